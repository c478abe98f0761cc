"""Predictions of images of any size and mode, each once; what cannot be read is named."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torchvision.models import resnet18
from torchvision.models._api import BUILTIN_MODELS

from cifar_dist.cli import main
from cifar_dist.commands import predict as command
from cifar_dist.training import evaluation
from cifar_dist.training.evaluation import summarize
from tests.commands.test_train import small_world_in
from tests.conftest import ROOT, make_images

SETTINGS = ["--set", "global_batch_size=13", "epochs=25", "schedule.name=cosine", "early_stopping.enabled=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that separates dark images from light ones, and images to predict."""
    folder = tmp_path_factory.mktemp("predict")
    with small_world_in(folder, has_images=True):
        make_images(folder / "images")
        assert main(["--recipe", "plain", "--dataset", "images", "--run-dir", "run", *SETTINGS]) == 0
        make_others(folder / "others")
        yield folder


def make_others(folder: Path) -> None:
    """The same two classes in every mode, none of the size that the model has."""
    (folder / "deep" / "er").mkdir(parents=True)
    for name, value in (("dark", 20), ("light", 230)):
        Image.new("L", (50, 20), value).save(folder / f"{name}-grey.png")
        Image.new("RGB", (7, 90), (value,) * 3).convert("P").save(folder / f"{name}-palette.gif")
        Image.new("RGBA", (40, 40), (value, value, value, 250)).save(folder / "deep" / f"{name}-alpha.webp")
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (64, 48), (value,) * 3).save(folder / "deep" / "er" / f"{name}-turned.jpg", exif=exif)
        Image.new("I;16", (30, 30), value * 256).save(folder / f"{name}-sixteen.tiff")


def predict(capsys, *words: str, code: int = 0) -> tuple[dict, str]:
    assert main(["predict", "--ckpt", "run", "--json", "-", *words]) == code
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_images_of_every_mode_are_classified_in_any_folder(folder, capsys):
    result, err = predict(capsys, "others")
    assert [each["file"] for each in result["predictions"]] == sorted(
        str(path.relative_to(folder)) for path in (folder / "others").rglob("*") if path.is_file()
    )
    for each in result["predictions"]:
        first, second = each["classes"]
        assert first["name"] == Path(each["file"]).name.split("-")[0]
        assert first["probability"] + second["probability"] == pytest.approx(1, abs=1e-4)
        assert first["probability"] > second["probability"]
    trained = json.loads((folder / "run" / "summary.json").read_text())
    assert result["unreadable"] == [] and (result["world_size"], result["precision"]) == (1, trained["precision"])
    assert "error" not in err


def test_predictions_have_the_bits_of_the_evaluation_however_many_are_decoded_at_once(folder, capsys, monkeypatch):
    seen, at_once, decode = [], [], command.decode_images
    monkeypatch.setattr(evaluation, "summarize", lambda *words: seen.append(words) or summarize(*words))
    assert main(["eval", "--ckpt", "run"]) == 0
    capsys.readouterr()
    ((logits, _, names),) = seen
    whole, _ = predict(capsys, "images/test")
    for each, row in zip(whole["predictions"], logits.softmax(1).tolist(), strict=True):
        shares = {one["name"]: one["probability"] for one in each["classes"]}
        assert [shares[name] for name in names] == row

    monkeypatch.setattr(command, "_DECODED_AT_ONCE", 3)
    monkeypatch.setattr(command, "batch_size_for", lambda size: 2)
    monkeypatch.setattr(command, "decode_images", lambda files, size: at_once.append(len(files)) or decode(files, size))
    in_parts, _ = predict(capsys, "images/test")
    assert at_once == [4, 3]
    for mine, yours in zip(in_parts["predictions"], whole["predictions"], strict=True):
        assert mine["file"] == yours["file"]
        assert mine["classes"][0]["probability"] == pytest.approx(yours["classes"][0]["probability"], abs=1e-5)


