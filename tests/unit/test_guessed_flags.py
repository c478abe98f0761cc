"""Names that people know from other programs are answered with the right flag or field."""

import pytest

from cifar_dist import cli
from cifar_dist.config import options, recipe

FIELDS = {
    "optimizer.learning_rate": "lr learning-rate learning_rate LR",
    "optimizer.weight_decay": "weight-decay wd",
    "optimizer.name": "optimizer optim",
    "optimizer.momentum": "momentum",
    "schedule.name": "scheduler",
    "global_batch_size": "batch-size batch_size",
    "augmentation.mixup": "mixup",
    "label_smoothing": "label-smoothing",
    "model": "model arch",
}
FLAGS = {
    "--config": "device",
    "--max-minutes": "time",
    "--precision": "amp fp16",
    "--num-processes": "gpus num_processes",
    "--run-dir": "output-dir",
    "--resume": "checkpoint",
    "--dataset": "data",
    "--tracker wandb": "wandb",
    "--epochs": "epoch Epochs",
}


def answer(capsys, *argv: str) -> str:
    assert cli.main(list(argv)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("meant", "guesses"), [*FIELDS.items(), *FLAGS.items()])
def test_a_flag_of_another_program_is_answered_with_ours(capsys, meant, guesses):
    expected = f"--set {meant}=VALUE" if meant in FIELDS else meant
    for guess in guesses.split():
        said = answer(capsys, f"--{guess}", "1")
        assert said.startswith(f"error: unknown argument '--{guess}', did you mean '{expected}'?"), said
        assert answer(capsys, f"--{guess}=1") == said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--workers 4", "unknown argument '--workers': images are in memory"),
        ("eval --model a.pt", "did you mean '--ckpt'?"),
        ("eval --lr 1", "unknown argument '--lr' (see launch.py eval --help)"),
        ("eval --output a", "did you mean '--json'?"),
        ("bench --batch-size 8", "did you mean '--set global_batch_size=VALUE'?"),
        ("--set lr=0.1", "unknown recipe field 'lr', did you mean 'optimizer.learning_rate'?"),
        ("--set optimizer.lr=0.1", "unknown recipe field 'optimizer.lr', did you mean 'optimizer.learning_rate'?"),
        ("--set optimizer.momentun=0", "did you mean 'momentum'?"),
        ("--set optimizer=sgd", "unknown recipe field 'optimizer', did you mean 'optimizer.name'?"),
        ("--zzz", "unknown argument '--zzz' (see launch.py train --help)"),
    ],
)
def test_so_are_other_commands_and_fields(capsys, argv, said):
    assert said in answer(capsys, *argv.split())


def test_every_answer_is_a_field_or_a_flag():
    assert set(recipe._ALIASES.values()) <= set(recipe.RECIPE_FIELDS)
    flags = {
        name
        for kind in options.COMMANDS.values()
        for each in options.fields(kind)
        for name in each.metadata.get("names", ())
    }
    assert set(options._ALIASES) <= flags
