"""Where a drawing goes: into a PNG, or into a page as SVG. And how names come into it as they are."""

import io
import re
import warnings
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cifar_dist.config.files import write_atomically
from cifar_dist.display.curves import PALETTE


def plain(text: str, width: int = 200) -> str:
    """Give text that matplotlib draws as it is, without taking dollars for formulas; what is longer is cut."""
    text = text.encode(errors="backslashreplace").decode()  # a folder's name may be any bytes
    short = text if len(text) <= width else f"{text[: width - 1]}…"
    return short.replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, in place in one step."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the page and the table have it.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(file, dpi=110, format="png")
    write_atomically(path, lambda png: png.write(file.getvalue()))


def to_svg(figure: Figure) -> str:
    """Give a figure as SVG that is part of a page.

    What is black has the page's colour of text, the palette is the page's `--c0` to `--c5`, text is text in the page's
    font, and no address is left in it.
    """
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| width="[^"]*pt"| height="[^"]*pt"', "", svg, count=4)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    for place, color in enumerate(PALETTE):
        svg = svg.replace(color.lower(), f"var(--c{place})")
    return svg.replace("#000000", "currentColor").strip()
