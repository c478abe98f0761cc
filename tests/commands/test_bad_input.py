"""A user's mistake is exit code 2 and one `error:` line, and changes nothing on disk."""

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_dist.cli import main
from cifar_dist.config.files import write_json
from cifar_dist.config.recipe import recipe_to_mapping
from cifar_dist.config.schema import flatten
from tests.conftest import make_dataset, make_recipe

FIELDS = sorted(flatten(recipe_to_mapping(make_recipe())))
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

scalars = st.one_of(
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=8),
    st.booleans(),
    st.none(),
    st.sampled_from(["[[16, 0.5], [32, 1.0]]", "{a: 1}", "!!python/object/apply:os.system [true]", "1e400", "*x", "%"]),
)
names = st.one_of(
    st.sampled_from(FIELDS), st.sampled_from(FIELDS).map(lambda name: name.split(".")[0]), st.text(max_size=6)
)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)
words = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12)


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CIFAR_DIST_CIFAR10_URLS", "")
    for command in ("train", "evaluate"):
        monkeypatch.setattr(f"cifar_dist.commands.{command}.load_dataset", lambda *_, **__: make_dataset())


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def run(*argv: str) -> tuple[int, str]:
    """Run a command, check the invariant, and return the code and the error line."""
    before, out, err = files(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(argv))
        except SystemExit as end:  # --help and --version
            code = end.code
    line = err.getvalue()
    assert code in (0, 2), line
    if code == 2:
        assert line.startswith("error: "), line
        assert line.count("\n") == 1, line
        assert len(line) > len("error: \n"), "says nothing"
    else:
        assert line == ""
    assert files() == before
    return code, line.removeprefix("error: ").rstrip("\n")


@FUZZ
@given(st.lists(st.tuples(names, scalars), min_size=1, max_size=3))
def test_any_assignment(pairs):
    run("--dry-run", "--set", *(f"{name}={value}" for name, value in pairs))


FLAGS = (
    "--epochs --seed --recipe --dataset --config --resume --run-dir --set --precision --data-dir --split --tta --ckpt"
    " --frobnicate -x".split()
)


@FUZZ
@given(words, st.lists(st.tuples(st.sampled_from(FLAGS), words), max_size=3))
def test_any_command_line(word, pairs):
    run("train", "--dry-run", *(each for pair in pairs for each in pair))
    run(word, "--dry-run") if not word.startswith("-") else run("train", "--dry-run", word)


@FUZZ
@given(st.one_of(documents.map(lambda document: yaml.dump(document).encode()), st.binary(max_size=60)))
@pytest.mark.parametrize("flag", ["--recipe", "--config"])
def test_any_file(flag, content):
    Path("file.yaml").write_bytes(content)
    run("--dry-run", flag, "file.yaml")


@FUZZ
@given(st.one_of(documents.map(lambda document: yaml.dump(document).encode()), st.binary(max_size=60)))
@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl"])
def test_any_run_directory(name, content):
    Path("run").mkdir(exist_ok=True)
    Path("run/config.yaml").write_text(
        yaml.safe_dump({"recipe": recipe_to_mapping(make_recipe()), "dataset": {"name": "shapes", "data_dir": "data"}})
    )
    Path("run", name).write_bytes(content)
    run("--dry-run", "--resume", "run")


@FUZZ
@given(data=st.data())
def test_any_damage_to_a_checkpoint(data):
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(2), "fc.weight": torch.ones(2, 3)}, buffer)
    damaged = bytearray(buffer.getvalue())
    place = data.draw(st.integers(0, len(damaged) - 1))
    if data.draw(st.booleans()):
        del damaged[place:]
    else:
        damaged[place] ^= data.draw(st.integers(1, 255))
    Path("model.pth").write_bytes(damaged)
    assert run("eval", "--ckpt", "model.pth", "--dataset", "shapes")[0] == 2


@settings(FUZZ, max_examples=25)
@given(documents)
def test_any_content_of_a_checkpoint(document):
    content = {"format_version": 1, "model": document, "recipe": document, "class_names": document, "x": document}
    if not isinstance(document, int | None):
        content["recipe"] = recipe_to_mapping(make_recipe())
    torch.save(content, "x.pt")
    assert run("eval", "--ckpt", "x.pt")[0] == 2


