"""The loss and the metrics. Sums stay on the device, and are reduced and divided once."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cifar_dist.data.loader import Batch
from cifar_dist.run.results import Evaluation


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
    sure, guesses = logits.float().softmax(1).max(1)
    sure = sure.masked_fill(guesses == labels, -1.0)
    places = sure.argsort(descending=True, stable=True)[:count]
    return places[sure[places] >= 0]


def summarize(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> Evaluation:
    """Return the metrics of logits (N, num_classes) and labels (N,), both on the CPU.

    The loss is the mean cross entropy. Of equal logits the lowest class is the prediction.
    """
    num_classes = len(class_names)
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)
    totals, hits = confusion.sum(1), confusion.diag()
    top5 = None
    if num_classes > 5:
        best5 = logits.topk(5, dim=1).indices
        top5 = int((best5 == labels.unsqueeze(1)).sum()) / len(labels)
    return Evaluation(
        num_samples=len(labels),
        loss=float(functional.cross_entropy(logits.double(), labels)),
        top1=int(hits.sum()) / len(labels),
        top5=top5,
        per_class_accuracy={
            name: hit / total if total else None
            for name, hit, total in zip(class_names, hits.tolist(), totals.tolist(), strict=True)
        },
        confusion_matrix=confusion.tolist(),
    )
