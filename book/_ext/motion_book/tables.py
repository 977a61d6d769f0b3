"""Two directives: the map of all methods, and the ledger of all claims.

``{method-map}`` reads the catalogue, ``{claims-ledger}`` the results files in ``book/results``.
Pages that use them are read again at every build, since what they show lives elsewhere.
"""

from __future__ import annotations

import html
from pathlib import Path
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
    """Register the directives."""
    app.add_directive("method-map", MethodMap)
    app.add_directive("claims-ledger", ClaimsLedger)


class MethodMap(SphinxDirective):
    """A table of the catalogue, one row per method, with ``:part:`` to show one part only."""

    option_spec: ClassVar = {"part": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return the table, in a container that scrolls when the page is narrow."""
        from toolkit.core.catalogue import catalogue

        self.env.note_reread()
        entries = [e for e in catalogue() if self.options.get("part") in (None, e.part)]
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


class ClaimsLedger(SphinxDirective):
    """Every judged claim of every recorded chapter, with how often each verdict was given.

    A plain table without JavaScript; the page script adds the filters by verdict and scale.
    """

    option_spec: ClassVar = {"folder": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return counts and table as HTML."""
        from toolkit.core import evidence

        self.env.note_reread()
        folder = Path(self.env.srcdir) / self.options.get("folder", f"{BOOK}/results")
        try:
            results = evidence.load_results(folder)
        except ValueError as error:
            raise self.error(str(error)) from error
        if not any(result["claims"] for result in results):
            return [nodes.paragraph("", "No chapter has been recorded yet.")]
        return [nodes.raw("", self._html(results, evidence.VERDICTS), format="html")]

    def _html(self, results: list[dict[str, Any]], verdicts: tuple[str, ...]) -> str:
        from toolkit.core.claims_table import claims_html, found_lines, verdict_html

        claims = [(result, claim) for result in results for claim in result["claims"]]
        counts = {name: sum(c["verdict"] == name for _, c in claims) for name in verdicts}
        items = "".join(
            f"<li>{verdict_html(n)} {k} of {len(claims)}</li>" for n, k in counts.items()
        )
        rows = []
        for result, claim in claims:
            ours = "<br>".join(
                html.escape(line) for line in found_lines(claim["conditions"], claim["unit"])
            )
            note = f"<br><small>{html.escape(claim['note'])}</small>" if claim["note"] else ""
            rows.append(
                (
                    f'data-verdict="{claim["verdict"]}" data-scale="{result["scale"]}"',
                    (
                        html.escape(claim["text"]) + note,
                        self._chapter(result["slug"]),
                        html.escape(claim["paper"] or "gives no figure"),
                        ours,
                        result["scale"],
                        verdict_html(claim["verdict"]),
                    ),
                )
            )
        columns = ("Claim", "Chapter", "Paper", "Ours", "Scale", "Verdict")
        table = claims_html(f"{len(claims)} claims, tested", columns, rows)
        return (
            f'<div class="ledger"><ul class="ledger-counts">{items}</ul>'
            f'<div class="ledger-filters"></div>{table}</div>'
        )

    def _chapter(self, slug: str) -> str:
        from toolkit.core.catalogue import catalogue

        entry = next((e for e in catalogue() if e.slug == slug), None)
        title = html.escape(entry.title if entry else slug)
        target = f"{BOOK}/{entry.chapter}" if entry else ""
        if target not in self.env.found_docs:
            return title
        uri = self.env.app.builder.get_relative_uri(self.env.docname, target)
        return f'<a href="{html.escape(uri)}">{title}</a>'
