"""Comparing a commit with today, exactly: what is renewed, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from book.engine.clear import Side, recorded_at, same_cells
from book.engine.compare import Run, compare, printed
from book.engine.key import file_hash
from book.engine.plan import assess
from book.engine.project import Chapter, Project
from book.engine.source import read
from tests.book.engine_toy import Toy, kill9, until
from tests.book.test_engine_trouble import gated
from toolkit.core.runs import results

LAYERS = """\
WIDTH = 3


class Shape:
    depth = 2

    def area(self):
        side = WIDTH
        return side * side

    def never(self):
        return 0


def wide(x):
    width = x * WIDTH
    return width


def unused():
    return 1
"""
ADAPTED = """\
from toolkit.core.layers import WIDTH, Shape, unused, wide


def adapt(rare=False):
    return unused() if rare else wide(WIDTH) + Shape().area()
"""
# a clock that ticks makes verify run the base a second time, so in most tests it stands still
CELLS = (
    "import json, os, time\nfrom toolkit import adapt\nclock = eval(os.environ.get('CLOCK', '0'))",
    "print('found', adapt(), 'after', clock, 's')",
    """
    with open(os.environ["TOOLKIT_RESULTS"] + f"/two.{SCALE}.json", "w") as file:
        json.dump({"slug": "two", "seeds": [0, 1], "value": adapt(), "t": clock}, file)
    """,
)
LAYERS_FILE = "toolkit/core/layers.py"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A project with one recorded chapter and its commit."""
    toy = Toy(tmp_path_factory.mktemp("verify") / "project")
    toy.write(LAYERS_FILE, LAYERS)
    toy.write("toolkit/core/adapted.py", ADAPTED)
    toy.chapter("two", *CELLS)
    toy.commit()
    toy.engine("record", "two", "--scale", "cpu")
    toy.commit()
    return toy


@pytest.fixture
def toy(tmp_path: Path, recorded: Toy) -> Toy:
    """A copy of it."""
    return Toy(tmp_path / "project", like=recorded)


def verified(toy: Toy, slug: str = "two") -> str | None:
    return toy.page(slug)["metadata"]["provenance"].get("verified")


def trees(toy: Toy) -> list[Path]:
    return [*toy.root.glob("_build/verify/*"), *toy.root.glob(".git/worktrees/*")]


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOCK", "time.time()")


@pytest.mark.usefixtures("ticking")
def test_a_renamed_variable_and_a_moved_function_are_renewed(toy: Toy) -> None:
    numbers = (toy.root / "book/results/two.cpu.json").read_bytes()
    printed_before = toy.printed("two")
    toy.write(LAYERS_FILE, LAYERS.replace("width", "breadth").replace("side", "edge"))
    area = "def wide(x):\n    breadth = x * WIDTH\n    return breadth\n"
    toy.edit(LAYERS_FILE, area, "")
    toy.write("toolkit/core/wider.py", f"from toolkit.core.layers import WIDTH\n{area}")
    toy.edit("toolkit/core/adapted.py", ", unused, wide", ", unused\nfrom .wider import wide")
    toy.chapter(
        "two", CELLS[0].replace("toolkit import", "toolkit.core.adapted import"), *CELLS[1:]
    )
    assert "numbers stale" in toy.engine("list")

    said = toy.engine("verify", "--base", "HEAD")
    assert "alpha/two  same: renewed: " in said
    assert said.partition("not reproducible, left out: ")[2].startswith("cell 3, t\n")
    assert "1 chapters, 0 differ or failed" in said
    assert "alpha/two  cpu: numbers fresh, page fresh; verified on " in toy.engine("list")
    assert toy.printed("two") == printed_before
    assert (toy.root / "book/results/two.cpu.json").read_bytes() == numbers
    line = "".join(toy.page("two")["cells"][1]["source"])
    assert f"verified on {verified(toy)}" in line
    assert "toolkit.core.adapted import adapt" in toy.text("two").decode()
    assert trees(toy) == []


@pytest.mark.usefixtures("ticking")
def test_a_changed_number_is_named_and_not_renewed(toy: Toy) -> None:
    kept = toy.text("two")
    toy.edit(LAYERS_FILE, "WIDTH = 3", "WIDTH = 4")
    said = toy.engine("verify", "--base", "HEAD", code=1)
    assert "value: 18 -> 32" in said
    assert "cell 3: 18 -> 32" in said
    assert "alpha/two  differs in 2 places" in said
    assert toy.text("two") == kept
    assert trees(toy) == []


PROBE = "from toolkit.core.layers import unused\nprint(unused())\n"


