"""A run that goes on ends as one that never stopped, and does not become another run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from cifar_dist.cli import main
from cifar_dist.commands import train as train_command
from cifar_dist.training.checkpoint import load_checkpoint
from cifar_dist.training.engine import Trainer
from cifar_dist.training.lock import RunLock
from cifar_dist.training.run_directory import RunDirectory
from tests.commands.test_train import SMALL, VALIDATION, assert_same_run, error_of, small_world, train
from tests.conftest import make_dataset

__all__ = ["small_world"]  # a fixture that every test here uses


def test_resuming_gives_the_same_bits_as_never_stopping():
    train("--epochs", "3", "--run-dir", "whole", *VALIDATION)
    train("--epochs", "1", "--run-dir", "parts", *VALIDATION)
    assert main(["--resume", "parts", "--epochs", "3"]) == 0
    assert_same_run("whole", "parts")
    assert RunDirectory(Path("parts")).previous.exists()


def test_a_compiled_run_resumes_and_ends_with_the_bits_of_its_compiler(capsys, monkeypatch):
    """The one that only traces: what it runs are the operations that are run without it."""
    compiled, compile_model = [], torch.compile

    def noted(model, **how):
        compiled.append((how["backend"], how["dynamic"]))
        return compile_model(model, **how)

    monkeypatch.setattr(torch, "compile", noted)
    Path("compiled.yaml").write_text("use_cpu: true\ndynamo_config: {dynamo_backend: EAGER}\n")
    train("--epochs", "2", "--run-dir", "whole", *VALIDATION)
    train("--epochs", "1", "--run-dir", "parts", "--config", "compiled.yaml", *VALIDATION)
    assert "compiled by eager" in capsys.readouterr().out
    assert main(["--config", "compiled.yaml", "--resume", "parts", "--epochs", "2"]) == 0
    assert_same_run("whole", "parts", epochs=2)
    assert compiled == [("eager", False)] * 2
    assert main(["eval", "--ckpt", "parts"]) == 0


@pytest.mark.parametrize("steps", [(1,), (3, 5), (2, 6, 7)])
def test_an_interrupted_run_ends_with_the_same_bits(capsys, monkeypatch, steps):
    """Interrupted in the first step, at the end of an epoch, after the last step, and several times."""
    everything = (*VALIDATION, "ema_decay=0.9", "dropout=0.2", "optimizer.nesterov=true", "augmentation.mixup=0.5")
    train("--epochs", "3", "--run-dir", "whole", *everything)
    original = Trainer._end_step
    for number, step in enumerate(steps):

        def signalled(trainer, *, stop=step):
            original(trainer)
            if trainer.state.step == stop:
                trainer.interrupt.requested = "SIGTERM"

        monkeypatch.setattr(Trainer, "_end_step", signalled)
        argv = (
            ["--resume", "parts"] if number else ["train", *SMALL, *everything, "--epochs", "3", "--run-dir", "parts"]
        )
        capsys.readouterr()
        assert main(argv) == 75
        assert capsys.readouterr().err.endswith("and saved; go on with: python launch.py --resume parts\n")
        summary = RunDirectory(Path("parts")).read_summary()
        assert (summary.status, summary.test) == ("interrupted", None)
    monkeypatch.setattr(Trainer, "_end_step", original)
    assert main(["--resume", "parts"]) == 0
    assert_same_run("whole", "parts")


def test_the_gradient_scalers_state_is_saved_and_restored(monkeypatch):
    """There is none on a CPU, so the runtime is made to have one, as it has with fp16."""
    scalers = []

    def with_scaler(*arguments, **named):
        runtime = original(*arguments, **named)
        runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
        scalers.append(runtime.accelerator.scaler)
        return runtime

    original = train_command.start
    monkeypatch.setattr(train_command, "start", with_scaler)
    train("--epochs", "1", "--run-dir", "x")
    saved = load_checkpoint(Path("x/checkpoints/last.pt"))["scaler"]
    assert saved == scalers[0].state_dict()
    assert saved["scale"] == 2.0
    saved["scale"] = 512.0
    content = load_checkpoint(Path("x/checkpoints/last.pt")) | {"scaler": saved}
    torch.save(content, "x/checkpoints/last.pt")
    assert main(["--resume", "x", "--epochs", "2"]) == 0
    assert scalers[1].state_dict()["scale"] == 512.0
    assert load_checkpoint(Path("x/checkpoints/last.pt"))["scaler"]["scale"] == 512.0


def test_an_untyped_validation_size_is_cut_to_the_dataset_and_stays():
    argv = ["--recipe", "standard", "--set", "stem=imagenet", "global_batch_size=32"]
    assert main(["train", *SMALL[2:6], *argv, "--epochs", "1", "--run-dir", "x"]) == 0
    assert yaml.safe_load(Path("x/config.yaml").read_text())["recipe"]["validation_size"] == 9
    assert main(["--resume", "x", "--epochs", "2"]) == 0
    assert load_checkpoint(Path("x/checkpoints/last.pt"))["epoch"] == 2
    again = ["train", *SMALL[2:6], *argv, "--run-dir", "x", "--resume"]  # as a requeued job types it
    assert main([*again, "--epochs", "3"]) == 0
    assert load_checkpoint(Path("x/checkpoints/last.pt"))["epoch"] == 3


def test_a_config_of_a_run_runs_it_again():
    """With the size of its validation split, which stands in it and need not be a tenth."""
    train("--epochs", "1", "--run-dir", "x", "--set", "validation_size=24", "early_stopping.monitor=val_loss")
    assert main(["--recipe", "x/config.yaml", *SMALL[2:6], "--run-dir", "y"]) == 0
    assert yaml.safe_load(Path("y/config.yaml").read_text())["recipe"]["validation_size"] == 24
    ours, theirs = (load_checkpoint(Path(f"{run}/checkpoints/last.pt"))["model"] for run in ("x", "y"))
    assert all(torch.equal(*pair) for pair in zip(ours.values(), theirs.values(), strict=True))


def test_how_often_a_run_is_saved_is_its_own(monkeypatch):
    rhythms, writer = [], train_command.CheckpointWriter

    def noted(*of, **rhythm):
        rhythms.append((rhythm["checkpoint_every_minutes"], rhythm["checkpoint_every_steps"]))
        return writer(*of, **rhythm)

    monkeypatch.setattr(train_command, "CheckpointWriter", noted)
    train("--epochs", "1", "--run-dir", "x", "--checkpoint-every-steps", "2")
    assert main(["--resume", "x", "--epochs", "2"]) == 0
    assert main(["--resume", "x", "--epochs", "3", "--checkpoint-every-steps", "5"]) == 0
    assert main(["--resume", "x", "--epochs", "4"]) == 0
    assert rhythms == [(None, 2), (None, 2), (None, 5), (None, 5)]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again():
    train("--epochs", "1", "--run-dir", "x")
    expected = load_checkpoint(Path("x/checkpoints/last.pt"))["model"]
    Path("x/checkpoints/last.pt").unlink()
    Path("x/summary.json").unlink()
    assert main(["--run-dir", "x", "--resume"]) == 0
    again = load_checkpoint(Path("x/checkpoints/last.pt"))["model"]
    assert all(torch.equal(*pair) for pair in zip(expected.values(), again.values(), strict=True))
    assert len(RunDirectory(Path("x")).read_records()) == 1


def test_a_requeued_slurm_job_goes_on_with_its_own_run(monkeypatch, capsys):
    """And not with another's of the same name, nor does a job that starts for the first time."""
    for job in ("7", "8", "8"):  # the last as from a shell in an allocation, where a command is typed twice
        monkeypatch.setenv("SLURM_JOB_ID", job)
        train("--epochs", "2", "--max-minutes", "0.0001", code=75)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    capsys.readouterr()
    train("--epochs", "2")
    assert "run            runs/original-shapes-seed0-2, going on after step" in capsys.readouterr().out
    assert RunDirectory(Path("runs/original-shapes-seed0")).read_summary().status == "interrupted"
    monkeypatch.setenv("SLURM_JOB_ID", "9")  # was requeued before it made a run
    train("--epochs", "1")
    assert RunDirectory(Path("runs/original-shapes-seed0-4")).read_summary().status == "completed"


