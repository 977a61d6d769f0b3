"""Pieces that all sections of lab notes are made of: tables, boxes, words and numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

FOLD = 10
"""A table of more rows is folded."""
NONE = Markup('<span class="none">–</span>')


@dataclass(frozen=True)
class Section:
    """One section of a page of lab notes.

    Args:
        anchor: its address on the page.
        title: its heading.
        body: what stands below the heading.
    """

    anchor: str
    title: str
    body: Markup


def paragraph(*sentences: str) -> Markup:
    """A paragraph; empty sentences are left out."""
    words = Markup(" ").join(filter(None, sentences))
    return Markup("<p>{}</p>").format(words)


def heading(anchor: str, title: str) -> Markup:
    """A heading below a section's own, with an address."""
    link = Markup('<a class="headerlink" href="#{0}" title="Link to this heading">#</a>')
    whole = Markup('<h3 id="{0}">{1}{2}</h3>')
    return whole.format(anchor, title, link.format(anchor))


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], long: int = FOLD
) -> Markup:
    """A table with a heading for every row and column; folded when it is long.

    It scrolls in its own box, and on a phone each row is a card.

    Args:
        caption: what it is, for its box and for screen readers.
        columns: headings with units; the first is that of the rows' headings.
        rows: one cell per column, each words, a number or :class:`markupsafe.Markup`.
        long: how many rows may stand unfolded.
    """
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in columns)
    body = Markup("").join(_row(columns, row) for row in rows)
    made = Markup(
        '<div class="table-scroll" role="region" tabindex="0" aria-label="{0}">'
        '<table class="house-table notes-table"><thead><tr>{1}</tr></thead>'
        "<tbody>{2}</tbody></table></div>"
    ).format(caption, head, body)
    return fold(f"{caption}: {len(rows)} rows", made) if len(rows) > long else made


def _row(columns: Sequence[str], cells: Sequence[Any]) -> Markup:
    first, *rest = cells
    inner = Markup('<th scope="row">{}</th>').format(first) + Markup("").join(
        Markup('<td data-label="{0}">{1}</td>').format(name, NONE if cell is None else cell)
        for name, cell in zip(columns[1:], rest, strict=True)
    )
    return Markup("<tr>{}</tr>").format(inner)


def fold(summary: str, inside: Markup) -> Markup:
    """A closed box."""
    whole = Markup('<details class="notes-fold"><summary>{}</summary>{}</details>')
    return whole.format(summary, inside)


def terms(facts: Iterable[tuple[str, Any]]) -> Markup:
    """A list of terms and what is said of each; empty ones are left out."""
    made = (Markup("<dt>{}</dt><dd>{}</dd>").format(name, said) for name, said in facts if said)
    return Markup('<dl class="notes-terms">{}</dl>').format(Markup("").join(made))


def code(word: str, most: int = 10) -> Markup:
    """The beginning of a hash or commit, with the whole of it as its title."""
    return Markup('<code title="{0}">{1}</code>').format(word, word[:most])


def commit(word: str) -> Markup:
    """A commit, "none" where the code was in no repository."""
    return code(word) if word else Markup("none")


@functools.cache
def spelled(word: str | float) -> str:
    """A name as a reader would write it: methods by their titles, no underscores."""
    known = _titles()
    return " ".join(known.get(part, part.replace("_", " ")) for part in str(word).split(" "))


@functools.cache
def _titles() -> Mapping[str, str]:
    from toolkit.core.declare.catalogue import catalogue

    return {entry.slug: entry.title for entry in catalogue()}


def number(value: Any) -> str:
    """A number in five digits or fewer, a bool in words, a list's items in a row."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1e4 else f"{value:.5g}"
    if isinstance(value, list):
        return " · ".join(number(one) for one in value)
    return spelled(value)


def counted(n: int, noun: str) -> str:
    """A number with its noun, in the plural where it must be."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds in runs: ``0 to 9, 400``."""
    ordered, runs = sorted(set(seeds)), []
    for seed in ordered:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in runs)


def anchor(*words: str) -> str:
    """An address made of words."""
    from docutils import nodes

    return nodes.make_id(" ".join(words))
