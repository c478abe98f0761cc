"""Class folders found, split, decoded, refused and cached, with small images."""

import errno
import io
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

SIZE = 8
TWO = ("train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test, which does not exist yet."""
    folder = tmp_path_factory.mktemp("cache") / "made/later"
    monkeypatch.setenv("CIFAR_DIST_CACHE", str(folder))
    return folder


def noise(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def put(folder: Path, *names: str, width: int = SIZE, height: int = SIZE) -> None:
    """Write images of noise that depends on the name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(crc32(os.fsencode(name)), width, height).save(folder / name)


def put_flat(folder: Path, **counts: int) -> None:
    for name, count in counts.items():
        put(folder, *(f"{name}/{index:02}.png" for index in range(count)))


def load(
    folder: Path, image_size: int = SIZE, cache_dir: Path | None = None, progress: Progress | None = None
) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        if cache_dir:
            patch.setenv("CIFAR_DIST_CACHE", str(cache_dir))
        return load_folder(folder, image_size=image_size, progress=progress)


def from_cache(dataset: Dataset) -> bool:
    return str(dataset.origin).endswith(" MiB in memory (read from the cache)")


def same(one: Dataset, other: Dataset) -> bool:
    return one.fingerprint() == other.fingerprint()


def refused(folder: Path, image_size: int = SIZE) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, image_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rgb(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def holds(part: LabelledImages | None, folder: Path, *names: str) -> bool:
    """Return whether a part has exactly these lossless images, in this order."""
    assert part is not None
    wanted = [rgb(folder / name).transpose(2, 0, 1) for name in names]
    return len(part) == len(names) and np.array_equal(part.images.numpy(), np.stack(wanted))


# What is found


def test_train_and_test(tmp_path: Path) -> None:
    put(tmp_path / "pets", *TWO, "train/dog/0.png", "train/eel/1.png")  # a class may lack test images
    dataset = load(tmp_path / "pets")
    assert (dataset.name, dataset.class_names, dataset.validation) == ("pets", ("cat", "dog", "eel"), None)
    assert holds(dataset.train, tmp_path / "pets/train", "cat/1.png", "dog/0.png", "dog/1.png", "eel/1.png")
    assert holds(dataset.test, tmp_path / "pets/test", "cat/2.png", "dog/2.png")
    assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([0, 1, 1, 2], [0, 1])


def test_val_is_the_validation_set_beside_test_and_else_the_test_set(tmp_path: Path) -> None:
    put(tmp_path, *TWO, "val/dog/3.png")
    both = load(tmp_path)
    assert holds(both.validation, tmp_path, "val/dog/3.png")
    assert both.validation is not None and both.validation.labels.tolist() == [1]
    assert holds(both.test, tmp_path, "test/cat/2.png", "test/dog/2.png")
    (tmp_path / "test").rename(tmp_path / "other")
    alone = load(tmp_path)
    assert holds(alone.test, tmp_path, "val/dog/3.png")
    assert (alone.test.labels.tolist(), alone.validation) == ([1], None)


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered = ("B/1.png", "a/b-1.png", "a/b.png", "a/b/1.png", "a-b/1.png")  # "-" < "." < "/"
    put(tmp_path, *(f"train/{name}" for name in ordered), "test/a/1.png")
    scandir = os.scandir

    @contextmanager
    def sorted_backwards(path: str) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    for listing in (scandir, sorted_backwards):
        monkeypatch.setattr(os, "scandir", listing)
        dataset = load(tmp_path)
        assert dataset.class_names == ("B", "a", "a-b")
        assert holds(dataset.train, tmp_path / "train", *ordered)
        assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([0, 1, 1, 1, 2], [1])


def test_hidden_and_other_files_are_skipped_and_deep_ones_are_not(tmp_path: Path) -> None:
    put(tmp_path, *TWO, "train/cat/deep/er/9.PNG", "train/cat/0.JpG", "train/.c/1.png", "train/cat/.x/1.png")
    put(tmp_path, "train/cat/._1.png", ".test/fox/1.png", "train/stray.png", "stray.png", "other/1.png")
    for name in ("train/cat/notes.txt", "train/cat/png", "README.md"):
        (tmp_path / name).write_text("no image")
    loaded = load(tmp_path)
    assert loaded.class_names == ("cat", "dog")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1]
    assert np.array_equal(loaded.train.images[2].permute(1, 2, 0), rgb(tmp_path / "train/cat/deep/er/9.PNG"))


def test_links_are_followed_once_and_pipes_are_not_opened(tmp_path: Path) -> None:
    put(tmp_path, *TWO)
    put(tmp_path / "elsewhere", "7.png")
    (tmp_path / "train/cat/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "train/cat")
    (tmp_path / "train/fox").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/loop").symlink_to("loop")
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    loaded = load(tmp_path)
    assert loaded.class_names == ("cat", "dog", "fox")
    assert loaded.train.labels.tolist() == [0, 0, 1, 2, 2]  # fox has 7.png and, by the link back, the cat


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one way to write a name")
def test_names_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    put(tmp_path, "train/e\u0301/1.png", "train/b/1.png", "test/\u00e9/1.png", os.fsdecode(b"train/\xff/1.png"))
    dataset = load(tmp_path)
    assert dataset.class_names == (r"\xff", "b", "\u00e9")
    assert dataset.test.labels.tolist() == [2]
    put(tmp_path, "train/\u00e9/2.png")
    assert "has two folders that are both called \u00e9" in refused(tmp_path)


def test_name_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "pets", *TWO)
    (tmp_path / "link").symlink_to("pets")
    monkeypatch.chdir(tmp_path / "pets/train")
    assert (load(Path("..")).name, load(tmp_path / "link").name) == ("pets", "link")


# The split of a folder without one


def test_flat_folder_gives_a_fifth_of_each_class(tmp_path: Path) -> None:
    put_flat(tmp_path, one=1, two=2, three=3, seven=7, train=8, test=40)  # a class may be called train
    dataset = load(tmp_path)
    assert dataset.class_names == ("one", "seven", "test", "three", "train", "two")
    assert Counter(dataset.test.labels.tolist()) == {1: 1, 2: 8, 3: 1, 4: 2, 5: 1}
    assert Counter(dataset.train.labels.tolist()) == {0: 1, 1: 6, 2: 32, 3: 2, 4: 6, 5: 1}
    assert dataset.train.labels.tolist() == sorted(dataset.train.labels.tolist())
    every = torch.cat([dataset.train.images, dataset.test.images])
    assert len(torch.unique(every.flatten(1), dim=0)) == 61


def test_split_is_fixed_and_hardly_changed_by_other_files(tmp_path: Path) -> None:
    def test_set() -> set[bytes]:
        return {image.numpy().tobytes() for image in load(tmp_path).test.images}

    put_flat(tmp_path, a=30, b=30)
    first = test_set()
    assert first == test_set()
    put(tmp_path, "a/new.png", "c/1.png", "c/2.png")
    assert len(first & test_set()) >= 11


# What is no dataset

ONE_CLASS = "two or more"
FOREIGN = "FOLDER has classes for {} that train/ lacks: fox"
PARTS = "FOLDER holds {} with folders in them"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), ONE_CLASS),
        (("a/1.png", "a/2.png"), ONE_CLASS),
        (("1.png", "2.png"), ONE_CLASS),
        (("train/a/1.png", "test/a/1.png"), ONE_CLASS),
        ((*TWO, "test/fox/1.png"), FOREIGN.format("test")),
        ((*TWO, "val/fox/1.png"), FOREIGN.format("val")),
        ((*TWO, "train/fox/no.txt"), "no training images in FOLDER of fox"),
        ((*TWO[:2], "test/cat/no.txt"), "FOLDER has no images for test"),
        (("a/1.png", "b/1.png"), "FOLDER has no images for test"),
        (("train/a/1.png", "cat/1.png", "dog/1.png"), PARTS.format("train")),
        (("test/a/1.png", "val/a/1.png"), PARTS.format("test, val")),
        (("train/a/1.png", "valid/a/1.png"), PARTS.format("train, valid")),
        (("Train/a/1.png", "Test/a/1.png"), PARTS.format("Test, Train")),
        ((*TWO, "test/cat/phone.HEIF"), "or no image for this Pillow): test/cat/phone.HEIF;"),
        ((*TWO, "test/cat/phone.avif"), "or no image for this Pillow): test/cat/phone.avif;"),
    ],
)
def test_folder_that_is_no_dataset(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        if name.endswith(".png"):
            put(tmp_path, name)
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    assert message.replace("FOLDER", str(tmp_path)) in refused(tmp_path)


def test_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(tmp_path / "no") == f"cannot read the folder {tmp_path / 'no'}: No such file or directory"
    put(tmp_path, *TWO)
    scandir = os.scandir

    def forbidden(path: str | Path) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert refused(tmp_path) == f"cannot read the folder {tmp_path / 'train/dog'}: Permission denied"


# One image


def decoded(tmp_path: Path, image: Image.Image, suffix: str = "png", size: int = SIZE, **options: object) -> np.ndarray:
    image.save(tmp_path / f"image.{suffix}", **options)
    return decode(str(tmp_path / f"image.{suffix}"), size)[0]


@pytest.mark.parametrize("suffix", "png jpg jpeg jfif bmp gif webp ppm pgm tif tiff".split())
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, *TWO)
    name = tmp_path / f"test/dog/3.{suffix}"
    noise(1).convert("L" if suffix == "pgm" else "RGB").save(name)
    assert np.array_equal(load(tmp_path).test.images[2].permute(1, 2, 0), rgb(name))


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (9, 8), (8, 11), (5, 3), (3, 64), (100, 16)])
def test_other_sizes_are_resized_and_cropped_as_torchvision_does(tmp_path: Path, width: int, height: int) -> None:
    image = noise(2, width, height)
    wanted = np.asarray(Compose([Resize(SIZE), CenterCrop(SIZE)])(image)).astype(int)
    assert abs(decoded(tmp_path, image) - wanted).max() <= 1


def test_strip_is_not_enlarged_before_it_is_cropped(tmp_path: Path) -> None:
    strip = Image.new("RGB", (1, 60_000), (10, 20, 30))
    assert (decoded(tmp_path, strip, size=512) == (10, 20, 30)).all()  # uncropped, 512 x 30,720,000


@pytest.mark.parametrize("image", [noise(3).convert("L"), noise(3).convert("1"), noise(3).quantize(16)])
def test_grey_and_palettes_become_rgb(tmp_path: Path, image: Image.Image) -> None:
    assert np.array_equal(decoded(tmp_path, image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    ink = Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0))
    assert abs(decoded(tmp_path, ink, suffix).astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path, suffix: str) -> None:
    deep = np.random.default_rng(4).integers(0, 65_536, (SIZE, SIZE)).astype(np.uint16)
    image = decoded(tmp_path, Image.fromarray(deep), suffix)
    assert np.array_equal(image, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_other_depths_are_clipped_to_16_bits_or_refused(tmp_path: Path) -> None:
    deep = np.tile(np.array([[-5, 0, 256, 65_535, 65_536, 70_000]], dtype=np.int32), (6, 1))
    image = decoded(tmp_path, Image.fromarray(deep).resize((SIZE, SIZE), Image.Resampling.NEAREST), "tif")
    assert np.unique(image).tolist() == [0, 1, 255]
    with pytest.raises(ValueError, match="floating-point"):
        decoded(tmp_path, Image.new("F", (SIZE, SIZE), 0.5), "tif")


def test_transparent_parts_become_grey(tmp_path: Path) -> None:
    half, solid = (decoded(tmp_path, Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, a))) for a in (128, 255))
    assert abs(half[0, 0].astype(int) - (192, 64, 64)).max() <= 1
    assert (solid == (255, 0, 0)).all()
    rgba, la = Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 0)), Image.new("LA", (SIZE, SIZE), (255, 0))
    palette, plain = (noise(3).quantize(16), bytes(16)), (Image.new("RGB", (SIZE, SIZE), (1, 2, 3)), (1, 2, 3))
    for image, transparency in ((rgba, None), (la, None), palette, plain):
        options = {} if transparency is None else {"transparency": transparency}
        assert (decoded(tmp_path, image, **options) == 128).all()


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
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01junk" * 3
    wanted = decoded(tmp_path, noise(5), "jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as while a folder is decoded
        assert np.array_equal(decoded(tmp_path, noise(5), "jpg", exif=exif), wanted)

    def fail(image: Image.Image, *, in_place: bool) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert np.array_equal(decoded(tmp_path, noise(5), "jpg"), wanted)


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
    for name, target in (("link", "nowhere"), ("loop", "loop.png")):
        (tmp_path / f"test/dog/{name}.png").symlink_to(target)
    named = sorted(f"test/dog/{name}.png" for name in [*bad, "link", "loop"])
    text = refused(tmp_path)
    assert text.startswith("7 of 11 image files cannot be read (")
    assert f": {', '.join(named)}; replace or remove them" in text
    assert not cache.exists()
    for index in range(12):
        (tmp_path / f"train/cat/bad{index:02}.jpg").touch()
    assert "train/cat/bad08.jpg, train/cat/bad09.jpg and 9 more;" in refused(tmp_path)


def test_decompression_bomb_is_named_and_large_photograph_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit Pillow warns, beyond twice the limit it raises."""
    put(tmp_path, *TWO)
    put(tmp_path, "test/cat/large.png", width=2 * SIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE)
    assert len(load(tmp_path).test) == 3
    put(tmp_path, "test/cat/bomb.png", width=3 * SIZE)
    assert "1 of 6 image files cannot be read (" in (text := refused(tmp_path)) and "test/cat/bomb.png" in text


def test_warnings_are_hidden_and_their_filters_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *TWO)
    load_pixels = ImageFile.ImageFile.load

    def warning(self: ImageFile.ImageFile) -> object:
        warnings.warn("odd metadata", UserWarning, stacklevel=1)
        return load_pixels(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", warning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        load(tmp_path)
        assert warnings.filters == before
    assert not caught


# Memory, progress and workers


def test_images_that_do_not_fit_are_refused_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *TWO)
    needed, decode_image = 4 * 3 * 512**2, decoding.decode
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    monkeypatch.setattr(decoding, "decode", None)
    assert refused(tmp_path, 512).startswith(
        "4 images of 512 x 512 take 3 MiB, and 3 MiB of memory are available: choose a smaller image_size (at most 511)"
    )
    monkeypatch.setattr(decoding, "decode", decode_image)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))
    assert ", 3.0 MiB in memory" in str(load(tmp_path, 512).origin)


