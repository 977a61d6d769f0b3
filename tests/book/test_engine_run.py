"""The engine at work on toy projects: what runs, what is kept, what is said."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import struct
import termios
from pathlib import Path

import nbformat
import pytest

from book.engine.lab import sha256
from tests.book.engine_toy import Toy

FIGURES = """
    import ipywidgets, os, sys, warnings
    warnings.warn("careful")
    print(SCALE, SEED, "at", os.getcwd(), sys.executable, os.path.expanduser("~/data"))
    """
RESULTS = """
    import json, os
    with open(os.environ["TOOLKIT_RESULTS"] + f"/one.{SCALE}.json", "w") as file:
        json.dump({"slug": "one", "scale": SCALE, "seeds": [0, 1, 2]}, file)
    """


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "project")


def test_from_source_to_page(toy: Toy) -> None:
    toy.chapter(
        "one",
        ":tags: [setup]\n# pip install git+@REPOSITORY@",
        FIGURES,
        "ipywidgets.IntSlider()",
        RESULTS,
        ":tags: [wrong]\nraise RuntimeError('a wrong answer must not run')",
    )
    listed = "alpha/one  no page: never recorded"
    assert listed in toy.engine("list")
    assert "alpha/one: recorded at ci" in toy.engine("record")

    page = nbformat.read(toy.root / "book/notebooks/alpha/one.ipynb", as_version=4)
    nbformat.validate(page)
    title, provenance, breath = (c.source for c in page.cells[:3])
    assert (title, breath) == ("# One", "In one breath.")
    badges, _, line = provenance.partition("\n\n")
    assert badges == (
        "[Paper: arXiv 2101.00001](https://arxiv.org/abs/2101.00001) · "
        "[Official code](https://github.com/them/one) · "
        "[Open in Colab](https://colab.research.google.com/github/us/toy/blob/main/"
        "book/notebooks/alpha/one.ipynb)"
    )
    assert re.fullmatch(
        r"\*Recorded run:\* scale \*\*ci\*\* · CPU \(\w+\) · Python 3\.\d+\.\d+\S*, "
        r"(PyTorch \S+, )?toolkit 9\.8\.7 · recorded on \d{4}-\d\d-\d\d · \d+ s · 3 seeds",
        line,
    )
    assert [c.source for c in page.cells if "wrong" in c.metadata.get("tags", [])] == []
    assert "git+https://github.com/us/toy" in "".join(c.source for c in page.cells)

    text = toy.text("one").decode()
    for place in (str(toy.root), str(Path.home()) + "/", "/ipykernel_", "papermill", "widget-view"):
        assert place not in text
    assert "ci 0 at . [python]/bin/python" in text
    assert "[cell]:" in text, "warnings stay, without this machine's paths"
    assert "careful" in text
    assert "widgets" not in page.metadata
    assert "live-only" in text, "a control says that it needs a kernel"
    results = json.loads((toy.root / "book/results/one.ci.json").read_text())
    assert results["seeds"] == [0, 1, 2]
    assert toy.leftovers() == []
    assert "alpha/one  ci: numbers fresh, page fresh" in toy.engine("list")
    told = page.metadata.provenance
    file = toy.root / "book/results/one.ci.json"
    assert told.results == {"file": "one.ci.json", "sha256": sha256(file)}
    assert (told.commit, told.dirty) == ("", False), "this project is no repository"
    assert told.processor
    assert platform.node() not in json.dumps(told) or not platform.node()


def test_the_page_shows_the_scale_it_ran_at(toy: Toy) -> None:
    toy.chapter("one", "print('ran at', SCALE)", RESULTS)
    toy.engine("record", "one", "--scale", "cpu")
    parameters = [
        c for c in toy.page("one")["cells"] if "parameters" in c["metadata"].get("tags", [])
    ]
    assert ["".join(c["source"]) for c in parameters] == [
        'SCALE = "cpu"  # ci, cpu or gpu\nSEED = 0'
    ]
    assert "ran at cpu" in toy.printed("one")
    assert [p.name for p in toy.root.glob("book/results/*")] == ["one.cpu.json"]

    kept = toy.text("one")
    assert "fresh at the larger scale cpu" in toy.engine("record", "one", "--scale", "ci")
    assert toy.text("one") == kept
    toy.engine("record", "one", "--scale", "ci", "--force")
    assert "ran at ci" in toy.printed("one")
    assert [p.name for p in toy.root.glob("book/results/*")] == ["one.ci.json"]


def test_editing_a_method_makes_exactly_its_dependants_stale(toy: Toy) -> None:
    toy.chapter("one", "from toolkit import One", "print(One.value)", toy.count("one"))
    toy.chapter("two", "from toolkit import Two", "print(Two.value)", toy.count("two"))
    toy.chapter("core", "from toolkit import adapt", "print(adapt())", toy.count("core"))
    toy.engine("record", "--jobs", "2")
    toy.engine("record")
    assert [toy.runs(s) for s in ("one", "two", "core")] == [1, 1, 1]

    toy.write("toolkit/alpha/two.py", "from .one import One\nclass Two(One):\n    value = 22\n")
    listing = toy.engine("list")
    assert "alpha/two   ci: numbers stale (toolkit/alpha/two.py: Two changed)" in listing
    assert listing.count("stale") == 1
    toy.engine("record")
    assert [toy.runs(s) for s in ("one", "two", "core")] == [1, 2, 1]
    assert toy.printed("two") == "22\n"

    toy.write("toolkit/alpha/one.py", "class One:\n    value = 11\n")
    assert toy.engine("list").count("stale") == 2, "Two is built on One"
    toy.write("toolkit/core/layers.py", "WIDTH = 4\n")
    assert toy.engine("list").count("stale") == 3


def test_changed_prose_keeps_the_outputs_and_runs_nothing(toy: Toy) -> None:
    toy.chapter("one", "print('hello')", toy.count("one"))
    toy.engine("record")
    toy.chapter("one", "print('hello')", toy.count("one"), tail="\nA new last word.\n")
    assert "numbers fresh, page stale (text changed)" in toy.engine("list")
    assert "alpha/one: text refreshed" in toy.engine("record")
    assert toy.runs("one") == 1
    assert toy.printed("one") == "hello\n"
    assert "A new last word." in toy.text("one").decode()
    assert "numbers fresh, page fresh" in toy.engine("list")


def test_failures_are_reported_together_and_the_last_good_page_stays(toy: Toy) -> None:
    toy.chapter("bad", "x = 1", "print('good run')")
    toy.engine("record")
    good = toy.text("bad")
    toy.chapter("bad", "x = 0", "print('before')", "1 / x")
    toy.chapter("worse", "def broken(:")
    toy.chapter("fine", "print('fine')")
    toy.write("book/chapters/alpha/unreadable.md", "no title")
    said = toy.engine("record", "--jobs", "2", code=1)
    assert "alpha/fine: recorded at ci" in said
    report = said.split("3 chapters failed:")[1]
    assert "alpha/bad, code cell 4 of 4: ZeroDivisionError: division by zero" in report
    assert "----> 1 1 / x" in report
    assert report.count("The last good page is kept.") == 1
    assert "alpha/worse, code cell 2 of 2: SyntaxError" in report
    assert "alpha/unreadable: the first cell must hold the title" in report
    assert report.count("It has no page yet.") == 2
    assert toy.text("bad") == good
    assert not (toy.root / "book/notebooks/alpha/worse.ipynb").exists()
    assert toy.leftovers() == []
    assert "ci: numbers stale (code cells changed)" in toy.engine("list", "bad")


def test_a_dying_kernel_is_named(toy: Toy) -> None:
    toy.chapter("one", "import os", "os._exit(3)")
    said = toy.engine("record", code=1)
    assert "alpha/one, code cell 3 of 3: the kernel died" in said


def test_a_broken_page_is_recorded_again(toy: Toy) -> None:
    toy.chapter("one", "print(1)", RESULTS)
    toy.engine("record")
    toy.write("book/notebooks/alpha/one.ipynb", toy.text("one").decode()[:200])
    assert "page cannot be read" in toy.engine("list")
    toy.engine("record")
    results = toy.root / "book/results/one.ci.json"
    results.write_text("{}")
    assert "one.ci.json is not the one the page was told from" in toy.engine("list")
    results.unlink()
    assert "one.ci.json is missing" in toy.engine("list")


def test_threads_are_shared_out_and_the_scale_variable_does_not_leak(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLKIT_SCALE", "gpu")
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ.get('TOOLKIT_SCALE'))"
    toy.chapter("one", code)
    toy.engine("record", "--jobs", "64")
    assert toy.printed("one") == "1 None\n"


def test_one_bar_shows_chapter_cell_and_time(toy: Toy) -> None:
    toy.chapter("one", "import time; time.sleep(0.3)", "print('b')")
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    engine = toy.start("record", stderr=writing)
    said = engine.communicate(timeout=60)[0]
    os.close(writing)
    bar = b""
    with contextlib.suppress(OSError), open(reading, "rb", buffering=0) as terminal:
        while chunk := terminal.read(4096):  # a terminal that has closed ends in an OSError
            bar += chunk
    bar = bar.decode()
    assert "alpha/one: recorded" in said
    assert "alpha/one 2/3 |" in bar
    assert re.search(r"\| 3/3 cells \[\d\d:\d\d<00:00\]", bar)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["record", "oen"], "there is no chapter 'oen'; did you mean 'one'?"),
        (
            ["record", "--scale", "cpuu"],
            "SCALE 'cpuu' is not one of ci, cpu, gpu; did you mean 'cpu'?",
        ),
        (["record", "--jobs", "0"], "'0' is not a whole number above 0"),
        (["build", "--memory", "-1"], "'-1' is not a number above 0"),
        (["build", "--scale", "cpu"], "unrecognized arguments: --scale"),
        (["verify"], "the following arguments are required: --base"),
        (["render"], "_config.yml does not exist"),
        (["serve"], "nothing is rendered yet"),
    ],
)
def test_bad_input_is_refused_before_any_work(toy: Toy, words: list[str], message: str) -> None:
    toy.chapter("one", toy.count("one"))
    assert message in toy.engine(*words, code=2)
    assert toy.runs("one") == 0


def test_orphans_are_listed(toy: Toy) -> None:
    toy.chapter("one", "print(1)")
    toy.write("book/notebooks/alpha/gone.ipynb", "{}")
    assert "book/notebooks/alpha/gone.ipynb: its source is gone" in toy.engine("list")
