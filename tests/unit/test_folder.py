"""Class folders: found, split, decoded, refused and cached, with small images made here."""

import errno
import io
import os
import re
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import CenterCrop, Compose, Resize

from cifar_dist.config.errors import UserError
from cifar_dist.data import decoding, image_cache
from cifar_dist.data.archives import CIFAR10
from cifar_dist.data.cifar import load_archive
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.data.decoding import Progress, decode
from cifar_dist.data.folder import load_folder
from cifar_dist.data.image_cache import default_cache_dir
from tests.conftest import ROOT

SIZE = 8


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which must not be made before it is needed."""
    folder = tmp_path_factory.mktemp("cache") / "made/later"
    monkeypatch.setenv("CIFAR_DIST_CACHE", str(folder))
    return folder


def noise(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def put(folder: Path, *names: str, width: int = SIZE, height: int = SIZE) -> None:
    """Write images whose pixels are noise that depends on the name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(crc32(os.fsencode(name)), width, height).save(folder / name)


def load(
    folder: Path, image_size: int = SIZE, seed: int = 0, cache_dir: Path | None = None, progress: Progress | None = None
) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        if cache_dir:
            patch.setenv("CIFAR_DIST_CACHE", str(cache_dir))
        return load_folder(folder, image_size=image_size, seed=seed, progress=progress)


def from_cache(dataset: Dataset) -> bool:
    return str(dataset.origin).endswith(" MiB in memory (read from the cache)")


def mebibytes(dataset: Dataset) -> float:
    match = re.search(r", ([0-9.]+) MiB in memory", str(dataset.origin))
    assert match is not None
    return float(match[1])


def refused(folder: Path, image_size: int = SIZE) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, image_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rgb(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def holds(part: LabelledImages | None, folder: Path, *names: str) -> bool:
    """Whether a part has exactly these lossless images, in this order."""
    assert part is not None
    wanted = [rgb(folder / name).transpose(2, 0, 1) for name in names]
    assert len(part) == len(names)
    return np.array_equal(part.images.numpy(), np.stack(wanted))


TWO = ("train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png")


# What is found


def test_train_and_test(tmp_path: Path) -> None:
    put(tmp_path / "pets", *TWO, "train/dog/0.png")
    dataset = load(tmp_path / "pets")
    assert (dataset.name, dataset.class_names, dataset.validation) == ("pets", ("cat", "dog"), None)
    assert holds(dataset.train, tmp_path / "pets", "train/cat/1.png", "train/dog/0.png", "train/dog/1.png")
    assert holds(dataset.test, tmp_path / "pets", "test/cat/2.png", "test/dog/2.png")
    assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([0, 1, 1], [0, 1])


def test_val_is_the_test_set_where_there_is_no_other(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png", "val/b/2.png")
    loaded = load(tmp_path)
    assert holds(loaded.test, tmp_path, "val/b/2.png")
    assert (loaded.test.labels.tolist(), loaded.validation) == ([1], None)


def test_val_beside_test_is_the_validation_set(tmp_path: Path) -> None:
    put(tmp_path, *TWO, "val/dog/3.png")
    loaded = load(tmp_path)
    assert holds(loaded.validation, tmp_path, "val/dog/3.png")
    assert loaded.validation is not None
    assert loaded.validation.labels.tolist() == [1]
    assert holds(loaded.test, tmp_path, "test/cat/2.png", "test/dog/2.png")
    assert str(loaded.origin).startswith("5 files of 8x8 pixels, ")


def test_classes_and_samples_are_in_one_order_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a/b/1.png", "a/b.png", "a/b-1.png", "a-b/1.png", "B/1.png"]  # "-" < "." < "/"
    put(tmp_path, *(f"train/{name}" for name in names), "test/a/1.png")
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *error: object) -> None: ...

    for listing in (scandir, Reversed):
        monkeypatch.setattr(os, "scandir", listing)
        dataset = load(tmp_path)
        assert dataset.class_names == ("B", "a", "a-b")
        ordered = ("B/1.png", "a/b-1.png", "a/b.png", "a/b/1.png", "a-b/1.png")
        assert holds(dataset.train, tmp_path, *(f"train/{name}" for name in ordered))
        assert dataset.train.labels.tolist() == [0, 1, 1, 1, 2]
        assert dataset.test.labels.tolist() == [1]


def test_hidden_and_other_files_are_skipped_and_deep_ones_are_not(tmp_path: Path) -> None:
    put(tmp_path, *TWO, "train/cat/deep/er/9.PNG", "train/cat/0.JpG", "train/.c/1.png", "train/cat/.x/1.png")
    put(tmp_path, "train/cat/._1.png", ".test/fox/1.png", "train/stray.png", "stray.png", "other/1.png")
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/png").write_text("no image")
    (tmp_path / "README.md").write_text("no image")
    loaded = load(tmp_path)
    assert loaded.class_names == ("cat", "dog")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1]
    assert torch.equal(loaded.train.images[2], torch.tensor(decode_saved("train/cat/deep/er/9.PNG")))


