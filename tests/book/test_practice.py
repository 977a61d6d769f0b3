"""Practice notebooks are today's, plain, run from top to bottom, and hold no solution."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import nbformat
import pytest

from book.engine import practice, record
from book.engine.exercises import Exercise, of_source
from book.engine.project import Chapter, EngineError, Project
from book.engine.source import read
from tests.book.engine_toy import REPOSITORY, Toy, read_once

PROJECT = Project(REPOSITORY)
# reading all sources would take each process a second before its first test
CHAPTERS = [c for c in PROJECT.chapters.values() if c.practice.is_file()]


@pytest.fixture(params=CHAPTERS, ids=lambda chapter: chapter.slug)
def chapter(request: pytest.FixtureRequest) -> Chapter:
    return request.param


def test_committed_notebooks_are_those_of_the_sources(chapter: Chapter) -> None:
    made = record.text_of(practice.notebook(read_once(chapter), PROJECT.repository))
    assert chapter.practice.read_text(encoding="utf-8") == made, "run: make book"


def test_none_is_missing_and_none_is_left_behind() -> None:
    there = set((REPOSITORY / "book" / "practice").glob("*/*.ipynb"))
    chapters = PROJECT.chapters.values()
    assert there == {c.practice for c in chapters if practice.has_practice(read_once(c))}


def cells(chapter: Chapter) -> list[str]:
    notebook = nbformat.read(chapter.practice, as_version=4)
    nbformat.validate(notebook)
    assert all(not c.outputs for c in notebook.cells if c.cell_type == "code")
    return [c.source for c in notebook.cells if c.cell_type == "code"]


def exercises(chapter: Chapter) -> list[Exercise]:
    return of_source(read_once(chapter))


def run(codes: list[str]) -> str:
    """What the cells print, run in one name space; installing on Colab is left out."""
    space: dict = {"__name__": "practice"}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for code in codes:
            if "%pip" not in code:
                exec(compile(code, "<practice>", "exec"), space)
    return said.getvalue()


def test_stubs_say_that_there_is_no_answer(chapter: Chapter) -> None:
    said = run(cells(chapter)).lower()
    assert said.count("not yet: there is no answer yet") == len(exercises(chapter))


def test_answers_in_place_of_the_stubs_are_judged(chapter: Chapter) -> None:
    """With solutions all checks say right; with each wrong answer its own hint."""
    codes, tasks = cells(chapter), exercises(chapter)
    start = next(i for i, code in enumerate(codes) if code == tasks[0].check)
    begun = codes[:start] if "toolkit" not in tasks[0].check else []

    def with_answers(answers: dict[str, str]) -> str:
        replaced = [answers.get(code, code) for code in codes[start:]]
        return run([*begun, *replaced])

    right = with_answers({task.stub: task.solution for task in tasks})
    assert right.count("Right:") == len(tasks), right
    for task in tasks:
        hints = {with_answers({task.stub: code}) for code in task.wrong}
        assert len(hints) == len(task.wrong)
        assert all("Right" not in hint for hint in hints)


def test_no_solution_and_no_myst_in_the_notebook(chapter: Chapter) -> None:
    text = chapter.practice.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert not practice.MYST.search(prose)
    squeezed = re.sub(r"\s+", "", "\n".join(c.source for c in notebook.cells))
    for task in exercises(chapter):
        assert re.sub(r"\s+", "", task.solution) not in squeezed
    checks = (REPOSITORY / f"toolkit/labs/exercises/{chapter.slug}.py").read_text(encoding="utf-8")
    for task in exercises(chapter):
        assert re.sub(r"\s+", "", task.solution) not in re.sub(r"\s+", "", checks)


CHAPTER = """## Idea

So.

## Method

Thus.

## On your model

Here.

## Exercises

### Exercise 1: double it

Write it.
"""
CELLS = [
    ":tags: [check]\nfrom toolkit.labs.exercises.toy import check_double",
    ":tags: [stub]\ntwice_as_much = None",
    ":tags: [solution]\ntwice_as_much = 4 + 4",
    ":tags: [wrong]\ntwice_as_much = 4",
    ":tags: [wrong]\ntwice_as_much = 16",
    ":tags: [attempt]\ncheck_double(twice_as_much)",
]


def toy_source(tmp_path: Path, text: str = CHAPTER):
    cells = "".join(f"\n```{{code-cell}} python\n{cell}\n```\n" for cell in CELLS)
    path = Toy(tmp_path).chapter("one", "print('start')", tail=f"\n{text}{cells}")
    return read(Chapter(path.parent.name, path.stem, path.parents[3]))


def test_a_notebook_holds_stub_and_check_and_no_solution(tmp_path: Path) -> None:
    source = toy_source(tmp_path)
    assert practice.has_practice(source)
    text = "\n".join(cell.source for cell in practice.notebook(source, "").cells)
    assert "twice_as_much = None" in text
    assert "check_double(twice_as_much)" in text
    assert "= 4" not in text
    assert "= 16" not in text
    assert "print('start')" not in text  # of no section that is practised


def test_links_lead_to_the_repository(tmp_path: Path) -> None:
    words = "So: [one](one.ipynb), [beds](../../beds.md#images), [paper](https://arxiv.org/abs/1)."
    source = toy_source(tmp_path, CHAPTER.replace("So.", words))
    text = "\n".join(cell.source for cell in practice.notebook(source, "https://repo").cells)
    assert f"(https://repo/blob/main/book/notebooks/{source.chapter.part}/one.ipynb)" in text
    assert "(https://repo/blob/main/book/beds.md#images)" in text
    assert "(https://arxiv.org/abs/1)" in text


def test_a_section_that_colab_cannot_show_is_refused(tmp_path: Path) -> None:
    source = toy_source(tmp_path)
    last = next(c for c in source.cells if "## Idea" in c.source)
    last.source += "\n\n```{admonition} Mind\nthis\n```"
    with pytest.raises(EngineError, match="Colab shows it raw"):
        practice.notebook(source, "")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    source = toy_source(tmp_path, CHAPTER.replace("## Method", "### Method"))
    with pytest.raises(EngineError, match="'## Method'"):
        practice.notebook(source, "")
