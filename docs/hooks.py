"""A hook of MkDocs: links to files outside docs/ become plain text with the file's path, as the site lacks them."""

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with `[text](../tests/x.py)` as "text (`tests/x.py`)"."""

    def without_link(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[2]))
        return link[0] if target.startswith("docs/") or ":" in link[2] else f"{link[1]} (`{target.split('#')[0]}`)"

    return re.sub(r"\[([^\]]+)\]\(([^)\s#][^)\s]*)\)", without_link, markdown)