def test_the_table_numbers_the_classes_of_bare_weights(folder, capsys):
    assert main(["export", "--ckpt", "run", "--out", "bare.pth"]) == 0
    for checkpoint, name in (("run", "light"), ("bare.pth", "1")):
        capsys.readouterr()
        assert main(["predict", "--ckpt", checkpoint, "others/light-grey.png"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert ("the weights do not name their classes: they are numbered" in lines) == (checkpoint != "run")
        assert lines[-1].split()[:2] == ["others/light-grey.png", name] and "%" in lines[-1]


def test_a_path_typed_twice_is_predicted_once_and_top_limits_the_classes(folder, capsys):
    result, _ = predict(capsys, "others/dark-grey.png", "./others/dark-grey.png", "--top", "1")
    (only,) = result["predictions"]
    assert only["file"] == "others/dark-grey.png" and len(only["classes"]) == 1


def test_what_cannot_be_read_is_named_and_the_rest_predicted(folder, capsys, monkeypatch):
    mixed, list_folder = folder / "mixed", os.scandir
    for name in ("mixed/secret", "empty"):
        (folder / name).mkdir(parents=True)
    (mixed / "broken.png").write_bytes(b"no image")
    (mixed / "notes.txt").write_text("no image, and not named like one")
    Image.new("L", (9, 9), 240).save(mixed / "good.png")
    (folder / "loop.png").symlink_to("loop.png")

    def scandir(path):
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    result, err = predict(capsys, "mixed", "absent.png", "empty", "loop.png", "x" * 300, code=2)
    assert [each["file"] for each in result["predictions"]] == ["mixed/good.png"]
    reasons = {each["file"]: each["reason"] for each in result["unreadable"]}
    unreadable = "cannot be read: empty, damaged, too large, or no image for this Pillow"
    assert reasons == {
        "mixed/secret": "cannot be read: Permission denied",
        "mixed/broken.png": unreadable,
        "absent.png": "does not exist",
        "empty": "holds no images",
        "loop.png": "cannot be read: Too many levels of symbolic links",
        "x" * 300: "cannot be read: File name too long",
    }
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 6 and "error: absent.png does not exist" in lines


def test_where_nothing_can_be_read_nothing_is_written(folder, capsys):
    (folder / "hollow").mkdir()
    assert main(["predict", "--ckpt", "run", "--json", "none.json", "hollow", "absent.png"]) == 2
    assert capsys.readouterr().err == "error: no image to predict: hollow holds no images, absent.png does not exist\n"
    assert not (folder / "none.json").exists()


def test_a_name_of_any_bytes_is_printed(folder, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("L", (9, 9), 240).save(folder / name)
    except OSError:
        pytest.skip("this file system allows only Unicode")
    result, _ = predict(capsys, name)
    assert result["predictions"][0]["file"] == r"caf\xe9.png"


@pytest.mark.full
def test_two_processes_predict_each_image_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUILTIN_MODELS, "resnet18", resnet18)  # the processes have no other
    make_images(tmp_path / "images")
    make_others(tmp_path / "others")
    train = "--recipe plain --dataset images --run-dir run --epochs 1 --precision no"
    assert main(train.split()) == 0
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    command = [sys.executable, str(ROOT / "launch.py"), "predict", "--ckpt", "run", "--json", "two.json"]
    command += ["--config", "two.yaml", "others", "absent.png"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.count("error: absent.png does not exist") == 1
    assert main(["predict", "--ckpt", "run", "--json", "one.json", "others"]) == 0
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert two["world_size"] == 2
    for mine, yours in zip(one["predictions"], two["predictions"], strict=True):
        assert mine["file"] == yours["file"]
        assert [each["name"] for each in mine["classes"]] == [each["name"] for each in yours["classes"]]
        shares = [[each["probability"] for each in every["classes"]] for every in (mine, yours)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-5)
