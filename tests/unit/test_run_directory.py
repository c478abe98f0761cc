"""The files of a run directory."""

import dataclasses
import json
import os

import pytest
import torch
import yaml
from torch import nn

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import write_json
from cifar_dist.config.recipe import EarlyStoppingConfig
from cifar_dist.run.checkpoint import load_checkpoint, save_checkpoint
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.results import Summary
from cifar_dist.training.evaluation import RunningSums
from cifar_dist.training.state import Best, EarlyStopping, TrainState
from tests.runs import make_metadata, make_recorder
from tests.unit.test_metrics import record


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / "x")
    assert not directory.holds_run
    directory.create()
    return directory


def state_at(epoch: int, best: int | None = None) -> TrainState:
    model = nn.Linear(2, 2)
    stopping = EarlyStoppingConfig(enabled=False, monitor="val_loss", patience=1, min_delta=0)
    kept = (
        None if best is None else Best(epoch=best, value=0.5, weights=dict(model.state_dict()), record={"epoch": best})
    )
    return TrainState(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        early_stopping=EarlyStopping(stopping),
        sums=RunningSums(torch.device("cpu")),
        epoch=epoch,
        step=10 * epoch,
        best=kept,
    )


def test_records_are_appended_read_and_cut_back(run):
    for epoch in (1, 2, 3):
        run.append_record(record(epoch))
    assert [each.epoch for each in run.read_records()] == [1, 2, 3]
    assert [each.epoch for each in run.truncate_records(epochs=2)] == [1, 2]
    run.append_record(record(3, train_loss=0.25))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["epoch"], line["train_loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 0.25)]


def test_fields_of_another_version_are_kept_and_only_a_damaged_line_is_lost(run):
    lines = [record(epoch).to_json() for epoch in (1, 2, 3, 4)]
    lines[0] = lines[0][:-1] + ', "grad_norm": 1.5}'
    lines[1] = lines[1][:30]
    run.metrics.write_text("\n".join(lines) + '\n{"epoch": 2, "st')  # the last one was cut off
    assert [each.epoch for each in run.read_records()] == [1, 3, 4]
    assert [each.epoch for each in run.truncate_records(epochs=3)] == [1, 3]
    assert run.metrics.read_text() == f"{lines[0]}\n{lines[2]}\n"


def test_a_summary_of_another_version_is_read_and_a_damaged_one_is_named(run):
    assert run.read_summary() is None
    summary = Summary(
        status="running", epochs=1, best_epoch=None, train_seconds=1.0, world_size=1, device="cpu", precision="no",
        num_threads=1, peak_memory_mib=7, test=None,
    )  # fmt: skip
    values = json.loads(summary.to_json()) | {"energy_joules": 3}
    del values["peak_memory_mib"]  # it may be None
    run.summary.write_text(json.dumps(values))
    assert run.read_summary() == dataclasses.replace(summary, peak_memory_mib=None)
    del values["epochs"]
    for damaged in (json.dumps(values), '{"status": "comp'):
        run.summary.write_text(damaged)
        with pytest.raises(UserError, match=r"summary\.json is damaged"):
            run.read_summary()


def test_only_what_a_killed_process_left_half_written_is_removed(run):
    halves = (run.path / ".metrics.jsonl.123.tmp", run.last.with_name(".last.pt.1.tmp"), run.figures / ".a.png.1.tmp")
    for path in (*halves, run.path / ".mine.tmp", run.path / ".my.notes.tmp"):
        path.touch()
    run.create()
    assert {path.name for path in run.path.rglob("*.tmp")} == {".mine.tmp", ".my.notes.tmp"}


def test_the_metadata_comes_back(run):
    metadata = make_metadata(checkpoint_every_minutes=0.5, trackers=("wandb",), slurm_job="7.0", git_commit="abc")
    run.write_metadata(metadata)
    assert run.read_metadata() == metadata
    assert run.holds_run
    run.config.write_text("recipe: 3")
    with pytest.raises(UserError, match="lacks its recipe or dataset"):
        run.read_metadata()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": {}}, "recipe field 'dataset.name' is missing"),
        ({"class_names": [1]}, r"class_names\[0\] must be text, not 1"),
        ({"world_size": True}, "world_size must be a whole number, not True"),
        ({"num_threads": -1}, "num_threads must be 1 or more, not -1"),
        ({"checkpoint_every_minutes": float("inf")}, "checkpoint_every_minutes must be a finite number"),
    ],
)
def test_edited_metadata_is_refused(run, change, message):
    content = {"format_version": 3, **make_metadata().to_mapping(), **change}
    run.config.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=rf"^run configuration .*config\.yaml is damaged: {message}"):
        run.read_metadata()


