"""Rendering, serving and the course command on a toy project."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path

import pytest

from book.engine import site
from book.engine.project import EngineError, Project
from tests.book.engine_toy import Toy

CONFIG = "title: Toy\nexecute:\n  execute_notebooks: 'off'\nonly_build_toc_files: true\n"
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
    toy.write("book/intro.md", "# Welcome\n")
    toy.chapter("one", "print('the output')")
    return toy


def test_build_records_renders_and_says_where(toy: Toy) -> None:
    said = toy.engine("build")
    assert "alpha/one: recorded at ci" in said
    first = toy.root / "_build/html/book/intro.html"
    assert f"open {first.as_uri()}" in said
    page = (toy.root / "_build/html/book/notebooks/alpha/one.html").read_text()
    assert "the output" in page
    assert "Recorded run:" in page

    with site.server(Project(toy.root), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/book/intro.html"
        assert b"Welcome" in urllib.request.urlopen(address, timeout=10).read()
        with pytest.raises(EngineError, match="cannot be used"):
            site.server(Project(toy.root), server.server_address[1])
        server.shutdown()

    # A failing chapter fails the build, is told last, and its last good page is rendered.
    toy.chapter("one", "1 / 0")
    said = toy.engine("build", code=1)
    assert said.index("open file:") < said.index("1 chapter failed:") < said.index("ZeroDivision")
    page = (toy.root / "_build/html/book/notebooks/alpha/one.html").read_text()
    assert "the output" in page


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
