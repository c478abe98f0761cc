"""The parts of a page: one HTML file that asks for nothing from anywhere, for a phone, a desk, paper and the dark."""

import base64
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from itertools import chain, dropwhile, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --soft: #f3f5f7; --line: #d5dae0; --text: #1c2128; --dim: #5a636e;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --soft: #20252b; --line: #3d444d; --text: #dfe4ea;
  --dim: #9aa4af; --c0: #3d9fe0; --c1: #ff8a4c; --c2: #2cc295; --c3: #e39cc2; --c4: #f0b429; --c5: #8fd0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, figure, ol { margin: .4rem 0; } .dim, figcaption { color: var(--dim); }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(7.6rem, 1fr)); margin: 1rem 0; }
.tiles div { background: var(--soft); border-radius: .5rem; padding: .5rem .6rem; }
.tiles b { display: block; font-size: 1.1rem; white-space: nowrap; }
.tiles span { color: var(--dim); font-size: .85rem; }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
svg { display: block; width: 100%; height: auto; fill: currentColor; } svg text { font-family: inherit !important; }
svg * { stroke-linejoin: round; }
.matrix { max-width: 42rem; } .matrix.large { max-width: none; } .matrix.large svg { min-width: 62rem; }
svg.line { display: inline-block; width: 2.2rem; height: .7rem; margin-right: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .scroll td, .scroll th { white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } .numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; }
.columns { columns: 20rem; column-gap: 2.5rem; } .columns div { display: flex; gap: 1rem; break-inside: avoid;
  justify-content: space-between; border-bottom: 1px solid var(--line); padding: .2rem 0; }
.columns span:first-child { color: var(--dim); flex: none; max-width: 72%; }
.columns span:first-child { overflow-wrap: break-word; } .columns span:last-child { text-align: right; }
.columns .marked span { color: var(--text); font-weight: 600; }
.bar { display: block; width: 6rem; height: .8rem; margin-top: .4rem; background: var(--soft); }
@media (max-width: 30rem) { .bar { display: none; } }
.bar i { display: block; height: 100%; background: var(--c0); }
.images { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); }
.images figure { margin: 0; } .images img { display: block; width: 100%; image-rendering: pixelated; }
.images figcaption { font-size: .8rem; line-height: 1.25; margin-top: .3rem; }
.images .wrong img { outline: 3px solid var(--c1); }
.images .wrong figcaption { color: var(--text); font-weight: 600; }
pre { background: var(--soft); border-radius: .5rem; padding: .7rem .9rem; white-space: pre-wrap; margin: .4rem 0; }
@media print { .bar, .bar i, .tiles div { print-color-adjust: exact; } h2 { break-after: avoid; } }
"""
# A browser that keeps to it asks for nothing, whatever a name might smuggle in.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(title: str, parts: Iterable[str]) -> str:
    """Put parts that are HTML already together to a page."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"
    )
    return "\n".join([head, *parts, "</body>\n</html>\n"])


def html_heading(text: str, note: str = "") -> str:
    """Give a heading, and a line that explains what is under it."""
    return f"<h2>{escape(text)}</h2>{html_note(note) if note else ''}"


def html_tiles(numbers: Mapping[str, str]) -> str:
    """Give the numbers that count, each with its name."""
    tiles = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in numbers.items())
    return f'<div class="tiles">{"".join(tiles)}</div>'


def html_panels(panels: Iterable[str]) -> str:
    """Give curves that stand beside each other where there is room."""
    return f'<div class="panels">{"".join(f"<figure>{svg}</figure>" for svg in panels)}</div>'


def html_matrix(svg: str, *, large: bool) -> str:
    """Give a confusion matrix; a large one scrolls by itself where the window is small."""
    return f'<div class="scroll"><div class="matrix{" large" if large else ""}">{svg}</div></div>'


def html_line(color: str, dashes: Sequence[float]) -> str:
    """Give a short piece of a curve, to be told by."""
    pattern = f' stroke-dasharray="{" ".join(f"{2 * each:g}" for each in dashes)}"' if dashes else ""
    return f'<svg class="line" viewBox="0 0 44 14"><path d="M0 7H44" stroke="{color}" stroke-width="3"{pattern}/></svg>'


def html_table(rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    """Give a table of numbers, its first row the headings; where it is wider than the window it scrolls by itself.

    `marks` are HTML, put before the first cell of the rows. A first cell has the room of the empty ones beside it.
    """
    head, *others = rows
    lines = []
    for (first, *cells), mark in zip(others, chain(marks, repeat("")), strict=False):
        full = list(dropwhile(lambda cell: not cell, cells))
        numbers = "".join(f"<td>{escape(cell)}</td>" for cell in full)
        lines.append(f'<td colspan="{1 + len(cells) - len(full)}">{mark}{escape(first)}</td>{numbers}')
    names = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="numbers"><tr>{names}</tr>{body}</table></div>'


def html_classes(rows: Iterable[tuple[str, float | None, int, str]]) -> str:
    """Give the classes: name, accuracy, number of images, and what it is taken for."""
    cells = []
    for name, accuracy, images, confusion in rows:
        share = "-" if accuracy is None else f"{accuracy:.1%}"
        bar = f'<span class="bar"><i style="width:{100 * (accuracy or 0):.1f}%"></i></span>'
        cells.append(
            f"<tr><td>{escape(name)}</td><td>{share}</td><td>{bar}</td><td>{escape(confusion)}</td><td>{images:,}</td></tr>"
        )
    head = "<tr><th>class</th><th>right</th><th></th><th>most taken for</th><th>images</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(cells)}</table></div>'


def html_list(lines: Iterable[str]) -> str:
    """Give lines in their order."""
    return f"<ol>{''.join(f'<li>{escape(line.strip())}</li>' for line in lines)}</ol>"


def html_fields(fields: Mapping[str, Any], *, marked: Collection[str] = ()) -> str:
    """Return names and values, in as many columns as there is room for; a name is broken after a dot or underscore."""
    rows = []
    for name, value in fields.items():
        breakable = re.sub(r"([._])", r"\1<wbr>", escape(name))
        attribute = ' class="marked"' if name in marked else ""
        rows.append(f"<div{attribute}><span>{breakable}</span><span>{escape(str(value))}</span></div>")
    return f'<div class="columns">{"".join(rows)}</div>'


def html_note(text: str) -> str:
    """Give a line that explains."""
    return f'<p class="dim">{escape(text)}</p>'


def html_text(text: str) -> str:
    """Give text as it is, in a box."""
    return f"<pre>{escape(text)}</pre>"


def html_images(images: NDArray[np.uint8], captions: Sequence[str], *, wrong: Sequence[bool]) -> str:
    """Give images (N, 3, H, W), each with its caption, and marked where it is wrong."""
    figures = []
    for image, caption, is_wrong in zip(images, captions, wrong, strict=True):
        marked = ' class="wrong"' if is_wrong else ""
        text = escape(caption)
        figures.append(
            f'<figure{marked}><img alt="{text}" src="{_data_url(image)}"><figcaption>{text}</figcaption></figure>'
        )
    return f'<div class="images">{"".join(figures)}</div>'


def _data_url(image: NDArray[np.uint8]) -> str:
    """Give an image (3, H, W) as a PNG in an address; a large one is made smaller."""
    picture, file = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), io.BytesIO()
    picture.thumbnail((96, 96))
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
