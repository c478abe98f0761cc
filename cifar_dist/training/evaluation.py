"""Exact evaluation: every sample once, for any number of samples and processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifar_dist.config.recipe import Recipe
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.loader import Normalizer, evaluation_batches
from cifar_dist.data.sampler import Shard
from cifar_dist.run.results import Evaluation, Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.metrics import confident_mistakes, summarize


def batch_size_for(image_size: int) -> int:
    """Return the batch size of an evaluation: 250 images of 32 pixels, fewer of larger ones.

    It depends on nothing else, so that evaluations of the same weights on one machine give the same bits.
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EvaluationSet:
    """The images that weights are evaluated on, and how they are normalized and resized."""

    data: LabelledImages
    indices: Tensor
    """(N,) int64: which of the images."""
    class_names: tuple[str, ...]
    recipe: Recipe
    """Gives image size and normalization."""
    runtime: Runtime

    def predict(self, model: nn.Module, observer: Observer, *, mirror: bool = False) -> Predictions:
        """Run the (unwrapped) model over the images, in evaluation mode.

        With `mirror`, the logits are the mean over an image and its mirror image. Each rank fills in the rows of its
        own samples, and one sum joins them: nothing is padded, so no sample counts twice.
        """
        runtime, indices, image_size = self.runtime, self.indices, self.recipe.image_size
        shard = Shard(index=runtime.world.rank, count=runtime.world.size)
        own, batch_size = [], batch_size_for(image_size)
        batches = evaluation_batches(
            self.data.to(runtime.device),
            indices,
            batch_size=batch_size,
            shard=shard,
            normalize=Normalizer(self.recipe.normalization, runtime.device, runtime.memory_format),
            image_size=image_size,
        )
        model.eval()
        with torch.no_grad(), runtime.accelerator.autocast():
            for images in batches:
                logits = model(images).float()
                if mirror:
                    logits = (logits + model(images.flip(3)).float()) / 2
                own.append(logits)
                observer.on_evaluation(min(len(indices), len(own) * batch_size * shard.count), len(indices))
        everything = torch.zeros(len(indices), len(self.class_names), device=runtime.device)
        if own:
            everything[shard.index :: shard.count] = torch.cat(own)
        everything = runtime.sum_over_ranks(everything)
        return Predictions(indices=indices, labels=self.data.labels.cpu()[indices], logits=everything.cpu())

    def evaluate(self, model: nn.Module, observer: Observer) -> Evaluation:
        """Evaluate the (unwrapped) model on them."""
        predictions = self.predict(model, observer)
        return summarize(predictions.logits, predictions.labels, self.class_names)


def figure_arrays(
    predictions: Predictions, data: LabelledImages, class_names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Return the arrays of test_predictions.npz for predictions on `data`, on the CPU (docs/outputs.md)."""
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
