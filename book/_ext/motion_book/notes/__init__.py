"""Lab notes: one page for each lab, made from its results at every build, and a list of them all.

The pages lie outside the reading order: they stand in no table of contents, so no page leads to
them as its next. The directive ``{lab-notes}`` lists them, and each chapter's line on its recorded
run links to its own. Nobody writes them; they hold what a chapter has no room for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from motion_book import chapters
from motion_book.notes import page

FOLDER = f"{chapters.BOOK}/notes"
LIST = f"{chapters.BOOK}/notes"
SCALE = "cpu"
RUN = "Recorded run:"
"""Begins the line, made by the engine, that says where a chapter's page comes from."""


def setup(app: Sphinx) -> None:
    """Register the pages, the list of them, and the links of the chapters."""
    app.add_directive("lab-notes", LabNotes)
    app.connect("html-collect-pages", pages)
    app.connect("doctree-read", _link)
    app.connect("env-get-outdated", _outdated)


def results(root: Path) -> list[str]:
    """The slugs of all labs that have results, by name."""
    found = (root / chapters.BOOK / "results").glob(f"*.{SCALE}.json")
    return sorted(path.name.removesuffix(f".{SCALE}.json") for path in found)


def read(root: Path, slug: str) -> page.Notes:
    """What the notes of a lab tell.

    Raises:
        ExtensionError: the results are damaged, or of another form; naming file and part.
    """
    path = root / chapters.BOOK / "results" / f"{slug}.{SCALE}.json"
    try:
        return _read(path, slug, path.stat().st_mtime_ns)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ExtensionError(
            f"{slug}.{SCALE}.json is damaged: {what}. No lab notes can be made; measure again, or "
            "take the file from the history."
        ) from error


@functools.lru_cache(maxsize=100)
def _read(path: Path, slug: str, changed: int) -> page.Notes:
    """The notes of one state of a file: the list and the pages of a build read it once."""
    return page.read(path.parent, slug, SCALE)


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, contents and template of each page of notes."""
    for slug in results(Path(app.srcdir)):
        notes = read(Path(app.srcdir), slug)
        name = f"{FOLDER}/{slug}"
        part, title = chapters.part_and_title(Path(app.srcdir), slug)
        chapter = chapters.address(app.env, part, slug, name)
        every = app.builder.get_relative_uri(name, LIST) if LIST in app.env.found_docs else None
        yield name, page.context(notes, title, chapter, every), "page.html"


class LabNotes(SphinxDirective):
    """A table of all pages of lab notes, in the order of the chapters."""

    option_spec: ClassVar = {}

    def run(self) -> list[nodes.Node]:
        """Return the table as HTML."""
        self.env.note_reread()
        root = Path(self.env.srcdir)
        rows = []
        for slug in results(root):
            part, title = chapters.part_and_title(root, slug)
            target = f"{chapters.BOOK}/notebooks/{part}/{slug}"
            uri = self.env.app.builder.get_relative_uri(self.env.docname, f"{FOLDER}/{slug}")
            row = page.row(read(root, slug), title, uri)
            rows.append((chapters.place(self.env, target), row))
        if not rows:
            return [nodes.paragraph("", "Nothing has been measured yet.")]
        table = page.list_table([row for _, row in sorted(rows, key=lambda pair: pair[0])])
        return [nodes.raw("", table, format="html")]


def _has_notes(root: Path, name: str) -> bool:
    """Whether a page is a chapter whose lab has results."""
    place = name.removeprefix(f"{chapters.BOOK}/notebooks/")
    return place != name and place.rpartition("/")[2] in results(root)


def _link(app: Sphinx, doctree: nodes.document) -> None:
    """Put a link to the lab notes behind the line on the recorded run."""
    name = app.env.docname
    if app.builder.format != "html" or not _has_notes(Path(app.srcdir), name):
        return
    app.env.metadata[name]["lab notes"] = True
    slug = name.rpartition("/")[2]
    uri = app.builder.get_relative_uri(name, f"{FOLDER}/{slug}")
    for line in doctree.findall(nodes.paragraph):
        if line.astext().startswith(RUN):
            line += [
                nodes.Text(" · "),
                nodes.reference("", "Lab notes", internal=True, refuri=uri, classes=["lab-notes"]),
            ]
            return


def _outdated(app: Sphinx, env: Any, *known: set[str]) -> list[str]:
    """Chapters whose lab got its first results since they were read, or lost them."""
    root = Path(app.srcdir)
    return [
        name
        for name in env.found_docs
        if bool(env.metadata[name].get("lab notes")) != _has_notes(root, name)
    ]