def decode_saved(name: str) -> np.ndarray:
    return np.asarray(noise(crc32(name.encode()))).transpose(2, 0, 1)


@pytest.mark.parametrize("suffix", "png jpg jpeg bmp gif webp ppm tif tiff".split())
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, *TWO, f"test/dog/3.{suffix}")
    image = load(tmp_path).test.images[2].permute(1, 2, 0).numpy()
    assert np.array_equal(image, rgb(tmp_path / f"test/dog/3.{suffix}"))


@pytest.mark.parametrize("suffix", ["heic", "HEIF", "avif"])
def test_formats_that_cannot_be_read_are_named(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, *TWO)
    (tmp_path / f"test/cat/phone.{suffix}").write_bytes(b"anything")
    assert f"cannot be read, convert them (to PNG or JPEG): test/cat/phone.{suffix}" in refused(tmp_path)


def test_links_are_followed_once_and_pipes_are_not_opened(tmp_path: Path) -> None:
    put(tmp_path, *TWO)
    put(tmp_path / "elsewhere", "7.png")
    (tmp_path / "train/cat/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "train/cat")
    (tmp_path / "train/fox").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    loaded = load(tmp_path)
    assert loaded.class_names == ("cat", "dog", "fox")
    assert loaded.train.labels.tolist() == [0, 0, 1, 2, 2]  # fox has 7.png and, by the link back, the cat


def test_names_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    put(tmp_path, "train/e\u0301/1.png", "train/b/1.png", "test/\u00e9/1.png")
    if sys.platform == "linux":
        put(tmp_path, os.fsdecode(b"train/\xff/1.png"))
        assert load(tmp_path).class_names == (r"\xff", "b", "\u00e9")
    assert load(tmp_path).test.labels.tolist() == [load(tmp_path).class_names.index("\u00e9")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one way to write a name")
def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    put(tmp_path, *TWO, "train/e\u0301/1.png", "train/\u00e9/2.png")
    assert "has two folders that are both called \u00e9" in refused(tmp_path)


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, *TWO)
    (tmp_path / "train/loop").symlink_to("loop")
    assert load(tmp_path).class_names == ("cat", "dog")
    (tmp_path / "test/dog/loop.png").symlink_to("loop.png")
    assert "cannot be read" in (text := refused(tmp_path)) and "test/dog/loop.png" in text


def test_name_of_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "pets", *TWO)
    (tmp_path / "link").symlink_to("pets")
    monkeypatch.chdir(tmp_path / "pets/train")
    assert load(Path("..")).name == "pets"
    assert load(tmp_path / "link").name == "link"


# The split of a folder without one


def put_flat(folder: Path, **counts: int) -> None:
    for name, count in counts.items():
        put(folder, *(f"{name}/{index:02}.png" for index in range(count)))


