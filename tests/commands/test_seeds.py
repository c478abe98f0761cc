"""`train --seeds`: several runs as one command that can be interrupted and repeated."""

import shlex
from pathlib import Path

import pytest

from cifar_dist.cli import main
from cifar_dist.commands import seeds
from cifar_dist.config.command_line import parse_arguments
from cifar_dist.config.world import World
from cifar_dist.run.directory import RunDirectory
from cifar_dist.training.trainer import Trainer
from tests.commands.test_train import SMALL, VALIDATION, assert_same_run, error_of, files_of, small_world, train
from tests.worlds.harness import run_ranks

__all__ = ["small_world"]  # a fixture
ARGV = ["train", "--seeds", "0-2", "--epochs", "2", "--run-dir", "study", *SMALL, *VALIDATION]
RUNS = [f"study/seed{seed}" for seed in range(3)]


def test_an_interrupted_command_goes_on_and_ends_with_the_table(capsys, monkeypatch):
    original = Trainer._end_step

    def stop_in_seed_1(trainer, epoch):
        if trainer.recipe.seed == 1 and trainer.state.step == 3:
            trainer.interrupt.requested = "SIGINT"
        original(trainer, epoch)

    monkeypatch.setattr(Trainer, "_end_step", stop_in_seed_1)
    assert main(ARGV) == 75
    *_, last = capsys.readouterr().err.splitlines()
    message, _, command = last.partition("resume all with: python launch.py ")
    assert (message, shlex.split(command)) == ("seed 1 has not ended; ", ARGV)
    assert [RunDirectory(Path(run)).holds_run for run in RUNS] == [True, True, False]
    before = files_of(RUNS[0])
    monkeypatch.setattr(Trainer, "_end_step", original)
    assert main(shlex.split(command)) == 0
    assert "mean ± sd of 3 runs" in capsys.readouterr().out
    assert files_of(RUNS[0]) == before
    train("--epochs", "2", "--seed", "1", "--run-dir", "alone", *VALIDATION)
    assert_same_run("alone", RUNS[1], epochs=2)
    assert main([*ARGV, "--set", "optimizer.learning_rate=0.02"]) == 2
    assert "this differs: optimizer.learning_rate 0.01 -> 0.02" in error_of(capsys)
    assert main([*ARGV, "--epochs", "3"]) == 2
    assert error_of(capsys) == "study/seed0 holds a run of 2 epochs, and not of 3: name another --run-dir"
    assert sorted(Path("study").iterdir()) == [Path(run) for run in RUNS]


def run_with_codes(codes: dict[int, int], argv: list[str], world: World = World()) -> tuple[int, list]:  # noqa: B008
    """Run the command with a training that only ends with a code. Return the code, and the options of each run."""
    begun = []

    def end_at_once(words, world):
        begun.append(parse_arguments(words)[1])
        return codes.get(begun[-1].seed, 0)

    return seeds.run(parse_arguments(argv)[1], argv, world, end_at_once), begun


@pytest.mark.parametrize("place", [[], ["--run-dir", "runs"]])
def test_the_dataset_is_that_of_the_recipe_unless_typed(place):
    for typed, dataset in (([], "shapes"), (["--dataset", "cifar100"], "cifar100")):
        code, begun = run_with_codes({}, ["--recipe", "first", "--seeds", "2", *typed, *place])
        assert (code, [options.dataset for options in begun]) == (0, [dataset, dataset])
        expected = "runs/seed1" if place else f"runs/first-{dataset}-seed1"
        assert begun[1].run_dir == Path(expected)


def test_a_run_is_a_command_of_its_own_and_a_failed_one_does_not_stop_the_others():
    argv = ["--max-minutes", "5", "--set", "stem=small", "--seeds=3,0-1", "--dataset", "shapes"]
    code, begun = run_with_codes({3: 1}, argv)
    assert (code, [options.seed for options in begun]) == (1, [3, 0, 1])
    for options in begun:
        assert options.run_dir == Path(f"runs/standard-shapes-seed{options.seed}")
        assert (options.resume, options.seeds, options.recipe, options.dataset) == (True, None, "standard", "shapes")
        assert options.assignments == {"stem": "small"}
        assert 4.9 < options.max_minutes <= 5, "of all runs together"
    assert [run_with_codes({3: code}, argv)[0] for code in (2, 75, 130)] == [2, 75, 130]
    assert len(run_with_codes({3: 75}, argv)[1]) == 1
    assert len(run_with_codes({3: 1}, argv, World(size=2, local_size=2))[1]) == 1, "ranks of a world are gone"
    assert [options.seed for options in run_with_codes({}, [*argv, "--dry-run"])[1]] == [3]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--seeds 3 --resume x", "--seeds resumes by itself"),
        ("--seeds 3 --seed 1", "--seeds and a seed contradict"),
        ("--seeds 3 --set seed=1", "--seeds and a seed contradict"),
        *((f"--seeds {text}", f"--seeds must be a number up to 1,000, a range 0-4, or a list 3,7, not '{text}'")
          for text in ("0", "4-2", "a", "1,", "0-1000", "3--5", "1.5")),
        ("--seeds 4294967295,4294967296", "seed must be in [0, 2^32)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(capsys, argv, message):
    assert main(argv.split()) == 2
    assert message in error_of(capsys)
    assert not Path("runs").exists()


@pytest.mark.full
def test_ranks_of_a_world_train_each_seed_together():
    argv = ["--seeds", "2", "--epochs", "1", *SMALL, "--set", "stem=small", "image_size=16", "global_batch_size=512"]
    (code, out, _), other = run_ranks(2, argv, Path())
    assert (code, other[:2]) == (0, (0, ""))
    assert "mean ± sd of 2 runs" in out
    runs = [RunDirectory(Path(f"runs/original-shapes-seed{seed}")).read_summary() for seed in range(2)]
    assert [(run.status, run.world_size) for run in runs] == [("completed", 2)] * 2
