"""The experiment: every choice that changes what is learned, in frozen dataclasses that check themselves.

A `Recipe` says nothing of devices or processes (that is the world, `config/world.py`). Fields have no defaults
here: the recipes in `config/recipes/*.yaml` are whole, and a user's file is laid over `standard`.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cifar_dist.config.loading import nested, read_recipe
from cifar_dist.config.parsing import build, merge, to_mapping


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field} must be {allowed}, not {value!r}")


def _require_fractions(owner: object, *fields: str, below_one: bool = False) -> None:
    for field in fields:
        value = getattr(owner, field)
        high = value < 1 if below_one else value <= 1
        _require(0 <= value and high, field, value, "in [0, 1)" if below_one else "in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How a gradient becomes a step."""

    name: Literal["sgd", "adamw", "muon"]
    learning_rate: float
    """The peak of the schedule."""
    momentum: float
    """In [0, 1)."""
    nesterov: bool
    weight_decay: float
    decay_norm_and_bias: bool
    """Whether weight decay also pulls BatchNorm's parameters and the biases, as torch does when not told otherwise."""
    sgd_learning_rate: float | None
    """For `muon` alone: the peak for all that is no filter, which SGD steps; null: as for the filters."""
    normalize_filters: bool
    """For `muon` alone: each filter bank is brought to the norm sqrt(its outputs) before a step (airbench94_muon)."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _require_fractions(self, "momentum", below_one=True)
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or above")
        _require(not self.nesterov or self.momentum > 0, "nesterov", True, "false where momentum is 0")
        other = self.sgd_learning_rate
        _require(other is None or other > 0, "sgd_learning_rate", other, "above 0, or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate as a pure function of the step."""

    name: Literal["constant", "cosine", "step", "triangular"]
    warmup_fraction: float
    """Part of all steps in which the rate rises linearly from 0, in [0, 1)."""
    step_epochs: int | None
    """For `step`: every so many epochs the rate is multiplied by `gamma`."""
    gamma: float | None
    """For `step`: the factor, in (0, 1]."""

    def __post_init__(self) -> None:
        _require_fractions(self, "warmup_fraction", below_one=True)
        stepped = self.name == "step"
        for field in ("step_epochs", "gamma"):
            value = getattr(self, field)
            _require((value is not None) == stepped, field, value, "set with schedule.name=step, and only with it")
        _require(self.step_epochs is None or self.step_epochs >= 1, "step_epochs", self.step_epochs, "1 or more")
        _require(self.gamma is None or 0 < self.gamma <= 1, "gamma", self.gamma, "in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingConfig:
    """When to stop before the last epoch. `monitor` also decides which epoch is the best."""

    enabled: bool
    monitor: Literal["val_loss", "val_acc", "train_loss"]
    patience: int
    """Epochs in a row without an improvement after which training stops."""
    min_delta: float
    """An improvement is one of more than this."""

    def __post_init__(self) -> None:
        _require(self.patience >= 1, "patience", self.patience, "1 or more")
        _require(self.min_delta >= 0, "min_delta", self.min_delta, "0 or above")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """What is done to a training image. 0 (or `none`) switches an operation off."""

    crop_padding: int
    """Pixels added on each side before a random crop of the image's own size."""
    crop_mode: Literal["zeros", "reflect"]
    """What the added pixels show."""
    flip: Literal["none", "random", "alternating"]
    rotation_degrees: float
    """An angle from [-d, d], nearest pixel, as torchvision's RandomRotation."""
    brightness: float
    """A factor from [max(0, 1-b), 1+b]; contrast and saturation alike (torchvision's ColorJitter)."""
    contrast: float
    saturation: float
    hue: float
    """A shift from [-h, h] of a full turn, h at most 0.5."""
    affine_degrees: float
    affine_translate: float
    affine_scale: float
    cutout: int
    """Side of the square that is blanked, in pixels (arXiv 1708.04552)."""
    mixup: float
    """The Beta distribution's alpha (arXiv 1710.09412)."""
    cutmix: float
    """The Beta distribution's alpha (arXiv 1905.04899)."""

    def __post_init__(self) -> None:
        for field in ("crop_padding", "brightness", "contrast", "saturation", "cutout", "mixup", "cutmix"):
            _require(getattr(self, field) >= 0, field, getattr(self, field), "0 or above")
        for field in ("rotation_degrees", "affine_degrees"):
            _require(0 <= getattr(self, field) <= 180, field, getattr(self, field), "in [0, 180]")
        _require(0 <= self.hue <= 0.5, "hue", self.hue, "in [0, 0.5]")
        _require_fractions(self, "affine_translate")
        _require_fractions(self, "affine_scale", below_one=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizationConfig:
    """Per channel, for pixels in [0, 1]: (pixel - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        _require(min(self.std) > 0, "std", list(self.std), "three numbers above 0")
        for field in ("mean", "std"):
            values = getattr(self, field)
            allowed = "of pixels in [0, 1] (divide what is for pixels up to 255 by 255)"
            _require(0 <= min(values) and max(values) <= 1, field, list(values), allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One experiment, whole."""

    model: Literal["resnet18"]
    stem: Literal["cifar", "small", "imagenet"]
    """cifar: 3x3, stride 1, no max-pool; small: 3x3, stride 2, no max-pool; imagenet: torchvision's own."""
    pretrained: str | None
    """`imagenet`, or the path of a state dict."""
    freeze_epochs: int
    """Epochs in which only the head of a pretrained model is trained."""
    dropout: float
    """Before the head, in [0, 1)."""
    batch_norm_group_size: int | None
    """Samples that share BatchNorm statistics; null: the global batch."""
    epochs: int
    global_batch_size: int
    """Images a step of the optimiser, over all processes."""
    gradient_accumulation_steps: int
    image_size: int
    """Side of the images the model sees, in pixels."""
    image_size_schedule: tuple[tuple[float, float], ...] | None
    """(side as a fraction of `image_size`, fraction of the steps at which it ends), the last (1, 1); null: no change.

    Sides above 1 are pixels, as in older recipes, and become fractions.
    """
    label_smoothing: float
    """In [0, 1)."""
    ema_decay: float
    """Of the averaged weights, in [0, 1); 0: none."""
    gradient_clipping: float | None
    """Largest norm of the whole gradient."""
    seed: int
    validation_size: int | Literal["auto"]
    """Images held out of the training set, in equal parts of its classes; 0: none; auto: as `fit_to_dataset` says."""
    selection: Literal["best", "last"]
    """Which weights are tested; without a validation split always the last."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    early_stopping: EarlyStoppingConfig
    augmentation: AugmentationConfig
    normalization: NormalizationConfig

    @classmethod
    def load(cls, name_or_file: str = "standard", **changes: Any) -> "Recipe":
        """Give a recipe of the package or a file's, with changes: `Recipe.load("quick", epochs=2)`.

        A field of a field is changed by its dotted name: `**{"optimizer.learning_rate": 0.1}`. Raises UserError.
        """
        return resolve_recipe(read_recipe(name_or_file), nested(changes))

    def __post_init__(self) -> None:
        for field in ("epochs", "global_batch_size", "gradient_accumulation_steps", "image_size"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        _require(self.freeze_epochs >= 0, "freeze_epochs", self.freeze_epochs, "0 or more")
        _require_fractions(self, "dropout", "label_smoothing", "ema_decay", below_one=True)
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")
        clipping, group = self.gradient_clipping, self.batch_norm_group_size
        _require(clipping is None or clipping > 0, "gradient_clipping", clipping, "above 0, or null")
        _require(
            not self.freeze_epochs or self.pretrained is not None,
            "freeze_epochs",
            self.freeze_epochs,
            "0 without pretrained",
        )
        _require(group is None or group >= 2, "batch_norm_group_size", group, "2 or more, or null")
        _require(self.global_batch_size >= 2, "global_batch_size", self.global_batch_size, "2 or more (BatchNorm)")
        size = self.validation_size
        _require(size == "auto" or size >= 0, "validation_size", size, "0 or more, or auto")
        self._check_early_stopping()
        self._check_image_sizes()

    def _check_early_stopping(self) -> None:
        stopping = self.early_stopping
        if stopping.enabled and self.validation_size == 0 and stopping.monitor != "train_loss":
            raise ValueError(
                f"early_stopping.monitor={stopping.monitor} needs a validation split: "
                "set validation_size above 0, or early_stopping.monitor=train_loss"
            )

    def _check_image_sizes(self) -> None:
        schedule = self.image_size_schedule
        if schedule is None:
            return
        sides, ends = [side for side, _ in schedule], [end for _, end in schedule]
        if max(sides, default=0) > 1:  # pixels
            sides = [side / self.image_size for side in sides]
        ok = bool(ends) and ends == sorted(set(ends)) and ends[0] > 0 and math.isclose(ends[-1], 1.0)
        ok = ok and sides[-1] == max(sides) == 1 and round(min(sides) * self.image_size) >= 1
        allowed = f"[side, end] pairs with sides as fractions of image_size={self.image_size}, the last 1, and ends"
        shown = [list(pair) for pair in schedule]
        _require(ok, "image_size_schedule", shown, f"{allowed} rising to 1")
        object.__setattr__(self, "image_size_schedule", tuple(zip(sides, ends, strict=True)))


def resolve_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """Lay a recipe's fields over each other (the base, typed flags, then `--set`) and check the whole.

    Raises UserError.
    """
    return build(Recipe, functools.reduce(merge, layers))


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Give the recipe as plain values, as config.yaml and the checkpoint hold it."""
    mapping: dict[str, Any] = to_mapping(recipe)
    return mapping