def test_flat_folder_gives_a_fifth_of_each_class(tmp_path: Path) -> None:
    put_flat(tmp_path, one=1, two=2, three=3, seven=7, eight=8, forty=40)
    dataset = load(tmp_path)
    assert dataset.class_names == ("eight", "forty", "one", "seven", "three", "two")
    assert Counter(dataset.test.labels.tolist()) == {0: 2, 1: 8, 3: 1, 4: 1, 5: 1}
    assert Counter(dataset.train.labels.tolist()) == {0: 6, 1: 32, 2: 1, 3: 6, 4: 2, 5: 1}
    assert dataset.train.labels.tolist() == sorted(dataset.train.labels.tolist())
    every = torch.cat([dataset.train.images, dataset.test.images])
    assert len(torch.unique(every.flatten(1), dim=0)) == 61


def test_split_is_fixed_by_the_seed_and_hardly_by_other_files(tmp_path: Path) -> None:
    def test_set(seed: int) -> set[bytes]:
        return {image.numpy().tobytes() for image in load(tmp_path, seed=seed).test.images}

    put_flat(tmp_path, a=30, b=30)
    first = test_set(0)
    assert first == test_set(0)
    assert len(first & test_set(1)) < 10
    put(tmp_path, "a/new.png", "c/1.png", "c/2.png")
    assert len(first & test_set(0)) >= 11


def test_class_may_be_called_train(tmp_path: Path) -> None:
    put_flat(tmp_path, train=5, plane=5, test=5)
    assert load(tmp_path).class_names == ("plane", "test", "train")


# What is no dataset


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "no") == f"cannot read the folder {tmp_path / 'no'}: No such file or directory"
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file") == f"cannot read the folder {tmp_path / 'file'}: Not a directory"


def test_class_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *TWO)
    scandir = os.scandir

    def forbidden(path: str | Path) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert refused(tmp_path) == f"cannot read the folder {tmp_path / 'train/dog'}: Permission denied"


@pytest.mark.parametrize("names", [(), ("a/1.png", "a/2.png"), ("1.png", "2.png"), ("train/a/1.png", "test/a/1.png")])
def test_one_class_is_too_few(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, *names)
    assert "two or more" in refused(tmp_path)


@pytest.mark.parametrize("part", ["test", "val"])
def test_class_that_training_lacks_is_named(tmp_path: Path, part: str) -> None:
    put(tmp_path, *TWO, f"{part}/fox/1.png", "test/cat/3.png")
    assert refused(tmp_path) == f"{tmp_path} has classes for {part} that train/ lacks: fox"


def test_class_that_only_training_has_is_one(tmp_path: Path) -> None:
    put(tmp_path, *TWO, "train/eel/1.png")
    (tmp_path / "test/dog/2.png").unlink()
    dataset = load(tmp_path)
    assert (dataset.class_names, dataset.test.labels.tolist()) == (("cat", "dog", "eel"), [0])


def test_class_without_training_images_is_named(tmp_path: Path) -> None:
    put(tmp_path, *TWO)
    (tmp_path / "train/dog/1.png").unlink()
    assert f"no training images in {tmp_path} of dog" in refused(tmp_path)


def test_test_set_without_images_is_refused(tmp_path: Path) -> None:
    put(tmp_path, *TWO)
    for name in TWO[2:]:
        (tmp_path / name).unlink()
    assert refused(tmp_path) == f"{tmp_path} has no images for test"
    put_flat(tmp_path / "flat", a=1, b=1)
    assert refused(tmp_path / "flat") == f"{tmp_path / 'flat'} has no images for test"


@pytest.mark.parametrize("parts", [("train",), ("test", "val"), ("train", "valid"), ("Train", "Test"), ("training",)])
def test_parts_by_other_names_are_not_taken_for_classes(tmp_path: Path, parts: tuple[str, ...]) -> None:
    put(tmp_path, *(f"{part}/{name}/1.png" for part in parts for name in "ab"), "cat/1.png", "dog/1.png")
    assert f"{tmp_path} holds {', '.join(sorted(parts))} with folders in them" in refused(tmp_path)


