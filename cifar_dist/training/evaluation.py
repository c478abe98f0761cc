"""Exact evaluation: every sample once, whatever the number of samples and processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifar_dist.data.batches import Normalizer, evaluation_batches
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.order import Shard
from cifar_dist.records import Evaluation, Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.metrics import confident_mistakes, summarize


def batch_size_for(image_size: int) -> int:
    """Give the images evaluated at once: 250 of 32 pixels, fewer of larger ones, so that activations stay small.

    It depends on nothing else, so that two evaluations of the same weights on one machine give the same bits.
    """
    return max(8, min(250, 250 * 32**2 // image_size**2))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """The logits for a set of samples, on the CPU."""

    indices: Tensor
    """(N,) int64: which samples of the dataset."""
    labels: Tensor
    """(N,) int64."""
    logits: Tensor
    """(N, num_classes) float32."""


def predict_logits(
    model: nn.Module,
    data: LabelledImages,
    indices: Tensor,
    *,
    num_classes: int,
    normalize: Normalizer,
    image_size: int,
    runtime: Runtime,
    mirror: bool = False,
    observer: Observer | None = None,
) -> Predictions:
    """Run the (unwrapped) model over `indices` (N,) of `data`, in evaluation mode.

    With `mirror`, the logits are the mean over an image and its mirror image. Each process fills in the rows of its
    own samples, and the rows are added up once: nothing is padded, so nothing is counted twice.
    """
    observer = observer or Observer()
    shard = Shard(index=runtime.world.rank, count=runtime.world.size)
    own, batch_size = [], batch_size_for(image_size)
    model.eval()
    with torch.no_grad(), runtime.autocast():
        for images in evaluation_batches(
            data, indices, batch_size=batch_size, shard=shard, normalize=normalize, image_size=image_size
        ):
            logits = model(images).float()
            if mirror:
                logits = (logits + model(images.flip(3)).float()) / 2
            own.append(logits)
            observer.on_evaluation(min(len(indices), len(own) * batch_size * shard.count), len(indices))
    everything = torch.zeros(len(indices), num_classes, device=runtime.device)
    if own:
        everything[shard.index :: shard.count] = torch.cat(own)
    everything = runtime.sum_over_ranks(everything)
    return Predictions(indices=indices, labels=data.labels.cpu()[indices], logits=everything.cpu())


def what_figures_need(
    predictions: Predictions, data: LabelledImages, class_names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Give what test_predictions.npz holds of predictions for `data` on the CPU (docs/outputs.md)."""
    mistakes, indices = confident_mistakes(predictions.logits, predictions.labels), predictions.indices
    return {
        "indices": indices.numpy(),
        "labels": predictions.labels.numpy(),
        # A model that hardly trained can have logits that float16 cannot hold.
        "logits": predictions.logits.clamp(-65504, 65504).numpy().astype(np.float16),
        "images": data.images[indices[:64]].numpy(),
        "mistakes": mistakes.numpy(),
        "mistaken_images": data.images[indices[mistakes]].numpy(),
        "class_names": np.array(class_names),
    }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Validation:
    """The images that are held out, and how they are prepared."""

    data: LabelledImages
    indices: Tensor
    class_names: tuple[str, ...]
    normalize: Normalizer

    def evaluate(self, model: nn.Module, *, image_size: int, runtime: Runtime, observer: Observer) -> Evaluation:
        """Say how good the (unwrapped) model is on them."""
        predictions = predict_logits(
            model,
            self.data,
            self.indices,
            num_classes=len(self.class_names),
            normalize=self.normalize,
            image_size=image_size,
            runtime=runtime,
            observer=observer,
        )
        return summarize(predictions.logits, predictions.labels, self.class_names)
