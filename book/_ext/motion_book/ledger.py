"""The ledger of all claims: ``{claims-ledger}`` reads the results files in ``book/results``.

A page that uses it is read again at every build, since what it shows lives elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from motion_book import chapters
from motion_book.chapters import BOOK
from toolkit.core.declare import catalogue

PARTS = (*catalogue.PARTS, "overview")
COLUMNS = ("Claim", "Whose", "Where", "Ours", "Margin", "Verdict")


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("claims-ledger", ClaimsLedger)


class ClaimsLedger(SphinxDirective):
    """Every judged claim of every recorded chapter, with how often each verdict was given.

    One closed box for each chapter, with its verdicts counted on the outside. It needs no
    JavaScript; the page script adds the filters.
    """

    option_spec: ClassVar = {"folder": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return counts and boxes as HTML."""
        from toolkit.core import evidence

        self.env.note_reread()
        folder = Path(self.env.srcdir) / self.options.get("folder", f"{BOOK}/results")
        try:
            results = evidence.load_results(folder)
        except ValueError as error:
            raise self.error(str(error)) from error
        if not any(result["claims"] or result["facts"] for result in results):
            return [nodes.paragraph("", "No chapter has been recorded yet.")]
        results = sorted(results, key=self._order)
        root = Path(self.env.srcdir)
        made = ledger_html(results, self._place, lambda part: chapters.part_title(root, part))
        return [nodes.raw("", made, format="html")]

    def _order(self, result: Mapping[str, Any]) -> tuple[int, str]:
        """Where the chapter of a result stands in the table of contents."""
        part, _ = chapters.part_and_title(Path(self.env.srcdir), result["slug"])
        return chapters.place(self.env, f"{BOOK}/notebooks/{part}/{result['slug']}")

    def _place(self, slug: str) -> tuple[str, str, str | None]:
        """A chapter's part, title and address; the address is None if the book lacks the page."""
        part, title = chapters.part_and_title(Path(self.env.srcdir), slug)
        return part, title, chapters.address(self.env, part, slug, self.env.docname)


Place = Callable[[str], tuple[str, str, "str | None"]]


def ledger_html(
    results: Sequence[Mapping[str, Any]], place: Place, titled: Callable[[str], str] = str
) -> str:
    """Return the whole ledger.

    Args:
        results: As ``evidence.load_results`` returns them, in the order of the chapters.
        place: Gives part, title and address of a chapter by its slug.
        titled: Gives the words for a part.
    """
    from toolkit.core import evidence

    by_slug: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_slug.setdefault(result["slug"], []).append(result)
    parts: dict[str, list[str]] = {}
    for slug, own in by_slug.items():
        part, title, uri = place(slug)
        parts.setdefault(part, []).append(_chapter_html(part, title, uri, own))
    known = {part: number for number, part in enumerate(PARTS)}
    sections = "".join(
        f'<section class="ledger-part" data-part="{html.escape(part)}">'
        f"<h2>{html.escape(titled(part))}</h2>{''.join(boxes)}</section>"
        for part, boxes in sorted(
            parts.items(), key=lambda item: (known.get(item[0], len(known)), item[0])
        )
    )
    counts = evidence.count(results)
    return (
        f'<div class="ledger">{_counts_html(counts)}{_errors_html(counts)}'
        f'<div class="ledger-filters"></div>{sections}</div>'
    )


def _counts_html(counts: Any) -> str:
    from toolkit.core import evidence

    items = "".join(
        f"<li>{evidence.verdict_html(word, number)}</li>"
        for word, number in counts.verdicts.items()
    )
    return f'<p>{counts.claims} claims were tested:</p><ul class="ledger-counts">{items}</ul>'


def _errors_html(counts: Any) -> str:
    """What to expect of chance, and what else a reader must know, in words."""
    lines = [
        "<strong>How many would be wrong by chance?</strong> If no claimed effect existed at all, "
        "that is, if every true difference were exactly 0, at most "
        f"<strong>{counts.false:.1f}</strong> of the {counts.claims} claims would be expected to "
        "read <em>holds</em> or <em>direction only</em>. If every effect were exactly as large as "
        f"its margin, at most <strong>{counts.missed:.1f}</strong> would read <em>refuted here</em>"
        " or <em>no difference that matters</em>. Claims that could not be decided whatever came "
        "out, for want of repeats, of a margin or of a bed that can tell, count as 0 in both."
    ]
    told = [
        (counts.unstable, "unstable: two blocks of seeds, each alone, give different verdicts"),
        (counts.late, "late: added or changed after the first measurement"),
        (counts.uncommitted, "declared, but not committed when first measured"),
        (counts.dropped, "declared before measuring and dropped afterwards"),
    ]
    items = "".join(f"<li>{number} {words}</li>" for number, words in told)
    facts = f"{counts.facts} facts, which are exact, are listed with their chapters and not counted"
    facts += f" above; {counts.facts_failed} of them came out otherwise." if counts.facts else "."
    return f'<div class="ledger-errors"><p>{"".join(lines)}</p><ul>{items}</ul><p>{facts}</p></div>'


def _chapter_html(
    part: str, title: str, uri: str | None, results: Sequence[Mapping[str, Any]]
) -> str:
    """One chapter: a closed box that shows its verdicts, and inside what it found."""
    from toolkit.core import evidence
    from toolkit.core.evidence.table import claim_cells, claims_html, facts_html

    words = [claim["verdict"] for result in results for claim in result["claims"]]
    pills = "".join(
        f" {evidence.verdict_html(word, words.count(word))}"
        for word in evidence.CLAIM_VERDICTS
        if word in words
    )
    inside = []
    name = html.escape(title)
    if uri is not None:
        inside.append(f'<p><a href="{html.escape(uri)}">To the chapter {name}</a></p>')
    for result in results:
        rows = [
            (
                f'data-verdict="{claim["verdict"]}" data-whose="{claim["whose"]}" '
                f'data-scale="{result["scale"]}"',
                list(claim_cells(claim).values()),
            )
            for claim in result["claims"]
        ]
        if rows:
            inside.append(claims_html(f"{title}, at scale {result['scale']}", COLUMNS, rows))
        inside.append(facts_html(result["facts"]))
        notes = [result["note"]] if result["note"] else []
        if result["dropped"]:
            notes.append("Declared before measuring, then dropped: " + ", ".join(result["dropped"]))
        inside += [f"<p><small>{html.escape(note)}</small></p>" for note in notes]
    noun = "claim" if len(words) == 1 else "claims"
    return (
        f'<details class="ledger-chapter" data-part="{html.escape(part)}"><summary>'
        f'<span class="ledger-title">{name}</span> '
        f'<span class="ledger-number">{len(words)} {noun}</span>'
        f'<span class="ledger-pills">{pills}</span></summary>{"".join(inside)}</details>'
    )
