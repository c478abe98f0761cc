"""Images of one's own: any size and mode, each once, and what cannot be read is named."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cifar_dist.cli import main
from cifar_dist.commands import evaluate
from cifar_dist.commands import predict as command
from cifar_dist.training.metrics import summarize
from tests.conftest import ROOT, make_images

SETTINGS = ["--set", "global_batch_size=13", "epochs=25", "schedule.name=cosine", "early_stopping.enabled=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that tells dark images from light ones, and images to be told."""
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CIFAR_DIST_CACHE", str(folder / "cache"))
        patch.setattr("cifar_dist.display.figures.save_figure", lambda figure, path: path.touch())
        make_images(folder / "images")
        assert main(["--recipe", "plain", "--dataset", "images", "--run-dir", "run", *SETTINGS]) == 0
        make_others(folder / "others")
        yield folder


def make_others(folder: Path) -> None:
    """The same two kinds of image in every mode, none of the size that the model has."""
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


def test_images_of_every_mode_are_told_apart_whichever_folder_they_are_in(folder, capsys):
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


def test_it_gives_what_the_evaluation_gives(folder, capsys, monkeypatch):
    """To the bit: the test images of the folder, as `eval` predicts them."""
    seen = []
    monkeypatch.setattr(evaluate, "summarize", lambda *words: seen.append(words) or summarize(*words))
    assert main(["eval", "--ckpt", "run"]) == 0
    capsys.readouterr()
    ((logits, _, names),) = seen
    result, _ = predict(capsys, "images/test")
    for each, row in zip(result["predictions"], logits.softmax(1).tolist(), strict=True):
        shares = {one["name"]: one["probability"] for one in each["classes"]}
        assert [shares[name] for name in names] == row


def test_many_images_are_decoded_part_by_part(folder, capsys, monkeypatch):
    at_once, decode = [], command.decode_images
    monkeypatch.setattr(command, "_DECODED_AT_ONCE", 3)
    monkeypatch.setattr(command, "batch_size_for", lambda size: 2)
    monkeypatch.setattr(command, "decode_images", lambda files, size: at_once.append(len(files)) or decode(files, size))
    in_parts, _ = predict(capsys, "images/test")
    assert at_once == [4, 3]
    monkeypatch.undo()
    whole, _ = predict(capsys, "images/test")
    for mine, yours in zip(in_parts["predictions"], whole["predictions"], strict=True):
        assert mine["file"] == yours["file"]
        assert mine["classes"][0]["probability"] == pytest.approx(yours["classes"][0]["probability"], abs=1e-5)


def test_bare_weights_number_their_classes(folder, capsys):
    assert main(["export", "--ckpt", "run", "--out", "bare.pth"]) == 0
    assert main(["predict", "--ckpt", "bare.pth", "others/light-grey.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the weights do not name their classes: they are numbered" in lines
    assert lines[-1].split()[:2] == ["others/light-grey.png", "1"]


def test_a_file_named_twice_is_predicted_once_and_top_limits_the_classes(folder, capsys):
    result, _ = predict(capsys, "others/dark-grey.png", "./others/../others/dark-grey.png", "--top", "1")
    (only,) = result["predictions"]
    assert only["file"] == "others/dark-grey.png" and len(only["classes"]) == 1


def test_what_cannot_be_read_is_named_and_the_rest_done(folder, capsys):
    mixed = folder / "mixed"
    mixed.mkdir()
    (mixed / "photo.heic").write_bytes(b"x")
    (mixed / "broken.png").write_bytes(b"no image")
    (mixed / "notes.txt").write_text("not an image, and not said to be one")
    Image.new("L", (9, 9), 240).save(mixed / "good.png")
    (folder / "empty").mkdir()
    result, err = predict(capsys, "mixed", "absent.png", "empty", code=2)
    assert [each["file"] for each in result["predictions"]] == ["mixed/good.png"]
    reasons = {each["file"]: each["reason"] for each in result["unreadable"]}
    assert reasons.keys() == {"mixed/photo.heic", "mixed/broken.png", "absent.png", "empty"}
    assert "HEIC" in reasons["mixed/photo.heic"] and reasons["absent.png"] == "does not exist"
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 4 and any("mixed/broken.png cannot be read" in line for line in lines)


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_done(folder, capsys, monkeypatch):
    def scandir(path):
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied")
        return list_folder(path)

    list_folder = os.scandir
    expected = [each["file"] for each in predict(capsys, "images")[0]["predictions"]]
    (folder / "images" / "secret").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    result, err = predict(capsys, "images", code=2)
    assert [each["file"] for each in result["predictions"]] == expected and expected
    assert re.search(r"error: images/secret is left out: cannot read the folder \S+/secret: Permission denied\n", err)


def test_a_path_that_may_not_be_looked_at_keeps_no_other_from_its_prediction(folder, capsys):
    result, _ = predict(capsys, "images", "x" * 300, code=2)
    assert result["predictions"] and [each["file"] for each in result["unreadable"]] == ["x" * 300]
    assert result["unreadable"][0]["reason"] == "cannot be read: File name too long"
    (folder / "loop.png").symlink_to("loop.png")
    result, _ = predict(capsys, "images", "loop.png", code=2)
    assert result["unreadable"][0]["reason"] == "cannot be read: Too many levels of symbolic links"


def test_a_name_of_any_bytes_is_printed(folder, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("L", (9, 9), 240).save(folder / name)
    except OSError:
        pytest.skip("this file system allows only Unicode")
    result, _ = predict(capsys, name)
    assert result["predictions"][0]["file"] == r"caf\xe9.png"


def test_where_nothing_can_be_read_nothing_is_written(folder, capsys):
    (folder / "hollow").mkdir()
    assert main(["predict", "--ckpt", "run", "--json", "none.json", "hollow", "photo.heic"]) == 2
    assert capsys.readouterr().err == (
        "error: no image is left: hollow holds no images, photo.heic cannot be read, as no HEIC or AVIF image can:"
        " convert it to PNG or JPEG\n"
    )
    assert not (folder / "none.json").exists()


def test_the_table_and_a_file_of_json(folder, capsys):
    assert main(["predict", "--ckpt", "run", "others/light-grey.png"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("others/light-grey.png") and line.split()[1] == "light" and "%" in line
    assert main(["predict", "--ckpt", "run", "others/light-grey.png", "--json", "out.json"]) == 0
    assert json.loads((folder / "out.json").read_text())["predictions"][0]["classes"][0]["name"] == "light"


def test_two_processes_predict_each_image_once(folder, tmp_path):
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    command = [sys.executable, str(ROOT / "launch.py"), "predict", "--ckpt", "run", "--json", "two.json"]
    command += ["--config", str(tmp_path / "two.yaml"), "others", "absent.png"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.count("error: absent.png does not exist") == 1
    assert main(["predict", "--ckpt", "run", "--json", "one.json", "others"]) == 0
    one, two = (json.loads((folder / name).read_text()) for name in ("one.json", "two.json"))
    assert two["world_size"] == 2
    assert [each["file"] for each in two["predictions"]] == [each["file"] for each in one["predictions"]]
    for mine, yours in zip(one["predictions"], two["predictions"], strict=True):
        assert [each["name"] for each in mine["classes"]] == [each["name"] for each in yours["classes"]]
        shares = [[each["probability"] for each in every["classes"]] for every in (mine, yours)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top", "0", "x.png"], "--top must be 1 or more, not 0"),
        (["--json", "no/such/place.json", "others"], "--json no/such/place.json cannot be written"),
        ([], "the following arguments are required: IMAGE|DIR"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, words, message):
    assert main(["predict", "--ckpt", "run", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