@pytest.mark.parametrize("name", ["checkpoints/best.pt", "test_predictions.npz", "report.html", "figures/curves.png"])
def test_somebodys_own_files_are_in_the_way(capsys, name):
    file = Path("own") / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    train("--epochs", "1", "--run-dir", "own", code=2)
    assert error_of(capsys) == f"own is no run, and a run would overwrite {file}: name another --run-dir"
    assert files_of("own") == {file: b"precious"}


def test_an_epoch_that_has_begun_is_ended_or_not_resumed(capsys, monkeypatch):
    train("--epochs", "1", "--run-dir", "x")
    end_step = Trainer._end_step

    def signalled(trainer):
        end_step(trainer)
        object.__setattr__(trainer.plan, "report_every_steps", 1)
        trainer.interrupt.requested = "SIGTERM" if trainer.state.step == 4 else None

    monkeypatch.setattr(Trainer, "_end_step", signalled)
    assert main(["--resume", "x", "--epochs", "3"]) == 75
    capsys.readouterr()
    assert main(["--resume", "x", "--epochs", "1"]) == 2
    assert error_of(capsys) == "epochs=1 is below the 2 that have begun: set it to 2 or more"
    assert main(["--resume", "x", "--epochs", "2"]) == 0


def test_run_dir_with_resume_starts_when_there_is_nothing_yet():
    train("--epochs", "1", "--run-dir", "new", "--resume")
    assert RunDirectory(Path("new")).read_summary().status == "completed"


