"""Parsing of the command line, completion, and hints for names that people know from other programs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cifar_dist import cli
from cifar_dist.config import command_line, options, recipe
from cifar_dist.config.command_line import parse_arguments
from cifar_dist.config.options import BenchOptions, EvalOptions, PredictOptions, TrainOptions

TRAIN_FLAGS = (
    "--config c.yaml --recipe plain --dataset shapes --data-dir d --run-dir r --resume --set epochs=4"
    " optimizer.momentum=0.5 --set stem=small --epochs 3 --seed 7 --precision no --num-processes 1 --dry-run --quiet"
)
TRAIN_OPTIONS = TrainOptions(
    config="c.yaml", recipe="plain", dataset="shapes", data_dir=Path("d"), run_dir=Path("r"), resume=True,
    assignments={"epochs": 4, "optimizer": {"momentum": 0.5}, "stem": "small"}, epochs=3, seed=7, precision="no",
    num_processes=1, dry_run=True, quiet=True,
)  # fmt: skip
EVAL_OPTIONS = EvalOptions(
    checkpoint=Path("x.pt"), split="validation", tta="mirror", json=Path("j"), figures=Path("f"), recipe="plain"
)
IMAGES = [Path("a.png")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", TrainOptions()),
        ("--epochs 3", TrainOptions(epochs=3)),
        (f"train {TRAIN_FLAGS}", TRAIN_OPTIONS),
        ("--resume x", TrainOptions(resume=True, resume_dir=Path("x"))),
        ("eval --ckpt x.pt --split validation --tta mirror --json j --figures f --recipe plain", EVAL_OPTIONS),
        ("eval --ckpt x.pt", EvalOptions(checkpoint=Path("x.pt"), split="test", tta="none")),
        ("predict --ckpt x.pt a.png", PredictOptions(checkpoint=Path("x.pt"), images=IMAGES, top=5)),
        ("predict --ckpt x.pt a.png --top 1", PredictOptions(checkpoint=Path("x.pt"), images=IMAGES, top=1)),
        ("bench", BenchOptions(recipe="standard", seconds=10.0, assignments={})),
        (
            "bench --recipe plain --seconds 2.5 --json j --set stem=small",
            BenchOptions(recipe="plain", seconds=2.5, json=Path("j"), assignments={"stem": "small"}),
        ),
    ],
)
def test_flags_become_typed_options(line, expected):
    words = line.split()
    command = words[0] if words and not words[0].startswith("-") else "train"
    assert parse_arguments(words) == (command, expected)


def test_only_typed_flags_override_the_recipe():
    assert TRAIN_OPTIONS.recipe_flags == {"epochs": 3, "seed": 7}
    assert TrainOptions(seed=0).recipe_flags == {"seed": 0}


def test_the_package_runs_as_a_module_and_prints_its_version(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cifar-dist", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("cifar_dist", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == "cifar-dist 0.1.0\n"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_openmp_spins_briefly_unless_the_user_chose(environ, expected, monkeypatch):
    seen = []
    command = SimpleNamespace(run=lambda *_: seen.append(os.environ.get("GOMP_SPINCOUNT")) or 0)
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: command)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--dry-run"]) == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("",), {"train", "eval", "predict", "export", "doctor"}),
        (("eval", "--t"), {"--tta"}),
        (("train", "--recipe", "s"), {"standard", "strong"}),
        (("--set", "epochs=1", "optimizer.m"), {"optimizer.momentum="}),
        (("--tracker", "w"), {"wandb"}),
        (("eval", "--tta", ""), {"none", "mirror", "six"}),
        (("recipes", ""), {"quick", "standard"}),
        (("config", "multi"), {"multi_cpu", "multi_gpu", "multi_node"}),
    ],
)
def test_a_shell_completes_commands_flags_and_values(typed, offered, capsys, monkeypatch):
    pytest.importorskip("shtab")
    monkeypatch.setenv("SHELL", "/bin/bash")
    with pytest.raises(SystemExit):
        cli.main(["--completion"])
    script = capsys.readouterr().out
    script += '\nCOMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_cifar_dist; echo "${COMPREPLY[*]}"'
    command = ["bash", "-c", script, "bash", "cifar-dist", *typed]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert offered <= set(words)
    assert all(word.startswith(typed[-1]) for word in words)


def test_completion_is_for_zsh_too(monkeypatch, capsys):
    pytest.importorskip("shtab")
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    with pytest.raises(SystemExit):
        cli.main(["--completion"])
    script = capsys.readouterr().out
    assert "compdef" in script and "--tta[" in script and "(none mirror six)" in script


def test_completion_names_the_package_that_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--completion"]) == 2
    assert capsys.readouterr().err == "error: --completion needs the package shtab: pip install shtab\n"


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


@pytest.fixture(autouse=True)
def program(monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_PROGRAM", "python launch.py")  # also under python -m pytest


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
        ("eval --lr 1", "unknown argument '--lr' (see python launch.py eval --help)"),
        ("eval --output a", "did you mean '--json'?"),
        ("bench --batch-size 8", "did you mean '--set global_batch_size=VALUE'?"),
        ("--set lr=0.1", "unknown recipe field 'lr', did you mean 'optimizer.learning_rate'?"),
        ("--set optimizer.lr=0.1", "unknown recipe field 'optimizer.lr', did you mean 'optimizer.learning_rate'?"),
        ("--set optimizer.momentun=0", "did you mean 'momentum'?"),
        ("--set optimizer=sgd", "unknown recipe field 'optimizer', did you mean 'optimizer.name'?"),
        ("--zzz", "unknown argument '--zzz' (see python launch.py train --help)"),
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
    assert set(command_line._ALIASES) <= flags