CASES = {
    "trian": "unknown command 'trian', did you mean 'train'?"
    " (commands: train, eval, predict, report, export, tune, bench, doctor, recipes, config)",
    "--epochs ten": "argument --epochs: invalid int value: 'ten' (see python launch.py train --help)",
    "--precision fp8": "argument --precision: invalid choice: 'fp8' (choose from ",
    "eval": "the following arguments are required: --ckpt (see python launch.py eval --help)",
    "--set model=nets.py:": "--set model: 'nets.py:' names no function: type file.py:function",
    "--set model=nets.py": "--set model: 'nets.py' names no function: type file.py:function",
    "--set epochs": "--set takes FIELD=VALUE without spaces, not 'epochs'",
    "--epochs 3 image_size=64": "unrecognized arguments: image_size=64 (type --set image_size=64, or see",
    "--set stem=!!python/name:os.system": "--set stem: '!!python/name:os.system' is not valid YAML",
    "--set optimizer.foo=0.1": "unknown recipe field 'optimizer.foo' (known are name, learning_rate, ",
    "--set gradient_accumulation_steps=3": "global_batch_size=512 does not divide by 1 processes x 3 accumulation:"
    " set it to 510 or 513",
    "--resume": "--resume needs to know the run: type --resume DIR, or --run-dir DIR --resume",
    "--resume a --run-dir b": "--resume a and --run-dir b name two runs: type one of them",
    "bench --seconds 0": "--seconds must be above 0, not 0.0",
    "--num-processes 0": "--num-processes must be 1 or more, not 0",
    "predict --ckpt x a.png --top 0": "--top must be 1 or more, not 0",
}


@pytest.mark.parametrize(("command", "message"), CASES.items(), ids=list(CASES))
def test_the_message_of_a_mistake(command, message):
    argv = command.split()
    code, line = run(*argv, *(["--dry-run"] if argv[0].startswith("-") else []))
    assert code == 2 and line.startswith(message)


def test_a_recipe_file_with_fields_beside_recipe_is_refused():
    Path("mine.yaml").write_text("epochs: 3\nstem: small\nrecipe: {epochs: 4}\n")
    message = "recipe file mine.yaml holds a whole recipe under 'recipe', and beside it epochs, stem"
    assert run("--dry-run", "--recipe", "mine.yaml") == (2, message)


READ = ("model.pth", "link.json", "mine.yaml", "images/a.png")
WRITTEN_BY_A_RUN = ("run/config.yaml", "run/summary.json", "run/checkpoints/last.pt")


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_files_that_are_read_or_belong_to_a_run_are_not_overwritten(command):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 512)}, "model.pth")
    Path("link.json").symlink_to("model.pth")
    Path("mine.yaml").write_text("stem: imagenet")
    for folder in ("images", "elsewhere", "run"):
        Path(folder).mkdir()
    Image.new("RGB", (4, 4)).save("images/a.png")
    Path("run/checkpoints").symlink_to(Path("elsewhere").absolute())
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints/last.pt"):
        Path("run", name).write_text("{}")
    images = ["images"] if command == "predict" else []
    for place in (*READ, *WRITTEN_BY_A_RUN):
        if (command, place) != ("eval", "images/a.png"):
            why = "is read" if place in READ else "own file"
            code, line = run(command, "--ckpt", "model.pth", "--recipe", "mine.yaml", "--json", place, *images)
            assert code == 2 and line.startswith(f"--json {place} would overwrite ") and why in line


def test_a_pipe_and_a_link_stay_what_they_are():
    """As /dev/null does, which root could replace."""
    os.mkfifo("pipe")
    Path("link.json").symlink_to("real.json")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("pipe", "link.json"):
        write_json(Path(name), {"top1": 0.5})
    assert os.read(reader, 100) == Path("real.json").read_bytes() == b'{"top1": 0.5}\n'
    os.close(reader)
    assert Path("pipe").is_fifo() and Path("link.json").is_symlink()


@pytest.mark.parametrize(
    "argv", [["--dataset", ""], ["--recipe="], ["--resume", ""], ["predict", "--ckpt", "run", ""], ["eval", "--ckpt="]]
)
def test_an_empty_argument_is_no_default(argv):
    assert run(*argv) == (2, "an argument is empty: is a variable of your script not set?")


@pytest.mark.parametrize("typed", ["eval --ckpt", "report", "--dry-run --run-dir", "--dry-run --recipe"])
def test_a_path_that_may_not_be_looked_at_is_one_line(typed):
    """A name that is too long stands for it: whoever runs these tests may be allowed everything."""
    code, line = run(*typed.split(), "x" * 300)
    assert code == 2 and "File name too long" in line
