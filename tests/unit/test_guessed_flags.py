"""Names that people know from other programs are answered with the right flag or field."""

import pytest

from cifar_dist import cli
from cifar_dist.config import arguments, parsing
from cifar_dist.config.loading import read_recipe
from cifar_dist.config.parsing import flatten

FIELDS = {
    "optimizer.learning_rate": "lr learning-rate learning_rate LR",
    "optimizer.weight_decay": "weight-decay wd",
    "optimizer.name": "optimizer optim",
    "optimizer.momentum": "momentum",
    "schedule.name": "scheduler lr-scheduler",
    "global_batch_size": "batch-size batch_size bs",
    "gradient_clipping": "grad-clip",
    "validation_size": "val-size",
    "augmentation.mixup": "mixup",
    "label_smoothing": "label-smoothing",
    "model": "model arch",
}
FLAGS = {
    "--config accelerate_configs/cpu.yaml": "device cpu",
    "--max-minutes": "time max-time",
    "--precision": "amp fp16 mixed-precision",
    "--num-processes": "gpus nproc-per-node num_processes",
    "--run-dir": "output-dir output save-dir",
    "--resume DIR": "checkpoint resume-from",
    "--dataset DIR": "data",
    "--tracker wandb": "wandb",
    "--epochs": "epoch num-epochs Epochs",
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
        ("eval --model a.pt", "did you mean '--ckpt FILE'?"),
        ("eval --lr 1", "unknown argument '--lr' (see launch.py eval --help)"),
        ("eval --wandb", "unknown argument '--wandb' (see launch.py eval --help)"),
        ("eval --output a", "did you mean '--json'?"),
        ("export --output a", "did you mean '--out'?"),
        ("bench --batch-size 8", "did you mean '--set global_batch_size=VALUE'?"),
        ("--set lr=0.1", "unknown recipe field 'lr', did you mean 'optimizer.learning_rate'?"),
        ("--set optimizer.lr=0.1", "unknown recipe field 'optimizer.lr', did you mean 'optimizer.learning_rate'?"),
        ("--set weight_decay=0", "unknown recipe field 'weight_decay', did you mean 'optimizer.weight_decay'?"),
        ("--set batch_size=8", "did you mean 'global_batch_size'?"),
        ("--set optimizer.momentun=0", "did you mean 'momentum'?"),
        ("--set optimizer=sgd", "optimizer must be a mapping of its fields, not 'sgd', did you mean 'optimizer.name'?"),
        ("--zzz", "unknown argument '--zzz' (see launch.py train --help)"),
    ],
)
def test_so_are_other_commands_and_fields(capsys, argv, said):
    assert said in answer(capsys, *argv.split())


def test_every_answer_is_a_field_or_a_flag():
    assert set(parsing._OTHER_NAMES) <= flatten(read_recipe("standard")).keys()
    flags = {
        flag for command in arguments._COMMANDS for flag in arguments._command_parser(command)._option_string_actions
    }
    assert {meant.split()[0] for meant in arguments._OTHER_NAMES} <= flags