def test_a_completed_run_has_nothing_left_to_do(capsys):
    train("--epochs", "1", "--run-dir", "x")
    before = Path("x/summary.json").read_text()
    capsys.readouterr()
    assert main(["--resume", "x"]) == 0
    assert "x is completed (1 epochs, accuracy " in capsys.readouterr().out
    assert Path("x/summary.json").read_text() == before


def test_a_completed_run_does_not_need_its_checkpoints():
    train("--epochs", "1", "--run-dir", "x", *VALIDATION)
    for file in Path("x/checkpoints").iterdir():
        file.write_bytes(b"no checkpoint")
    files = files_of("x")
    assert main(["--resume", "x"]) == 0
    assert files_of("x") == files


def test_a_tested_run_without_its_checkpoints_is_not_begun_again(capsys):
    train("--epochs", "1", "--run-dir", "x")
    for file in Path("x/checkpoints").iterdir():
        file.unlink()
    files = files_of("x")
    capsys.readouterr()
    assert main(["--resume", "x", "--epochs", "2"]) == 2
    assert error_of(capsys) == "the checkpoints of x are gone, and it cannot go on: type a new --run-dir"
    assert files_of("x") == files


def test_an_early_stopped_run_has_nothing_left_to_do(capsys):
    train("--epochs", "9", "--run-dir", "x", "--set", "early_stopping.patience=1", "early_stopping.min_delta=100")
    assert "Early stopping triggered: training ended after 2 of 9 epochs" in capsys.readouterr().out
    assert RunDirectory(Path("x")).read_summary().status == "early_stopped"
    assert main(["--resume", "x", "--epochs", "20"]) == 0
    assert "was stopped early after 2 epochs: nothing left to do" in capsys.readouterr().out


def files_of(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "4"], "this differs: seed 0 -> 4; type a new --run-dir"),
        (
            ["--set", "optimizer.momentum=0.5", "stem=small"],
            "differs: optimizer.momentum 0.9 -> 0.5, stem imagenet -> small;",
        ),
        (["--set", "gradient_accumulation_steps=2"], "this differs: gradient_accumulation_steps 1 -> 2;"),
        (["--recipe", "plain", "--dataset", "cifar10"], "dataset shapes -> cifar10"),
        (["--epochs", "1"], "epochs=1 is below the 2 that are done"),
    ],
)
def test_a_resumed_run_stays_what_it_was(capsys, argv, message):
    train("--epochs", "2", "--run-dir", "x")
    files = files_of("x")
    capsys.readouterr()
    assert main(["--resume", "x", *argv]) == 2
    assert message in error_of(capsys)
    assert files_of("x") == files


def test_a_run_in_progress_cannot_have_fewer_epochs_than_are_done(capsys):
    train("--epochs", "2", "--run-dir", "x")
    Path("x/summary.json").unlink()  # as if it had been killed
    capsys.readouterr()
    assert main(["--resume", "x", "--epochs", "1"]) == 2
    assert error_of(capsys) == "epochs=1 is below the 2 that have begun: set it to 2 or more"


