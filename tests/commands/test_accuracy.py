"""benchmarks/accuracy.py, the programmes of runs behind docs/accuracy.md."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.changes import CHANGES
from cifar_dist import Recipe, load_model, train
from tests.commands.test_train import small_world
from tests.conftest import ROOT

__all__ = ["small_world"]  # a fixture that every test here uses

PROGRAMME = """
- {name: tuned, recipe: original, test: false, set: {global_batch_size: 16, epochs: 1, validation_size: 16}}
- {name: shown, recipe: original, seeds: 2, set: {global_batch_size: 16, epochs: 1}, config: graphs.yaml}
"""


def accuracy(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "accuracy.py"), run_name="__main__")
    return ended.value.code


@pytest.mark.full
def test_a_programme_continues_and_does_no_run_twice(capsys, monkeypatch, tmp_path):
    graphs = tmp_path / "graphs.yaml"
    graphs.write_text("use_cpu: true\ndynamo_config: {dynamo_backend: CUDAGRAPHS}\n")
    Path("small.yaml").write_text(PROGRAMME.replace("graphs.yaml", str(graphs)))
    run = ("run", "small.yaml", "--results", "small.jsonl", "--work", "work", "--dataset", "shapes")

    assert accuracy(monkeypatch, *run, "--minutes", "0.1") == 75
    assert not Path("small.jsonl").exists()

    assert accuracy(monkeypatch, *run, "--seeds", "0") == 0
    tuned, shown = map(json.loads, Path("small.jsonl").read_text().splitlines())
    assert [(line["name"], line["seed"], line["test"]) for line in (tuned, shown)] == [
        ("tuned", 0, False), ("shown", 0, True)
    ]  # fmt: skip
    assert "plain" not in tuned and tuned["val_acc"] is not None, "while tuning, the validation images alone decide"
    assert shown["val_acc"] is None and 0 <= shown["plain"] <= 1 and 0 <= shown["mirror"] <= 1
    assert (shown["epochs"], shown["at_once"], shown["torch"]) == (1, 1, torch.__version__.split("+")[0])
    said = capsys.readouterr()
    assert said.out.count("CUDAGRAPHS needs CUDA, one process") == 1, "the row's own config, and no other's"

    for _ in range(2):  # the second time nothing is left
        assert accuracy(monkeypatch, *run) == 0
        lines = [json.loads(line) for line in Path("small.jsonl").read_text().splitlines()]
        assert [(line["name"], line["seed"]) for line in lines] == [("tuned", 0), ("shown", 0), ("shown", 1)]
    capsys.readouterr()

    assert accuracy(monkeypatch, "table", "small.yaml", "--results", "small.jsonl") == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [("| tuned", "1"), ("| shown", "2")]
    assert rows[0][2:5] == ["", "", f"{tuned['val_acc']:.2%}"]
    mean = sum(line["plain"] for line in lines[1:]) / 2
    assert rows[1][2].startswith(f"{mean:.2%} ± ")


@pytest.mark.full
@pytest.mark.parametrize("change", [each for each in CHANGES if each is not None])
def test_a_change_of_the_training_changes_its_weights_and_nothing_after_it(change, tmp_path):
    how = {"epochs": 3, "global_batch_size": 8, "image_size": 12, "image_size_schedule": None, "validation_size": 0}
    recipe = Recipe.load("fast", **how)

    def weights(name: str) -> dict[str, torch.Tensor]:
        train(recipe, dataset="shapes", run_dir=tmp_path / name, quiet=True)
        return load_model(tmp_path / name).state_dict()

    before = weights("before")
    with CHANGES[change]():
        changed = weights("changed")
    after = weights("after")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.isfinite().all() and changed[name].isfinite().all()
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("programme", "row"), [("cpu", "quick"), ("cpu", "fast"), ("cpu", "standard"), ("gpu", "strong")]
)
def test_the_readme_shows_committed_results_of_the_recipes_as_they_are(capsys, monkeypatch, programme, row):
    """A changed recipe has another digest, and no results until it is measured again."""
    assert accuracy(monkeypatch, "table", str(ROOT / "benchmarks" / "programmes" / f"{programme}.yaml")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {row} |")]
    shown = line.split(" | ")[2].replace("%", "").strip()
    assert shown and f"{shown} % (n = {line.split(' | ')[1]})" in (ROOT / "README.md").read_text()
