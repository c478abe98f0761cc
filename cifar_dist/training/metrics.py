"""Metrics: sums stay on the device, are reduced once, and divided once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cifar_dist.records import Evaluation


class RunningSums:
    """An epoch's loss, hits and images, added up on the device without making it wait."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)  # float32: MPS has no float64; exact counts to 16.7 million
        self._count = torch.ones((), device=device)

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: its summed loss (), logits (B, num_classes) and labels (B,)."""
        hits = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([loss_sum, hits.to(loss_sum.dtype), self._count * len(labels)])


def summarize(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> Evaluation:
    """Reduce logits (N, num_classes) and labels (N,), both on the CPU, to what an evaluation says.

    The loss is the mean cross entropy; top-5 is None where there are five classes or fewer. Of equal logits the lowest
    class is the prediction. Raises ValueError where there is no sample.
    """
    if not len(labels):
        raise ValueError("there are no samples to evaluate")
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
