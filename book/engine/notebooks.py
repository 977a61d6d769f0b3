"""Today's chapters as notebooks for nbval: the sources at ``ci``, with the outputs they recorded.

The recorded pages show what was measured, perhaps with earlier code; whether today's chapters run
is another question, and this answers it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from book.engine import record
from book.engine.plan import recorded
from book.engine.project import Project, write
from book.engine.source import Source, read, tags

COMPARED = "nbval-check-output"  # the tag, or comment, of a cell whose output must be the same
COMMENT = "# NBVAL_CHECK_OUTPUT"


def write_all(project: Project, say: Callable[[str], None]) -> Path:
    """Write every chapter to ``_build/ci``, replacing what was there; returns the folder.

    Args:
        project: where.
        say: prints one line.
    """
    made = {c.name: record.text_of(notebook(read(c), project)) for c in project.chapters.values()}
    folder = project.root / "_build" / "ci"
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in made.items():
        write(folder / f"{name}.ipynb", text)
    say(f"{len(made)} notebooks: {folder}")
    return folder


def notebook(source: Source, project: Project) -> NotebookNode:
    """A chapter's notebook at ``ci``; where the page has the same cell, with its outputs."""
    known = _recorded(source)
    new = record.page(source, "ci", [[] for _ in source.code], None, project.repository)
    for cell in (c for c in new.cells if c.cell_type == "code"):
        outputs = known.get(cell.source)
        if outputs is not None:
            # nbval takes outputs without a number for those of a cell that was never run
            cell.outputs, cell.execution_count = outputs, 1
        else:  # there is nothing to compare with
            cell.source = cell.source.replace(COMMENT, "# not recorded yet")
            cell.metadata["tags"] = [tag for tag in tags(cell) if tag != COMPARED]
    return new


def _recorded(source: Source) -> dict[str, list]:
    """Outputs of the recorded page by the code that gave them."""
    if recorded(source.chapter)[0] is None:
        return {}
    page = nbformat.read(source.chapter.page, as_version=4)
    return {c.source: list(c.outputs) for c in page.cells if c.cell_type == "code"}
