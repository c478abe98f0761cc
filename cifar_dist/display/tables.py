"""Text for people: `format_*` functions give it, `print_*` functions put it on the console."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cifar_dist.config.errors import printable
from cifar_dist.config.provenance import command_line
from cifar_dist.display.console import can_draw
from cifar_dist.run.results import EpochRecord, Evaluation, Summary


def format_percent(fraction: float | None) -> str:
    """Give a fraction of 1 as a percentage with two decimals, or a dash."""
    return "-" if fraction is None else f"{fraction:.2%}"


def format_duration(seconds: float) -> str:
    """Give a duration in the two units that matter."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole, minutes = round(seconds), round(seconds / 60)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{minutes // 60} h {minutes % 60} min"


def format_epoch(record: EpochRecord, epochs: int, *, is_best: bool, end: str = "") -> str:
    """Return an epoch as one line of aligned fields; `end` is when training is expected to end."""
    width = len(str(epochs))
    parts = [f"epoch {record.epoch:>{width}}/{epochs}", f"loss {record.train_loss:.3f}", f"acc {record.train_acc:6.2%}"]
    if record.val_loss is not None and record.val_acc is not None:
        parts += [f"val loss {record.val_loss:.3f}", f"val acc {record.val_acc:6.2%}"]
    parts += [f"lr {record.lr:.4g}", f"{record.images_per_second:,.0f} images/s", format_duration(record.epoch_seconds)]
    parts += [f"end {end}"] if end else []
    return "  ".join(parts) + ("  best" if is_best else "")


def format_evaluation_totals(evaluation: Evaluation) -> str:
    """Give an evaluation's totals as one line; with top-5 where there are more than ten classes."""
    easy = evaluation.top5 is None or len(evaluation.per_class_accuracy) <= 10
    top5 = "" if easy else f", top-5 {format_percent(evaluation.top5)}"
    accuracy = format_percent(evaluation.top1)
    return f"accuracy {accuracy}{top5}, loss {evaluation.loss:.4f} on {evaluation.num_samples:,} images"


def format_class_bars(evaluation: Evaluation, *, width: int = 80) -> list[str]:
    """Give each class's accuracy with a bar; of many classes only the ten that are known least.

    In a panel of `width` columns no line is broken, where the name leaves room for a bar at all.
    """
    shown, lines = dict(evaluation.per_class_accuracy), []
    if len(shown) > 20:
        lines.append(f"the ten worst of {len(shown)} classes:")
        worst = sorted(shown, key=lambda name: (shown[name] is None, shown[name] or 0.0))[:10]
        shown = {name: shown[name] for name in worst}
    names = max(map(cell_len, shown))
    bar_width = max(1, min(30, width - names - 15))  # beside the bar: spaces, the number, and the panel's edges
    for name, accuracy in shown.items():
        bar = "█" * max(round(accuracy * bar_width), 1) if accuracy else ""
        lines.append(f"{name}{' ' * (names - cell_len(name))}  {format_percent(accuracy):>7}  {bar}".rstrip())
    return lines


def format_confusions(evaluation: Evaluation, *, count: int = 3) -> list[str]:
    """Give the classes that are most often taken for another, by the share of their images."""
    names = list(evaluation.per_class_accuracy)
    found = []
    for i, row in enumerate(evaluation.confusion_matrix):
        found += [(n / sum(row), n, sum(row), names[i], names[j]) for j, n in enumerate(row) if n and i != j]
    found.sort(key=lambda each: -each[0])
    return [
        f"{share:6.1%} of {name} taken for {other} ({n:,} of {of:,})" for share, n, of, name, other in found[:count]
    ]


def format_worst_confusions(evaluation: Evaluation) -> list[str]:
    """Give the confusions that hurt most, under a heading; nothing where there are none."""
    confusions = format_confusions(evaluation)
    return ["", "confusions that hurt most:", *confusions] if confusions else []


def format_outcome(summary: Summary, *, total_epochs: int) -> str:
    """Say how a run ended and how long it trained."""
    how = {
        "completed": "Training completed",
        "early_stopped": "Early stopping triggered: training ended",
        "interrupted": "Interrupted",
        "diverged": "Diverged",
        "running": "Running",
    }[summary.status]
    best = "" if summary.best_epoch is None else f", best epoch {summary.best_epoch}"
    epochs = f"{summary.epochs} of {total_epochs} epoch{'s' if total_epochs > 1 else ''}"
    return f"{how} after {epochs} in {format_duration(summary.train_seconds)}{best}"