def test_a_probe_clears_what_no_chapter_calls(toy: Toy) -> None:
    toy.edit(LAYERS_FILE, "return 1", "one = 1\n    return one")
    toy.write("book/probes/rare.py", PROBE)  # without one that agrees: the next test
    said = toy.engine("verify", "--base", "HEAD")
    assert "probe rare: same" in said
    assert "alpha/two: renewed: " in said


def test_what_no_ci_run_and_no_probe_shows_is_named_and_not_renewed(toy: Toy) -> None:
    kept = toy.text("two")
    for old, new in (
        ("return 1", "return 2"),
        ("return 0", "return 1"),
        ("depth = 2", "depth = 3"),
        ("WIDTH = 3", "WIDTH = 2 + 1"),
    ):
        toy.edit(LAYERS_FILE, old, new)
    toy.write("book/probes/rare.py", PROBE)
    toy.write("book/probes/broken.py", "raise ValueError('no such thing')\n")
    said = toy.engine("verify", "--base", "HEAD", code=1)
    assert "probe rare: differs\n1 -> 2" in said
    assert "probe broken: failed\nat the base: ValueError: no such thing" in said
    assert "1 chapters, 2 differ or failed" in said
    assert "alpha/two     same: not renewed: " in said
    for words in (
        "unused changed, and no ci run calls it",
        "Shape.never changed, and no ci run calls it",
        "Shape.depth changed, which a ci run need not show",
        "WIDTH changed, which a ci run need not show",
    ):
        assert f"not renewed: {LAYERS_FILE}: {words}" in said
    assert said.count("not renewed") == 8, "four, told as they come and in the table"
    assert toy.text("two") == kept
    assert "numbers stale" in toy.engine("list")


def test_a_page_of_other_code_than_the_base_is_not_renewed(toy: Toy) -> None:
    recorded_at = toy.page("two")["metadata"]["provenance"]["commit"]
    toy.edit(LAYERS_FILE, "x * WIDTH", "WIDTH * x")
    toy.commit()
    toy.edit(LAYERS_FILE, "WIDTH * x", "(x) * WIDTH + 0")
    said = toy.engine("verify", "--base", "HEAD")
    assert (
        f"it was recorded with other code than the base has (its commit: {recorded_at[:9]})" in said
    )
    assert verified(toy) is None


@pytest.mark.weekly
def test_other_causes_than_code_are_not_renewed(toy: Toy) -> None:
    toy.write("constraints.txt", "torch==1\n")
    assert "not renewed: versions of packages changed" in toy.engine("verify", "--base", "HEAD")


@pytest.mark.parametrize(
    ("cells", "same"),
    [
        (CELLS, True),
        (("from toolkit import adapt\nimport os\n" + CELLS[0], *CELLS[1:]), True),
        ((CELLS[0], CELLS[1] + "  # a comment", CELLS[2]), True),
        ((CELLS[0], CELLS[1].replace("'after',", "*['after'],"), CELLS[2]), False),
        ((CELLS[0], ":tags: [raises-exception]\n" + CELLS[1], CELLS[2]), False),
        ((*CELLS, "unseen = 1"), False),
    ],
)
def test_cells_may_differ_in_import_lines_only(
    tmp_path: Path, cells: tuple[str, ...], same: bool
) -> None:
    toy = Toy(tmp_path)
    chapter = Chapter("alpha", "two", toy.root)
    toy.chapter("two", *CELLS)
    before = read(chapter)
    toy.chapter("two", *cells)
    assert same_cells(before, read(chapter)) is same


@pytest.mark.weekly
def test_a_page_of_format_1_is_renewed_by_the_files_it_names(toy: Toy) -> None:
    page = toy.page("two")
    parts = page["metadata"]["provenance"]["parts"]
    del parts["code"]
    files = [LAYERS_FILE, "toolkit/core/adapted.py", "toolkit/__init__.py"]
    parts |= {"format": 1, "toolkit": {f: file_hash(toy.root / f) for f in files}}
    parts["constraints"] = file_hash(toy.root / "constraints.txt")
    page["metadata"]["provenance"]["results"] = True
    toy.write("book/notebooks/alpha/two.ipynb", json.dumps(page))
    assert "numbers stale (recorded before code was keyed by definition)" in toy.engine("list")
    tasks, _ = assess(Project(toy.root), Project(toy.root).select([]))
    assert [t.action for t in tasks] == ["keep"]
    toy.edit(LAYERS_FILE, "width = x", "breadth = x")
    toy.edit(LAYERS_FILE, "return width", "return breadth")
    assert "renewed" in toy.engine("verify", "--base", "HEAD")
    assert "numbers fresh, page fresh; verified" in toy.engine("list")

    toy.chapter("two", *CELLS)
    source, side = read(Chapter("alpha", "two", toy.root)), Side(toy.root)
    parts["toolkit"][LAYERS_FILE] = file_hash(toy.root / LAYERS_FILE)
    assert recorded_at(parts, source, side)
    for changed in ({"cells": "other"}, {"toolkit": {LAYERS_FILE: "other"}}, {"constraints": ""}):
        assert not recorded_at({**parts, **changed}, source, side)


