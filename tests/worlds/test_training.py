"""One recipe trains the same model on every world: in float64, to rounding."""

import contextlib
import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer
from torchvision.ops import StochasticDepth

from cifar_dist.run.checkpoint import load_checkpoint
from cifar_dist.run.directory import RunDirectory
from cifar_dist.training.trainer import InterruptedRun
from tests.runs import begin
from tests.worlds.harness import models_in_float64, run_world
from tests.worlds.test_two_ranks import make_trainer, weights_of

pytestmark = pytest.mark.full

# All that changes a step; 35 images in batches of 8 or 16 leave 3 in the last, so that a rank of four has none of them.
# Not smaller images: of 16 pixels one is left at the end, BatchNorm sees 2 or 3 values, and a relative change of 1e-15
# in the weights grows to 1e-10 in nine steps, in the smallest groups to 1e-2. With 24 pixels it stays below 1e-13.
EVERYTHING = (
    "stem=small", "epochs=4", "image_size=24", "global_batch_size=8", "validation_size=4", "train_size=35",
    "ema_decay=0.9",
    "early_stopping.enabled=false", "dropout=0.3", "label_smoothing=0.1", "optimizer.learning_rate=0.01",
    "optimizer.nesterov=true", "optimizer.momentum=0.9", "optimizer.weight_decay=0.01",
    "schedule={name: cosine, warmup_fraction: 0.3}",
    "augmentation.mixup=0.5", "augmentation.cutmix=0.5", "augmentation.cutout=8",
)  # fmt: skip
DEEP = ("stem=cifar", "image_size=16", "epochs=1", "global_batch_size=16", "optimizer.learning_rate=0.001")
VARIANTS = {
    "accumulated": ("gradient_accumulation_steps=2", "gradient_clipping=0.5"),
    "groups": ("global_batch_size=16", "batch_norm_group_size=4", "epochs=2"),
    "groups accumulated": (
        "global_batch_size=16", "batch_norm_group_size=2", "gradient_accumulation_steps=2", "epochs=2",
    ),
    "muon": (
        "optimizer={name: muon, learning_rate: 0.02, sgd_learning_rate: 0.01, normalize_filters: true}",
        "augmentation.flip=alternating",
        "image_size=32", "image_size_schedule=[[0.75, 0.5], [1.0, 1.0]]", "epochs=2",
    ),
    "fast": (
        "model=fastnet", "epochs=2", "whitening_bias_epochs=1", "batch_norm_scale=false", "batch_norm_momentum=0.4",
        "head_scale=0.1", "dropout=0",
        "optimizer={name: muon, learning_rate: 0.02, momentum: 0.6, sgd_momentum: 0.8, head_learning_rate: 0.01,"
        " bias_learning_rate: 0.1, normalize_filters: true, orthogonalization_steps: 3}",
    ),
    # In three steps: each lets a change of 1e-15 grow by ten.
    "mobilenet_v2": ("model=mobilenet_v2", *DEEP),
    "efficientnet_b0": ("model=efficientnet_b0", *DEEP),
    "transformer": (f"model={__name__}:tiny_vit", "stem=imagenet", "epochs=2"),
    "own network": (f"model={__name__}:OwnNetwork", "stem=imagenet", "epochs=2", "gradient_accumulation_steps=2"),
}  # fmt: skip


def tiny_vit(num_classes):
    """Build torchvision's vision transformer with dropout of tokens and of attention."""
    return VisionTransformer(24, 8, 2, 2, 16, 24, dropout=0.2, attention_dropout=0.3, num_classes=num_classes)


