"""The plan: recipe and world meet in the arithmetic of a run, done once in one pure function."""

from dataclasses import dataclass, replace

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import Recipe

# The ranks agree, and read the loss from the device, about once a second, so that the device does not wait for them.
# Orders of magnitude for a ResNet-18, not measurements.
_IMAGES_A_SECOND = {"cpu": 500, "mps": 2_000, "cuda": 30_000}
_FEW_STEPS = 10  # in an epoch
_FEWEST_HELD_OUT, _MOST_HELD_OUT = 50, 5_000
"""Of `validation_size: auto`. The accuracy on fewer than 50 images has a standard error of several points."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSizes:
    """The numbers of images in a dataset, before anything is held out."""

    num_train: int
    num_test: int
    num_validation: int = 0
    """Images of a validation set that the dataset brings itself."""
    num_classes: int = 2


KNOWN_SIDE = 32  # of the images of `KNOWN_SIZES`, in pixels
KNOWN_SIZES = {
    "cifar10": DatasetSizes(num_train=50_000, num_test=10_000, num_classes=10),
    "cifar100": DatasetSizes(num_train=50_000, num_test=10_000, num_classes=100),
    "shapes": DatasetSizes(num_train=5_000, num_test=1_000, num_classes=10),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """Every derived number of a run."""

    global_batch_size: int
    per_device_batch_size: int
    world_size: int
    gradient_accumulation_steps: int
    num_train: int
    """Training images without those held out: all, or the subset that `train_size` asks for."""
    num_left_out: int
    """Training images that are neither in the subset nor held out."""
    num_validation: int
    num_test: int
    epochs: int
    steps_per_epoch: int
    images_per_epoch: int
    """`num_train`, or one fewer where the last batch would be a single image."""
    batch_norm_groups: int
    """Parts of a micro-batch with BatchNorm statistics of their own."""
    image_sizes: tuple[tuple[int, int], ...]
    """(side of the training images in pixels, last step that has it), in their order."""
    agree_every_steps: int
    """After so many steps the ranks exchange loss, divergence and stop signals. A signal waits at most this long."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, without early stopping."""
        return self.epochs * self.steps_per_epoch

    @property
    def equation(self) -> str:
        """The global batch as the product of its factors."""
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        group = self.global_batch_size // self.gradient_accumulation_steps // self.batch_norm_groups
        statistics = f"; BatchNorm sees {group} at a time" if group < self.global_batch_size else ""
        return (
            f"global_batch_size {self.global_batch_size} = {self.per_device_batch_size} per device"
            f" x {processes} x {self.gradient_accumulation_steps} accumulation{statistics}"
        )

    @property
    def lines(self) -> dict[str, str]:
        """The plan in words: names and values."""
        epochs = f"{self.epochs:,} epoch{'s' if self.epochs > 1 else ''}"
        unused = self.num_train - self.images_per_epoch
        note = f" ({unused} image left out of each: BatchNorm needs two)" if unused else ""
        train = f"{self.num_train:,}" + (f" of {self.num_train + self.num_left_out:,}" if self.num_left_out else "")
        sizes = [f"{side} x {side} to step {end:,}" for side, end in self.image_sizes[:-1]]
        side = self.image_sizes[-1][0]
        return {
            "batch": self.equation,
            "images": f"{train} training, {self.num_validation:,} validation, {self.num_test:,} test",
            "image size": ", ".join([*sizes, f"{side} x {side}"]),
            "steps": f"{self.steps_per_epoch:,} an epoch{note} x {epochs} = {self.total_steps:,}",
        }

    @property
    def few_steps_note(self) -> str | None:
        """A smaller batch to try if an epoch has so few steps that BatchNorm's averages and the schedule suffer."""
        fitting = max(self.world_size * self.gradient_accumulation_steps, 2)
        while 2 * fitting * _FEW_STEPS <= self.num_train:
            fitting *= 2
        if self.steps_per_epoch >= _FEW_STEPS or fitting >= self.global_batch_size:
            return None
        steps = f"{self.steps_per_epoch} step{'s' if self.steps_per_epoch > 1 else ''} an epoch"
        more = -(-_images_per_epoch(self.num_train, fitting) // fitting)
        return f"{steps} may be too few to learn: --set global_batch_size={fitting} gives {more} steps"

    def place_of(self, step: int) -> str:
        """Return epoch and step in it of the run's `step`, all counted from 1."""
        epoch = max(1, -(-step // self.steps_per_epoch))
        return f"epoch {epoch}, step {step - (epoch - 1) * self.steps_per_epoch}"

    def image_size_at(self, step: int) -> int:
        """Return the side of the training images in pixels in a step of the run, counted from 0."""
        return next((side for side, end in self.image_sizes if step < end), self.image_sizes[-1][0])


def num_held_out(recipe: Recipe, sizes: DatasetSizes) -> int:
    """Return the size of the validation set. Raises UserError if the dataset does not allow the recipe's.

    `auto` is a tenth of the training images, at most 5,000, and leaves each class an image. It is 0 where that is fewer
    than 50. A validation set that the dataset brings is used whole, and nothing is held out beside it.
    """
    size, own, most = recipe.validation_size, sizes.num_validation, max(sizes.num_train - sizes.num_classes, 0)
    if own:
        if size not in ("auto", 0, own):
            raise UserError(f"validation_size={size}, but the dataset brings its own {own}: leave it out")
        return own
    if size == "auto":
        share = min(_MOST_HELD_OUT, sizes.num_train // 10, most)
        return share if share >= _FEWEST_HELD_OUT else 0
    if size > most:
        raise UserError(
            f"validation_size={size} leaves a class without an image to train on: the training set has"
            f" {sizes.num_train} images of {sizes.num_classes} classes, set it to at most {most}"
        )
    return size


def num_trained(recipe: Recipe, sizes: DatasetSizes) -> tuple[int, int]:
    """Return the training images of an epoch, and those left out. Raises UserError if `train_size` cannot be had."""
    available = sizes.num_train - (0 if sizes.num_validation else num_held_out(recipe, sizes))
    size = recipe.train_size
    count = available if size is None else size if isinstance(size, int) else round(size * available)
    fewest = min(max(sizes.num_classes, 2), available)
    if not fewest <= count <= available:
        raise UserError(
            f"train_size={size} is {count:,} of {available:,} training images of {sizes.num_classes} classes:"
            f" set it to null or to {fewest:,} to {available:,} images"
        )
    return count, available - count


def fit_to_dataset(recipe: Recipe, sizes: DatasetSizes) -> Recipe:
    """Replace `validation_size: auto` by a number. Raises UserError as `num_held_out` does."""
    size = num_held_out(recipe, sizes)
    try:
        return replace(recipe, validation_size=size) if recipe.validation_size == "auto" else recipe
    except ValueError as error:  # early stopping needs a validation set, and nothing can be held out
        raise UserError(f"of {sizes.num_train} training images none is held out: {error}") from None


def make_plan(recipe: Recipe, *, world_size: int, sizes: DatasetSizes, device_type: str) -> RunPlan:
    """Derive the numbers of a run. Raises UserError with the nearest batch sizes if the global batch does not divide.

    Any number of images goes with any world.
    """
    batch, accumulation = recipe.global_batch_size, recipe.gradient_accumulation_steps
    if below := batch % (factor := world_size * accumulation):
        nearest = f"{batch - below} or " if batch > factor else ""
        raise UserError(
            f"global_batch_size={batch} does not divide by {world_size} processes x {accumulation} accumulation:"
            f" set it to {nearest}{batch - below + factor}"
        )
    num_train, num_left_out = num_trained(recipe, sizes)
    images_per_epoch = _images_per_epoch(num_train, batch)
    steps_per_epoch = -(-images_per_epoch // batch)
    total_steps = recipe.epochs * steps_per_epoch
    ends: dict[int, int] = {}  # last step -> side in pixels
    for side, end in recipe.image_size_schedule or ((1, 1),):
        ends.setdefault(round(end * total_steps), round(side * recipe.image_size))
    # Processes on CPUs may share the cores of one machine.
    images_a_second = _IMAGES_A_SECOND[device_type] * (world_size if device_type == "cuda" else 1)
    return RunPlan(
        global_batch_size=batch,
        per_device_batch_size=batch // factor,
        world_size=world_size,
        gradient_accumulation_steps=accumulation,
        num_train=num_train,
        num_left_out=num_left_out,
        num_validation=num_held_out(recipe, sizes),
        num_test=sizes.num_test,
        epochs=recipe.epochs,
        steps_per_epoch=steps_per_epoch,
        images_per_epoch=images_per_epoch,
        batch_norm_groups=_batch_norm_groups(recipe.batch_norm_group_size, batch // accumulation, world_size),
        image_sizes=tuple((side, last) for last, side in ends.items() if last > 0),
        agree_every_steps=max(1, min(images_a_second // batch, steps_per_epoch)),
    )


def _images_per_epoch(num_train: int, batch: int) -> int:
    """Return the images that are trained on: a last batch of one is left out, for BatchNorm needs two."""
    return num_train - (1 if num_train % batch == 1 else 0)


def _batch_norm_groups(size: int | None, micro_batch: int, world_size: int) -> int:
    """Return the number of groups in a micro-batch. Raises UserError unless each rank holds equally many, whole."""
    if size is None:
        return 1
    fitting = [n for n in range(2, micro_batch + 1) if micro_batch % n == 0 and micro_batch // n % world_size == 0]
    if size not in fitting:
        choices = ", ".join(map(str, fitting)) or "none"
        raise UserError(
            f"batch_norm_group_size={size} must cut the {micro_batch} images that are forwarded together into groups"
            f" that divide by {world_size} processes: set it to null or one of: {choices}"
        )
    return micro_batch // size