def test_pixels_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "_BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(decoding, "_MAX_WORKERS", 1)
    put(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png", "val/a/0.png")
    for index in range(1, 160):
        os.link(tmp_path / "train/a/0.png", tmp_path / f"train/a/{index}.png")
    for _ in ("decoded and saved", "from the cache"):
        tracemalloc.start()  # sees the memory of NumPy and Python, not of torch, which holds the images
        loaded = load(tmp_path, 96)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * 2**20 < 4 * 2**20 < loaded.train.images.nbytes
    parts = (loaded.train, loaded.test, loaded.validation)
    assert len({part.images.untyped_storage().data_ptr() for part in parts if part}) == 1
    assert all(part and part.images.is_contiguous() for part in parts)


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


@pytest.mark.full
def test_processes_decode_what_threads_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    put_flat(folder, a=30, b=10)
    put(folder, "a/wide.png", width=40, height=20)
    # Pillow warns of so many pixels; its limit is not lowered, as other processes would keep theirs.
    Image.new("L", (9_500, 9_500)).save(folder / "a/large.png", compress_level=1)
    progress: list[tuple[int, int | None]] = []
    report = lambda done, total: progress.append((done, total))  # noqa: E731
    by_threads = load(folder, cache_dir=tmp_path / "one", progress=report)
    monkeypatch.setattr(decoding, "_MANY", 1)
    monkeypatch.setattr(decoding, "usable_cpus", lambda: 2)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")  # as for a user, and not the errors that warnings are in tests
        before = list(warnings.filters)
        patch.setattr(decoding, "ThreadPoolExecutor", None)
        assert same(load(folder, cache_dir=tmp_path / "other", progress=report), by_threads)
        assert progress == 2 * [(16, 42), (32, 42), (42, 42)]
        assert warnings.filters == before
        (folder / "a/bad.png").write_bytes(b"no image")
        with pytest.raises(UserError, match=r"1 of 43 image files cannot be read .*: a/bad\.png"):
            load(folder, cache_dir=tmp_path / "third")
    (folder / "a/bad.png").unlink()
    monkeypatch.setattr(decoding, "_begin_worker", os.abort)  # threads take over
    assert same(load(folder, cache_dir=tmp_path / "fourth"), by_threads)


@pytest.mark.full
def test_script_without_a_guard_is_not_run_again_by_workers(tmp_path: Path) -> None:
    put(tmp_path, *(f"{number}.png" for number in range(40)))
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from cifar_dist.data import decoding, image_files\n"
        "print('ran')\n"
        "decoding._MANY, decoding.usable_cpus = 1, lambda: 2\n"
        "files, *_ = image_files.find_images(sorted(Path(__file__).parent.glob('*.png')))\n"
        "print(image_files.decode_images(files, 8)[1] == [True] * 40)\n"
    )
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ran\nTrue\n", "")