class OwnNetwork(nn.Module):
    """A network with every other kind of randomness, BatchNorm1d, samples in dimension 1, and a spare layer."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 8, stride=8), nn.Dropout2d(0.2), StochasticDepth(0.3, "batch"))
        self.dropout, self.spare = nn.Dropout(0.2), nn.Linear(2, 2)
        self.encoder = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.2)
        self.tail = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108), nn.Linear(108, num_classes))

    def forward(self, images):
        tokens = self.dropout(self.stem(images).flatten(2).permute(2, 0, 1))
        tokens = self.dropout(checkpoint(self.encoder, tokens, use_reentrant=False))
        return self.tail(tokens.transpose(0, 1))


def in_float64(runtime, assignments):
    with models_in_float64():
        return make_trainer(runtime, *EVERYTHING, *assignments, num_train=42)


def train(runtime, *, folder: Path, variant: str):
    """Train, and let rank 0 save its weights; return what must be equal on all ranks."""
    trainer = in_float64(runtime, VARIANTS[variant])
    records = trainer.fit()
    weights = weights_of(trainer)
    if runtime.is_main:
        torch.save({"weights": weights, "losses": [record.train_loss for record in records]}, folder / f"{variant}.pt")
    return [(record.val_loss, record.step) for record in records], [float(w.sum()) for w in weights.values()]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Train each variant in worlds of 1, 2 and 4; return {size: (folder, {variant: results by rank})}."""
    made = {}
    for size in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"world{size}")
        checks = [functools.partial(train, folder=folder, variant=variant) for variant in VARIANTS]
        made[size] = (folder, dict(zip(VARIANTS, run_world(size, *checks), strict=True)))
    return made


def assert_same_weights(ours, theirs):
    for name, value in theirs.items():
        if value.is_floating_point():  # a bias before a convolution and BatchNorm has no gradient but rounding
            assert float((value - ours[name]).norm()) <= 1e-8 * max(float(value.norm()), 1e-6), name
        else:
            assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_do_not_depend_on_the_world(worlds, variant, size):
    alone, together = (torch.load(worlds[count][0] / f"{variant}.pt", weights_only=True) for count in (1, size))
    assert_same_weights(together["weights"], alone["weights"])
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-6)  # their sums are float32
    first, *others = worlds[size][1][variant]
    assert all(other == first for other in others), "the ranks' records or weights differ"


MIDDLE = ("epochs=2", "global_batch_size=16", "batch_norm_group_size=4")


def run_part(
    runtime,
    *,
    folder: Path,
    settings: tuple[str, ...] = MIDDLE,
    stop_after: int | None = None,
    every: int | None = None,
):
    """Train, from a checkpoint in the folder if there is one, to the end or to a step in which a signal comes."""
    trainer = in_float64(runtime, settings)
    object.__setattr__(trainer.plan, "agree_every_steps", 1)
    end = trainer._end_step

    def signalled(epoch):
        trainer.interrupt.requested = "SIGTERM" if trainer.state.step + 1 == stop_after else None
        end(epoch)

    trainer._end_step = signalled
    begin(trainer, folder, checkpoint_every_steps=every)
    with contextlib.suppress(InterruptedRun):
        trainer.fit()
        trainer.recorder.save(trainer.state)
    runtime.ranks.all_gather([0])  # the others read what rank 0 has written
    return trainer.state.step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_world(1, functools.partial(run_part, folder=folder)) == [[6]]
    return folder


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (4, 2)])
def test_a_run_goes_on_in_another_world(tmp_path, uninterrupted, first, second):
    assert run_world(first, functools.partial(run_part, folder=tmp_path / "parts", stop_after=4)) == [[4] * first]
    assert run_world(second, functools.partial(run_part, folder=tmp_path / "parts")) == [[6] * second]
    whole, parts = RunDirectory(uninterrupted), RunDirectory(tmp_path / "parts")
    ours, theirs = load_checkpoint(parts.last), load_checkpoint(whole.last)
    for part in ("model", "model_ema"):
        assert_same_weights(ours[part], theirs[part])
    losses = [[record.train_loss for record in run.read_records()] for run in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("variant", ["groups", "mobilenet_v2", "efficientnet_b0", "transformer", "own network"])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_only_saves(tmp_path, variant):
    whole, parts = (RunDirectory(tmp_path / name) for name in ("whole", "parts"))
    part = functools.partial(run_part, settings=VARIANTS[variant])
    run_world(
        2,
        functools.partial(part, folder=whole.path, every=2),
        functools.partial(part, folder=parts.path, stop_after=2),
        functools.partial(part, folder=parts.path),
    )
    ours, theirs = load_checkpoint(parts.last), load_checkpoint(whole.last)
    assert ours["step"] == theirs["step"] > 2
    for name in ("model", "model_ema"):
        assert all(torch.equal(*pair) for pair in zip(ours[name].values(), theirs[name].values(), strict=True))
    losses = [[record.train_loss for record in run.read_records()] for run in (whole, parts)]
    assert losses[0] == losses[1]