def test_a_lab_is_renewed_with_its_results_and_runs_in_other_processes_are_seen(toy: Toy) -> None:
    toy.lab()
    toy.engine("record", "one")
    toy.commit()
    before = json.loads((toy.root / "book/results/one.ci.json").read_text())
    names = [job["check"] for e in before["experiments"].values() for job in e["jobs"]]
    took = {name: float(place) for place, name in enumerate(names)}
    results.write_times(toy.root / "book/results", "one", "ci", {"jobs": {**took, "gone": 9.0}})
    lab = "toolkit/labs/alpha/one.py"
    toy.edit(lab, 'return {"score": seed * 2}', 'doubled = seed * 2\n    return {"score": doubled}')
    assert "numbers stale (quick: to measure)" in toy.engine("list", "one")
    said = toy.engine("verify", "one", "--base", "HEAD")
    assert "alpha/one  same: renewed: " in said
    assert "numbers fresh, page fresh; verified on" in toy.engine("list", "one")
    after = json.loads((toy.root / "book/results/one.ci.json").read_text())
    assert before["codes"] != after["codes"]
    renamed = [job["check"] for e in after["experiments"].values() for job in e["jobs"]]
    assert renamed != names
    for found in (before, after):
        for job in (j for e in found["experiments"].values() for j in e["jobs"]):
            assert job.pop("code") in found["codes"]
            assert job.pop("check")
        del found["codes"]
    assert before == after
    times = json.loads((toy.root / "book/results/times/one.ci.json").read_text())
    assert times["verified"] == verified(toy, "one")
    assert times["jobs"] == {**dict(zip(renamed, took.values(), strict=True)), "gone": 9.0}
    assert "nothing to run" in toy.engine("record", "one")


BED = """\
    DEPTH = {"ci": 1, "cpu": 3}


    def deep(scale):
        return DEPTH[scale]


    def adapt(seed, scale):
        return {"test": seed + deep(scale)}
    """
BED_FILE = "toolkit/labs/beds/pond.py"


@pytest.fixture
def pond(toy: Toy) -> Toy:
    """A project with a measured bed and its commit."""
    toy.bed("pond", BED)
    took = {job["check"]: 1.0 for job in pond_jobs(toy)}
    results.write_times(toy.root / "book/results", "beds/pond", "cpu", {"jobs": took})
    toy.commit()
    return toy


def pond_jobs(toy: Toy) -> list[dict]:
    found = json.loads((toy.root / "book/results/beds/pond.cpu.json").read_text())
    return found["experiments"]["pond"]["jobs"]


def test_a_bed_is_listed_compared_and_renewed(pond: Toy) -> None:
    assert "beds/pond  cpu: numbers fresh" in pond.engine("list")
    before = pond_jobs(pond)
    pond.edit(BED_FILE, "return DEPTH[scale]", "depth = DEPTH[scale]\n    return depth")
    said = pond.engine("list", "beds/pond")
    assert said == f"beds/pond  cpu: numbers stale ({BED_FILE}: deep changed)\n"
    said = pond.engine("verify", "beds/pond", "--base", "HEAD")
    assert "beds/pond  same: renewed: " in said
    assert "0 chapters, 1 beds, 0 differ or failed" in said
    assert pond.engine("list", "beds/pond") == "beds/pond  cpu: numbers fresh\n"
    after = pond_jobs(pond)
    assert [job["record"] for job in before] == [job["record"] for job in after]
    assert before[0]["code"] != after[0]["code"]
    times = json.loads((pond.root / "book/results/times/beds/pond.cpu.json").read_text())
    assert times["verified"]
    assert set(times["jobs"]) == {job["check"] for job in after}
    assert trees(pond) == []