def test_a_run_of_another_format_is_refused(run):
    run.config.write_text(yaml.safe_dump({"format_version": 2, **make_metadata().to_mapping()}))
    with pytest.raises(UserError, match=r"config\.yaml has format 2, and this version reads 3: use the version of"):
        run.read_metadata()


def test_checkpoints_keep_to_their_rhythm(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cifar_dist.run.prepare.time.monotonic", lambda: now[0])
    recorder = make_recorder(run, make_metadata())
    recorder.on_epoch_end(record(1), state_at(1))
    assert not run.last.exists()
    now[0] = 60.0
    recorder.on_epoch_end(record(2), state_at(2))
    assert load_checkpoint(run.last)["epoch"] == 2
    now[0] = 100.0
    recorder.on_epoch_end(record(3), state_at(3))
    assert load_checkpoint(run.last)["epoch"] == 2
    recorder.save(state_at(3))
    assert (load_checkpoint(run.last)["epoch"], load_checkpoint(run.previous)["epoch"]) == (3, 2)
    recorder.save(state_at(3))
    assert load_checkpoint(run.previous)["epoch"] == 2, "an epoch was saved twice"


def test_on_a_slow_disk_checkpoints_are_rarer(run, monkeypatch):
    """Each takes two seconds here, and a hundredth of the time is theirs."""
    now = [0.0]
    monkeypatch.setattr("cifar_dist.run.prepare.time.monotonic", lambda: now[0])
    recorder = make_recorder(run, make_metadata())

    def save_slowly(*arguments, **named):
        save_checkpoint(*arguments, **named)
        now[0] += 2

    monkeypatch.setattr("cifar_dist.run.prepare.save_checkpoint", save_slowly)
    written = []
    for epoch in range(1, 11):
        now[0] += 60
        recorder.on_epoch_end(record(epoch), state_at(epoch))
        if not written or load_checkpoint(run.last)["epoch"] != written[-1]:
            written.append(load_checkpoint(run.last)["epoch"])
    assert written == [1, 5, 9]


def test_the_best_weights_have_a_file_of_their_own(run):
    recorder = make_recorder(run, make_metadata(checkpoint_every_minutes=1e-9))
    recorder.on_epoch_end(record(1), state_at(1))
    assert not run.best.exists()
    recorder.on_epoch_end(record(2), state_at(2, best=1))
    best = load_checkpoint(run.best)
    assert (best["epoch"], best["record"]["epoch"], best["recipe_name"]) == (1, 1, "plain")
    assert "optimizer" not in best
    assert torch.equal(best["model"]["bias"], load_checkpoint(run.last)["best"]["weights"]["bias"])
    stamp = run.best.stat().st_mtime_ns
    recorder.on_epoch_end(record(3), state_at(3, best=1))
    assert run.best.stat().st_mtime_ns == stamp, "the same best weights were written again"
    recorder.on_epoch_end(record(4), state_at(4, best=4))
    assert load_checkpoint(run.best)["epoch"] == 4


def test_json_in_a_file_can_be_read_by_people_and_holds_any_path(tmp_path):
    content = {"checkpoint": os.fsdecode(b"caf\xe9"), "per_class_accuracy": {"猫": 0.5}}
    write_json(tmp_path / "a.json", content)
    assert "猫" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_bytes()) == content
