"""Metrics, and exact evaluation: every sample once, for any number of samples and processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cifar_dist.config.options import Tta
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.loader import Batch, Normalizer, evaluation_batches
from cifar_dist.run.results import Evaluation, Observer
from cifar_dist.runtime.distributed import Runtime


def batch_loss(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Return the summed cross entropy of a batch. In mixed images each class counts by its share."""
    if batch.partner_labels is None or batch.shares is None:
        return functional.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=label_smoothing)
    own, other = (
        functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        for labels in (batch.labels, batch.partner_labels)
    )
    return (own * batch.shares + other * (1 - batch.shares)).sum()


class RunningSums:
    """This rank's sums of an epoch: loss, correct predictions, images; and the first step with a non-finite loss.

    They are kept on the device, without synchronizing it.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, device=device)  # float32: MPS has no float64; exact counts to 16.7 million
        self._count = torch.ones((), device=device)
        self._never = torch.full((), math.inf, device=device)
        self._first_bad_step = self._never.clone()
        self._step = torch.zeros((), device=device)

    def at_step(self, step: int) -> None:
        """Set the step of the next batches."""
        self._step.fill_(step)

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its summed loss (), logits (B, num_classes) and labels (B,).

        Works in place on tensors, so that a CUDA graph can replay it.
        """
        correct = (logits.argmax(1) == labels).sum()
        self._sums += torch.stack([loss_sum.float(), correct.float(), self._count * len(labels)])
        bad = torch.where(torch.isfinite(loss_sum), self._never, self._step)
        torch.minimum(self._first_bad_step, bad, out=self._first_bad_step)

    def read(self) -> tuple[float, float, float, float]:
        """Return loss, correct, images, and the first step with a bad loss (inf if none). Synchronizes the device."""
        loss, correct, images, bad = torch.cat([self._sums, self._first_bad_step.unsqueeze(0)]).tolist()
        return loss, correct, images, bad

    def set(self, loss: float, correct: float, images: float) -> None:
        """Restore sums that `read` returned."""
        self._sums.copy_(torch.tensor([loss, correct, images]))


def confident_mistakes(logits: Tensor, labels: Tensor, *, count: int = 64) -> Tensor:
    """Return the indices of at most `count` wrong predictions, the most confident first."""
    confidence, predicted = logits.float().softmax(1).max(1)
    confidence = confidence.masked_fill(predicted == labels, -1.0)
    indices = confidence.argsort(descending=True, stable=True)[:count]
    return indices[confidence[indices] >= 0]


def summarize(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> Evaluation:
    """Return the metrics of logits (N, num_classes) and labels (N,), both on the CPU.

    The loss is the mean cross entropy. Of equal logits the lowest class is the prediction.
    """
    num_classes = len(class_names)
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)
    totals, correct = confusion.sum(1), confusion.diag()
    top5 = None
    if num_classes > 5:
        best5 = logits.topk(5, dim=1).indices
        top5 = int((best5 == labels.unsqueeze(1)).sum()) / len(labels)
    return Evaluation(
        num_samples=len(labels),
        loss=float(functional.cross_entropy(logits.double(), labels)),
        top1=int(correct.sum()) / len(labels),
        top5=top5,
        per_class_accuracy={
            name: count / total if total else None
            for name, count, total in zip(class_names, correct.tolist(), totals.tolist(), strict=True)
        },
        confusion_matrix=confusion.tolist(),
    )


def views(images: Tensor, tta: Tta) -> list[tuple[Tensor, float]]:
    """Return versions of normalized images (N, C, H, W) whose logits are averaged at test time, and their weights.

    `mirror`: the images and their mirror images. `six`: half the weight is that of `mirror`, half that of both shifted
    by one pixel of 32 up and left, and down and right, the border reflected (arXiv 2404.00498, section 3.5).
    """
    if tta == "none":
        return [(images, 1.0)]
    if tta == "mirror":
        return [(images, 0.5), (images.flip(3), 0.5)]
    height, width = images.shape[2:]
    shift = max(1, round(height / 32))
    padded = functional.pad(images, [shift] * 4, mode="reflect")
    corners = [padded[:, :, begin : begin + height, begin : begin + width] for begin in (0, 2 * shift)]
    return [
        (view, weight / 2)
        for shifted, weight in ((images, 0.5), (corners[0], 0.25), (corners[1], 0.25))
        for view in (shifted, shifted.flip(3))
    ]


def batch_size_for(image_size: int) -> int:
    """Return the batch size of an evaluation: 250 images of 32 pixels, fewer of larger ones.

    It depends on nothing else, so that evaluations of the same weights on one machine have the same bits.
    """
    return max(8, min(250, 250 * 32**2 // image_size**2))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EvaluationSet:
    """The images that weights are evaluated on. The recipe sets their normalization and size."""

    data: LabelledImages
    indices: Tensor
    """(N,) int64: which of the images."""
    class_names: tuple[str, ...]
    recipe: Recipe
    runtime: Runtime

    @property
    def labels(self) -> Tensor:
        """(N,) int64, on the CPU."""
        return self.data.labels.cpu()[self.indices]

    def predict(self, model: nn.Module, observer: Observer, *, tta: Tta = "none") -> Tensor:
        """Return the logits (N, num_classes) float32 of the unwrapped model, on the CPU. A collective.

        They are the mean over the `views` of an image. Each rank fills in the rows of its own samples, and one sum
        joins them: nothing is padded, so no sample counts twice.
        """
        runtime, indices, image_size = self.runtime, self.indices, self.recipe.image_size
        mine = slice(runtime.world.rank, None, runtime.world.size)
        own, batch_size = [], batch_size_for(image_size)
        batches = evaluation_batches(
            self.data.to(runtime.device),
            indices[mine],
            batch_size=batch_size,
            normalize=Normalizer(self.recipe.normalization, runtime.device, runtime.memory_format),
            image_size=image_size,
        )
        model.eval()
        with torch.no_grad(), runtime.accelerator.autocast():
            for images in batches:
                own.append(sum(weight * model(view).float() for view, weight in views(images, tta)))
                observer.on_evaluation(min(len(indices), len(own) * batch_size * runtime.world.size), len(indices))
        all_logits = torch.zeros(len(indices), len(self.class_names), device=runtime.device)
        if own:
            all_logits[mine] = torch.cat(own)
        return runtime.sum_over_ranks(all_logits).cpu()

    def summarize(self, logits: Tensor) -> Evaluation:
        """Return the metrics of what `predict` returned."""
        return summarize(logits, self.labels, self.class_names)

    def figure_arrays(self, logits: Tensor) -> dict[str, NDArray[Any]]:
        """Return the arrays of test_predictions.npz (docs/after-training.md)."""
        labels, images = self.labels, self.data.images
        mistakes, count = confident_mistakes(logits, labels), min(64, len(labels))
        shown = labels.argsort(stable=True)[torch.arange(count) * len(labels) // count]  # of all classes
        return {
            "indices": self.indices.numpy(),
            "labels": labels.numpy(),
            # A model that hardly trained can have logits that float16 cannot hold.
            "logits": logits.clamp(-65504, 65504).numpy().astype(np.float16),
            "shown": shown.numpy(),
            "images": images[self.indices[shown]].numpy(),
            "mistakes": mistakes.numpy(),
            "mistaken_images": images[self.indices[mistakes]].numpy(),
            "class_names": np.array(self.class_names),
        }
