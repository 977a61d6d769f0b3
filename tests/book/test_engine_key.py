"""What makes a page stale: exactly what it depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from book.engine.key import differences, parts
from book.engine.plan import assess
from book.engine.project import EngineError, Project
from book.engine.source import read
from tests.book.engine_toy import Toy
from toolkit.core.runs.code import Tracer


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


ONE = "toolkit/alpha/one.py"


def key_parts(toy: Toy, slug: str, scale: str = "ci") -> dict:
    project = Project(toy.root)
    source = read(project.chapters[slug])
    data = {name: f"hash of {name}" for name in source.settings.data}
    return parts(source, project, scale, Tracer(toy.root), data)


def test_each_part_of_the_key_answers_to_its_own_cause(toy: Toy) -> None:
    toy.chapter("one", "from toolkit import One", "print(1)", front="chapter: {data: [digits]}")
    before = key_parts(toy, "one")
    assert differences(before, key_parts(toy, "one")) == {}

    def changed() -> dict[str, str]:
        return differences(before, key_parts(toy, "one"))

    toy.write("constraints.txt", "torch==1\n")
    assert changed() == {"constraints": "versions of packages changed"}
    toy.write("constraints.txt", "torch==0\npytest==1\n")
    assert changed() == {}, "numbers do not depend on it"
    toy.write("constraints.txt", "torch==0\n")
    toy.write("toolkit/alpha/two.py", "class Two: pass\n")
    assert changed() == {}, "the chapter does not use Two"
    toy.write(ONE, "class One:\n    value = 5\n")
    assert changed() == {"code": f"{ONE}: One changed"}
    toy.write(ONE, "from toolkit.core.layers import WIDTH\nclass One:\n    value = WIDTH\n")
    assert changed()["code"] == f"{ONE}: One changed, toolkit/core/layers.py: WIDTH is new"
    toy.write(ONE, "class One:\n    value = 1  # a comment\n")
    assert changed() == {}
    cells = ("from toolkit import One", "print(2)")
    toy.chapter("one", *cells, front="chapter: {data: [digits]}")
    assert changed() == {"cells": "code cells changed"}
    toy.chapter("one", "from toolkit import One", "print(1)", front="chapter: {data: [mnist]}")
    assert changed() == {"data": "data: mnist new, digits no longer used"}
    toy.chapter(
        "one",
        "from toolkit import One",
        "print(1)",
        front="chapter: {data: [digits]}",
        tail="\nMore.",
    )
    assert changed() == {"text": "text changed"}


def test_scale_and_device_class_are_parts(toy: Toy) -> None:
    toy.chapter("one", "print(1)")
    found = differences(key_parts(toy, "one"), key_parts(toy, "one", "gpu"))
    assert found == {"scale": "scale: ci -> gpu", "device": "device: cpu -> cuda"}


def test_a_page_of_format_1_is_stale_in_its_numbers_and_says_why(toy: Toy) -> None:
    toy.chapter("one", "from toolkit import One")
    now = key_parts(toy, "one")
    former = {k: v for k, v in now.items() if k != "code"} | {"format": 1, "toolkit": {ONE: "a"}}
    assert differences(former, now) == {"format": "recorded before code was keyed by definition"}


def test_wrong_answers_are_no_part_of_the_page(toy: Toy) -> None:
    toy.chapter("one", "print(1)")
    before = key_parts(toy, "one")
    toy.chapter("one", "print(1)", ":tags: [wrong]\nprint(2)")
    assert differences(before, key_parts(toy, "one")) == {}


def test_line_endings_do_not_count(toy: Toy) -> None:
    toy.chapter("one", "from toolkit import One")
    before = key_parts(toy, "one")
    file = toy.root / ONE
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert differences(before, key_parts(toy, "one")) == {}


BROKEN = {
    "no title": ("Text.", "the first cell must hold the title"),
    "no parameters": ("# T\n", "0 cells are tagged `parameters`"),
    "wrong parameter": (
        '# T\n```{code-cell} python\n:tags: [parameters]\nSCALE = "cpu"\nSEED = 0\n```\n',
        'must assign SCALE = "ci"',
    ),
    "computed parameter": (
        "# T\n```{code-cell} python\n:tags: [parameters]\nSCALE = f()\nSEED = 0\n```\n",
        "may only assign plain values",
    ),
    "unknown entry": ("---\nchapter: {memory: 2}\n---\n# T\n", "did you mean 'memory_gib'?"),
    "memory": ("---\nchapter: {memory_gib: 0}\n---\n# T\n", "memory_gib is 0, it must be a number"),
    "data": ("---\nchapter: {data: digits}\n---\n# T\n", "it must be a list of names"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_source_is_named_and_does_not_stop_the_others(
    toy: Toy, text: str, message: str
) -> None:
    toy.chapter("good", "print(1)")
    toy.write("book/chapters/alpha/bad.md", text)
    project = Project(toy.root)
    tasks, failures = assess(project, project.select([]))
    assert [t.chapter.slug for t in tasks] == ["good"]
    assert [f.chapter for f in failures] == ["alpha/bad"]
    assert message in failures[0].message


def test_an_unknown_data_set_fails_its_own_chapter(toy: Toy) -> None:
    toy.write(
        "toolkit/core/data.py",
        "def hashes(names):\n    return {n: {'digits': 1}[n] for n in names}\n",
    )
    toy.chapter("good", "print(1)", front="chapter: {data: [digits]}")
    toy.chapter("bad", "print(1)", front="chapter: {data: [digitz]}")
    tasks, failures = assess(Project(toy.root), Project(toy.root).select([]))
    assert [t.parts["data"].keys() for t in tasks] == [{"digits"}]
    assert [(f.chapter, "digitz" in f.message) for f in failures] == [("alpha/bad", True)]


def test_unknown_chapter_suggests_the_nearest(toy: Toy) -> None:
    toy.chapter("adalora", "print(1)")
    with pytest.raises(EngineError, match="no chapter 'adalroa'; did you mean 'adalora'"):
        Project(toy.root).select(["adalroa"])
    with pytest.raises(EngineError, match="no chapter 'zzz'; there are: adalora"):
        Project(toy.root).select(["zzz"])


def test_one_slug_in_two_parts_is_refused(toy: Toy) -> None:
    toy.chapter("one", "print(1)")
    toy.chapter("one", "print(1)", part="beta")
    with pytest.raises(EngineError, match="alpha/one and beta/one"):
        Project(toy.root).select([])


def test_no_project_here(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no folder book/chapters"):
        Project(tmp_path / "nowhere").select([])
