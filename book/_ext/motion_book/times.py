"""How long a chapter takes to read: ``{reading-times}`` counts words, code and figures.

Minutes are words at 180 a minute, eight seconds for each line of code that is shown, and half a
minute for each figure; rounded up. Exercises are not in them.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from motion_book.chapters import place
from motion_book.findings import title

WORDS_A_MINUTE, LINE, FIGURE = 180, 8 / 60, 0.5
HIDDEN = {"remove-cell", "remove-input", "hide-input", "hide-cell"}
ASIDE = re.compile(r"<(script|style|details)\b.*?</\1>", re.DOTALL)
TAG = re.compile(r"<[^>]+>")
WORD = re.compile(r"[^\W\d_][\w'-]*")
SHOWN = re.compile(r'class="(?:house-figure|explorer)"')


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("reading-times", ReadingTimes)


class ReadingTimes(SphinxDirective):
    """A table: for each recorded chapter its words, lines of code, figures and minutes."""

    option_spec: ClassVar = {"folder": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return the table as HTML, in the order of the table of contents."""
        self.env.note_reread()
        root = Path(self.env.srcdir)
        folder = root / self.options.get("folder", "book/notebooks")
        rows = []
        for page in sorted(folder.glob("*/*.ipynb"), key=self._place):
            counts = counted(json.loads(page.read_text(encoding="utf-8")))
            cells = "".join(
                f'<td data-label="{name}">{value:,}</td>' for name, value in counts.items()
            )
            rows.append(f'<tr><th scope="row">{html.escape(title(page))}</th>{cells}</tr>')
        if not rows:
            return [nodes.paragraph("", "No chapter has been recorded yet.")]
        head = "".join(f'<th scope="col">{name}</th>' for name in ("chapter", *counts))
        table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        return [nodes.raw("", f'<table class="house-table">{table}</table>', format="html")]

    def _place(self, page: Path) -> tuple[int, str]:
        name = page.relative_to(self.env.srcdir).with_suffix("")
        return place(self.env, name.as_posix())


def counted(page: Mapping[str, Any]) -> dict[str, int]:
    """Words, visible lines of code, figures and minutes of a recorded page."""
    words = lines = figures = 0
    for cell in page["cells"]:
        kinds = set(cell.get("metadata", {}).get("tags", ()))
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(WORD.findall(source))
        elif "remove-cell" not in kinds:
            lines += 0 if HIDDEN & kinds else len(source.splitlines())
            for output in cell.get("outputs", ()):
                shown = "".join(output.get("data", {}).get("text/html", ""))
                figures += len(SHOWN.findall(shown))
                words += len(WORD.findall(html.unescape(TAG.sub(" ", ASIDE.sub(" ", shown)))))
    minutes = math.ceil(words / WORDS_A_MINUTE + lines * LINE + figures * FIGURE)
    return {"words": words, "lines of code": lines, "figures": figures, "minutes": minutes}
