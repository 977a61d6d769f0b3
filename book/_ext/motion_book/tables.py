"""The map of all methods: ``{method-map}`` reads the catalogue.

Pages that use it are read again at every build, since what it shows lives elsewhere.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from motion_book import chapters
from motion_book.chapters import BOOK

MAP_HEAD = ("Method", "What it does", "Numbers trained per layer")


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("method-map", MethodMap)


class MethodMap(SphinxDirective):
    """Tables of the catalogue by part, one row per method; ``:part:`` shows one part only."""

    option_spec: ClassVar = {"part": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return for each part a line that says what moves, and its table."""
        from toolkit.core.declare.catalogue import catalogue

        self.env.note_reread()
        wanted = self.options.get("part")
        shown = (e for e in catalogue() if e.part == wanted or (not wanted and e.chapter))
        parts: dict[str, list[Any]] = {}
        for entry in shown:
            parts.setdefault(entry.part, []).append(entry)
        if not parts:
            raise self.error(f"no method in part {self.options.get('part')!r}")
        return [node for part, entries in parts.items() for node in self._part(part, entries)]

    def _part(self, part: str, entries: list[Any]) -> list[nodes.Node]:
        what = importlib.import_module(f"toolkit.{part}").__doc__ or ""
        title = chapters.part_title(Path(self.env.srcdir), part)
        line = nodes.paragraph("", "", nodes.strong("", title))
        if title != part:
            line += [nodes.Text(", "), nodes.literal("", part)]
        words = f": {what.strip()}".split("``")  # a docstring marks code by two backticks
        line += [nodes.literal("", w) if i % 2 else nodes.Text(w) for i, w in enumerate(words)]
        box = nodes.container(classes=["table-scroll", "method-map"])
        table = nodes.table(classes=["method-map-table", "stacks"])
        group = nodes.tgroup(cols=len(MAP_HEAD))
        group += [nodes.colspec(colwidth=width) for width in (20, 50, 30)]
        head = nodes.thead("", _row([[nodes.paragraph("", name)] for name in MAP_HEAD]))
        body = nodes.tbody("", *(_row(self._cells(entry)) for entry in entries))
        group += [head, body]
        table += group
        box += table
        return [line, box]

    def _cells(self, entry: Any) -> list[list[nodes.Node]]:
        def text(words: str) -> list[nodes.Node]:
            return [nodes.paragraph("", words)]

        def formula(latex: str) -> list[nodes.Node]:
            return [nodes.paragraph("", "", nodes.math(latex, latex))]

        start = "starts at the base" if entry.zero_init else "does not start at the base"
        merge = "can be merged" if entry.mergeable else "cannot be merged"
        use = f"{start}; {merge}; extra work at inference: {entry.inference}"
        below = nodes.paragraph("", use, classes=["method-sources"])
        return [
            self._name(entry),
            [*text(entry.acts_on), *formula(entry.equation), below],
            formula(entry.count),
        ]

    def _name(self, entry: Any) -> list[nodes.Node]:
        """The method with a link to its chapter, its part, and its sources."""
        title: nodes.Node = nodes.Text(entry.title)
        target = f"{BOOK}/{entry.chapter}"
        if target in self.env.found_docs:
            uri = self.env.app.builder.get_relative_uri(self.env.docname, target)
            title = nodes.reference("", entry.title, internal=True, refuri=uri)
        sources = [(f"arXiv {entry.arxiv}", f"https://arxiv.org/abs/{entry.arxiv}")]
        if entry.code:
            sources.append(("code", f"https://github.com/{entry.code}"))
        below = nodes.paragraph("", str(entry.year), classes=["method-sources"])
        for words, address in sources:
            below += [nodes.Text(", "), nodes.reference("", words, internal=False, refuri=address)]
        return [nodes.paragraph("", "", nodes.strong("", "", title)), below]


def _row(cells: list[list[nodes.Node]]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", *cell) for cell in cells))
