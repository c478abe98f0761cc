"""A resumed run ends as one that was never stopped, and does not become another run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from cifar_dist.cli import main
from cifar_dist.commands import train as train_command
from cifar_dist.run.checkpoint import load_checkpoint
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.lock import RunLock
from cifar_dist.training.trainer import Trainer
from tests.commands.test_train import (
    DATA,
    EVERYTHING,
    SMALL,
    VALIDATION,
    assert_same_run,
    error_of,
    files_of,
    small_world,
    train,
    whole,
)
from tests.conftest import make_dataset

__all__ = ["small_world", "whole"]  # fixtures


def saved(run: str = "x", name: str = "last") -> dict:
    return load_checkpoint(Path(run) / "checkpoints" / f"{name}.pt")


def status(run: str) -> str:
    return RunDirectory(Path(run)).read_summary().status


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    return error_of(capsys)


def test_a_compiled_run_resumes_with_the_bits_of_its_compiler(capsys, monkeypatch):
    """With `eager`, which only traces: it runs the same operations as without a compiler."""
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
def test_an_interrupted_run_ends_with_the_same_bits(capsys, monkeypatch, whole, steps):
    """Interrupted in the first step, at the end of an epoch, after the last step, and several times."""
    original = Trainer._end_step
    argv = ["train", *SMALL, *EVERYTHING, "--epochs", "3", "--run-dir", "parts"]
    for step in steps:

        def signalled(trainer, epoch, *, stop=step):
            if trainer.state.step + 1 == stop:
                trainer.interrupt.requested = "SIGTERM"
            original(trainer, epoch)

        monkeypatch.setattr(Trainer, "_end_step", signalled)
        capsys.readouterr()
        assert main(argv) == 75
        argv = ["--resume", "parts"]
        assert capsys.readouterr().err.endswith("and saved; resume with: python launch.py --resume parts\n")
        summary = RunDirectory(Path("parts")).read_summary()
        assert (summary.status, summary.test) == ("interrupted", None)
        assert saved("parts")["step"] >= step
    monkeypatch.setattr(Trainer, "_end_step", original)
    assert main(argv) == 0
    assert_same_run(whole, "parts")


def test_more_epochs_and_random_states_give_the_same_bits(monkeypatch):
    """The package does not draw from torch's global generator; a user's code may, here in each step."""
    original = Trainer._end_step

    def drawing(trainer, epoch):
        trainer.state.model.fc.bias.data.add_(torch.rand(10) / 10)
        original(trainer, epoch)

    monkeypatch.setattr(Trainer, "_end_step", drawing)
    train("--epochs", "3", "--run-dir", "whole", *VALIDATION)
    train("--epochs", "2", "--run-dir", "parts", *VALIDATION)
    torch.rand(5)
    assert main(["--resume", "parts", "--epochs", "3"]) == 0
    assert_same_run("whole", "parts")
    assert saved("parts", "previous")["epoch"] == 2


def test_a_step_that_the_scaler_skips_is_not_divergence(monkeypatch):
    """The first gradients overflow, as with fp16, and are not used. The scaler's state is resumed."""
    original, scales = train_command.start, []

    def with_scaler(*arguments, **named):
        runtime = original(*arguments, **named)
        runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=3)
        return runtime

    def noted(trainer, epoch):
        end(trainer, epoch)
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
    assert saved("whole")["scaler"]["scale"] == scales[-1]
    assert all(value.isfinite().all() for value in saved("whole")["model"].values())


def test_resuming_the_whole_recipe_gives_the_same_bits(monkeypatch):
    """Interrupted when the second epoch was done but not saved: it is repeated from the checkpoint of the first."""
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
    assert saved("parts")["epoch"] == 1
    assert main(["--resume", "parts"]) == 0
    assert_same_run("whole", "parts", epochs=2)


def test_a_default_validation_size_is_cut_to_the_dataset_and_stays():
    argv = ["--recipe", "standard", *DATA, "--run-dir", "x", "--set", "stem=imagenet", "global_batch_size=32"]
    assert main([*argv, "--epochs", "1"]) == 0
    assert yaml.safe_load(Path("x/config.yaml").read_text())["recipe"]["validation_size"] == 0
    assert main(["--resume", "x", "--epochs", "2"]) == 0
    assert main([*argv, "--resume", "--epochs", "3"]) == 0, "the words of a requeued job"
    assert saved()["epoch"] == 3


def test_a_config_of_a_run_runs_it_again():
    """With the size of its validation split, which need not be a tenth."""
    train("--epochs", "1", "--run-dir", "x", "--set", "validation_size=24", "early_stopping.monitor=val_loss")
    assert main(["--recipe", "x/config.yaml", *DATA, "--run-dir", "y"]) == 0
    assert saved("y")["recipe"] == saved()["recipe"]
    assert torch.equal(saved("y")["model"]["fc.weight"], saved()["model"]["fc.weight"])