def test_a_bed_that_differs_or_cannot_be_cleared_stays_stale(pond: Toy) -> None:
    kept = pond_jobs(pond)
    pond.edit(BED_FILE, "return DEPTH", "return 1 + DEPTH")
    said = pond.engine("verify", "beds/pond", "--base", "HEAD", code=1)
    assert "record.test: 1 -> 2" in said
    assert "0 chapters, 1 beds, 1 differ or failed" in said
    pond.edit(BED_FILE, "1 + DEPTH", "DEPTH")
    pond.edit(BED_FILE, '"cpu": 3', '"cpu": 4')
    said = pond.engine("verify", "beds/pond", "--base", "HEAD")
    assert f"not renewed: {BED_FILE}: DEPTH changed, which a ci run need not show" in said
    pond.commit()
    pond.edit(BED_FILE, "seed + deep(scale)", "deep(scale) + seed")
    said = pond.engine("verify", "beds/pond", "--base", "HEAD")
    assert "measured with other code than the base has (its commit: c0ffeec0f)" in said
    pond.write("constraints.txt", "torch==1\n")
    said = pond.engine("verify", "beds/pond", "--base", "HEAD")
    assert "not renewed: versions of packages changed" in said
    assert pond_jobs(pond) == kept
    assert "there are no results of 'beds/lake'; there are: beds/pond" in pond.engine(
        "list", "beds/lake", code=2
    )


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("nowhere", "BASE 'nowhere' is no commit here"),
        ("--all", "argument --base: expected one argument"),
        ("HEAD:toolkit", "BASE 'HEAD:toolkit' is no commit here"),
    ],
)
def test_a_base_that_is_no_commit(toy: Toy, base: str, words: str) -> None:
    assert words in toy.engine("verify", "--base", base, code=2)


def test_a_base_of_another_format(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    (toy.root / "toolkit").rename(toy.root / "aside")
    first = toy.commit()
    (toy.root / "aside").rename(toy.root / "toolkit")
    toy.chapter("one", "print(1)")
    assert "has no folder book/chapters" in toy.engine("verify", "--base", first, code=2)
    toy.write("book/chapters/alpha/one.md", "no title")
    second = toy.commit()
    toy.chapter("one", "print(1)")
    toy.chapter("new", "print(1)")
    said = toy.engine("verify", "--base", second, code=1)
    assert "alpha/one  failed: at the base: alpha/one: the first cell must hold the title" in said
    assert "alpha/new  not compared: the base has no such chapter" in said


def test_no_repository(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.chapter("one", "print(1)")
    assert "is no git repository" in toy.engine("verify", "--base", "HEAD", code=2)


@pytest.mark.weekly
def test_a_chapter_that_fails_on_a_side_says_which(toy: Toy) -> None:
    toy.edit(LAYERS_FILE, "return side * side", "return side / 0")
    said = toy.engine("verify", "--base", "HEAD", code=1)
    assert "failed: today: alpha/two, code cell 3 of 4: ZeroDivisionError" in said


@pytest.mark.weekly
def test_an_interrupted_run_leaves_no_tree_and_whole_files(toy: Toy) -> None:
    kept = toy.text("two")
    gate = toy.root / "gate"
    toy.chapter("two", *CELLS, toy.count("two"), gated(gate))
    toy.commit()
    engine = toy.start("verify", "--base", "HEAD")
    until(lambda: toy.runs("two"))
    engine.terminate()
    said, _ = engine.communicate(timeout=30)
    assert engine.returncode == 130, said
    assert trees(toy) == []
    assert toy.processes() == []

    engine = toy.start("verify", "--base", "HEAD")
    until(lambda: toy.runs("two") == 2)
    kill9(engine)
    assert trees(toy) != []
    until(lambda: toy.processes() == [], seconds=15)
    gate.touch()
    toy.engine("verify", "--base", "HEAD")
    assert trees(toy) == []
    assert toy.text("two") == kept


def test_words_and_numbers_are_compared_exactly() -> None:
    stream = {"output_type": "stream", "name": "stdout", "text": ["a 1.0 ", "b\n"]}
    table = {
        "output_type": "display_data",
        "data": {"text/html": "<table><tr><td>1.50</td><td>x&gt;y</td></tr></table><img alt='z'>"},
    }
    assert printed([stream, table]) == ["a", "1.0", "b", "1.50", "x>y"]
    one = Run({("cell 1", "words"): 2, ("cell 1", 0): "a", ("cell 1", 1): "1.0"})
    other = Run({("cell 1", "words"): 2, ("cell 1", 0): "a", ("cell 1", 1): "1.00"})
    assert compare(one, one).differing == []
    assert compare(one, other).differing == ["cell 1: 1.0 -> 1.00"]
    assert compare(one, other, other).differing == []
    assert compare(one, other, other).unstable == ["cell 1"]
    more = Run({("cell 1", "words"): 1, ("cell 1", 0): "b"})
    assert compare(one, more).differing == ["cell 1: 2 words -> 1 words"]