# One image


def decoded(tmp_path: Path, image: Image.Image, suffix: str = "png", size: int = SIZE, **options: object) -> np.ndarray:
    image.save(tmp_path / f"image.{suffix}", **options)
    return decode(str(tmp_path / f"image.{suffix}"), size)[0]


def test_image_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    assert np.array_equal(decoded(tmp_path, noise(1)), np.asarray(noise(1)))


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (9, 8), (8, 11), (5, 3), (3, 64), (100, 16)])
def test_other_sizes_are_brought_to_it_as_torchvision_does(tmp_path: Path, width: int, height: int) -> None:
    image = noise(2, width, height)
    wanted = np.asarray(Compose([Resize(SIZE), CenterCrop(SIZE)])(image)).astype(int)
    assert abs(decoded(tmp_path, image) - wanted).max() <= 1


def test_strip_is_not_blown_up_before_it_is_cropped(tmp_path: Path) -> None:
    strip = Image.new("RGB", (1, 60_000), (10, 20, 30))
    tracemalloc.start()
    assert (decoded(tmp_path, strip, size=512) == (10, 20, 30)).all()  # uncropped, 512 x 30,720,000
    tracemalloc.stop()


def test_grey_and_palettes_become_rgb(tmp_path: Path) -> None:
    grey = noise(3).convert("L")
    assert np.array_equal(decoded(tmp_path, grey), np.asarray(grey.convert("RGB")))
    black_and_white = noise(3).convert("1")
    assert np.array_equal(decoded(tmp_path, black_and_white), np.asarray(black_and_white.convert("RGB")))
    palette = noise(3).quantize(16)
    assert np.array_equal(decoded(tmp_path, palette), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    ink = Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0))
    assert abs(decoded(tmp_path, ink, suffix).astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path, suffix: str) -> None:
    deep = np.random.default_rng(4).integers(0, 65_536, (SIZE, SIZE)).astype(np.uint16)
    image = decoded(tmp_path, Image.fromarray(deep), suffix)
    assert np.array_equal(image, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_pixels_of_32_bits_are_taken_for_16_and_cut_off_at_their_ends(tmp_path: Path) -> None:
    deep = np.tile(np.array([[-5, 0, 256, 65_535, 65_536, 70_000]], dtype=np.int32), (6, 1))
    image = decoded(tmp_path, Image.fromarray(deep).resize((SIZE, SIZE), Image.Resampling.NEAREST), "tif")
    assert np.unique(image).tolist() == [0, 1, 255]


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        decoded(tmp_path, Image.new("F", (SIZE, SIZE), 0.5), "tif")


def test_transparent_parts_become_grey(tmp_path: Path) -> None:
    clear, half, solid = (decoded(tmp_path, Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, a))) for a in (0, 128, 255))
    assert (clear == 128).all()
    assert abs(half[0, 0].astype(int) - (192, 64, 64)).max() <= 1
    assert (solid == (255, 0, 0)).all()
    assert (decoded(tmp_path, Image.new("LA", (SIZE, SIZE), (255, 0))) == 128).all()
    palette = noise(3).quantize(16)
    assert (decoded(tmp_path, palette, transparency=bytes(16)) == 128).all()
    assert (decoded(tmp_path, Image.new("RGB", (SIZE, SIZE), (1, 2, 3)), transparency=(1, 2, 3)) == 128).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_image_is_turned_as_its_exif_says(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (2 * SIZE, SIZE), "red")
    image.paste("blue", (0, 0, SIZE, SIZE))  # blue is on the left, and at the top when it was turned
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / f"image.{suffix}", exif=exif, quality=100)
    turned, original = decode(str(tmp_path / f"image.{suffix}"), SIZE)
    assert original == (SIZE, 2 * SIZE)
    assert turned[0, 4, 2] > 200 > 60 > turned[0, 4, 0]
    assert turned[-1, 4, 0] > 200 > 60 > turned[-1, 4, 2]


