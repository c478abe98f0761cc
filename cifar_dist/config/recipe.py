"""The experiment: every choice that changes what is learned, in frozen dataclasses, and how it is read from YAML.

A `Recipe` says nothing of devices or processes (that is the world, `config/world.py`). docs/recipes.md describes its
fields. They have no defaults: `config/recipes/*.yaml` are complete, and a user's file overrides `standard`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cifar_dist.config.errors import UserError
from cifar_dist.config.own_code import is_own_code, refuse_untyped_code
from cifar_dist.config.schema import Check, build, flatten, merge, nearest, nested, parse_yaml, read_yaml, to_mapping

DEFAULT_RECIPE = "standard"
_RECIPES = Path(__file__).with_name("recipes")

Count = Annotated[int, Check(lambda value: value >= 1, "1 or more")]
Size = Annotated[int, Check(lambda value: value >= 2, "2 or more (BatchNorm)")]
Natural = Annotated[int, Check(lambda value: value >= 0, "0 or more")]
Positive = Annotated[float, Check(lambda value: value > 0, "above 0")]
NonNegative = Annotated[float, Check(lambda value: value >= 0, "0 or above")]
Fraction = Annotated[float, Check(lambda value: 0 <= value <= 1, "in [0, 1]")]
FractionBelow1 = Annotated[float, Check(lambda value: 0 <= value < 1, "in [0, 1)")]
FractionOfAll = Annotated[float, Check(lambda value: 0 < value < 1, "2 images or more, a fraction in (0, 1), or null")]
Degrees = Annotated[float, Check(lambda value: 0 <= value <= 180, "in [0, 180]")]
_IN_PIXELS = "of pixels in [0, 1] (divide what is for pixels up to 255 by 255)"


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field} must be {allowed}, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How a gradient becomes a step."""

    name: Literal["sgd", "adamw", "muon"]
    learning_rate: Positive
    momentum: FractionBelow1
    nesterov: bool
    weight_decay: NonNegative
    decay_norm_and_bias: bool
    sgd_learning_rate: Positive | None
    """For `muon`: the peak for the parameters that SGD steps, which are all but filters; null: as for the filters."""
    normalize_filters: bool
    """For `muon`: each filter bank is scaled to the norm sqrt(its outputs) before a step (airbench94_muon)."""
    orthogonalization_steps: Count
    """For `muon`: its Newton-Schulz steps."""
    sgd_momentum: FractionBelow1 | None
    """For `muon`: the momentum of the parameters that SGD steps; null: `momentum`."""
    head_learning_rate: Positive | None
    """The peak for the last layer; null: as for the other matrices that SGD or AdamW steps."""
    bias_learning_rate: Positive | None
    """The peak for biases and BatchNorm's parameters; null: as for the other parameters that SGD or AdamW steps."""

    def __post_init__(self) -> None:
        lowest = self.momentum if self.sgd_momentum is None else min(self.momentum, self.sgd_momentum)
        _require(not self.nesterov or lowest > 0, "nesterov", True, "false where momentum or sgd_momentum is 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate as a pure function of the step."""

    name: Literal["constant", "cosine", "step", "triangular"]
    warmup_fraction: FractionBelow1
    step_epochs: Count | None
    gamma: Annotated[float, Check(lambda value: 0 < value <= 1, "in (0, 1]")] | None

    def __post_init__(self) -> None:
        for field in ("step_epochs", "gamma"):
            is_set = getattr(self, field) is not None
            only = "set with schedule.name=step, and only with it"
            _require(is_set == (self.name == "step"), field, getattr(self, field), only)


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingConfig:
    """When to stop before the last epoch. `monitor` also decides which epoch is the best."""

    enabled: bool
    monitor: Literal["val_loss", "val_acc", "train_loss"]
    patience: Count
    min_delta: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """Random operations on a training image; 0 (or `none`) switches one off.

    Cutout: arXiv 1708.04552; mixup: 1710.09412, CutMix: 1905.04899, both by the Beta distribution's alpha.
    TrivialAugmentWide: 2103.10158, RandAugment: 1909.13719, random erasing: 1708.04896.
    """

    crop_padding: Natural
    crop_mode: Literal["zeros", "reflect"]
    flip: Literal["none", "random", "alternating"]
    rotation_degrees: Degrees
    """An angle from [-d, d], nearest pixel, as torchvision's RandomRotation."""
    brightness: NonNegative
    """A factor from [max(0, 1-b), 1+b]; contrast and saturation alike (torchvision's ColorJitter)."""
    contrast: NonNegative
    saturation: NonNegative
    hue: Annotated[float, Check(lambda value: 0 <= value <= 0.5, "in [0, 0.5]")]
    affine_degrees: Degrees
    affine_translate: Fraction
    affine_scale: FractionBelow1
    policy: Literal["none", "trivial", "randaugment"]
    custom: str | None
    """A user's function, `package.module:function` or `file.py:function`."""
    cutout: Natural
    random_erasing: Fraction
    """The probability of an image."""
    mixup: NonNegative
    cutmix: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizationConfig:
    """Per channel, for pixels in [0, 1]: (pixel - mean) / std."""

    mean: Annotated[tuple[float, float, float], Check(lambda mean: 0 <= min(mean) <= max(mean) <= 1, _IN_PIXELS)]
    std: Annotated[tuple[float, float, float], Check(lambda std: 0 < min(std) <= max(std) <= 1, _IN_PIXELS)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One complete experiment."""

    model: str
    """A classification network of torchvision, `fastnet`, or a function of your own (`config/own_code.py`)."""
    allow_untracked_randomness: bool
    """Whether the network may draw random numbers that depend on the world size (`model/probe.py`)."""
    stem: Literal["cifar", "small", "imagenet"] | None
    """Of a network of torchvision; null for others."""
    pretrained: str | None
    freeze_epochs: Natural
    dropout: FractionBelow1
    batch_norm_group_size: Size | None
    """Samples that share BatchNorm statistics; null: the global batch."""
    batch_norm_momentum: Annotated[float, Check(lambda value: 0 < value <= 1, "in (0, 1]")] | None
    """The weight of a batch in BatchNorm's running statistics, torch's `momentum`; null: the network's own."""
    batch_norm_scale: bool
    """Whether BatchNorm's scales are trained; if not they stay 1."""
    head_scale: Positive
    """A factor on the initial weights of the last layer (docs/recipes.md)."""
    whitening_bias_epochs: Natural | None
    """For `fastnet`: the first layer's bias is trained for so many epochs, then the layer is frozen; null: always."""
    epochs: Count
    global_batch_size: Size
    gradient_accumulation_steps: Count
    image_size: Count
    image_size_schedule: tuple[tuple[float, float], ...] | None
    """(side as a fraction of `image_size`, fraction of the steps at which it ends), the last (1, 1); null: no change.

    Sides above 1 are pixels, and become fractions.
    """
    label_smoothing: FractionBelow1
    ema_decay: FractionBelow1
    gradient_clipping: Positive | None
    seed: Annotated[int, Check(lambda value: 0 <= value < 2**32, "in [0, 2^32)")]
    validation_size: Literal["auto"] | Natural
    train_size: Size | FractionOfAll | None
    """Training images, or a fraction of those that are not held out; null: all."""
    """Images held out of the training set, in equal parts of its classes; 0: none; auto: see `plan.num_held_out`."""
    selection: Literal["best", "last"]
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    early_stopping: EarlyStoppingConfig
    augmentation: AugmentationConfig
    normalization: NormalizationConfig

    @classmethod
    def load(cls, name_or_file: str = DEFAULT_RECIPE, **changes: Any) -> "Recipe":
        """Load a recipe by name or file, with changes: `Recipe.load("quick", epochs=2)`.

        A nested field is changed by its dotted name: `**{"optimizer.learning_rate": 0.1}`. Raises UserError.
        """
        return resolve_recipe(read_recipe(name_or_file, changes), nested(changes))

    def __post_init__(self) -> None:
        if self.model == "fastnet" or is_own_code(self.model):
            object.__setattr__(self, "stem", None)
        else:
            _require(self.stem is not None, "stem", None, f"cifar, small or imagenet for {self.model}")
        if self.model != "fastnet":
            object.__setattr__(self, "whitening_bias_epochs", None)
        freeze = self.freeze_epochs
        _require(not freeze or self.pretrained is not None, "freeze_epochs", freeze, "0 without pretrained")
        stopping = self.early_stopping
        if stopping.enabled and self.validation_size == 0 and stopping.monitor != "train_loss":
            raise ValueError(
                f"early_stopping.monitor={stopping.monitor} needs a validation split: "
                "set validation_size above 0, or early_stopping.monitor=train_loss"
            )
        if self.image_size_schedule is not None:
            object.__setattr__(self, "image_size_schedule", self._size_fractions(self.image_size_schedule))

    def _size_fractions(self, schedule: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        """Return a schedule with sides as fractions. Raises ValueError for one that does not grow to (1, 1)."""
        sides, ends = [side for side, _ in schedule], [end for _, end in schedule]
        if max(sides, default=0) > 1:  # pixels
            sides = [side / self.image_size for side in sides]
        ok = bool(ends) and ends == sorted(set(ends)) and ends[0] > 0 and math.isclose(ends[-1], 1.0)
        ok = ok and sides[-1] == max(sides) == 1 and round(min(sides) * self.image_size) >= 1
        allowed = f"[side, end] pairs with sides as fractions of image_size={self.image_size}, the last 1, and ends"
        _require(ok, "image_size_schedule", [list(pair) for pair in schedule], f"{allowed} rising to 1")
        return tuple(zip(sides, ends, strict=True))


RECIPE_FIELDS = [
    f"{field.name}.{inner.name}" if inner else field.name
    for field in fields(Recipe)
    for inner in (fields(field.type) if is_dataclass(field.type) else (None,))
]
"""Dotted names."""
PRETRAINED_SIDES = {
    "efficientnet_b1": 240, "efficientnet_b2": 288, "efficientnet_b3": 300, "efficientnet_b4": 380,
    "efficientnet_b5": 456, "efficientnet_b6": 528, "efficientnet_b7": 600,
    "efficientnet_v2_s": 384, "efficientnet_v2_m": 480, "efficientnet_v2_l": 480, "regnet_y_128gf": 384,
    "swin_v2_t": 256, "swin_v2_s": 256, "swin_v2_b": 256, "vit_h_14": 518,
}  # fmt: skip
"""The sides of torchvision's ImageNet weights that are not 224, by model: `image_size: auto`."""
_ALIASES = {
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "optimizer": "optimizer.name",
    "optim": "optimizer.name",
    "scheduler": "schedule.name",
    "lr_scheduler": "schedule.name",
    "warmup": "schedule.warmup_fraction",
    "batch_size": "global_batch_size",
    "bs": "global_batch_size",
    "grad_clip": "gradient_clipping",
    "ema": "ema_decay",
    "arch": "model",
}
"""Names of fields in other programs."""


def find_field(name: str) -> str | None:
    """Return the recipe field that ends in `name`, or that has this name in other programs."""
    own = [field for field in RECIPE_FIELDS if field.rpartition(".")[2] == name]
    return own[0] if len(own) == 1 else _ALIASES.get(name)


def resolve_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """Build a recipe from mappings, of which later ones override earlier ones. Raises UserError."""
    values = functools.reduce(merge, layers)
    for name in flatten(values):
        if name not in RECIPE_FIELDS and (meant := find_field(name.rpartition(".")[2])):
            raise UserError(f"unknown recipe field '{name}', did you mean '{meant}'?")
    if values.get("image_size") == "auto":
        values = {**values, "image_size": PRETRAINED_SIDES.get(values.get("model", ""), 224)}
    return build(Recipe, values)


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, as config.yaml and checkpoints store it."""
    mapping: dict[str, Any] = to_mapping(recipe)
    return mapping


def describe_network(recipe: Recipe) -> str:
    """Return the network in words: its name, and its stem if it has one."""
    return recipe.model if recipe.stem is None else f"{recipe.model}, stem {recipe.stem}"


def recipe_names() -> list[str]:
    """Return the names of the package's recipes in alphabetical order."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def read_recipe(name_or_file: str, typed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a recipe of the package, or a file that overrides `standard`, such as a run's config.yaml.

    Raises UserError, also if a run's config.yaml names a function that is not among the `typed` fields (dotted names).
    """
    path, names = Path(name_or_file), recipe_names()
    if name_or_file in names:
        return read_yaml(_RECIPES / f"{name_or_file}.yaml", "recipe")
    if not path.exists():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise UserError(f"recipe file {path} does not exist")
        raise UserError(f"unknown recipe '{name_or_file}'{nearest(name_or_file, names)} (recipes: {', '.join(names)})")
    values, standard = read_yaml(path, "recipe file"), read_recipe(DEFAULT_RECIPE)
    if isinstance(values.get("recipe"), Mapping):
        if beside := sorted(values.keys() & standard.keys()):
            raise UserError(
                f"recipe file {path} holds a whole recipe under 'recipe', and beside it {', '.join(beside)}"
            )
        values = values["recipe"]
        refuse_untyped_code(flatten(values), typed or {}, f"recipe file {path}")
    return merge(standard, nested(values))


def recipe_label(name_or_file: str) -> str:
    """Return the short name of a recipe, as in the name of the run directory."""
    path = Path(name_or_file)
    return path.parent.name if path.name == "config.yaml" and path.parent.name else path.stem


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse `--set` arguments (`optimizer.learning_rate=0.1`, values in YAML) into a nested mapping."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise UserError(f"--set takes FIELD=VALUE, not '{assignment}'")
        value = parse_yaml(text, f"--set {name.strip()}: '{text}'")
        result = merge(result, nested({name.strip(): value}))
    return result
