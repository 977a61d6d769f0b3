"""Tables that Sphinx writes, made readable: heads say what they head, cells what they answer to.

Screen readers need the scope of a head; on a phone, where wide tables fall into cards, each cell
carries the words of its column.
"""

from __future__ import annotations

import re
from typing import Any

from bs4 import BeautifulSoup
from sphinx.application import Sphinx

TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
SCOPED = re.compile(r"<th\b[^>]*\sscope=", re.IGNORECASE)
WIDE = 4
"""From this number of columns on, or of class ``stacks``, a table falls into cards on a phone."""


def setup(app: Sphinx) -> None:
    """Register the change of each page's tables."""
    app.connect("html-page-context", _change, priority=850)


def _change(app: Sphinx, pagename: str, template: str, context: dict, doctree: Any) -> None:
    if "body" in context:
        context["body"] = TABLE.sub(lambda found: labelled(found.group()), context["body"])


def labelled(table: str) -> str:
    """A table of one row of heads with their scopes, and labels in its cells if it is wide.

    Tables with scopes already, or with heads that span columns, stay as they are.
    """
    if SCOPED.search(table):  # most tables, and parsing takes 10 ms
        return table
    soup = BeautifulSoup(table, "html.parser")
    heads = soup.select("thead th")
    if not heads or len(soup.select("thead tr")) != 1:
        return table
    if any(th.has_attr("colspan") for th in soup.find_all("th")):
        return table
    for head in heads:
        head["scope"] = "col"
    words = [head.get_text(" ", strip=True) for head in heads]
    kinds = soup.table.get("class", [])
    wide = len(words) >= WIDE or "stacks" in kinds
    if wide:
        soup.table["class"] = list(dict.fromkeys([*kinds, "stacks"]))
    for row in soup.select("tbody tr"):
        for word, cell in zip(words, row.find_all(["td", "th"], recursive=False), strict=False):
            if cell.name == "th":
                cell["scope"] = "row"
            elif wide:
                cell["data-label"] = word
    return str(soup)