def test_run_dir_with_resume_starts_where_there_is_no_checkpoint_yet():
    train("--epochs", "1", "--run-dir", "x", "--resume")
    expected = saved()["model"]
    for name in ("checkpoints/last.pt", "summary.json"):  # as after a kill before the first checkpoint
        Path("x", name).unlink()
    assert main(["--run-dir", "x", "--resume"]) == 0
    assert all(torch.equal(*pair) for pair in zip(expected.values(), saved()["model"].values(), strict=True))
    assert len(RunDirectory(Path("x")).read_records()) == 1


def test_what_a_resume_changes_is_noted(capsys):
    train("--epochs", "2", "--run-dir", "x", "--max-minutes", "0.0001", code=75)
    config = Path("x/config.yaml")
    config.write_text(config.read_text().replace("world_size: 1", "world_size: 2", 1))
    for file in Path("x/checkpoints").iterdir():
        file.unlink()
    capsys.readouterr()
    assert main(["--resume", "x"]) == 0
    out = capsys.readouterr().out
    assert "run            x, from its first step: there is no checkpoint yet\n" in out
    assert "2 processes before, 1 now: rounding differs" in out


def test_a_requeued_slurm_job_resumes_its_own_run(monkeypatch, capsys):
    """Not another job's of the same name, nor does a job resume that starts for the first time."""
    for job in ("7", "8", "8"):  # the last as from a shell in an allocation, where a command is typed twice
        monkeypatch.setenv("SLURM_JOB_ID", job)
        train("--epochs", "2", "--max-minutes", "0.0001", code=75)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    train("--epochs", "2")
    assert "run            runs/original-shapes-seed0-2, resumed in epoch" in capsys.readouterr().out
    assert status("runs/original-shapes-seed0") == "interrupted"
    train("--epochs", "2", "--set", "label_smoothing=0.1")  # the job's next command
    assert (
        status("runs/original-shapes-seed0-3") == "interrupted"
        and status("runs/original-shapes-seed0-4") == "completed"
    )
    monkeypatch.setenv("SLURM_JOB_ID", "9")  # was requeued before it made a run
    train("--epochs", "1")
    assert status("runs/original-shapes-seed0-5") == "completed"


@pytest.mark.parametrize("name", ["checkpoints/best.pt", "test_predictions.npz", "report.html", "figures/curves.png"])
def test_a_users_own_files_are_not_overwritten(capsys, name):
    file = Path("own") / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    train("--epochs", "1", "--run-dir", "own", code=2)
    assert error_of(capsys) == f"own is no run, and a run would overwrite {file}: name another --run-dir"
    assert files_of("own") == {file: b"precious"}


def test_an_epoch_that_has_begun_is_ended_or_not_resumed(capsys, monkeypatch):
    train("--epochs", "1", "--run-dir", "x")
    end_step = Trainer._end_step

    def signalled(trainer, epoch):
        object.__setattr__(trainer.plan, "agree_every_steps", 1)
        trainer.interrupt.requested = "SIGTERM" if trainer.state.step == 3 else None
        end_step(trainer, epoch)

    monkeypatch.setattr(Trainer, "_end_step", signalled)
    assert main(["--resume", "x", "--epochs", "3"]) == 75
    capsys.readouterr()
    assert main(["--resume", "x", "--epochs", "1"]) == 2
    out, line = capsys.readouterr()
    assert not out.strip(), "it is refused before the plan is printed"
    assert line == (
        "error: epochs=1 is below the 2 that have begun: set it to 2 or more, or type --resume x alone (epochs=3)\n"
    )
    assert main(["--resume", "x", "--epochs", "2"]) == 0


def test_a_completed_run_is_left_alone(capsys):
    """It does not need its checkpoints; without them it cannot be given more epochs."""
    train("--epochs", "1", "--run-dir", "x", *VALIDATION)
    for file in Path("x/checkpoints").iterdir():
        file.write_bytes(b"no checkpoint")
    files = files_of("x")
    capsys.readouterr()
    assert main(["--resume", "x"]) == 0
    assert "x is completed (1 epochs, accuracy " in capsys.readouterr().out
    assert files_of("x") == files
    for file in Path("x/checkpoints").iterdir():
        file.unlink()
    files = files_of("x")
    line = refused(capsys, "--resume", "x", "--epochs", "2")
    assert line == "the checkpoints of x are gone, and it cannot go on: type a new --run-dir"
    assert files_of("x") == files


def test_a_run_that_stopped_early_has_nothing_left_to_do(capsys):
    train("--epochs", "9", "--run-dir", "x", "--set", "early_stopping.patience=1", "early_stopping.min_delta=100")
    assert "Early stopping triggered: training ended after 2 of 9 epochs" in capsys.readouterr().out
    assert status("x") == "early_stopped"
    assert main(["--resume", "x", "--epochs", "20"]) == 0
    assert "was stopped early after 2 epochs: nothing left to do" in capsys.readouterr().out


