"""Chapters with a lab: what is measured, what is only told, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from book.engine import install
from tests.book.engine_toy import VIEW, Toy, kill9, until
from tests.book.test_engine_trouble import gated

pytestmark = pytest.mark.usefixtures("unrendered")

LAB = "toolkit/labs/alpha/one.py"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A project whose one chapter has a lab, recorded at ci."""
    toy = Toy(tmp_path_factory.mktemp("lab") / "project")
    toy.lab()
    listed = toy.engine("list")
    assert "alpha/one  no page, ci: numbers stale (never measured at ci)" in listed
    said = toy.engine("record")
    assert said.index("its lab measures at ci") < said.index("alpha/one: recorded at ci")
    return toy


@pytest.fixture
def toy(tmp_path: Path, recorded: Toy) -> Toy:
    """A copy of it."""
    return Toy(tmp_path / "project", like=recorded)


def results(toy: Toy, scale: str = "ci") -> Path:
    return toy.root / f"book/results/one.{scale}.json"


def test_recording_measures_then_tells(toy: Toy) -> None:
    assert toy.jobs() == 4
    assert toy.printed("one") == "mean 1.5\n"
    provenance = toy.page("one")["metadata"]["provenance"]
    assert provenance["results"]["file"] == "one.ci.json"
    assert provenance["seeds"] == [2, 2]
    assert "alpha/one  ci: numbers fresh, page fresh" in toy.engine("list")
    assert "nothing to run" in toy.engine("record")
    assert toy.jobs() == 4


def test_a_figure_or_a_sentence_is_told_again_and_runs_no_job(toy: Toy) -> None:
    toy.edit(LAB, '"mean "', '"average "')
    said = toy.engine("list")
    assert f"numbers fresh, page stale ({LAB}: view changed)" in said
    assert "alpha/one: told again at ci" in toy.engine("build")
    assert toy.printed("one") == "average 1.5\n"
    toy.chapter("one", *VIEW, "print('more')")
    assert "numbers fresh, page stale (code cells changed; text changed)" in toy.engine("list")
    toy.engine("record")
    assert toy.printed("one") == "average 1.5\nmore\n"
    assert toy.jobs() == 4


def test_code_of_one_experiment_measures_its_jobs_only_and_build_measures_nothing(
    toy: Toy,
) -> None:
    before = toy.text("one")
    toy.edit(LAB, "seed * 2", "seed * 3")
    assert "numbers stale (quick: to measure), page fresh" in toy.engine("list")
    said = toy.engine("build")
    assert "1 page kept with stale numbers, marked so:" in said
    assert (toy.jobs(), toy.text("one")) == (4, before)
    toy.engine("record")
    assert toy.jobs() == 6
    assert "numbers fresh, page fresh" in toy.engine("list")


def test_prose_is_refreshed_beside_stale_numbers_which_stay_stale(toy: Toy) -> None:
    toy.edit(LAB, "seed * 2", "seed * 3")
    toy.chapter("one", *VIEW, tail="\nLast words.\n")
    assert "alpha/one: text refreshed" in toy.engine("build")
    assert "Last words." in toy.text("one").decode()
    assert "numbers stale (quick: to measure" in toy.engine("list")


def test_numbers_measured_without_the_engine_are_told(toy: Toy) -> None:
    (toy.root / "book/notebooks/alpha/one.ipynb").unlink()
    assert "alpha/one: told again at ci" in toy.engine("build")
    assert toy.jobs() == 4


def test_other_packages_measure_every_job_again_and_so_does_force(toy: Toy) -> None:
    toy.write("constraints.txt", "torch==1\n")
    assert "numbers stale (versions of packages changed)" in toy.engine("list")
    before = results(toy).read_bytes()
    toy.engine("record")
    assert toy.jobs() == 8
    assert results(toy).read_bytes() == before
    assert "numbers fresh, page fresh" in toy.engine("list")
    toy.engine("record", "--force")
    assert toy.jobs() == 12


def test_a_larger_scale_replaces_page_and_results(toy: Toy) -> None:
    toy.engine("record", "one", "--scale", "cpu")
    assert toy.printed("one") == "mean 2.0\n"
    assert [p.name for p in sorted(toy.root.glob("book/results/*.json"))] == ["one.cpu.json"]
    assert "fresh at the larger scale cpu" in toy.engine("record", "one", "--scale", "ci")


def test_telling_takes_the_largest_scale_and_never_loses_its_results(toy: Toy) -> None:
    page, small = toy.text("one"), results(toy).read_bytes()
    toy.engine("record", "one", "--scale", "cpu")
    jobs = toy.jobs()
    for asked in ((), ("--scale", "cpu")):
        (toy.root / "book/notebooks/alpha/one.ipynb").write_bytes(page)
        results(toy).write_bytes(small)
        said = toy.engine("record", "one", "--scale", "ci", "--tell")
        assert "measured at the larger scale cpu" in said
        assert results(toy, "cpu").is_file()
        assert "alpha/one: told again at cpu" in toy.engine("record", "one", *asked, "--tell")
        assert toy.printed("one") == "mean 2.0\n"
        assert [p.name for p in sorted(toy.root.glob("book/results/*.json"))] == ["one.cpu.json"]
        assert toy.jobs() == jobs