# The cache


def files_in(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_cache_gives_the_same_images_and_sizes(tmp_path: Path, cache: Path) -> None:
    put(tmp_path, *TWO)
    put(tmp_path, "test/cat/wide.png", width=40, height=2)
    put(tmp_path, "test/cat/large.png", width=10, height=12)
    put(tmp_path, "test/cat/tiny.png", width=3, height=9)
    first, second = load(tmp_path), load(tmp_path)
    assert first.origin == "7 files of 3x9 to 10x12 pixels, resized and cropped to 8x8, 0.0 MiB in memory"
    assert second.origin == f"{first.origin} (read from the cache)"
    assert same(first, second)
    assert [file.suffix for file in files_in(cache)] == [".pixels"]


def test_cache_serves_without_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_flat(tmp_path, a=20, b=20)
    wanted = load(tmp_path)
    monkeypatch.setattr(decoding, "decode", None)
    found = load(tmp_path)
    assert from_cache(found) and same(found, wanted)
    monkeypatch.undo()
    assert load(tmp_path, 4).train.images.shape[2:] == (4, 4)  # replaces the file


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def overwrite(path: Path, *, extra_bytes: int) -> None:
    """Change the content, and keep the time of the last change, as an archive that is unpacked may do."""
    status, content = path.stat(), png(noise(99))
    path.write_bytes(content + bytes(status.st_size - len(content) + extra_bytes))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "other content": lambda path: overwrite(path, extra_bytes=0),
    "other length": lambda path: overwrite(path, extra_bytes=1),
    "other time": touch,
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("4.png")),
    "added": lambda path: put(path.parent, "5.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folder_replaces_its_old_cache_file(tmp_path: Path, cache: Path, change: str) -> None:
    put(tmp_path / "data", *TWO, "train/cat/3.png")
    (tmp_path / "data/train/cat/3.png").write_bytes(png(noise(3)) + bytes(50))
    put(tmp_path / "other", *TWO)
    load(tmp_path / "data")
    [first] = files_in(cache)
    load(tmp_path / "other")
    before = files_in(cache)
    (cache / f"{first.stem}killed.part").write_bytes(b"half")
    CHANGES[change](tmp_path / "data/train/cat/3.png")
    changed = load(tmp_path / "data")
    assert not from_cache(changed)
    assert same(changed, load(tmp_path / "data", cache_dir=tmp_path / "fresh"))
    assert len(files_in(cache)) == len(before) == 2
    assert set(before) - set(files_in(cache)) == {first}
    assert from_cache(load(tmp_path / "other"))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in the pixels": lambda content: content[:200],
    "cut at the end": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "bit in the sizes": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "bit in the pixels": lambda content: content[:300] + bytes([content[300] ^ 16]) + content[301:],
    "bit in the checksum": lambda content: content[:-1] + bytes([content[-1] ^ 128]),
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


def test_cache_of_another_folder_is_not_used_under_a_false_name(tmp_path: Path, cache: Path) -> None:
    put(tmp_path / "one", *TWO)
    put(tmp_path / "two", *TWO)
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
    monkeypatch.setattr(image_cache, "default_cache_dir", lambda: None)
    assert not from_cache(load(tmp_path))


def test_cache_file_gets_its_name_when_it_is_whole(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, *TWO)
    done: list[str] = []
    fsync = os.fsync
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


def test_many_at_once_all_get_the_right_pixels(tmp_path: Path, cache: Path) -> None:
    """Threads stand for processes: they share only files. Two sizes remove each other's files."""
    put_flat(tmp_path, a=20, b=20)
    wanted = {size: load(tmp_path, size, cache_dir=tmp_path / ".alone") for size in (4, SIZE)}
    right: list[bool] = []

    def keep_loading(size: int) -> None:
        for _ in range(5):
            right.append(same(load(tmp_path, size), wanted[size]))

    threads = [threading.Thread(target=keep_loading, args=(size,)) for size in (4, SIZE) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == 20 * [True]
    assert all(file.suffix == ".pixels" for file in files_in(cache))


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.home()
    assert default_cache_dir({}, "linux") == home / ".cache/cifar-dist"
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}, "linux") == Path("/x/cifar-dist")
    assert default_cache_dir({"XDG_CACHE_HOME": "relative"}, "linux") == home / ".cache/cifar-dist"
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}, "darwin") == home / "Library/Caches/cifar-dist"
    assert default_cache_dir({"LOCALAPPDATA": "/local", "XDG_CACHE_HOME": "/x"}, "win32") == Path("/local/cifar-dist")
    assert default_cache_dir({"CIFAR_DIST_CACHE": "/own", "XDG_CACHE_HOME": "/x"}, "darwin") == Path("/own")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_cache_dir({}, "linux") is None


# The official images


@pytest.mark.full
@pytest.mark.official
def test_official_images_in_folders_are_those_of_the_official_files(official_data: Path) -> None:
    folder = official_data / "cifar10-png/test"
    if not folder.is_dir():
        pytest.skip(f"there are no class folders of PNG files in {folder}")
    official = load_archive(replace(CIFAR10, train=()), official_data).test
    for _ in ("decoded", "from the cache"):
        dataset = load_folder(folder, image_size=32)
        assert (dataset.class_names, dataset.sizes.num_test) == (CIFAR10.class_names, 2_000)
        for label in range(10):
            found = [image for part in (dataset.train, dataset.test) for image in part.images[part.labels == label]]
            wanted = official.images[official.labels == label]
            assert len(found) == len(wanted)
            assert {image.numpy().tobytes() for image in found} == {image.numpy().tobytes() for image in wanted}
    assert from_cache(dataset)
