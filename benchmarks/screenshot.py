"""Draws the README's picture of a training in a terminal: a real run on `shapes`, as Rich shows it at one of its steps.

    python benchmarks/screenshot.py docs/figures/terminal.svg

What is drawn is what a terminal of 100 columns has then: the header, and the live view below it.
"""

import argparse
import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

sys.path.insert(0, str(Path(__file__).parent.parent))

from cifar_dist import cli
from cifar_dist.commands import train
from cifar_dist.display.progress import LiveTraining
from cifar_dist.display.terminal import THEME, print_header

WORDS = ["--recipe", "first", "--set", "seed=1"]
EPOCH, STEP = 4, 21
"""Of the picture."""


def terminal(*, record: bool) -> Console:
    """Return a console that prints nowhere."""
    return Console(record=record, width=100, height=30, force_terminal=True, file=io.StringIO(), theme=THEME)


class Photographed(LiveTraining):
    """The live view, of which a picture is taken at one step."""

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Draw it all once on the console that records."""
        super().on_step(step_in_epoch, loss)
        if (self.epoch, step_in_epoch) == (EPOCH, STEP):
            paper.print(self)


paper = terminal(record=True)


def main() -> int:
    """Train, and write the picture; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.svg")
    file = parser.parse_args().file
    # The run's folder is a temporary one; a person would have this.
    train.print_header = lambda _, values: print_header(paper, values | {"run": "runs/first-shapes-seed1"})
    train.training_display = lambda _, plan, *, quiet, facts, memory: Photographed(
        terminal(record=False), plan, facts, memory
    )
    with tempfile.TemporaryDirectory() as folder:
        code = cli.main([*WORDS, "--run-dir", f"{folder}/run"])
    svg = paper.export_svg(title=" ".join(["python launch.py", *WORDS]), theme=MONOKAI)
    # A page that shows it is to ask nobody for a font.
    file.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))
    return code


if __name__ == "__main__":
    sys.exit(main())
