"""One invariant: a mistake is exit code 2 and one `error:` line, and nothing on disk is changed by it."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.models import resnet18

from cifar_dist.cli import main
from cifar_dist.config.files import check_json
from cifar_dist.config.loading import recipe_names
from cifar_dist.config.parsing import flatten
from cifar_dist.config.recipe import recipe_to_mapping
from tests.conftest import make_dataset, make_recipe

FIELDS = sorted(flatten(recipe_to_mapping(make_recipe())))
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
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
    """Run a command; check the invariant; give the code and the error line."""
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


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                "--epochs --seed --recipe --dataset --config --resume --run-dir --set --precision --data-dir --split"
                " --tta --ckpt --frobnicate -x".split()
            ),
            words,
        ),
        max_size=3,
    )
)  # fmt: skip
def test_any_flag(pairs):
    run("train", "--dry-run", *(word for pair in pairs for word in pair))


@FUZZ
@given(words)
def test_any_command(word):
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


@pytest.fixture(scope="module")
def good_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save(resnet18(num_classes=10).state_dict(), buffer)
    return buffer.getvalue()


@settings(FUZZ, max_examples=12)
@given(data=st.data())
def test_any_damage_to_a_checkpoint(good_checkpoint, data):
    damaged = bytearray(good_checkpoint)
    place = data.draw(st.integers(0, len(damaged) - 1))
    if data.draw(st.booleans()):
        del damaged[place:]
    else:
        damaged[place] ^= data.draw(st.integers(1, 255))
    Path("model.pth").write_bytes(damaged)
    run("eval", "--ckpt", "model.pth", "--dataset", "shapes")
    Path("model.pth").unlink()


@settings(FUZZ, max_examples=25)
@given(documents)
def test_any_content_of_a_checkpoint(document):
    content = {"format_version": 1, "model": document, "recipe": document, "class_names": document, "x": document}
    torch.save(
        content if isinstance(document, int | None) else {**content, "recipe": recipe_to_mapping(make_recipe())}, "x.pt"
    )
    assert run("eval", "--ckpt", "x.pt")[0] == 2


RECIPES = ", ".join(recipe_names())
CASES = {
    "trian": "unknown command 'trian', did you mean 'train'?"
    " (commands: train, eval, predict, report, export, bench, doctor)",
    "--epoch 3": "unknown argument '--epoch', did you mean '--epochs'?",
    "--epochs ten": "argument --epochs: invalid int value: 'ten' (see launch.py train --help)",
    "--epochs 0": "epochs must be 1 or more, not 0",
    "--recipe quik": f"unknown recipe 'quik', did you mean 'quick'? (recipes: {RECIPES})",
    "--dataset cifar11": "unknown dataset 'cifar11', did you mean 'cifar10'?"
    " (datasets: cifar10, cifar100, shapes, or a folder of class folders)",
    "--set lr=0.1": "unknown recipe field 'lr'",
    "--set optimizer.lr=0.1": "unknown recipe field 'optimizer.lr' (fields of optimizer: name, learning_rate, momentum,"
    " nesterov, weight_decay, decay_norm_and_bias, sgd_learning_rate, normalize_filters)",
    "--set learning_rate=0.1": "unknown recipe field 'learning_rate', did you mean 'optimizer.learning_rate'?",
    "eval --chkpt a": "unknown argument '--chkpt', did you mean '--ckpt'?",
    "bench --data-dir x": "unknown argument '--data-dir' (see launch.py bench --help)",
    "--set augmentation.hue=0.7": "augmentation.hue must be in [0, 0.5], not 0.7",
    "--set optimizer.momentum=0": "optimizer.nesterov must be false where momentum is 0, not True",
    "--set schedule.gamma=2": "schedule.gamma must be set with schedule.name=step, and only with it, not 2.0",
    "--set validation_size=0 early_stopping.enabled=true": "early_stopping.monitor=val_loss needs a validation split:"
    " set validation_size above 0, or early_stopping.monitor=train_loss",
    "--set validation_size=60000": "validation_size=60000 leaves no images to train on: the training set has 50000,"
    " set it to at most 49998",
    "--set freeze_epochs=2": "freeze_epochs must be 0 without pretrained, not 2",
    "--set gradient_accumulation_steps=3": "global_batch_size=512 does not divide by 1 processes x 3 accumulation:"
    " set it to 510 or 513",
    "--config nowhere.yaml": "cannot read Accelerate config nowhere.yaml: No such file or directory",
    "--resume": "--resume needs to know the run: type --resume DIR, or --run-dir DIR --resume",
    "--resume nowhere": "there is no run in nowhere to resume",
    "eval --ckpt nowhere.pt": "there is no checkpoint nowhere.pt",
    "bench --seconds -1": "--seconds must be above 0 and below a day, not -1",
}


@pytest.mark.parametrize(("command", "message"), CASES.items(), ids=list(CASES))
def test_the_words_of_a_mistake(command, message):
    argv = command.split()
    if argv[0].startswith("-"):
        argv += ["--dry-run"]
    assert run(*argv) == (2, message)


def test_a_recipe_file_of_two_minds_is_refused():
    Path("mine.yaml").write_text("epochs: 3\nstem: small\nrecipe: {epochs: 4}\n")
    message = "recipe file mine.yaml holds a whole recipe under 'recipe', and beside it epochs, stem"
    assert run("--dry-run", "--recipe", "mine.yaml") == (2, message)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("model.pth", "would overwrite what is read"),
        ("link.json", "would overwrite what is read"),
        ("mine.yaml", "would overwrite what is read"),
        ("images/a.png", "would overwrite what is read"),
        ("run/config.yaml", "would overwrite a run's own file"),
        ("run/summary.json", "would overwrite a run's own file"),
        ("run/checkpoints/last.pt", "would overwrite a run's own file"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_what_is_read_and_what_a_run_wrote_is_not_overwritten(good_checkpoint, command, place, why):
    if (command, place) == ("eval", "images/a.png"):
        return  # it reads none
    Path("model.pth").write_bytes(good_checkpoint)
    Path("link.json").symlink_to("model.pth")
    Path("mine.yaml").write_text("stem: imagenet")
    Path("images").mkdir()
    Image.new("RGB", (4, 4)).save("images/a.png")
    Path("elsewhere").mkdir()
    Path("run").mkdir()
    Path("run/checkpoints").symlink_to(Path("elsewhere").absolute())
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints/last.pt"):
        Path("run", name).write_text("{}")
    images = ["images"] if command == "predict" else []
    argv = [command, "--ckpt", "model.pth", "--recipe", "mine.yaml", "--json", place, *images]
    assert run(*argv) == (2, f"--json {place} {why}: name another file")


def test_what_is_nobodys_is_overwritten():
    """A result of before, in a run's folder too, and a file that is only called as a run's."""
    Path("run").mkdir()
    Path("run/config.yaml").write_text("{}")
    for name in ("summary.json", "metrics.jsonl", "config.yaml", "run/eval.json"):
        if not Path(name).exists():
            Path(name).write_text("{}")
        check_json(Path(name), "absent")
        if name != "run/eval.json":
            Path(name).unlink()


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


def test_weights_that_are_missing_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    code, line = run("--recipe", "finetune", "--dataset", "shapes")
    assert code == 2
    place = Path("nowhere/checkpoints/resnet18-f37072fd.pth")
    assert line == (
        f"the ImageNet weights are not in {place} and could not be downloaded (no network here):"
        " put the file there, or name a state dict with --set pretrained=FILE"
    )


def no_network(*_, **__):
    raise OSError("no network here")


def test_the_invariant_itself_can_fail(monkeypatch):
    def writes_and_refuses(argv):
        Path("left behind").write_text(json.dumps(argv))
        os.write(2, b"")
        return 2

    monkeypatch.setattr(sys.modules[__name__], "main", writes_and_refuses)
    with pytest.raises(AssertionError):
        run("anything")
