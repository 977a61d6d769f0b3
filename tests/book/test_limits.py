"""Chapters keep the limits of their form, and each limit is seen failing."""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from book.engine.project import Chapter, Project
from book.engine.source import Source, read
from tests.book import limits
from tests.book.engine_toy import REPOSITORY
from tests.book.test_pages import pages
from toolkit.core import show

PROJECT = Project(REPOSITORY)
CHAPTERS = list(PROJECT.chapters.values())
SAMPLE = CHAPTERS[0]
named = {"ids": lambda chapter: chapter.slug}


def problems(chapter: Chapter) -> list[str]:
    text = chapter.source.read_text(encoding="utf-8")
    page = nbformat.read(chapter.page, as_version=4)
    return limits.of_source(read(chapter), text) + limits.of_page(page)


@pytest.mark.parametrize("chapter", CHAPTERS, **named)
def test_sources_and_pages_keep_the_limits(chapter: Chapter) -> None:
    assert problems(chapter) == []


def test_every_chapter_is_among_the_pages_whose_screens_are_measured() -> None:
    paths = {c.page.relative_to(REPOSITORY).with_suffix(".html").as_posix() for c in CHAPTERS}
    assert paths <= set(pages())


def changed(code: str = "", prose: str = "") -> Source:
    """A chapter with one cell more."""
    source = copy.deepcopy(read(SAMPLE))
    source.cells.append(new_code_cell(code) if code else new_markdown_cell(prose))
    return source


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (changed("\n".join(f"x{i} = {i}" for i in range(150))), "visible lines of code"),
        (changed("x = 1\n" * 26), "visible cell of 26 lines"),
        (changed("x = " + "1 + " * 30 + "1"), "characters"),
        (changed(prose="It works. If the lines part, the claim holds."), "begins with If"),
    ],
)
def test_each_limit_of_a_source_is_seen(source: Source, word: str) -> None:
    assert any(word in problem for problem in limits.of_source(source, "short"))


def test_a_long_source_is_seen() -> None:
    found = limits.of_source(read(SAMPLE), "x\n" * 700)
    assert any("700 lines of source" in problem for problem in found)


def page(*shown: str | None) -> nbformat.NotebookNode:
    """A page of cells: HTML of an output, or None for a paragraph."""
    cells = []
    for html in shown:
        output = [new_output("display_data", data={"text/html": html})] if html else []
        cells.append(
            new_code_cell("display(x)", outputs=output) if html else new_markdown_cell("So.")
        )
    return new_notebook(cells=cells)


FIGURE = '<figure class="house-figure"></figure>'


@pytest.mark.parametrize(
    ("notebook", "word"),
    [
        (page(*[FIGURE, None] * 8), "8 figures"),
        (page(FIGURE, FIGURE, None), "no answer below"),
        (page('<table class="house-table"></table>'), "no answer below"),
        (page(FIGURE, show.answer("If it rises, it holds.")._repr_html_()), "begins with If"),
    ],
)
def test_each_limit_of_a_page_is_seen(notebook: nbformat.NotebookNode, word: str) -> None:
    assert any(word in problem for problem in limits.of_page(notebook))


def test_answers_and_paragraphs_count_as_answers() -> None:
    assert limits.of_page(page(FIGURE, None, FIGURE, show.answer("So.")._repr_html_())) == []


def explorer(y: list[float]) -> dict:
    import pandas as pd

    rows = [(s, c, x) for s in ("a", "b") for c in (1, 2, 3) for x in (0, 1)]
    frame = pd.DataFrame(rows, columns=["line", "size", "x"]).assign(y=y)
    return show.explorer(frame, "x", "y", "line", ["size"], title="t", alt="t").spec


def test_an_axis_left_empty_and_a_hidden_series_are_seen() -> None:
    good = [0, 10, 0, 9, 0, 8, 10, 0, 9, 0, 8, 0]
    assert limits.of_explorer(explorer(good)) == []
    empty = [0, 10, 4, 5, 0, 8, 10, 0, 5, 4, 8, 0]
    assert "(2,) fills less than 40%" in limits.of_explorer(explorer(empty))[0]
    hidden = [0, 10, 0, 9, 0, 8, 10, 0, 0, 9, 8, 0]  # at size 2, where it starts
    assert "a and b lie upon each other" in limits.of_explorer(explorer(hidden))[0]


LOW = "<div style='height:950px'></div>"
NARROW = "<div style='width:300px' class='output'>"
FORMULA = "<mjx-container display='true' style='display:block;width:300px;overflow-x:auto'>"


@pytest.mark.browser
@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("<div style='height:14000px'></div>", "screens"),
        ("<p>" + "word " * 2001 + "</p>", "2001 words"),
        (LOW + "<section class='card-first'>x</section>", "the card ends"),
        ("<p>x</p>", "no card"),
        (NARROW + "<table style='width:500px'><tr><td>x</table></div>", "wider than its column"),
        (FORMULA + "<p style='width:500px'>x</p></mjx-container>", "a formula is 200 px wider"),
    ],
)
def test_each_limit_of_a_screen_is_seen(browser, tmp_path: Path, body: str, word: str) -> None:
    width, height = limits.WINDOW
    window = browser.new_page(viewport={"width": width, "height": height})
    try:
        window.set_content(textwrap.dedent(f"<article class='bd-article'>{body}</article>"))
        assert any(word in problem for problem in limits.of_screen(window))
    finally:
        window.close()
