"""Class folders listed, split, decoded and refused; image files of no dataset; with small images."""

import errno
import io
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps
from rich.console import Console
from torchvision.transforms import CenterCrop, Compose, Resize

from cifar_dist.config.errors import UserError, printable
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.data import folder as folder_module
from cifar_dist.data.cifar import CIFAR10, load_archive
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.data.folder import decode, find_images, folder_sizes, load_folder
from cifar_dist.display.terminal import print_header, print_lines, print_notes
from cifar_dist.run.resolve import check_dataset_name

SIZE = 8
TWO = ("train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png")


def noise(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def put(folder: Path, *names: str, width: int = SIZE, height: int = SIZE) -> Path:
    """Write files; those called .png are images of noise that depends on the name, the others empty."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            noise(crc32(os.fsencode(name)), width, height).save(folder / name)
        else:
            (folder / name).touch()
    return folder


def put_flat(folder: Path, **counts: int) -> None:
    for name, count in counts.items():
        put(folder, *(f"{name}/{index:02}.png" for index in range(count)))


def load(folder: Path, image_size: int = SIZE, *, for_training: bool = True) -> Dataset:
    return load_folder(folder, image_size=image_size, for_training=for_training)


def refused(folder: Path, image_size: int = SIZE, *, for_training: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, image_size, for_training=for_training)
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


def test_train_and_test(tmp_path, monkeypatch):
    put(tmp_path / "pets", *TWO, "train/dog/0.png", "train/eel/1.png")  # a class may lack test images
    dataset = load(tmp_path / "pets")
    assert (dataset.name, dataset.class_names, dataset.validation) == ("pets", ("cat", "dog", "eel"), None)
    assert holds(dataset.train, tmp_path / "pets/train", "cat/1.png", "dog/0.png", "dog/1.png", "eel/1.png")
    assert holds(dataset.test, tmp_path / "pets/test", "cat/2.png", "dog/2.png")
    assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([0, 1, 1, 2], [0, 1])
    assert folder_sizes(tmp_path / "pets") == dataset.sizes
    monkeypatch.chdir(tmp_path / "pets/train")
    assert load(Path("..")).name == "pets"


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_val_is_the_validation_set_beside_test_and_else_the_test_set(tmp_path, name):
    put(tmp_path, *TWO, f"{name}/dog/3.png")
    both = load(tmp_path)
    assert holds(both.validation, tmp_path, f"{name}/dog/3.png")
    assert both.validation is not None and both.validation.labels.tolist() == [1]
    assert holds(both.test, tmp_path, "test/cat/2.png", "test/dog/2.png")
    (tmp_path / "test").rename(tmp_path / "other")
    alone = load(tmp_path)
    assert holds(alone.test, tmp_path, f"{name}/dog/3.png")
    assert (alone.test.labels.tolist(), alone.validation) == ([1], None)


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    ordered = ("B/1.png", "a/b-1.png", "a/b.png", "a/b/1.png", "a-b/1.png")  # "-" < "." < "/"
    put(tmp_path, *(f"train/{name}" for name in ordered), "test/a/1.png")
    walk, iterdir = os.walk, Path.iterdir

    def walk_backwards(*words: object, **options: object) -> Iterator[tuple[str, list[str], list[str]]]:
        for root, folders, names in walk(*words, **options):
            folders.sort(reverse=True)
            yield root, folders, sorted(names, reverse=True)

    for backwards in (False, True):
        if backwards:
            monkeypatch.setattr(os, "walk", walk_backwards)
            monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(iterdir(path), reverse=True)))
        dataset = load(tmp_path)
        assert dataset.class_names == ("B", "a", "a-b")
        assert holds(dataset.train, tmp_path / "train", *ordered)
        assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([0, 1, 1, 1, 2], [1])


def test_deep_images_are_read_hidden_ones_not_and_other_files_are_counted(tmp_path):
    put(tmp_path, *TWO, "train/cat/deep/er/9.PNG.png", "train/.c/1.png", "train/cat/.x/1.png", "train/cat/._1.png")
    put(tmp_path, "train/stray.png", "stray.png", "other/1.png", "README.md")
    put(tmp_path, "train/cat/labels.TXT", "train/dog/deep/notes.txt", "train/dog/x.psd", "test/cat/noext")
    (tmp_path / "train/cat/deep/er/9.PNG.png").rename(tmp_path / "train/cat/deep/er/9.PNG")
    loaded, skipped = load(tmp_path), "4 other files skipped (1 without a suffix, 1 .psd, 2 .txt)"
    assert loaded.class_names == ("cat", "dog")
    assert loaded.train.labels.tolist() == [0, 0, 1]
    assert np.array_equal(loaded.train.images[1].permute(1, 2, 0), rgb(tmp_path / "train/cat/deep/er/9.PNG"))
    assert loaded.origin == f"5 image files, resized and cropped to 8x8 pixels; {skipped}"
    assert find_images([tmp_path / "train", tmp_path / "test"])[2] == skipped
    assert find_images([tmp_path / "train/cat/1.png"])[2] == ""


def test_links_are_followed_once(tmp_path):
    put(tmp_path, *TWO)
    put(tmp_path / "elsewhere", "7.png")
    (tmp_path / "train/cat/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "train/cat")
    (tmp_path / "train/fox").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/loop").symlink_to("loop")
    loaded = load(tmp_path)
    assert loaded.class_names == ("cat", "dog", "fox")
    assert loaded.train.labels.tolist() == [0, 0, 1, 2, 2]  # fox has 7.png and, by the link back, the cat


# The split of a folder without one


def test_flat_folder_gives_a_fifth_of_each_class(tmp_path):
    put_flat(tmp_path, one=1, two=2, three=3, seven=7, train=8, test=40)  # a class may be called train
    dataset = load(tmp_path)
    assert dataset.class_names == ("one", "seven", "test", "three", "train", "two")
    assert Counter(dataset.test.labels.tolist()) == {1: 1, 2: 8, 3: 1, 4: 2, 5: 1}
    assert Counter(dataset.train.labels.tolist()) == {0: 1, 1: 6, 2: 32, 3: 2, 4: 6, 5: 1}
    assert dataset.train.labels.tolist() == sorted(dataset.train.labels.tolist())
    every = torch.cat([dataset.train.images, dataset.test.images])
    assert len(torch.unique(every.flatten(1), dim=0)) == 61


def test_split_is_fixed_and_hardly_changed_by_other_files(tmp_path):
    put_flat(tmp_path, a=30, b=30)
    first = {image.numpy().tobytes() for image in load(tmp_path).test.images}
    put(tmp_path, "a/new.png", "c/1.png", "c/2.png")
    assert len(first & {image.numpy().tobytes() for image in load(tmp_path).test.images}) >= 11


# What is no dataset

ONE_CLASS, FOREIGN = "two or more", "FOLDER has classes that train/ lacks: fox"
DEEPER = "no class folder of FOLDER holds an image itself, only folders do"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no folder in FOLDER holds an image: name the folder whose subfolders are the classes"),
        (("a/1.png", "a/2.png"), ONE_CLASS),
        (("train/a/1.png", "test/a/1.png"), ONE_CLASS),
        ((*TWO, "test/fox/1.png"), FOREIGN),
        ((*TWO, "val/fox/1.png"), FOREIGN),
        ((*TWO, "train/fox/no.txt"), "no training images in FOLDER of fox"),
        ((*TWO[:2], "test/cat/no.txt"), "FOLDER has no images for test"),
        (("a/1.png", "b/1.png"), "FOLDER has no images for test"),
        ((*TWO, "val/cat/no.txt"), "FOLDER has no images for val"),
        (("test/a/1.png", "val/a/1.png"), DEEPER),
        (("images/cat/1.png", "masks/cat/1.png"), "the classes, perhaps FOLDER/images, or"),
        (("data/train/cat/1.png", "data/train/dog/1.png", "data/test/cat/1.png"), "perhaps FOLDER/data, or"),
        (("train/images/cat/1.png", "train/masks/cat/1.png", "test/images/cat/1.png"), DEEPER),
        ((*TWO, "test/cat/bad.jpg"), "1 of 5 image files cannot be read (empty, damaged"),
    ],
)
def test_folder_that_is_no_dataset(tmp_path, names, message):
    assert message.replace("FOLDER", str(put(tmp_path, *names))) in refused(tmp_path)


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    assert refused(tmp_path / "no") == f"cannot read the folder {tmp_path / 'no'}: No such file or directory"
    put(tmp_path, *TWO)
    scandir = os.scandir

    def forbidden(path: str | Path) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert refused(tmp_path) == f"cannot read the folder {tmp_path / 'train/dog'}: Permission denied"


def test_what_can_be_evaluated_and_not_trained_on(tmp_path):
    put(tmp_path, "test/a/1.png", "test/b/1.png", "test/b/2.png")
    dataset = load(tmp_path, for_training=False)
    assert (dataset.class_names, dataset.test.labels.tolist(), len(dataset.train)) == (("a", "b"), [0, 1, 1], 0)
    assert dataset.whole is dataset.validation is None
    assert DEEPER.replace("FOLDER", str(tmp_path)) in refused(tmp_path)
    flat = load(put(tmp_path / "one", "a/1.png", "a/2.png"), for_training=False)
    assert flat.whole is not None and flat.whole.labels.tolist() == [0, 0] and flat.class_names == ("a",)
    assert flat.whole.images.data_ptr() == flat.train.images.data_ptr(), "the images are in memory twice"
    assert "no images for test" in refused(put(tmp_path / "other", *TWO[:2]), for_training=False)


@pytest.mark.parametrize("name", ["CIFAR10", "Cifar-10", "cifar_10", "Shapes"])
def test_a_dataset_in_another_case_is_recognized(name):
    meant = "shapes" if name == "Shapes" else "cifar10"
    assert meant in KNOWN_SIZES
    with pytest.raises(UserError, match=f"no dataset or folder '{name}', did you mean '{meant}'"):
        check_dataset_name(name)


# One image

FORMATS = {"pbm": "PPM", "apng": "PNG", "avif": "AVIF"}
SUFFIXES = [*FORMATS, *"png jpg jpeg jfif jpe bmp gif webp ppm pgm pnm tif tiff tga jp2".split()]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_pillow_reads_is_read(tmp_path, suffix):
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip("this Pillow cannot read it")
    put(tmp_path, *TWO)
    name = tmp_path / f"test/dog/3.{suffix}"
    noise(1).convert({"pgm": "L", "pbm": "1"}.get(suffix, "RGB")).save(name, FORMATS.get(suffix))
    assert np.array_equal(load(tmp_path).test.images[2].permute(1, 2, 0), rgb(name))


def decoded(tmp_path: Path, image: Image.Image, suffix: str = "png", size: int = SIZE, **options: object) -> np.ndarray:
    image.save(tmp_path / f"image.{suffix}", **options)
    return decode(str(tmp_path / f"image.{suffix}"), size)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (9, 8), (5, 3), (3, 64)])
def test_other_sizes_are_resized_and_cropped_as_torchvision_does(tmp_path, width, height):
    image = noise(2, width, height)
    wanted = np.asarray(Compose([Resize(SIZE), CenterCrop(SIZE)])(image)).astype(int)
    assert abs(decoded(tmp_path, image) - wanted).max() <= 1
    strip = Image.new("RGB", (1, 60_000), (10, 20, 30))
    assert (decoded(tmp_path, strip, size=512) == (10, 20, 30)).all()  # uncropped, 512 x 30,720,000


def test_every_mode_becomes_rgb(tmp_path):
    for image in (noise(3).convert("L"), noise(3).convert("1"), noise(3).quantize(16)):
        assert np.array_equal(decoded(tmp_path, image), np.asarray(image.convert("RGB")))
    ink = Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0))
    assert abs(decoded(tmp_path, ink, "jpg").astype(int) - (255, 0, 0)).max() < 6
    red, blue = (Image.new("RGB", (SIZE, SIZE), name) for name in ("red", "blue"))
    first = decoded(tmp_path, red, "gif", save_all=True, append_images=[blue])
    assert abs(first.astype(int) - (255, 0, 0)).max() < 4, "an animation gives its first frame"
    with pytest.raises(ValueError, match="floating-point"):
        decoded(tmp_path, Image.new("F", (SIZE, SIZE), 0.5), "tif")


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_the_upper_eight(tmp_path, suffix):
    deep = np.random.default_rng(4).integers(0, 65_536, (SIZE, SIZE)).astype(np.uint16)
    image = decoded(tmp_path, Image.fromarray(deep), suffix)
    assert np.array_equal(image, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_transparent_parts_become_grey(tmp_path):
    half, solid = (decoded(tmp_path, Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, a))) for a in (128, 255))
    assert abs(half[0, 0].astype(int) - (192, 64, 64)).max() <= 1
    assert (solid == (255, 0, 0)).all()
    assert (decoded(tmp_path, Image.new("LA", (SIZE, SIZE), (255, 0))) == 128).all()
    assert (decoded(tmp_path, noise(3).quantize(16), transparency=bytes(16)) == 128).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_image_is_turned_as_its_exif_says(tmp_path, suffix, monkeypatch):
    image = Image.new("RGB", (2 * SIZE, SIZE), "red")
    image.paste("blue", (0, 0, SIZE, SIZE))  # blue is on the left, and at the top when it was turned
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decoded(tmp_path, image, suffix, exif=exif, quality=100)
    assert turned[0, 4, 2] > 200 > 60 > turned[0, 4, 0]
    assert turned[-1, 4, 0] > 200 > 60 > turned[-1, 4, 2]

    def fail(image: Image.Image, *, in_place: bool) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert decoded(tmp_path, image, suffix).shape == (SIZE, SIZE, 3), "a broken EXIF block leaves the pixels good"


def test_unreadable_files_are_named_together(tmp_path, monkeypatch):
    put(tmp_path, *TWO)
    stream = io.BytesIO()
    noise(6, 64, 64).save(stream, "PNG")
    good = stream.getvalue()
    bad = {"empty": b"", "text": b"text", "cut": good[: len(good) // 2], "cut early": good[:20]}
    bad |= {"postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}
    for name, content in bad.items():
        (tmp_path / f"test/dog/{name}.png").write_bytes(content)
    (tmp_path / "test/dog/link.png").symlink_to("nowhere")
    put(
        tmp_path, "test/dog/large.png", width=2 * SIZE
    )  # beyond its limit Pillow warns, beyond twice the limit it raises
    put(tmp_path, "test/dog/bomb.png", width=3 * SIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE)
    named = sorted(f"test/dog/{name}.png" for name in [*bad, "link", "bomb"])
    text = refused(tmp_path)
    assert text.startswith("7 of 12 image files cannot be read (")
    assert f": {', '.join(named)}; replace or remove them" in text
    put(tmp_path, *(f"train/cat/bad{index:02}.jpg" for index in range(12)))
    assert "train/cat/bad08.jpg, train/cat/bad09.jpg and 9 more;" in refused(tmp_path)


# Memory and progress


def test_images_that_do_not_fit_are_refused_before_any_is_read(tmp_path, monkeypatch):
    put(tmp_path, *TWO)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 3 * 512**2 - 1))
    monkeypatch.setattr(folder_module, "decode_images", None)
    assert refused(tmp_path, 512).startswith(
        "4 images of 512 x 512 take 3 MiB, and 3 MiB of memory are available: choose a smaller image_size"
    )


def test_progress_is_reported_and_an_interruption_does_not_wait_for_the_rest(tmp_path, monkeypatch):
    put_flat(tmp_path, a=200, b=200)
    progress, done = [], []
    load_folder(tmp_path, image_size=SIZE, progress=lambda *numbers: progress.append(numbers))
    assert progress == sorted(progress) and progress[-1] == (400, 400)

    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "decode", lambda *words: done.append(words) or decode(*words))
    monkeypatch.setattr(folder_module, "_MAX_WORKERS", 1)
    with pytest.raises(KeyboardInterrupt):
        load_folder(tmp_path, image_size=SIZE, progress=interrupt)
    assert len(done) < 300


# Names and paths

ODD, SHOWN = "n\x1b[31m\n\x9b", r"n\x1b[31m\n\x9b"


def test_control_characters_of_names_are_escaped(tmp_path):
    put(tmp_path / ODD, f"{ODD}/{ODD}.png", f"{ODD}/2.png", "b/1.png", "b/2.png", f"b/{ODD}.jpg")
    assert f"b/{SHOWN}.jpg" in refused(tmp_path / ODD)
    (tmp_path / ODD / "b" / f"{ODD}.jpg").unlink()
    dataset = load(tmp_path / ODD)
    assert (dataset.name, dataset.class_names) == (SHOWN, ("b", SHOWN))
    names = [file.name for file in find_images([tmp_path / ODD / ODD / f"{ODD}.png", tmp_path / ODD / ODD])[0]]
    assert names == [printable(str(tmp_path / ODD / ODD / name)) for name in (f"{ODD}.png", "2.png")]
    assert printable("Üß 猫 \u200d👩‍🚀") == "Üß 猫 \u200d👩‍🚀"


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_that_is_printed_commands_the_terminal(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=100)
    print_notes(console, [f"note {ODD}"])
    print_lines(console, [f"line {ODD}"], title=f"title {ODD}")
    print_header(console, {"run": ODD})
    text = console.file.getvalue()
    assert text.count(SHOWN) == (4 if terminal else 3) and "\x1b" not in text and "\x9b" not in text


def test_each_path_is_found_once_as_it_was_typed(tmp_path):
    put(tmp_path, "store/x.png")
    links = [tmp_path / "l1.png", tmp_path / "l2.png", tmp_path / "folder" / "l3.png"]
    links[2].parent.mkdir()
    for link in links:
        link.symlink_to(tmp_path / "store/x.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "store/x.png")
    typed = [*links[:2], links[0], tmp_path / "folder", links[2], tmp_path / "hard.png"]
    files, unreadable, _ = find_images(typed)
    assert [file.path for file in files] == [*map(str, links), str(tmp_path / "hard.png")]
    assert not unreadable


# The official images


@pytest.mark.full
@pytest.mark.official
def test_official_images_in_folders_are_those_of_the_official_files(official_data):
    folder = official_data / "cifar10-png/test"
    if not folder.is_dir():
        pytest.skip(f"there are no class folders of PNG files in {folder}")
    official = load_archive(replace(CIFAR10, train=CIFAR10.test), official_data).test
    dataset = load_folder(folder, image_size=32)
    assert (dataset.class_names, dataset.sizes.num_test) == (CIFAR10.class_names, 2_000)
    for label in range(10):
        found = [image for part in (dataset.train, dataset.test) for image in part.images[part.labels == label]]
        wanted = official.images[official.labels == label]
        assert {image.numpy().tobytes() for image in found} == {image.numpy().tobytes() for image in wanted}
