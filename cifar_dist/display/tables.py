"""Text for people: `format_*` functions give it, nothing here prints."""

from collections.abc import Sequence

from cifar_dist.records import EpochRecord, Evaluation, Summary


def format_percent(fraction: float | None) -> str:
    """Give a fraction of 1 as a percentage with two decimals, or a dash."""
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def format_duration(seconds: float) -> str:
    """Give a duration in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_epoch(record: EpochRecord, epochs: int, *, is_best: bool) -> str:
    """Give an epoch as one line of aligned fields."""
    width = len(str(epochs))
    parts = [f"epoch {record.epoch:>{width}}/{epochs}", f"loss {record.train_loss:.3f}", f"acc {record.train_acc:6.2%}"]
    if record.val_loss is not None and record.val_acc is not None:
        parts += [f"val loss {record.val_loss:.3f}", f"val acc {record.val_acc:6.2%}"]
    parts += [f"lr {record.lr:.4g}", f"{record.images_per_second:,.0f} images/s", format_duration(record.epoch_seconds)]
    return "  ".join(parts) + ("  best" if is_best else "")


def format_evaluation(evaluation: Evaluation, *, bar_width: int = 30) -> list[str]:
    """Give an evaluation: one line of totals, then a bar for each class."""
    top5 = "" if evaluation.top5 is None else f", top-5 {format_percent(evaluation.top5)}"
    lines = [
        f"accuracy {format_percent(evaluation.top1)}{top5}, loss {evaluation.loss:.4f}"
        f" on {evaluation.num_samples:,} images",
        "",
    ]
    width = max(map(len, evaluation.per_class_accuracy))
    for name, accuracy in evaluation.per_class_accuracy.items():
        bar = "" if accuracy is None else "█" * round(accuracy * bar_width)
        lines.append(f"{name:<{width}}  {format_percent(accuracy):>8}  {bar}".rstrip())
    return lines


def format_outcome(summary: Summary, *, total_epochs: int) -> str:
    """Say how a run ended and how long it trained."""
    how = {
        "completed": "Training completed",
        "early_stopped": "Early stopping triggered: training ended",
        "interrupted": "Interrupted",
        "diverged": "Diverged",
        "running": "Running",
    }[summary.status]
    minutes = summary.train_seconds / 60
    best = "" if summary.best_epoch is None else f", best epoch {summary.best_epoch}"
    return f"{how} after {summary.epochs} of {total_epochs} epochs in {minutes:.2f} minutes{best}"


def format_ratio(values: Sequence[float]) -> str:
    """Give a median with its spread."""
    low, middle, high = values
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