@pytest.mark.parametrize("checkpoint", [True, False])
def test_other_data_is_refused_on_resume(capsys, monkeypatch, checkpoint):
    """Also where the run was killed before its first checkpoint: config.yaml says what it began with."""
    train("--epochs", "1", "--run-dir", "x")
    if not checkpoint:
        Path("x/checkpoints/last.pt").unlink()
        Path("x/summary.json").unlink()
    files = files_of("x")
    renamed = replace(make_dataset(), class_names=("cat", *make_dataset().class_names[1:]))
    for dataset, difference in (
        (make_dataset(num_test=50), "content of the dataset shapes"),
        (make_dataset(num_classes=5), "number of classes 10 -> 5"),
        (renamed, "names of classes class0 -> cat"),
    ):
        capsys.readouterr()
        monkeypatch.setattr("cifar_dist.commands.train.load_dataset", lambda *_, given=dataset, **__: given)
        assert main(["--resume", "x", "--epochs", "2"]) == 2
        assert f"this differs: {difference}; type a new --run-dir" in error_of(capsys)
        assert files_of("x") == files


def test_a_changed_config_file_is_compared_with_the_checkpoint(capsys):
    train("--epochs", "1", "--run-dir", "x")
    config = Path("x/config.yaml")
    config.write_text(config.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    capsys.readouterr()
    assert main(["--resume", "x", "--epochs", "2"]) == 2
    assert "this differs: optimizer.momentum 0.9 -> 0.8" in error_of(capsys)


def test_what_somebody_edited_is_named_with_its_file(capsys):
    """In config.yaml and in a checkpoint: a field of another version, and one that has become something else."""
    train("--epochs", "1", "--run-dir", "x")
    config, last = Path("x/config.yaml"), Path("x/checkpoints/last.pt")
    good, content = config.read_text(), load_checkpoint(last)
    capsys.readouterr()
    values = yaml.safe_load(good)
    for changed, message in (
        ({"recipe": {**values["recipe"], "stemm": 1}}, "stemm"),
        ({"num_threads": -1}, "is damaged: num_threads must be a number above 0, not -1"),
    ):
        config.write_text(yaml.safe_dump({**values, **changed}))
        assert main(["--resume", "x", "--epochs", "2"]) == 2
        line = error_of(capsys)
        assert f"run configuration {config}" in line
        assert message in line
    config.write_text(good)
    for changed, message in (
        ({"recipe": {**content["recipe"], "stemm": 1}}, "stemm"),
        ({"num_threads": -1}, "is damaged: num_threads must be a number above 0, not -1"),
        ({"dataset": None}, "is damaged: dataset must be a mapping, not None"),
        ({"epoch": None}, "is damaged: epoch must be a whole number, not None"),
        ({"step": -1}, "is damaged: step must be a number, 0 or more, not -1"),
    ):
        torch.save({**content, **changed}, last)
        assert main(["eval", "--ckpt", str(last)]) == 2
        line = error_of(capsys)
        assert f"checkpoint {last}" in line
        assert message in line
        if "recipe" not in changed:  # there the two differ, and that is said
            assert main(["--resume", "x", "--epochs", "2"]) == 2
            assert message in error_of(capsys)
    torch.save({**content, "epoch": 99}, last)
    assert main(["--resume", "x", "--epochs", "2"]) == 2
    assert error_of(capsys) == "epochs=2 is below the 99 that have begun: set it to 99 or more"
    # The one before is gone on from, and it is the one that is named.
    for damaged, changed, message in (
        (b"", {"num_threads": -1}, " is damaged: num_threads"),
        (b"", {"statistics": None}, " does not hold what this program writes"),
        (None, {"num_threads": -1}, " is damaged: num_threads"),
    ):
        torch.save({**content, **changed}, last.with_name("previous.pt"))
        last.unlink() if damaged is None else last.write_bytes(damaged)
        assert main(["--resume", "x", "--epochs", "2"]) == 2
        assert error_of(capsys).startswith(f"checkpoint x/checkpoints/previous.pt{message}")


def test_what_may_change_may(capsys):
    """More epochs, another precision, another place of the run and of the data."""
    train("--epochs", "1", "--run-dir", "x")
    Path("x").rename("moved")
    assert main(["--resume", "moved", "--epochs", "2", "--precision", "bf16", "--data-dir", "elsewhere"]) == 0
    content = load_checkpoint(Path("moved/checkpoints/last.pt"))
    assert (content["epoch"], content["precision"]) == (2, "bf16")
    assert content["dataset"]["data_dir"] == str(Path("elsewhere").absolute())
    assert not Path("x").exists()


def test_two_live_runs_do_not_share_a_folder(capsys):
    train("--epochs", "1", "--run-dir", "x")
    files = files_of("x")
    with RunLock() as other:
        other.take(Path("x"))
        capsys.readouterr()
        assert main(["--resume", "x", "--epochs", "2"]) == 2
        assert "x is in use by process" in error_of(capsys)
        Path("new").mkdir()
        with RunLock() as faster:
            faster.take(Path("new"))
            train("--epochs", "1", "--run-dir", "new", code=2)
        assert "new is in use by process" in error_of(capsys)
    assert files_of("x") == files
    assert files_of("new") == {}


def test_a_run_whose_folder_was_taken_over_stops(capsys, monkeypatch):
    append = RunDirectory.append_record

    def append_and_lose(self, record):
        append(self, record)
        Path("x/.lock").write_text(Path("x/.lock").read_text().replace('"token": "', '"token": "not-'))

    monkeypatch.setattr(RunDirectory, "append_record", append_and_lose)
    train("--epochs", "3", "--run-dir", "x", "--checkpoint-every-steps", "1", code=1)
    line = capsys.readouterr().err
    assert "has taken this run over: x is left to it\n" in line
    assert line.count("\n") == 1
    assert load_checkpoint(Path("x/checkpoints/last.pt"))["step"] == 2


def test_random_states_are_saved_and_restored(monkeypatch):
    """Nothing of ours draws from torch's global generator; what somebody adds may, here in each step."""
    original = Trainer._end_step

    def drawing(trainer):
        trainer.state.model.fc.bias.data.add_(torch.rand(10) / 10)
        original(trainer)

    monkeypatch.setattr(Trainer, "_end_step", drawing)
    train("--epochs", "3", "--run-dir", "whole")
    train("--epochs", "2", "--run-dir", "parts")
    torch.rand(5)
    assert main(["--resume", "parts", "--epochs", "3"]) == 0
    assert_same_run("whole", "parts")


def test_a_step_that_the_scaler_skips_is_not_divergence(monkeypatch):
    """The first gradients overflow, as with fp16, and are not used; the run goes on, also when resumed."""
    original, scales = train_command.start, []

    def with_scaler(*arguments, **named):
        runtime = original(*arguments, **named)
        runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=3)
        return runtime

    def noted(trainer):
        end(trainer)
        scales.append(trainer.runtime.accelerator.scaler.get_scale())

    end = Trainer._end_step
    monkeypatch.setattr(train_command, "start", with_scaler)
    monkeypatch.setattr(Trainer, "_end_step", noted)
    train("--epochs", "3", "--run-dir", "whole")
    assert scales[0] < 1e38, "no step was skipped"
    assert len(scales) == 9
    train("--epochs", "1", "--run-dir", "parts")
    assert main(["--resume", "parts", "--epochs", "3"]) == 0
    assert_same_run("whole", "parts")
    first = load_checkpoint(Path("whole/checkpoints/last.pt"))
    assert all(value.isfinite().all() for value in first["model"].values())