def test_broken_exif_leaves_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *TWO)
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01junk" * 3
    noise(5).save(tmp_path / "test/dog/broken.jpg", exif=exif)
    first = load(tmp_path)
    assert np.array_equal(first.test.images[2].permute(1, 2, 0), decoded(tmp_path, noise(5), "jpg"))

    def fail(image: Image.Image, *, in_place: bool) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert same(first, load(tmp_path, cache_dir=tmp_path / ".other"))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    red, blue = (Image.new("RGB", (SIZE, SIZE), name) for name in ("red", "blue"))
    image = decoded(tmp_path, red, suffix, save_all=True, append_images=[blue])
    assert abs(image.astype(int) - (255, 0, 0)).max() < 4


# Unreadable files


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_unreadable_files_are_named_together_and_nothing_is_cached(tmp_path: Path, cache: Path) -> None:
    put(tmp_path, *TWO)
    good = png(noise(6, 64, 64))
    bad = {"empty": b"", "text": b"text", "cut": good[: len(good) // 2], "cut early": good[:20]}
    bad |= {"postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}
    for name, content in bad.items():
        (tmp_path / f"test/dog/{name}.png").write_bytes(content)
    (tmp_path / "test/dog/link.png").symlink_to("nowhere")
    named = ", ".join(sorted(f"test/dog/{name}.png" for name in [*bad, "link"]))
    text = refused(tmp_path)
    assert text.startswith("6 of 10 image files cannot be read (")
    assert f": {named}; replace or remove them" in text
    assert not cache.exists()


def test_ten_unreadable_files_are_named_and_the_others_counted(tmp_path: Path) -> None:
    put(tmp_path, *TWO)
    for index in range(12):
        (tmp_path / f"train/cat/bad{index:02}.jpg").touch()
    assert "train/cat/bad08.jpg, train/cat/bad09.jpg and 2 more;" in refused(tmp_path)


def test_a_decompression_bomb_is_named_and_a_large_photograph_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond its limit Pillow warns, beyond twice the limit it raises."""
    put(tmp_path, *TWO)
    put(tmp_path, "test/cat/large.png", width=2 * SIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE)
    assert len(load(tmp_path).test) == 3
    put(tmp_path, "test/cat/bomb.png", width=3 * SIZE)
    assert "1 of 6 image files cannot be read (" in refused(tmp_path)
    assert "test/cat/bomb.png" in refused(tmp_path)


def test_warnings_do_not_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *TWO)
    load_pixels = ImageFile.ImageFile.load

    def warning(self: ImageFile.ImageFile) -> object:
        warnings.warn("odd metadata", UserWarning, stacklevel=1)
        return load_pixels(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", warning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(tmp_path)
    assert not caught


# Memory and progress


def test_images_that_do_not_fit_are_refused_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *TWO)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 3 * 512**2 - 1))
    monkeypatch.setattr(decoding, "decode", None)
    assert refused(tmp_path, 512).startswith(
        "4 images of 512 x 512 take 3 MiB, and 3 MiB of memory are available: choose a smaller image_size (at most 511)"
    )
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 3 * 512**2))
    assert mebibytes(load(tmp_path, 512)) == 3


def test_pixels_are_in_memory_once(tmp_path: Path) -> None:
    put(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png", "val/a/0.png")
    content = (tmp_path / "train/a/0.png").read_bytes()
    for index in range(1, 300):
        (tmp_path / f"train/a/{index}.png").write_bytes(content)
    for _ in ("decoded and saved", "from the cache"):
        tracemalloc.start()  # sees NumPy's and Python's memory, not torch's, in which the images lie
        loaded = load(tmp_path, 192)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert mebibytes(loaded) > 30
        assert peak < 16 * 2**20
    parts = (loaded.train, loaded.test, loaded.validation)
    assert len({part.images.untyped_storage().data_ptr() for part in parts if part}) == 1
    assert all(part and part.images.is_contiguous() for part in parts)


def test_progress_is_told_up_to_the_last_file(tmp_path: Path) -> None:
    put_flat(tmp_path, a=30, b=10)
    told: list[tuple[int, int | None]] = []
    load(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(16, 40), (32, 40), (40, 40)]


def test_processes_decode_what_threads_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    put_flat(folder, a=30, b=10)
    put(folder, "a/wide.png", width=40, height=20)
    by_threads = load(folder, cache_dir=tmp_path / "one")
    monkeypatch.setattr(decoding, "_MANY", 1)
    monkeypatch.setattr(decoding, "ThreadPoolExecutor", None)
    told: list[int] = []
    by_processes = load(folder, cache_dir=tmp_path / "other", progress=lambda done, _: told.append(done))
    assert same(by_processes, by_threads)
    assert told == [16, 32, 41]
    (folder / "a" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 42 image files cannot be read .*: a/bad\.png"):
        load(folder, cache_dir=tmp_path / "third")


def test_threads_decode_where_processes_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_flat(tmp_path / "images", a=30, b=10)
    by_threads = load(tmp_path / "images", cache_dir=tmp_path / "one")
    monkeypatch.setattr(decoding, "_MANY", 1)
    monkeypatch.setattr(decoding, "_begin_worker", os.abort)
    assert same(load(tmp_path / "images", cache_dir=tmp_path / "other"), by_threads)


@pytest.mark.parametrize("many", [1, 10_000])
def test_decoding_leaves_the_filters_of_warnings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    put_flat(tmp_path, a=40, b=40)
    # Pillow warns of so many pixels; its limit is not lowered, as a process would not hear of it.
    Image.new("L", (9_500, 9_500)).save(tmp_path / "a" / "large.png", compress_level=1)
    monkeypatch.setattr(decoding, "_MANY", many)
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as for a user, and not the errors that warnings are in tests
        before = list(warnings.filters)
        assert "81 files" in (load(tmp_path).origin or "")
        assert warnings.filters == before


def test_interruption_does_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    put_flat(tmp_path, a=200, b=200)
    count = Counter[str]()

    def counting(path: str, size: int) -> object:
        count["decoded"] += 1
        return decode(path, size)

    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "decode", counting)
    monkeypatch.setattr(decoding, "_MAX_WORKERS", 1)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, progress=interrupt)
    assert count["decoded"] < 300
    assert not cache.exists()


# What a person is shown, and the cache


def same(one: Dataset, other: Dataset) -> bool:
    return one.fingerprint() == other.fingerprint()


def files_in(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_origin_is_the_same_from_the_cache(tmp_path: Path, cache: Path) -> None:
    put(tmp_path, *TWO)
    put(tmp_path, "test/cat/wide.png", width=40, height=2)
    put(tmp_path, "test/cat/large.png", width=10, height=12)
    put(tmp_path, "test/cat/tiny.png", width=3, height=9)
    first = load(tmp_path)
    assert first.origin == "7 files of 3x9 to 10x12 pixels, resized and cropped to 8x8, 0.0 MiB in memory"
    second = load(tmp_path)
    assert second.origin == f"{first.origin} (read from the cache)"
    assert same(first, second)
    assert [file.suffix for file in files_in(cache)] == [".pixels"]


def test_cached_pixels_are_used_without_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_flat(tmp_path, a=20, b=20)
    first, other_split = load(tmp_path, seed=1), load(tmp_path, seed=2)
    load(tmp_path, 4)  # replaces it
    alone = [load(tmp_path, seed=seed, cache_dir=tmp_path / f".{seed}") for seed in (1, 2)]
    assert same(first, alone[0])
    assert same(other_split, alone[1])
    assert not same(first, other_split)
    assert from_cache(other_split)  # found by another order of the same files
    monkeypatch.setattr(decoding, "decode", None)
    assert from_cache(load(tmp_path, seed=3, cache_dir=tmp_path / ".1"))


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def same_size(path: Path) -> None:
    status, content = path.stat(), png(noise(99))
    path.write_bytes(content + bytes(status.st_size - len(content)))
    touch(path)


def longer(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "other content": same_size,
    "other time": touch,
    "longer, other time": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "longer, same time": longer,
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("4.png")),
    "added": lambda path: put(path.parent, "5.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folder_is_seen_and_its_old_file_removed(tmp_path: Path, cache: Path, change: str) -> None:
    put(tmp_path / "data", *TWO, "train/cat/3.png")
    (tmp_path / "data/train/cat/3.png").write_bytes(png(noise(3)) + bytes(50))
    put(tmp_path / "other", *TWO)
    load(tmp_path / "data")
    load(tmp_path / "other")
    before = files_in(cache)
    (cache / f"{min(before, key=lambda file: file.stat().st_mtime_ns).stem}killed.part").write_bytes(b"half")
    CHANGES[change](tmp_path / "data/train/cat/3.png")
    changed = load(tmp_path / "data")
    assert not from_cache(changed)
    assert same(changed, load(tmp_path / "data", cache_dir=tmp_path / "fresh"))
    assert len(files_in(cache)) == len(before) == 2
    assert len(set(files_in(cache)) & set(before)) == 1
    assert from_cache(load(tmp_path / "other"))


def test_other_image_size_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    put(tmp_path, *TWO)
    load(tmp_path, 4)
    assert load(tmp_path, SIZE).train.images.shape == (2, 3, SIZE, SIZE)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:10],
    "cut in the pixels": lambda content: content[:200],
    "cut at the end": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "bit in the sizes": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "bit in the pixels": lambda content: content[:300] + bytes([content[300] ^ 16]) + content[301:],
    "bit in the checksum": lambda content: content[:-1] + bytes([content[-1] ^ 128]),
    "foreign": lambda content: b"something else" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_rebuilt(tmp_path: Path, cache: Path, damage: str) -> None:
    put(tmp_path, *TWO)
    first = load(tmp_path)
    [file] = files_in(cache)
    content = file.read_bytes()
    file.write_bytes(DAMAGES[damage](content))
    second = load(tmp_path)
    assert not from_cache(second)
    assert same(first, second)
    assert file.read_bytes() == content


def test_cache_of_another_folder_is_not_taken_under_a_false_name(tmp_path: Path, cache: Path) -> None:
    put(tmp_path / "one", *TWO)
    put(tmp_path / "two", *TWO)
    noise(9).save(tmp_path / "two/train/cat/1.png")
    load(tmp_path / "one")
    [first] = files_in(cache)
    load(tmp_path / "two")
    [second] = set(files_in(cache)) - {first}
    second.write_bytes(first.read_bytes())
    assert not from_cache(load(tmp_path / "two"))


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *TWO)
    (tmp_path / "file").touch()
    for _ in range(2):
        assert not from_cache(load(tmp_path, cache_dir=tmp_path / "file/cache"))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert not from_cache(load(tmp_path, cache_dir=tmp_path / "cache"))
    assert files_in(tmp_path / "cache") == []


def test_cache_file_gets_its_name_when_it_is_whole(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, *TWO)
    done: list[str] = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor)))

    def interrupted(self: Path, target: Path) -> Path:
        assert done == ["fsync"]
        assert self.stat().st_size > 4 * 3 * SIZE**2
        assert not target.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert files_in(cache) == []
    monkeypatch.setattr(Path, "replace", rename)
    load(tmp_path)
    assert len(files_in(cache)) == 1


def test_many_at_once_all_get_the_right_pixels(tmp_path: Path, cache: Path) -> None:
    # Threads stand for processes: they share nothing but the files. Two sizes, so that they remove each other's files.
    put_flat(tmp_path, a=20, b=20)
    wanted = {size: load(tmp_path, size, cache_dir=tmp_path / ".alone") for size in (4, SIZE)}
    wrong: list[int] = []

    def keep_loading(size: int) -> None:
        for _ in range(5):
            if not same(load(tmp_path, size), wanted[size]):
                wrong.append(size)

    threads = [threading.Thread(target=keep_loading, args=(size,)) for size in (4, SIZE) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(file.suffix == ".pixels" for file in files_in(cache))


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.home()
    assert default_cache_dir({}, "linux") == home / ".cache/cifar-dist"
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}, "linux") == Path("/x/cifar-dist")
    assert default_cache_dir({"XDG_CACHE_HOME": "relative"}, "linux") == home / ".cache/cifar-dist"
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}, "darwin") == home / "Library/Caches/cifar-dist"
    assert default_cache_dir({"LOCALAPPDATA": "/local", "XDG_CACHE_HOME": "/x"}, "win32") == Path("/local/cifar-dist")
    for platform in ("linux", "darwin", "win32"):
        assert default_cache_dir({"CIFAR_DIST_CACHE": "/own", "XDG_CACHE_HOME": "/x"}, platform) == Path("/own")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_cache_dir({}, "linux") is None


def test_without_any_place_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *TWO)
    monkeypatch.setattr(image_cache, "default_cache_dir", lambda: None)
    assert not from_cache(load(tmp_path))


# The official images


@pytest.mark.official
def test_official_images_in_folders_are_those_of_the_official_files(official_data: Path) -> None:
    folder = official_data / "cifar10-png/test"
    if not folder.is_dir():
        pytest.skip(f"there are no class folders of PNG files in {folder}")
    official = load_archive(replace(CIFAR10, train=()), official_data).test
    for _ in ("decoded", "from the cache"):
        dataset = load_folder(folder, image_size=32, seed=0)
        assert (dataset.class_names, dataset.sizes.num_test) == (CIFAR10.class_names, 2_000)
        for label in range(10):
            found = [image for part in (dataset.train, dataset.test) for image in part.images[part.labels == label]]
            wanted = official.images[official.labels == label]
            assert len(found) == len(wanted)
            assert {image.numpy().tobytes() for image in found} == {image.numpy().tobytes() for image in wanted}
    assert from_cache(dataset)


def test_files_that_change_places_are_decoded_again(tmp_path: Path) -> None:
    """Of equal size and equal age, as an archive may unpack them."""
    for name, color in (("dark", 10), ("light", 240)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (SIZE, SIZE), color).save(tmp_path / "train" / name / f"{number}.bmp")
            os.utime(tmp_path / "train" / name / f"{number}.bmp", (1, 1))
    put(tmp_path / "test" / "dark", "0.png")
    put(tmp_path / "test" / "light", "0.png")
    before = load(tmp_path).train.images
    dark, light = (tmp_path / "train" / name / "0.bmp" for name in ("dark", "light"))
    dark.rename(tmp_path / "x")
    light.rename(dark)
    (tmp_path / "x").rename(light)
    after = load(tmp_path).train.images
    assert sorted(before[:, 0, 0, 0].tolist()) == [10, 10, 240, 240]
    assert [before[0, 0, 0, 0], after[0, 0, 0, 0]] == [10, 240]


def test_a_script_without_a_guard_is_not_run_again_by_the_processes_that_decode(tmp_path: Path) -> None:
    put(tmp_path, *(f"{number}.png" for number in range(40)))
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from cifar_dist.data import decoding, image_files\n"
        "print('ran')\n"
        "decoding._MANY = 1\n"
        "files, _ = image_files.find_images(sorted(Path(__file__).parent.glob('*.png')))\n"
        "print(image_files.decode_images(files, 8)[1] == [True] * 40)\n"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ran\nTrue\n", "")
