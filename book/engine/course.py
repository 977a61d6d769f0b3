"""Student and instructor notebooks, made from the same sources as the pages.

Students get of each exercise the check, the stub and the attempt; instructors get all, with the
hint each wrong answer earns.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from book.engine import record
from book.engine.exercises import Exercise, exercises, of_source
from book.engine.plan import recorded
from book.engine.project import EngineError, Project, write
from book.engine.source import TOKEN, Source, read, tags

__all__ = ["Exercise", "build", "exercises", "instructor", "student"]

HIDDEN_FROM_STUDENTS = {"solution", "wrong"}


def student(source: Source, repository: str) -> NotebookNode:
    """The notebook a student gets: no solutions, no wrong answers, no outputs."""
    of_source(source)  # a malformed exercise might leave a solution untagged
    cells = [c for c in source.cells if not HIDDEN_FROM_STUDENTS & set(tags(c))]
    return _notebook(cells, repository)


def instructor(source: Source, project: Project) -> NotebookNode:
    """The notebook a teacher gets: all of it, outputs included where the page is recorded."""
    found = iter(of_source(source))
    outputs = _page_outputs(source)
    cells: list[NotebookNode] = []
    exercise, held = None, None
    for cell in source.cells:
        kinds = set(tags(cell))
        if "check" in kinds:
            exercise, number = next(found), 0
        if "solution" in kinds:  # shown after the wrong answers, so that it is the one in force
            held = [new_markdown_cell(f"**Solution {exercise.number}.**"), _copy(cell, outputs)]
            continue
        if "wrong" in kinds:
            number += 1
            hint = exercise.hint(cell.source)
            if hint is None:
                raise EngineError(
                    f"{source.chapter.name}, exercise {exercise.number} ({exercise.title}): "
                    f"wrong answer {number} passes its check"
                )
            cells.append(new_markdown_cell(f"**Wrong answer {number}.** The check says: *{hint}*"))
        if "attempt" in kinds:
            cells += held
        cells.append(_copy(cell, outputs))
    return _notebook(cells, project.repository)


def _page_outputs(source: Source) -> dict[str, list]:
    """Outputs of the recorded page by the code that gave them."""
    if recorded(source.chapter)[0] is None:
        return {}
    notebook = nbformat.read(source.chapter.page, as_version=4)
    return {c.source: c.outputs for c in notebook.cells if c.cell_type == "code"}


def _copy(cell: NotebookNode, outputs: dict[str, list]) -> NotebookNode:
    new = nbformat.from_dict(cell)
    if new.cell_type == "code":
        new.outputs = outputs.get(cell.source, [])
        for output in new.outputs:
            if output.output_type == "execute_result":
                output.execution_count = None
    return new


def _notebook(cells: list[NotebookNode], repository: str) -> NotebookNode:
    new = [nbformat.from_dict(cell) for cell in cells]
    for number, cell in enumerate(new):
        cell["id"] = f"cell-{number:03d}"
        cell["source"] = cell.source.replace(TOKEN, repository)
    notebook = new_notebook(cells=new)
    notebook.metadata["kernelspec"] = dict(record.KERNEL)
    return notebook


def build(project: Project, say: Callable[[str], None]) -> Path:
    """Write both sets to ``_build/course``, replacing the former ones.

    Args:
        project: where. The checks run in this process, so its toolkit must be importable.
        say: prints one line.

    Returns:
        The folder with ``student`` and ``instructor``.
    """
    made: dict[str, str] = {}
    for chapter in project.chapters.values():  # all of it before the first file is touched
        source = read(chapter)
        notebooks = {
            "student": student(source, project.repository),
            "instructor": instructor(source, project),
        }
        for audience, notebook in notebooks.items():
            made[f"{audience}/{chapter.name}.ipynb"] = record.text_of(notebook)
    folder = project.root / "_build" / "course"
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in made.items():
        write(folder / name, text)
    count = f"{len(project.chapters)} chapter{'s' if len(project.chapters) != 1 else ''}"
    say(f"{count}: {folder / 'student'} and {folder / 'instructor'}")
    return folder
