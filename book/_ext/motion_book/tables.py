"""The map of all methods: ``{method-map}`` reads the catalogue.

Pages that use it are read again at every build, since what it shows lives elsewhere.
"""

from __future__ import annotations

from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

BOOK = "book"
MAP_HEAD = (
    "Method",
    "Where it acts",
    "Equation",
    "Numbers trained per layer",
    "Starts at the base",
    "Mergeable",
    "Extra work at inference",
)


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("method-map", MethodMap)


class MethodMap(SphinxDirective):
    """A table of the catalogue, one row per method, with ``:part:`` to show one part only."""

    option_spec: ClassVar = {"part": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return the table, in a container that scrolls when the page is narrow."""
        from toolkit.core.declare.catalogue import catalogue

        self.env.note_reread()
        wanted = self.options.get("part")
        shown = (e for e in catalogue() if e.part == wanted or (not wanted and e.chapter))
        entries = list(shown)
        if not entries:
            raise self.error(f"no method in part {self.options.get('part')!r}")
        box = nodes.container(classes=["table-scroll", "method-map"])
        table = nodes.table(classes=["method-map-table"])
        group = nodes.tgroup(cols=len(MAP_HEAD))
        group += [nodes.colspec(colwidth=1) for _ in MAP_HEAD]
        head = nodes.thead("", _row([[nodes.paragraph("", name)] for name in MAP_HEAD]))
        body = nodes.tbody("", *(_row(self._cells(entry)) for entry in entries))
        group += [head, body]
        table += group
        box += table
        return [box]

    def _cells(self, entry: Any) -> list[list[nodes.Node]]:
        def text(words: str) -> list[nodes.Node]:
            return [nodes.paragraph("", words)]

        def formula(latex: str) -> list[nodes.Node]:
            return [nodes.paragraph("", "", nodes.math(latex, latex))]

        return [
            self._name(entry),
            text(entry.acts_on),
            formula(entry.equation),
            formula(entry.count),
            text("yes" if entry.zero_init else "no"),
            text("yes" if entry.mergeable else "no"),
            text(entry.inference),
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
        below = nodes.paragraph("", f"{entry.part}, {entry.year}", classes=["method-sources"])
        for words, address in sources:
            below += [nodes.Text(", "), nodes.reference("", words, internal=False, refuri=address)]
        return [nodes.paragraph("", "", nodes.strong("", "", title)), below]


def _row(cells: list[list[nodes.Node]]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", *cell) for cell in cells))