def test_a_resumed_run_stays_what_it_was(capsys):
    train("--epochs", "2", "--run-dir", "x")
    files = files_of("x")
    for argv, message in (
        (["--seed", "4"], "this differs: seed 0 -> 4; undo that, or type a new --run-dir"),
        (["--set", "optimizer.momentum=0.5", "stem=small"], "optimizer.momentum 0.9 -> 0.5, stem imagenet -> small;"),
        (["--recipe", "plain", "--dataset", "cifar10"], "dataset shapes -> cifar10"),
    ):
        assert message in refused(capsys, "--resume", "x", *argv)
        assert files_of("x") == files


@pytest.mark.parametrize("checkpoint", [True, False])
def test_other_data_is_refused_on_resume(capsys, monkeypatch, checkpoint):
    """Also if the run was killed before its first checkpoint: config.yaml has what it began with."""
    train("--epochs", "1", "--run-dir", "x")
    if not checkpoint:
        Path("x/checkpoints/last.pt").unlink()
        Path("x/summary.json").unlink()
    files = files_of("x")
    renamed = replace(make_dataset(), class_names=("cat", *make_dataset().class_names[1:]))
    for dataset, difference in (
        (make_dataset(num_test=50), "content of the dataset shapes"),
        (make_dataset(num_classes=5), "number of classes 10 -> 5"),
        (renamed, "class name class0 -> cat"),
    ):
        monkeypatch.setattr("cifar_dist.commands.train.load_dataset", lambda *_, given=dataset, **__: given)
        line = refused(capsys, "--resume", "x", "--epochs", "2")
        assert f"this differs: {difference}; undo that, or type a new --run-dir" in line
        assert files_of("x") == files


def test_an_edited_config_or_checkpoint_is_refused(capsys):
    """tests/unit/test_run_directory.py has more edits. The error names the file that is used."""
    train("--epochs", "1", "--run-dir", "x")
    config, last, previous = Path("x/config.yaml"), Path("x/checkpoints/last.pt"), Path("x/checkpoints/previous.pt")
    values, content = yaml.safe_load(config.read_text()), saved()
    optimizer = {**values["recipe"]["optimizer"], "momentum": 0.8}
    for changed, message in (
        ({"num_threads": -1}, f"run configuration {config} is damaged: num_threads must be 1 or more, not -1"),
        ({"recipe": {**values["recipe"], "optimizer": optimizer}}, "this differs: optimizer.momentum 0.9 -> 0.8"),
    ):
        config.write_text(yaml.safe_dump({**values, **changed}))
        assert message in refused(capsys, "--resume", "x", "--epochs", "2")
    config.write_text(yaml.safe_dump(values))
    torch.save({**content, "recipe": {**content["recipe"], "stemm": 1}}, last)
    line = f"checkpoint {last} is damaged: unknown recipe field 'recipe.stemm'"
    assert refused(capsys, "eval", "--ckpt", str(last)).startswith(line)
    for file, changed, message in (
        (last, {"dataset": None}, "is damaged: dataset must be a mapping of its fields, not None"),
        (previous, {"num_threads": -1}, "is damaged: num_threads"),
        (previous, {"statistics": None}, "does not hold what this program writes"),
    ):
        torch.save({**content, **changed}, file)
        assert refused(capsys, "--resume", "x", "--epochs", "2").startswith(f"checkpoint {file} {message}")
        last.write_bytes(b"")


def test_epochs_precision_intervals_and_places_may_change():
    train("--epochs", "1", "--run-dir", "x", "--checkpoint-every-steps", "2")
    assert saved()["checkpoint_every_steps"] == 2
    Path("x").rename("moved")
    changes = ["--precision", "bf16", "--data-dir", "elsewhere", "--checkpoint-every-steps", "5"]
    assert main(["--resume", "moved", "--epochs", "2", *changes]) == 0
    assert main(["--resume", "moved", "--epochs", "3"]) == 0, "with the changes, which are stored"
    content = saved("moved")
    assert (content["epoch"], content["precision"], content["checkpoint_every_steps"]) == (3, "bf16", 5)
    assert content["dataset"]["data_dir"] == str(Path("elsewhere").absolute())
    assert not Path("x").exists()


def test_two_live_runs_do_not_share_a_directory(capsys):
    train("--epochs", "1", "--run-dir", "x")
    files = files_of("x")
    Path("new").mkdir()
    with RunLock() as other, RunLock() as faster:
        other.acquire(Path("x"))
        assert "x is in use by another process" in refused(capsys, "--resume", "x", "--epochs", "2")
        faster.acquire(Path("new"))
        assert "new is in use by another process" in refused(capsys, *SMALL, "--epochs", "1", "--run-dir", "new")
    assert files_of("x") == files
    assert files_of("new") == {}
