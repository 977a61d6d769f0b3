"""Rendering, serving and the course command on a toy project."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path

import pytest

from book.engine import site
from book.engine.project import EngineError, Project
from book.engine.serve import server
from tests.book.engine_toy import REPOSITORY, Toy

CONFIG = (
    "title: Toy\nexecute:\n  execute_notebooks: 'off'\nonly_build_toc_files: true\n"
    "sphinx:\n  local_extensions:\n    marks: book/_ext/motion_book\n"
)
TOC = """\
format: jb-book
root: book/intro
parts:
  - caption: Part
    chapters:
      - file: book/notebooks/alpha/one
"""


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    toy = Toy(tmp_path / "project")
    toy.write("_config.yml", CONFIG)
    toy.write("_toc.yml", TOC)
    extension = REPOSITORY / "book/_ext/motion_book/marks.py"
    toy.write("book/_ext/motion_book/marks.py", extension.read_text(encoding="utf-8"))
    toy.write("book/intro.md", "# Welcome\n")
    toy.chapter("one", "print('the output')")
    return toy


def test_build_renders_and_says_where(toy: Toy) -> None:
    toy.engine("record")
    said = toy.engine("build")
    assert "1 chapters looked at, nothing to run" in said
    first = toy.root / "_build/html/book/intro.html"
    assert f"open {first.as_uri()}" in said
    page = (toy.root / "_build/html/book/notebooks/alpha/one.html").read_text()
    assert "the output" in page
    assert "Recorded run:" in page

    with server(Project(toy.root), 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_address[1]}/book/intro.html"
        assert b"Welcome" in urllib.request.urlopen(address, timeout=10).read()
        with pytest.raises(EngineError, match="cannot be used"):
            server(Project(toy.root), running.server_address[1])
        running.shutdown()

    # What needs measuring is not run: the page is kept, named and marked, and the mark goes again.
    kept = toy.text("one")
    toy.chapter("one", "1 / 0")
    said = toy.engine("build")
    assert said.index("open file:") < said.index("1 page kept with stale numbers, marked so:")
    assert "alpha/one: code cells changed" in said
    assert toy.text("one") == kept
    page = (toy.root / "_build/html/book/notebooks/alpha/one.html").read_text()
    assert "the output" in page
    line = "Its numbers were measured with earlier code (what changed: code cells changed)."
    assert line in page
    assert page.index("</h1>") < page.index(line) < page.index("Recorded run:")

    toy.chapter("one", "print('the output')")
    assert "kept" not in toy.engine("build")
    page = (toy.root / "_build/html/book/notebooks/alpha/one.html").read_text()
    assert "earlier code" not in page


@pytest.mark.usefixtures("unrendered")
def test_a_chapter_that_cannot_be_read_fails_the_build_after_rendering(toy: Toy) -> None:
    toy.write("book/chapters/alpha/two.md", "no title")
    said = toy.engine("build", code=1)
    assert said.index("open file:") < said.index("1 chapter failed:") < said.index("alpha/two")


def test_a_page_that_was_not_rendered_is_an_error(toy: Toy) -> None:
    # jupyter-book only warns about a file that does not exist.
    toy.write("_toc.yml", TOC + "      - file: book/missing\n")
    said = toy.engine("render", code=2)
    assert "book/missing" in said


def test_pages_of_the_table_of_contents(toy: Toy) -> None:
    toy.write("_toc.yml", TOC + "        sections:\n          - file: book/deep.md\n")
    assert site.toc_pages(Project(toy.root)) == [
        "book/intro.html",
        "book/notebooks/alpha/one.html",
        "book/deep.html",
    ]
    toy.write("_toc.yml", "- file: a\n")
    with pytest.raises(EngineError, match="first page with `root:`"):
        site.toc_pages(Project(toy.root))
