"""Shapes: ten classes of coloured figures on cluttered backgrounds, drawn at every start and read from no file.

Each figure is a signed distance function (negative inside) sampled at the pixel centres, after Inigo Quilez, "2D
distance functions", https://iquilezles.org/articles/distfunctions2d/. Position, size, tilt, stretch and colours vary,
and figures may be lighter or darker than their background: a linear model of the pixels learns little.

The bytes are the same on every machine. The random bits are PCG64's raw output, which NumPy guarantees. The
pixels use only operations that IEEE 754 rounds exactly (+ - * / sqrt, min, max, floor, compare), one at a time: no sin
or cos, no matrix product and no sum over an axis, whose last bit depends on the library.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import PCG64
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cifar_dist.data.dataset import Dataset

Floats = NDArray[np.float32]

CLASS_NAMES = (
    *("circle", "ring", "square", "triangle", "star"),
    *("cross", "crescent", "heart", "arrow", "hourglass"),
)
_SIZE = 32
_BLOBS, _STROKES = 2, 3
_CONTRAST = 0.4  # least difference in lightness, of 1, between a figure and its background, if a candidate has it
_BLOCK = 50  # images drawn at once: few enough that the arrays stay in the processor's cache
_COS30, _COS36, _COS45 = math.sqrt(3) / 2, (math.sqrt(5) + 1) / 4, math.sqrt(0.5)  # sqrt is rounded exactly, cos is not
_SIN36 = math.sqrt(1 - _COS36 * _COS36)
_union: Callable[[Floats, Floats], Floats] = np.minimum
_intersection: Callable[[Floats, Floats], Floats] = np.maximum


def _length(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y)


def _distance(figure: str, x: Floats, y: Floats) -> Floats:
    """Return the signed distance to a figure that about fills the unit disc; y grows downwards, as in the image."""
    match figure:
        case "circle":
            return _length(x, y) - 0.9
        case "ring":
            return abs(_length(x, y) - 0.76) - 0.22
        case "square":
            return _intersection(abs(x), abs(y)) - 0.8
        case "triangle":
            y = y - 0.2
            return _intersection(abs(x) * _COS30 - y * 0.5, y) - 0.55
        case "star":  # reflections fold the ten half-arms onto one, where the outline is a single straight edge
            x, y = abs(x), -y
            for normal_x, normal_y in ((_COS36, -_SIN36), (-_COS36, -_SIN36)):
                beyond: Floats = np.maximum(x * normal_x + y * normal_y, 0)
                x, y = x - beyond * (2 * normal_x), y - beyond * (2 * normal_y)
            return abs(x) * 0.894 + (y - 1.1) * 0.447
        case "cross":
            x, y = abs(x), abs(y)
            return _union(_intersection(x - 1, y - 0.3), _intersection(x - 0.3, y - 1))
        case "crescent":
            return _intersection(_length(x, y) - 1, 0.8 - _length(x - 0.5, y))
        case "heart":  # a square on its corner, and on each of its two upper sides a disc with that side as diameter
            side = 0.55
            u, v = (x - y) * _COS45 + 0.2, (-x - y) * _COS45 + 0.2
            discs = _union(_length(u - side, v), _length(u, v - side))
            return _union(_intersection(abs(u), abs(v)), discs) - side
        case "arrow":
            y = abs(y)
            head = _intersection((x + y - 1) * _COS45, -x + 0.1)
            return _union(head, _intersection(abs(x + 0.4) - 0.6, y - 0.25))
        case "hourglass":
            x, y = abs(x), abs(y)
            return _intersection(x * 0.78 - (y * 0.62 + 0.1), y - 0.95)
    raise ValueError(figure)


def _uniform(bits: PCG64, low: float, high: float, *shape: int) -> Floats:
    """Draw `shape` numbers in [low, high] from the top 24 bits of a word each, which float32 holds exactly."""
    words = np.asarray(bits.random_raw(math.prod(shape)), dtype=np.uint64).reshape(shape)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24 * (high - low)) + np.float32(low)


def _local_frame(bits: PCG64, count: int, reach: float, stretch: float, tilt: Floats) -> tuple[Floats, Floats]:
    """Return pixel coordinates (count, 32, 32) from a random origin along axes turned by atan2(tilt[1], tilt[0]).

    The origin is at most `reach` pixels from the centre, horizontally and vertically. One axis is longer by a factor of
    at most `stretch`, the other shorter by the same factor; `tilt` is (2, count, 1, 1).
    """
    centre = _uniform(bits, -reach, reach, 2, count, 1, 1)
    cos, sin = tilt / np.maximum(_length(tilt[0], tilt[1]), 1e-3)
    pixels = np.arange(_SIZE, dtype=np.float32) - (_SIZE - 1) / 2
    x, y = pixels - centre[0], pixels[:, None] - centre[1]
    factor = _uniform(bits, 1 / stretch, stretch, count, 1, 1)
    return (cos * x + sin * y) * factor, (cos * y - sin * x) / factor


def _colour_field(bits: PCG64, count: int, spread: float) -> Floats:
    """Draw smooth colour variation (count, 3, 32, 32) in [-spread, spread]: a random lattice, interpolated."""
    cells = 3
    values = _uniform(bits, -spread, spread, count, 3, cells + 1, cells + 1)
    position = (np.arange(_SIZE, dtype=np.float32) + 0.5) * (cells / _SIZE)
    lower = position.astype(np.int64)
    weight = position - lower.astype(np.float32)
    for axis, fraction in ((2, weight[:, None]), (3, weight)):
        before, after = np.take(values, lower, axis), np.take(values, lower + 1, axis)
        values = before + (after - before) * fraction
    return values


def _lightness(colour: Floats) -> Floats:
    """Return perceived lightness (..., 1) of colours (..., 3), by rounded Rec. 601 weights."""
    return colour[..., 0:1] * 0.3 + colour[..., 1:2] * 0.6 + colour[..., 2:3] * 0.1


def _muted_colour(bits: PCG64, count: int) -> Floats:
    """Draw greyish colours (count, 3), for all that is not a figure."""
    vivid = _uniform(bits, 0, 1, count, 3)
    grey = _lightness(vivid)
    return grey + (vivid - grey) * 0.3


def _contrasting_colour(bits: PCG64, ground: Floats) -> Floats:
    """Draw colours (count, 3): the first candidate that differs enough from `ground` in lightness, else the best."""
    candidates = _uniform(bits, 0, 1, len(ground), 16, 3)
    contrast = abs(_lightness(candidates) - _lightness(ground)[:, None])[..., 0]
    return candidates[np.arange(len(ground)), np.argmax(np.minimum(contrast, _CONTRAST), axis=1)]


def _paint(canvas: Floats, coverage: Floats, colour: Floats) -> None:
    """Blend `colour` (count, 3, 1 or 32, 1 or 32) over `canvas` (count, 3, 32, 32) by `coverage` (count, 32, 32)."""
    canvas += (colour - canvas) * np.clip(coverage, 0, 1)[:, None]


def _draw_block(bits: PCG64, figure: str, count: int) -> NDArray[np.uint8]:
    """Draw `count` images (count, 3, 32, 32) of one figure."""
    ground = _muted_colour(bits, count)
    canvas = _colour_field(bits, count, 0.12) + ground[..., None, None]
    for index in range(_BLOBS + _STROKES):  # clutter in every direction and across every border
        x, y = _local_frame(bits, count, _SIZE / 2, 1.4, _uniform(bits, -1, 1, 2, count, 1, 1))
        size = _uniform(bits, 3, 9, count, 1, 1)
        if index < _BLOBS:
            coverage = 0.6 - (x * x + y * y) / (size * size)
        else:
            coverage = 1.2 - _length(np.maximum(abs(x) - size, 0), y)
        _paint(canvas, coverage, _muted_colour(bits, count)[..., None, None])

    tilt = _uniform(bits, -0.5, 0.5, 2, count, 1, 1)
    tilt[0] = 1  # at most 27 degrees to either side
    x, y = _local_frame(bits, count, 4, 1.15, tilt)
    x = x * np.copysign(np.float32(1), _uniform(bits, -1, 1, count, 1, 1))  # half of them mirrored
    radius = _uniform(bits, 8.5, 12, count, 1, 1)
    x, y = x / radius, y / radius
    shade = _uniform(bits, -0.15, 0.15, count, 3, 1, 1) * x[:, None]
    _paint(canvas, 0.5 - _distance(figure, x, y) * radius, _contrasting_colour(bits, ground)[..., None, None] + shade)

    words = np.asarray(bits.random_raw(2 * canvas.size // 8)).astype("<u8")
    grain = words.view(np.uint8).reshape(2, *canvas.shape).astype(np.float32)
    canvas += (grain[0] - grain[1]) * _uniform(bits, 0.02 / 255, 0.09 / 255, count, 1, 1, 1)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _draw_images(seed: int, per_class: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw `per_class` images of every figure from one stream of random bits, in a random order, and their labels."""
    bits, counts = PCG64(seed), [min(_BLOCK, per_class - start) for start in range(0, per_class, _BLOCK)]
    blocks = [_draw_block(bits, figure, count) for figure in CLASS_NAMES for count in counts]
    labels = np.repeat(np.arange(len(CLASS_NAMES)), per_class)
    order = np.argsort(np.asarray(bits.random_raw(len(labels))), kind="stable")
    return np.concatenate(blocks)[order], labels[order]


def load_shapes() -> "Dataset":
    """Draw 5,000 training and 1,000 test images, (N, 3, 32, 32) uint8, from two streams, each class equally often.

    It takes about half a second on one core. No global random state is read or changed.
    """
    import torch

    from cifar_dist.data.dataset import Dataset, LabelledImages

    train, test = (
        LabelledImages(images=torch.from_numpy(images), labels=torch.from_numpy(labels).to(torch.int64))
        for images, labels in (_draw_images(seed=1, per_class=500), _draw_images(seed=2, per_class=100))
    )
    return Dataset(name="shapes", class_names=CLASS_NAMES, train=train, test=test)