def test_resuming_the_whole_recipe_gives_the_same_bits(monkeypatch):
    """Interrupted when the second epoch was done but not saved: it is done again from the checkpoint of the first."""
    fields = [
        "optimizer.nesterov=true", "schedule={name: triangular, warmup_fraction: 0.2}", "label_smoothing=0.1",
        "ema_decay=0.9", "gradient_clipping=5", "gradient_accumulation_steps=2", "dropout=0.2",
        "image_size_schedule=[[16, 0.5], [32, 1.0]]", "early_stopping.enabled=false",
        "augmentation={flip: alternating, crop_mode: reflect, cutout: 8, mixup: 0.2, cutmix: 1, affine_degrees: 5}",
    ]  # fmt: skip
    train("--run-dir", "whole", "--epochs", "2", "--set", *fields)
    append = RunDirectory.append_record

    def interrupted(self, record):
        if record.epoch == 2:
            raise KeyboardInterrupt
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_record", interrupted)
        train("--run-dir", "parts", "--epochs", "2", "--checkpoint-every-steps", "3", "--set", *fields, code=130)
    assert load_checkpoint(Path("parts/checkpoints/last.pt"))["epoch"] == 1
    assert main(["--resume", "parts"]) == 0
    assert_same_run("whole", "parts", epochs=2)
