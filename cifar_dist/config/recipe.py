"""The experiment: every choice that changes what is learned, in frozen dataclasses, and how it is read from YAML.

A `Recipe` says nothing of devices or processes (that is the world, `config/world.py`). docs/recipes.md describes its
fields. All but `dataset` have no default: `config/recipes/*.yaml` are complete, and a user's file overrides `standard`.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cifar_dist.config.errors import UserError
from cifar_dist.config.own_code import OWN_CODE_FIELDS, is_own_code, refuse_untyped_code
from cifar_dist.config.schema import Check, build, flatten, merge, nearest, nested, parse_yaml, read_yaml, to_mapping

DEFAULT_RECIPE = "standard"
RECIPES = Path(__file__).with_name("recipes")

Count = Annotated[int, Check(lambda value: value >= 1, "1 or more")]
Size = Annotated[int, Check(lambda value: value >= 2, "2 or more")]
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
    """SGD, AdamW (arXiv 1711.05101), or Muon (kellerjordan.github.io/posts/muon) for filters and SGD for the rest."""
    learning_rate: Positive
    """The peak of the schedule."""
    momentum: FractionBelow1
    """As in torch.optim.SGD; the first beta of AdamW."""
    nesterov: bool
    """Nesterov momentum. It needs `momentum` above 0, and AdamW does not use it."""
    weight_decay: NonNegative
    """As in torch.optim.SGD. For AdamW and Muon it is decoupled: rate x `weight_decay`."""
    decay_norm_and_bias: bool
    """Whether the parameters of BatchNorm and the biases decay too."""
    sgd_learning_rate: Positive | None
    """For `muon`: the peak rate of the parameters that SGD trains; null: the same as for the filters."""
    normalize_filters: bool
    """For `muon`: scale each filter tensor to the norm sqrt(output channels) before a step (airbench94_muon)."""
    orthogonalization_steps: Count
    """For `muon`: Newton-Schulz steps that orthogonalize an update."""
    sgd_momentum: FractionBelow1 | None
    """For `muon`: the momentum of the parameters that SGD trains; null: `momentum`."""
    head_learning_rate: Positive | None
    """The peak rate of the last layer; null: as other matrices trained by SGD or AdamW."""
    bias_learning_rate: Positive | None
    """The peak rate of biases and BatchNorm's parameters; null: as other parameters trained by SGD or AdamW."""

    def __post_init__(self) -> None:
        lowest = self.momentum if self.sgd_momentum is None else min(self.momentum, self.sgd_momentum)
        _require(not self.nesterov or lowest > 0, "nesterov", True, "false where momentum or sgd_momentum is 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate as a pure function of the step."""

    name: Literal["constant", "cosine", "step", "triangular"]
    """How the rate falls after the warm-up: not at all, to 0 as a cosine, in steps, or to 0 in a straight line."""
    warmup_fraction: FractionBelow1
    """The fraction of all steps that is a linear warm-up to the peak."""
    step_epochs: Count | None
    """For `step`: the epochs between two steps, as `step_size` of torch's StepLR."""
    gamma: Annotated[float, Check(lambda value: 0 < value <= 1, "in (0, 1]")] | None
    """For `step`: the factor of the rate at each step."""

    def __post_init__(self) -> None:
        for name in ("step_epochs", "gamma"):
            is_set = getattr(self, name) is not None
            only = "set with schedule.name=step, and only with it"
            _require(is_set == (self.name == "step"), name, getattr(self, name), only)


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingConfig:
    """When to stop before the last epoch. `monitor` also decides which epoch is the best."""

    enabled: bool
    """Whether the training may end before its last epoch."""
    monitor: Literal["val_loss", "val_acc", "train_loss"]
    """The metric that decides when to stop and which epoch is the best."""
    patience: Count
    """Epochs in a row without an improvement before the stop."""
    min_delta: NonNegative
    """An improvement must be larger than this. Accuracies are fractions of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """Random operations on a training image, in the order of the fields; 0 (or `none`) switches one off."""

    crop_padding: Natural
    """Pad each side by N pixels, then crop to the old size at a random place."""
    crop_mode: Literal["zeros", "reflect"]
    """What the padding shows: black, or the mirrored border."""
    flip: Literal["none", "random", "alternating"]
    """Mirror half of the images. `alternating` mirrors the other half in the next epoch (arXiv 2404.00498)."""
    rotation_degrees: Degrees
    """Rotate by an angle from [-d, d] degrees, nearest pixel, as torchvision's RandomRotation."""
    affine_degrees: Degrees
    """Rotate by an angle from [-d, d] degrees, as torchvision's RandomAffine."""
    affine_translate: Fraction
    """Move along x and y by fractions of the side from [-t, t], in whole pixels."""
    affine_scale: FractionBelow1
    """Scale by a factor from [1 - s, 1 + s]."""
    policy: Literal["none", "trivial", "randaugment"]
    """TrivialAugmentWide (arXiv 2103.10158), or RandAugment with 2 operations at magnitude 9 (arXiv 1909.13719)."""
    custom: str | None
    """A function of your own for each batch, `package.module:function` or `file.py:function`."""
    brightness: NonNegative
    """Multiply by a factor from [max(0, 1 - b), 1 + b]."""
    contrast: NonNegative
    """Multiply the difference from the mean gray by a factor from [max(0, 1 - c), 1 + c]."""
    saturation: NonNegative
    """Multiply the difference from the gray image by a factor from [max(0, 1 - s), 1 + s]."""
    hue: Annotated[float, Check(lambda value: 0 <= value <= 0.5, "in [0, 0.5]")]
    """Shift the hue by a fraction of a turn from [-h, h]."""
    cutout: Natural
    """Blank a square of this side in pixels at a random place (arXiv 1708.04552)."""
    random_erasing: Fraction
    """The probability that a random box of an image is blanked, as torchvision's RandomErasing."""
    mixup: NonNegative
    """Blend each image with another; the share is drawn from Beta(a, a), a this field (arXiv 1710.09412)."""
    cutmix: NonNegative
    """Paste a box of another image; its area is drawn from Beta(a, a), a this field (arXiv 1905.04899)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizationConfig:
    """What the network gets of a pixel: (pixel - mean) / std, per channel."""

    mean: Annotated[tuple[float, float, float], Check(lambda mean: 0 <= min(mean) <= max(mean) <= 1, _IN_PIXELS)]
    """The mean of each channel (red, green, blue), for pixels in [0, 1]."""
    std: Annotated[tuple[float, float, float], Check(lambda std: 0 < min(std) <= max(std) <= 1, _IN_PIXELS)]
    """The standard deviation of each channel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One complete experiment: everything that changes what is learned, and nothing of devices or processes.

    Raises:
        ValueError: Fields contradict each other. `Recipe.load` also checks types and limits, and raises UserError.
    """

    model: str
    """A torchvision classifier, `fastnet`, or a function of your own (`file.py:function`)."""
    allow_untracked_randomness: bool
    """Whether the network may draw random numbers that depend on the world size."""
    stem: Literal["cifar", "small", "imagenet"] | None
    """The first layers of a torchvision network; set to null for other networks.

    In a ResNet: 3x3 with stride 1, 3x3 with stride 2, or 7x7 with max-pool (docs/your-network.md).
    """
    pretrained: str | None
    """Start from `imagenet` (torchvision's weights, downloaded if missing) or from a state dict in a file."""
    freeze_epochs: Natural
    """Epochs at the start that train only the head and a new stem. BatchNorm statistics adapt meanwhile."""
    dropout: FractionBelow1
    """The probability of dropout before the last layer."""
    batch_norm_group_size: Size | None
    """Images that share BatchNorm statistics; null: the global batch, or a micro-batch of it."""
    batch_norm_momentum: Annotated[float, Check(lambda value: 0 < value <= 1, "in (0, 1]")] | None
    """The weight of a batch in BatchNorm's running statistics, torch's `momentum`; null: the network's own."""
    batch_norm_scale: bool
    """Whether BatchNorm's scales are trained. If not, they stay 1."""
    head_scale: Positive
    """A factor on the initial weights of the last layer."""
    whitening_bias_epochs: Natural | None
    """For `fastnet`: epochs before the bias of the first layer is frozen, too; null: never."""
    epochs: Count
    """Passes over the training images."""
    global_batch_size: Size
    """Images of one optimizer step, over all processes."""
    gradient_accumulation_steps: Count
    """Micro-batches of one step. BatchNorm statistics are over a micro-batch."""
    image_size: Count
    """Pixels a side, in training and evaluation; `auto`: as for the model's ImageNet weights, 224 for most."""
    image_size_schedule: tuple[tuple[float, float], ...] | None
    """Train on smaller images first: pairs [side, end], of which the last is [1, 1]; null: no change.

    A side is a fraction of `image_size`, or pixels where it is above 1. An end is a fraction of all steps.
    """
    label_smoothing: FractionBelow1
    """The part of the target that is spread evenly over all classes (arXiv 1512.00567)."""
    ema_decay: FractionBelow1
    """Exponential moving average of the weights with this decay per step; it is validated and tested. 0: none."""
    gradient_clipping: Positive | None
    """The largest norm of the gradient; null: no limit."""
    seed: Annotated[int, Check(lambda value: 0 <= value < 2**32, "in [0, 2^32)")]
    """Decides the initial weights, the validation split, the order and every random draw."""
    validation_size: Literal["auto"] | Natural
    """Images held out, stratified by class; `auto`: a tenth of the training images, at most 5,000, and none
    where that is fewer than 50; 0: none."""
    train_size: Size | FractionOfAll | None
    """Train on N images, or on a fraction of those not held out, stratified by class; null: all."""
    selection: Literal["best", "last"]
    """The weights that are tested. `early_stopping.monitor` decides which epoch is the best."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    early_stopping: EarlyStoppingConfig
    augmentation: AugmentationConfig
    normalization: NormalizationConfig
    dataset: str | None = field(default=None, compare=False)
    """The default of `--dataset`. A run stores the dataset that it used instead."""

    @classmethod
    def load(cls, name_or_file: str = DEFAULT_RECIPE, **changes: Any) -> "Recipe":
        """Load a recipe by name or file, with changes: `Recipe.load("quick", epochs=2)`.

        Args:
            name_or_file: A recipe of the package, or a YAML file that overrides `standard`.
            **changes: New values of fields. A nested field has a dotted name: `**{"optimizer.learning_rate": 0.1}`.

        Raises:
            UserError: The recipe or a field is unknown, or a value is not allowed.
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
    f"{outer.name}.{inner.name}" if inner else outer.name
    for outer in fields(Recipe)
    for inner in (fields(outer.type) if is_dataclass(outer.type) else (None,))
    if outer.compare
]
"""Dotted names of all but `dataset`."""
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
        values = {**values, "image_size": PRETRAINED_SIDES.get(str(values.get("model")), 224)}
    return build(Recipe, values)


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, without its `dataset`, as config.yaml and checkpoints store it."""
    mapping: dict[str, Any] = to_mapping(recipe)
    return mapping


def describe_network(recipe: Recipe) -> str:
    """Return the network in words: its name, and its stem if it has one."""
    return recipe.model if recipe.stem is None else f"{recipe.model}, stem {recipe.stem}"


def network_label(model: str) -> str:
    """Return the last part of a network's name, as it stands in the name of a run directory."""
    return re.sub(r"\W", "", re.split(r"[:.]", model)[-1])  # "<lambda>", "a/b"


def describe_recipe(name: str, recipe: Recipe) -> str:
    """Return the recipe's name, and its network if it is your own or replaces that of the package's recipe."""
    is_replaced = name in recipe_names() and recipe.model != read_recipe(name)["model"]
    return f"{name} with {network_label(recipe.model)}" if is_replaced or is_own_code(recipe.model) else name


def recipe_names() -> list[str]:
    """Return the names of the package's recipes in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name_or_file: str, typed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a recipe of the package, or a file that overrides `standard`, such as a run's config.yaml.

    Raises UserError, also if a run's config.yaml names a function that is not among the `typed` fields (dotted names).
    """
    path, names = Path(name_or_file), recipe_names()
    if name_or_file in names:
        return read_yaml(RECIPES / f"{name_or_file}.yaml", "recipe")
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
    """Return the short name of a recipe, as in the name of the run directory; a run's config.yaml holds it."""
    path = Path(name_or_file)
    if path.name != "config.yaml" or not path.exists():
        return path.stem
    return Path(str(read_yaml(path, "recipe file").get("recipe_name") or path.parent.name or path.stem)).name


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse `--set` arguments (`optimizer.learning_rate=0.1`, values in YAML) into a nested mapping."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise UserError(f"--set takes FIELD=VALUE without spaces, not '{assignment}'")
        if name.strip() == "dataset":
            raise UserError(f"--set {assignment}: the dataset has a flag of its own, type --dataset {text}")
        is_file = name.strip() in OWN_CODE_FIELDS and text.endswith(".py")
        if is_file or text.endswith(":"):  # the latter YAML reads as a mapping
            raise UserError(f"--set {name.strip()}: '{text}' names no function: type file.py:function")
        value = parse_yaml(text, f"--set {name.strip()}: '{text}'")
        result = merge(result, nested({name.strip(): value}))
    return result
