"""A page of lab notes as a whole, and its line in the list of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from motion_book.notes.declared import blocks, declared
from motion_book.notes.experiments import experiments
from motion_book.notes.origin import crashed, provenance, runs
from motion_book.notes.parts import Section, paragraph, table
from motion_book.notes.searches import searches

COLUMNS = ("lab notes of", "claims", "experiments", "runs", "of them crashed", "recorded on")


@dataclass(frozen=True)
class Notes:
    """What a page tells, before it has a title and links.

    Args:
        scale: at which it was measured.
        sections: in order.
        counts: claims, experiments, runs, and how many of these crashed.
        recorded: the day; empty where it was not kept.
    """

    scale: str
    sections: tuple[Section, ...]
    counts: tuple[int, int, int, int]
    recorded: str


def read(folder: Path, slug: str, scale: str) -> Notes:
    """Read a results file and make its sections.

    Args:
        folder: of the results; dates and durations lie below it.
        slug, scale: whose.

    Raises:
        ValueError, KeyError, TypeError: The file is damaged, of another version, or lacks a part.
    """
    from toolkit.core.evidence.results import check_verdicts
    from toolkit.core.io import read_json
    from toolkit.core.runs import results

    document = read_json(results.results_path(folder, slug, scale))
    if document["schema"] != results.SCHEMA:
        raise ValueError(f"schema {document['schema']!r}, this code knows {results.SCHEMA}")
    for claim in document["claims"]:
        check_verdicts(claim)
    for experiment in document["experiments"].values():
        altered = [job["args"] for job in experiment["jobs"] if job["check"] != results.check(job)]
        if altered:
            raise ValueError(f"the run with {altered[0]} was altered")
    times = results.read_times(folder, slug, scale)
    return made(document, times)


def made(document: Mapping[str, Any], times: Mapping[str, Any]) -> Notes:
    """The sections of a document of results."""
    every = runs(document)
    lost = sum(job["error"] is not None for job in every)
    return Notes(
        scale=document["scale"],
        sections=(
            declared(document),
            blocks(document),
            searches(document),
            experiments(document),
            crashed(document),
            provenance(document, times),
        ),
        counts=(len(document["claims"]), len(document["experiments"]), len(every), lost),
        recorded=times.get("recorded") or "",
    )


def context(notes: Notes, title: str, chapter: str | None, every: str | None) -> dict[str, Any]:
    """What the theme's template of a page needs.

    Args:
        notes: what the page tells.
        title: the chapter's.
        chapter: address of the chapter, seen from here; None if the book lacks it.
        every: address of the list of all notes; None likewise.
    """
    name = f"Lab notes: {title}"
    link = Markup('<a href="{}">{}</a>')
    whose = link.format(chapter, title) if chapter else title
    all_of_them = Markup(" ({})").format(link.format(every, "all lab notes")) if every else ""
    lead = paragraph(
        Markup("Everything that was measured for the chapter {}{}, at scale {}.").format(
            whose, all_of_them, notes.scale
        ),
        "This page is made from the results file at every build; nobody types its numbers.",
    )
    parts = Markup("").join(_section(section) for section in notes.sections)
    body = Markup('<section class="lab-notes"><h1>{}</h1>{}{}</section>').format(name, lead, parts)
    return {"title": name, "body": body, "toc": _contents(name, notes.sections), "parents": []}


def _section(section: Section) -> Markup:
    mark = Markup('<a class="headerlink" href="#{0}" title="Link to this heading">#</a>')
    return Markup('<section id="{0}"><h2>{1}{2}</h2>{3}</section>').format(
        section.anchor, section.title, mark.format(section.anchor), section.body
    )


def _contents(name: str, sections: Sequence[Section]) -> Markup:
    """The sections as the theme's side bar takes them."""
    item = Markup('<li><a class="reference internal" href="#{}">{}</a></li>')
    items = Markup("").join(item.format(s.anchor, s.title) for s in sections)
    whole = Markup('<ul><li><a class="reference internal" href="#">{}</a><ul>{}</ul></li></ul>')
    return whole.format(name, items)


def row(notes: Notes, title: str, uri: str) -> list[Any]:
    """A lab's line in the list: its name with a link, its counts, its day."""
    link = Markup('<a href="{}">{}</a>').format(uri, title)
    return [link, *(f"{count:,}" for count in notes.counts), notes.recorded or None]


def list_table(rows: Sequence[Sequence[Any]]) -> Markup:
    """The list of all notes, never folded."""
    return table("Lab notes", COLUMNS, rows, long=len(rows))
