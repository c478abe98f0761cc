"""What is typed becomes typed options, or one line; no help imports torch."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cifar_dist import cli
from cifar_dist.config.arguments import parse_arguments
from cifar_dist.config.options import BenchOptions, EvalOptions, TrainOptions
from tests.conftest import ROOT


def parsed(*argv: str):
    return parse_arguments(list(argv))


def test_without_a_command_it_trains():
    assert parsed() == ("train", TrainOptions())
    assert parsed("--epochs", "3") == ("train", TrainOptions(epochs=3)) == parsed("train", "--epochs", "3")


def test_every_flag_of_train_arrives():
    argv = (
        "--config c.yaml --recipe plain --dataset shapes --data-dir d --run-dir r --resume --set epochs=4"
        " optimizer.momentum=0.5 --set stem=small --epochs 3 --seed 7 --precision no --dry-run --quiet"
    )
    command, options = parsed(*argv.split())
    assert command == "train"
    assert options == TrainOptions(
        config="c.yaml", recipe="plain", dataset="shapes", data_dir=Path("d"), run_dir=Path("r"), resume=True,
        assignments={"epochs": 4, "optimizer": {"momentum": 0.5}, "stem": "small"}, epochs=3, seed=7, precision="no",
        dry_run=True, quiet=True,
    )  # fmt: skip
    assert options.recipe_flags == {"epochs": 3, "seed": 7}


def test_resume_takes_a_folder_or_none():
    assert parsed("--resume", "x")[1] == TrainOptions(resume=True, resume_dir=Path("x"))
    assert parsed("--run-dir", "x", "--resume")[1] == TrainOptions(resume=True, run_dir=Path("x"))


def test_the_flags_of_eval_and_bench_arrive():
    argv = (
        "--ckpt",
        "x.pt",
        "--split",
        "validation",
        "--tta",
        "mirror",
        "--json",
        "j",
        "--figures",
        "f",
        "--recipe",
        "plain",
    )
    assert parsed("eval", *argv) == (
        "eval",
        EvalOptions(
            checkpoint=Path("x.pt"), split="validation", tta="mirror", json=Path("j"), figures=Path("f"), recipe="plain"
        ),
    )
    argv = "--recipe plain --seconds 2.5 --json j --set stem=small".split()
    options = BenchOptions(recipe="plain", seconds=2.5, json=Path("j"), assignments={"stem": "small"})
    assert parsed("bench", *argv) == ("bench", options)


def test_the_smallest_that_can_be_typed():
    assert parsed("train", "--num-processes", "1")[1].num_processes == 1
    assert parsed("predict", "--ckpt", "x.pt", "a.png", "--top", "1")[1].top == 1


def test_what_is_not_typed_is_what_the_help_says():
    evaluation, prediction = parsed("eval", "--ckpt", "x.pt")[1], parsed("predict", "--ckpt", "x.pt", "a.png")[1]
    assert (evaluation.split, evaluation.tta, prediction.top) == ("test", "none", 5)
    bench = parsed("bench")[1]
    assert (bench.recipe, bench.seconds, bench.sweep, bench.assignments) == ("standard", 10.0, False, {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evla"], "error: unknown command 'evla', did you mean 'eval'? (commands: train, eval, predict, report,"),
        (["--epoch", "3"], "error: unknown argument '--epoch', did you mean '--epochs'?"),
        (["--epochs", "three"], "error: argument --epochs: invalid int value: 'three' (see launch.py train --help)"),
        (["--precision", "fp8"], "error: argument --precision: invalid choice: 'fp8'"),
        (["eval"], "error: the following arguments are required: --ckpt (see launch.py eval --help)"),
        (["bench", "--seconds", "0"], "error: --seconds must be above 0 and below a day, not 0"),
        (["--set", "epochs"], "error: --set takes FIELD=VALUE, not 'epochs'"),
        (["--resume", "a", "--run-dir", "b"], "error: --resume a and --run-dir b name two runs: type one of them"),
        (["--resume"], "error: --resume needs to know the run: type --resume DIR, or --run-dir DIR --resume"),
        (["--dataset", "cifar"], "error: unknown dataset 'cifar', did you mean 'cifar10'? (datasets:"),
        (["--recipe", "orignal"], "error: unknown recipe 'orignal', did you mean 'original'?"),
        (["--config", "none.yaml"], "error: cannot read Accelerate config none.yaml: No such file or directory"),
        (["--set", "stem=big"], "error: stem must be one of cifar, small, imagenet, not 'big'"),
        (["--set", "batch_norm_group_size=7"], "error: batch_norm_group_size=7 must cut the"),
        (["--resume", "no/such/run"], "error: there is no run in no/such/run to resume"),
        (["eval", "--ckpt", "none.pt"], "error: there is no checkpoint none.pt"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == "cifar-dist 0.1.0\n"


@pytest.mark.full
@pytest.mark.parametrize("argv", [[], ["train"], ["eval"], ["report"], ["bench"], ["doctor"]])
def test_no_help_imports_torch(argv):
    probe = (
        "import sys\nfrom cifar_dist.cli import main\n"
        f"try: main({[*argv, '--help']!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'accelerate', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--help" in result.stdout
    assert all(len(line) <= 120 for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("typed", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_leave_the_cores_to_others_unless_told_otherwise(typed, expected, monkeypatch):
    seen = []
    command = SimpleNamespace(run=lambda *_: seen.append(os.environ.get("GOMP_SPINCOUNT")) or 0)
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: command)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for name, value in typed.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--dry-run"]) == 0
    assert seen == [expected]


@pytest.mark.full
def test_the_package_can_be_run_as_a_module():
    command = [sys.executable, "-m", "cifar_dist", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "cifar-dist 0.1.0\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("",), {"train", "eval", "predict", "export", "doctor", "--recipe"}),
        (("ev",), {"eval"}),
        (("eval", "--t"), {"--tta"}),
        (("--rec",), {"--recipe"}),
        (("train", "--recipe", "s"), {"standard", "strong"}),
        (("--set", "optimizer.m"), {"optimizer.momentum="}),
        (("--set", "epochs=1", "optimizer.m"), {"optimizer.momentum="}),
        (("--tracker", "w"), {"wandb"}),
        (("--v",), {"--version"}),
        (("eval", "--tta", ""), {"none", "mirror"}),
        (("export", "--ckpt", ""), set()),
    ],
)
def test_a_shell_completes_commands_flags_and_what_they_take(typed, offered):
    script = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--completion"], capture_output=True, text=True, check=True
    ).stdout
    script += '\nCOMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _cifar_dist; echo "${COMPREPLY[*]}"'
    command = ["bash", "-c", script, "bash", "cifar-dist", *typed]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert offered <= set(words)
    assert all(word.startswith(typed[-1]) for word in words)
    assert offered or not words