def format_bench(result: Mapping[str, Any]) -> list[str]:
    """Give what `bench` measured: rates, our loop over each of the others with its spread, and the parts of a step."""
    names = {"bare_step": "bare step", "loop": "our loop", "script": "original script", "peer": "common peer"}
    rows = [["", "images/s", "our loop is", "in rounds"]]
    for key, name in names.items():
        rate, ratio = result[f"{key}_images_per_second"], f"loop_over_{key.removesuffix('_step')}"
        if rate is not None and key == "loop":
            rows.append([name, f"{rate:,.0f}", "", ""])
        elif rate is not None:
            spread = f"{result[f'{ratio}_min']:.3f} to {result[f'{ratio}_max']:.3f}"
            rows.append([name, f"{rate:,.0f}", f"{result[ratio]:.3f} x as fast", spread])
    parts: Mapping[str, float] = result["seconds_by_part"]
    total = sum(parts.values())
    memory: Mapping[str, float] = result["memory_mib_by_part"]
    work = f"{result['flops_per_image'] * result['loop_images_per_second'] / 1e12:.3g} TFLOP/s of the model"
    if result["model_flop_utilisation"] is not None:
        work += f", {result['model_flop_utilisation']:.1%} of the device's peak"
    how = "each given to the GPU by itself, not replayed, and" if result["compiler"] == "CUDAGRAPHS" else "each"
    return [
        *format_table(rows),
        "",
        f"medians of {result['rounds']} rounds; {work}",
        "",
        f"milliseconds a step, by part, {how} waited for:",
        *(f"{name:<14}{1000 * each:>9.2f}  {each / total:>6.1%}" for name, each in parts.items()),
        "",
        "MiB by part: " + ", ".join(f"{name} {each:,.0f}" for name, each in memory.items() if each),
        *([f"peak memory: {result['peak_memory_mib']:,} MiB"] if result["peak_memory_mib"] is not None else []),
    ]


def format_sweep(result: Mapping[str, Any]) -> list[str]:
    """Give what `bench --sweep` measured, the fastest first; what was too slow or failed has no spread."""
    rows = [["precision", "layout", "compiler", "optimizer", "images/s", "in rounds", ""]]
    for row in result["sweep"]:
        rate = "-" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}"
        spread = f"{row['min']:,.0f} to {row['max']:,.0f}" if "min" in row else "first look"
        compiler = (row["compiler"] or "none").lower()
        kernel = "fused" if row["fused"] else "unfused"
        note = row.get("failed", "chosen" if row["is_chosen"] else "")
        rows.append([row["precision"], row["memory_format"], compiler, kernel, rate, spread, note])
    share = f"what the loop has is {result['chosen_over_fastest']:.2f} of the fastest"
    return [*format_table(rows), "", f"medians of {result['rounds']} rounds; {share}"]


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Give rows of cells, names first, as lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [space + cell for cell, space in zip(row[1:], spaces[1:], strict=True)]
        lines.append("  ".join([row[0] + spaces[0], *cells]))
    return lines


def print_table(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, the first with the headings; on a terminal that is too narrow cells are broken, not rows."""
    if not can_draw(console):
        print_lines(console, format_table(rows), title="")
        return
    table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_header(console: Console, values: Mapping[str, str]) -> None:
    """Print what stands above a run: a line each, and on a terminal that is too narrow between words, indented."""
    width, values = max(map(len, values)) + 2, {name: printable(value) for name, value in values.items()}
    if not can_draw(console):
        for name, value in values.items():
            console.print(Text(f"{name:<{width}}{value}"), soft_wrap=True, highlight=False)
        return
    grid = Table.grid()
    grid.add_column(style="bold", no_wrap=True, width=width)
    grid.add_column(overflow="fold")
    for name, value in values.items():
        grid.add_row(Text(name), Text(value))
    console.print(grid)


def print_result(console: Console, summary: Summary, total_epochs: int, directory: Path) -> None:
    """Print how a run ended: in a panel on a terminal, as plain lines elsewhere."""
    assert summary.test is not None
    lines = [
        format_outcome(summary, total_epochs=total_epochs),
        f"test {format_evaluation_totals(summary.test)}",
        "",
        *format_class_bars(summary.test, width=console.width),
        *format_worst_confusions(summary.test),
        "",
        f"in {directory}: config.yaml, metrics.jsonl, summary.json, checkpoints, figures",
    ]
    print_lines(console, lines, title="result")
    commands = (
        ["report", directory],
        ["predict", "--ckpt", directory, "IMAGE"],
        ["export", "--ckpt", directory, "--out", "model.pth"],
    )
    print_notes(console, ["next:", *(f"  {command_line(*words)}" for words in commands)])  # no panel: to be copied


def print_lines(console: Console, lines: Sequence[str], *, title: str) -> None:
    """Print lines: in a panel on a terminal, as they are elsewhere."""
    title, lines = printable(title), [*map(printable, lines)]
    if can_draw(console):
        console.print(Panel(Group(*map(Text, lines)), title=title, border_style="green", expand=False))
        return
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_notes(console: Console, notes: Iterable[str | None]) -> None:
    """Print lines that a person should read, as they are; None is no line."""
    for note in filter(None, notes):
        console.print(printable(note), soft_wrap=True, highlight=False, markup=False)