def test_a_break_between_the_two_writes_is_seen_and_mended(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.edit(LAB, "seed + One.value", "seed + 10")
    page = toy.text("one")
    real = install.write

    def full(path: Path, text: str) -> None:
        if path.suffix == ".ipynb":
            raise OSError("no space left on device")
        real(path, text)

    monkeypatch.setattr(install, "write", full)
    assert "no space left on device" in toy.engine("record", code=1)
    monkeypatch.undo()
    assert toy.text("one") == page
    said = toy.engine("list")
    assert "numbers fresh" in said
    assert "one.ci.json is not the one the page was told from" in said
    jobs = toy.jobs()
    toy.engine("record")
    assert toy.printed("one") == "mean 10.5\n"
    assert toy.jobs() == jobs


def test_a_break_between_the_two_writes_of_a_chapter_without_lab(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = 'open(os.environ["TOOLKIT_RESULTS"] + f"/two.{SCALE}.json", "w").write('
    toy.chapter("two", f'import os\n{write}"{{}}")')
    toy.engine("record", "two")
    toy.chapter("two", f'import os\n{write}"[1]".join("{{}}"))')
    real = install.write

    def full(path: Path, text: str) -> None:
        if path.suffix == ".ipynb":
            raise OSError("no space left on device")
        real(path, text)

    monkeypatch.setattr(install, "write", full)
    monkeypatch.setattr("book.engine.record.seed_counts", lambda _: [])
    toy.engine("record", "two", code=1)
    monkeypatch.undo()
    assert "two.ci.json is not the one the page was told from" in toy.engine("list", "two")


def test_a_lab_that_fails_is_reported_with_what_it_said(toy: Toy) -> None:
    page, numbers = toy.text("one"), results(toy).read_bytes()
    toy.edit(LAB, "seed * 2", "seed / 0")
    said = toy.engine("record", code=1)
    assert "alpha/one: its lab is not complete: ZeroDivisionError: division by zero" in said
    assert 'return {"score": seed / 0}' in said
    assert (toy.text("one"), results(toy).read_bytes()) == (page, numbers)


def test_a_lab_that_never_ends_is_ended(toy: Toy) -> None:
    toy.edit(LAB, 'return {"score": seed * 2}', "while True: pass")
    said = toy.engine("record", "--timeout", "4", code=1)
    assert "ended: its lab ran longer than 4 s; what it measured is kept" in said
    assert toy.processes() == []


def test_a_broken_lab_stops_no_other_chapter(toy: Toy) -> None:
    toy.chapter("two", "print(2)")
    toy.edit(LAB, "from toolkit.alpha.one import One", "raise ValueError('no such bed')")
    said = toy.engine("list", code=1)
    assert "alpha/one  broken: its lab cannot say what is stale: ValueError: no such bed" in said
    assert "alpha/two  no page: never recorded" in said


def test_kill_9_while_the_lab_measures_leaves_results_and_page_whole(toy: Toy) -> None:
    page, numbers = toy.text("one"), results(toy).read_bytes()
    gate = toy.root / "gate"
    waiting = "".join(f"    {line}\n" for line in _dedented(gated(gate)))
    toy.edit(LAB, "def quick(seed):\n", f"def quick(seed):\n{waiting}")
    engine = toy.start("record")
    until(lambda: toy.jobs() == 5)
    kill9(engine)
    until(lambda: toy.processes() == [], seconds=15)
    assert (toy.text("one"), results(toy).read_bytes()) == (page, numbers)
    gate.touch()
    assert "alpha/one: recorded at ci" in toy.engine("record")
    assert toy.leftovers() == []


def _dedented(text: str) -> list[str]:
    import textwrap

    return textwrap.dedent(text).strip("\n").splitlines()


def test_trying_changes_nothing_and_says_what_would_differ(toy: Toy) -> None:
    kept = {p: p.read_bytes() for p in toy.root.rglob("*") if p.is_file() and "book" in p.parts}
    assert "every number and every printed word is what is recorded" in toy.engine("try", "one")
    toy.edit(LAB, "seed + One.value", "seed + One.value / 2")
    said = toy.engine("try", "one")
    assert "experiments.slow.jobs[seed=0].record.score: 1 -> 0.5" in said
    assert "cell 3: 1.5 -> 1.0" in said
    assert "quick" not in said.partition("differ:")[2], "its jobs were not run again"
    said = toy.engine("try", "one", "--scale", "cpu")
    assert "it runs; its page is at ci, so there is nothing to compare with" in said
    toy.chapter("two", "1 / 0")
    assert "ZeroDivisionError" in toy.engine("try", "two", code=1)
    now = {p: p.read_bytes() for p in kept}
    assert now == kept


def test_provenance_of_the_store_is_on_the_page(toy: Toy) -> None:
    toy.write(
        "book/results/times/one.ci.json",
        json.dumps({"recorded": "2026-01-02", "verified": "2026-03-04", "seconds": 300.0}),
    )
    toy.engine("record", "--force")
    line = "".join(toy.page("one")["cells"][1]["source"])
    assert "recorded on 2026-01-02 · verified on 2026-03-04 · 5 min · 2 seeds" in line
