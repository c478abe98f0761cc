"""A page of one run or of several: one HTML file with its pictures in it, which asks for nothing from anywhere."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f3f5f7; --text: #1c2128; --dim: #57606a; }
@media (prefers-color-scheme: dark) { :root { --line: #444c56; --soft: #22272e; --text: #dde3ea; --dim: #9aa4af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: var(--text); line-height: 1.5;
       font-family: system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.figures { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; }
.figures div { background: var(--soft); border-radius: .5rem; padding: .5rem .9rem; }
.figures b { display: block; font-size: 1.25rem; } .figures span { color: var(--dim); font-size: .85rem; }
img { height: auto; background: #fff; border-radius: .4rem; }
.wide { overflow-x: auto; }
.wide img { width: max(100%, 36rem); }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
pre { background: var(--soft); padding: .7rem; border-radius: .4rem; overflow-x: auto; white-space: pre-wrap;
      overflow-wrap: anywhere; }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """Put parts that are HTML already together to a page."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
    )
    return "\n".join([head, f"<body><h1>{escape(title)}</h1>", *parts, "</body></html>\n"])


def html_heading(text: str) -> str:
    """Give a heading."""
    return f"<h2>{escape(text)}</h2>"


def html_numbers(numbers: Mapping[str, str]) -> str:
    """Give the numbers that count, each with its name."""
    cells = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in numbers.items())
    return f'<div class="figures">{"".join(cells)}</div>'


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Give a table, its first row the headings; where it is wider than the screen it scrolls by itself."""
    first, *others = rows
    head = "".join(f"<th>{escape(cell)}</th>" for cell in first)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in others)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def html_text(text: str) -> str:
    """Give text as it is, in a box."""
    return f"<pre>{escape(text)}</pre>"


def html_picture(path: Path, alternative: str) -> str:
    """Give a PNG as part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img alt="{escape(alternative)}" src="data:image/png;base64,{data}"></div>'
