"""What training makes small."""

from torch import Tensor
from torch.nn import functional

from cifar_dist.data.batches import Batch


def batch_loss(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Give a batch's summed cross entropy; where images are mixed, each class counts by its share of the image."""
    if batch.partner_labels is None or batch.shares is None:
        return functional.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=label_smoothing)
    own, other = (
        functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        for labels in (batch.labels, batch.partner_labels)
    )
    return (own * batch.shares + other * (1 - batch.shares)).sum()
