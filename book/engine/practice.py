"""Practice notebooks: what a reader opens on Colab. Exercises with stubs, no solutions, no outputs.

Generated from a chapter's source: title and first words, the sections of :data:`SECTIONS`, and the
cells that these need (tagged ``setup``, ``parameters`` or ``practice``). Markdown is made plain, as
Colab knows no MyST, and links lead to the repository, as there are no files beside it there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from book.engine import record
from book.engine.course import HIDDEN_FROM_STUDENTS
from book.engine.exercises import of_source
from book.engine.project import EngineError, Project, write
from book.engine.source import TITLE, TOKEN, Source, read, tags

SECTIONS = ("Idea", "Method", "On your model", "Exercises")
NEEDED = {"setup", "parameters", "practice"}
MEASURED = "measured"
"""Tag of cells that show what a lab measured, which no student can run."""
HEADING = re.compile(r"^## (.+?)\s*$", re.MULTILINE)
CITED = re.compile(r"\s*\{cite(?::\w+)?\}`[^`]+`")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")
MYST = re.compile(r"\{[a-z:-]+\}`|^:::|^```\{", re.MULTILINE)


def has_practice(source: Source) -> bool:
    """Whether a chapter is of the form that has one: its checks are imported by name."""
    found = of_source(source)
    return bool(found) and all(task.check.lstrip().startswith("from ") for task in found)


def notebook(source: Source, repository: str) -> NotebookNode:
    """The practice notebook of a chapter.

    Args:
        source: the chapter as read.
        repository: address put where the source says ``@REPOSITORY@``.

    Raises:
        EngineError: a section is missing, or Markdown is left that Colab cannot show.
    """
    place = source.chapter.page.relative_to(source.chapter.root).as_posix()
    folder = place.rpartition("/")[0]

    def plain(text: str) -> str:
        def whole(link: re.Match[str]) -> str:
            return f"]({repository}/blob/main/{posixpath.normpath(f'{folder}/{link[1]}')}"

        return LINK.sub(whole, _plain(text))

    intro = f"Practice for the chapter [{source.title}]({repository}/blob/main/{place})."
    cells, section, seen = [], "", []
    for cell in source.cells:
        kinds = set(tags(cell))
        if cell.cell_type == "code":
            wanted = section in SECTIONS or kinds & NEEDED
            if wanted and not kinds & {*HIDDEN_FROM_STUDENTS, MEASURED}:
                cells.append(new_code_cell(cell.source.replace(TOKEN, repository)))
            continue
        for part in re.split(r"(?m)^(?=## )", cell.source):
            heading = HEADING.match(part)
            section = heading[1] if heading else section
            if heading:
                seen.append(section)
            if not cells:
                title = TITLE.sub(f"# Practice: {source.title}", plain(part), count=1)
                cells.append(new_markdown_cell(f"{title}\n\n{intro}"))
            elif section in SECTIONS and part.strip():
                cells.append(new_markdown_cell(plain(part)))
    name = source.chapter.name
    if missing := [title for title in SECTIONS if title not in seen]:
        raise EngineError(f"{name}: it has no section '## {missing[0]}'")
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:03d}"
        if cell.cell_type == "markdown" and (left := MYST.search(cell.source)):
            raise EngineError(f"{name}: {left[0]!r} in a section for practice: Colab shows it raw")
    made = new_notebook(cells=cells)
    made.metadata["kernelspec"] = dict(record.KERNEL)
    return made


def _plain(text: str) -> str:
    return CITED.sub("", text).replace(record.LINKS, "").replace(record.PROVENANCE, "").strip()


def write_all(project: Project, say: Callable[[str], None]) -> list[Path]:
    """Write the practice notebooks that differ from what is there; returns their files.

    Args:
        project: where.
        say: prints one line for each.
    """
    written = []
    for chapter in project.chapters.values():
        try:
            source = read(chapter)
        except EngineError:  # whoever tells the chapters names it
            continue
        try:
            if not has_practice(source):
                continue
            text = record.text_of(notebook(source, project.repository))
        except EngineError as error:  # the other chapters and the site do not wait for this one
            say(f"no practice notebook: {error}")
            continue
        path = chapter.practice
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write(path, text)
            written.append(path)
            say(f"{chapter.name}: practice notebook written")
    return written
