"""Folders of images as people have them: rare formats, a level too many, test images alone, odd names."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cifar_dist.config.errors import UserError, printable
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.data.archives import CIFAR10, CIFAR100
from cifar_dist.data.dataset import Dataset
from cifar_dist.data.decoding import decode, image_suffixes
from cifar_dist.data.folder import folder_sizes, load_folder
from cifar_dist.data.image_files import find_images
from cifar_dist.data.official_files import provide, where_found
from cifar_dist.display.terminal import print_header, print_lines, print_notes
from cifar_dist.run.resolve import check_dataset_name


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))


def put(folder: Path, *names: str) -> Path:
    """Write a small grey image under each name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (90, 90, 90)).save(folder / name)
    return folder


def load(folder: Path, **options: bool) -> Dataset:
    return load_folder(folder, image_size=8, **options)


# Formats


FORMATS = {"jpe": "JPEG", "pbm": "PPM", "pnm": "PPM", "apng": "PNG", "tga": "TGA", "jp2": "JPEG2000", "avif": "AVIF"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_pillow_reads_is_read(tmp_path, suffix):
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip("this Pillow cannot read it")
    put(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    Image.new("1" if suffix == "pbm" else "RGB", (8, 8), "white").save(tmp_path / f"a/x.{suffix}", FORMATS[suffix])
    assert folder_sizes(tmp_path).num_train + folder_sizes(tmp_path).num_test == 5
    pixels, _ = decode(str(tmp_path / f"a/x.{suffix}"), 8)
    assert np.unique(pixels).tolist() in ([254], [255])
    assert "skipped" not in str(load(tmp_path).origin)


def test_what_is_skipped_is_counted(tmp_path):
    put(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    for name in ("a/labels.TXT", "b/deep/notes.txt", "b/x.psd", "a/noext", "a/.hidden", "a/depth.pfm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    skipped = "5 other files skipped (1 without a suffix, 1 .pfm, 1 .psd, 2 .txt)"
    assert str(load(tmp_path).origin).endswith(f"MiB in memory; {skipped}")
    assert find_images([tmp_path])[2] == skipped
    assert find_images([tmp_path / "a/1.png"])[2] == ""


def test_images_that_no_pillow_reads_are_refused_and_never_skipped():
    assert {".heic", ".heif", ".avif"} <= image_suffixes()


# A level too many


@pytest.mark.parametrize(
    ("names", "likely"),
    [
        (["seg_train/seg_train/x", "seg_train/seg_train/y", "seg_test/seg_test/x", "seg_pred/seg_pred"],
         "seg_train/seg_train"),
        (["images/cat", "images/dog", "masks/cat", "masks/dog"], "images"),
        (["pets/train/cat", "pets/train/dog", "pets/test/cat", "pets/test/dog"], "pets"),
        (["pets/cat", "pets/dog"], "pets"),
        (["train/images/cat", "train/images/dog", "train/masks/cat", "test/images/cat"], "train/images"),
    ],
)  # fmt: skip
def test_class_folders_of_folders_are_refused_with_the_path_that_looks_right(tmp_path, names, likely):
    for index, name in enumerate(names):
        put(tmp_path, *(f"{name}/{number}.png" for number in range(9 - index)))
    for read in (load, folder_sizes):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert f"name the folder whose folders are the classes ({tmp_path / likely}, by" in str(caught.value)


def test_one_image_in_a_class_folder_makes_it_one(tmp_path):
    put(tmp_path, "a/deep/1.png", "a/deep/2.png", "b/1.png", "b/deep/2.png")
    assert load(tmp_path).class_names == ("a", "b")


# To evaluate


@pytest.mark.parametrize("part", ["test", "val"])
def test_test_images_alone_can_be_evaluated_and_not_trained_on(tmp_path, part):
    put(tmp_path, f"{part}/a/1.png", f"{part}/b/1.png", f"{part}/b/2.png")
    dataset = load(tmp_path, for_training=False)
    assert (dataset.class_names, dataset.test.labels.tolist(), len(dataset.train)) == (("a", "b"), [0, 1, 1], 0)
    assert dataset.whole is dataset.validation is None
    with pytest.raises(UserError, match=f"holds {part} with folders in them: expected are train/CLASS"):
        load(tmp_path)
    relabelled = dataset.with_classes(("z", "b", "a"))
    assert relabelled.test.labels.tolist() == [2, 1, 1]


def test_a_folder_without_parts_can_be_evaluated_whole(tmp_path):
    put(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(5)))
    dataset = load(tmp_path, for_training=False)
    assert dataset.whole is not None
    assert torch.bincount(dataset.whole.labels).tolist() == [5, 5]
    assert dataset.whole.images.data_ptr() == dataset.train.images.data_ptr(), "the images are in memory twice"
    other = dataset.with_classes(("z", "b", "a")).whole
    assert other is not None and torch.bincount(other.labels).tolist() == [0, 5, 5]
    assert len(load(put(tmp_path / "one", "a/1.png", "a/2.png"), for_training=False).class_names) == 1


@pytest.mark.parametrize("names", [["train/a/1.png", "train/b/1.png"], ["test/a/x/y.txt"], ["Test/a/1.png"]])
def test_what_cannot_be_evaluated(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"with folders in them: expected are|has no images for test"):
        load(tmp_path, for_training=False)


# The official files


@pytest.mark.parametrize("archive", [CIFAR10, CIFAR100])
@pytest.mark.parametrize("inner", ["folder", "tarball"])
def test_the_official_folder_itself_may_be_named(tmp_path, monkeypatch, archive, inner):
    monkeypatch.setenv(archive.urls_variable, "")
    folder = tmp_path / archive.folder
    folder.mkdir()
    for file in archive.files:
        (folder / file.name).touch()
    named = tmp_path / getattr(archive, inner)
    assert provide(archive, named) == provide(archive, tmp_path) == folder
    assert where_found(archive, named) == f"found: {folder}"


@pytest.mark.parametrize("name", ["CIFAR10", "Cifar-10", "cifar_10", "Shapes"])
def test_a_dataset_in_another_case_is_recognized(name):
    meant = "shapes" if name == "Shapes" else "cifar10"
    assert meant in KNOWN_SIZES
    with pytest.raises(UserError, match=f"unknown dataset '{name}', did you mean '{meant}'"):
        check_dataset_name(name)


# Names


ODD, SHOWN = "n\x1b[31m\n\x9b", r"n\x1b[31m\n\x9b"


def test_control_characters_of_names_are_escaped(tmp_path):
    put(tmp_path / ODD, f"{ODD}/{ODD}.png", f"{ODD}/2.png", "b/1.png", "b/2.png")
    (tmp_path / ODD / "b" / f"{ODD}.jpg").touch()
    with pytest.raises(UserError) as caught:
        load(tmp_path / ODD)
    assert f"b/{SHOWN}.jpg" in str(caught.value) and "\x1b" not in str(caught.value)
    (tmp_path / ODD / "b" / f"{ODD}.jpg").unlink()
    dataset = load(tmp_path / ODD)
    assert (dataset.name, dataset.class_names) == (SHOWN, ("b", SHOWN))
    names = [file.name for file in find_images([tmp_path / ODD / ODD / f"{ODD}.png", tmp_path / ODD / ODD])[0]]
    assert names == [printable(str(tmp_path / ODD / ODD / name)) for name in (f"{ODD}.png", "2.png")]
    assert str(UserError(f"there is no checkpoint {ODD}")) == r"there is no checkpoint n\x1b[31m \x9b"
    assert printable("Üß 猫 \u200d👩‍🚀") == "Üß 猫 \u200d👩‍🚀"


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_that_is_printed_commands_the_terminal(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=100)
    print_notes(console, [f"note {ODD}"])
    print_lines(console, [f"line {ODD}"], title=f"title {ODD}")
    print_header(console, {"run": ODD})
    text = console.file.getvalue()
    assert text.count(SHOWN) == (4 if terminal else 3) and "\x1b" not in text and "\x9b" not in text


# Links


def test_each_path_is_predicted_once_as_it_was_typed(tmp_path):
    put(tmp_path, "store/x.png")
    links = [tmp_path / "l1.png", tmp_path / "l2.png", tmp_path / "folder" / "l3.png"]
    links[2].parent.mkdir()
    for link in links:
        link.symlink_to(tmp_path / "store/x.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "store/x.png")
    typed = [*links[:2], links[0], tmp_path / "folder", links[2], tmp_path / "hard.png"]
    files, refused, _ = find_images(typed)
    assert [file.path for file in files] == [*map(str, links), str(tmp_path / "hard.png")]
    assert not refused
