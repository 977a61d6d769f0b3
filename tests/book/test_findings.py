"""The cards of the first page: words, number and picture are those of the recorded chapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sphinx", reason="the extra book is not installed")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from motion_book import findings, times  # noqa: E402

from tests.book.ledger_toy import judged  # noqa: E402
from toolkit.core.evidence.table import found_text, verdict_html  # noqa: E402

FIGURE = '<figure class="house-figure"><img alt="{}" src="data:image/png;base64,{}"></figure>'


@pytest.fixture
def book(tmp_path):
    """A recorded page of one chapter with two figures, and the results of one claim."""
    folder = tmp_path / "book" / "notebooks" / "lowrank"
    folder.mkdir(parents=True)
    shown = [FIGURE.format("a &lt; b", "QQ=="), FIGURE.format("second", "Qg==")]
    cells = [{"cell_type": "markdown", "source": ["# Toy: a title\n"]}] + [
        {"cell_type": "code", "source": [], "outputs": [{"data": {"text/html": [figure]}}]}
        for figure in shown
    ]
    (folder / "toy.ipynb").write_text(json.dumps({"cells": cells}))
    return tmp_path


def card(book, line):
    claim = judged("holds", 3).record()
    builder = SimpleNamespace(get_relative_uri=lambda here, there: f"{there}.html")
    env = SimpleNamespace(docname="book/intro", app=SimpleNamespace(builder=builder))
    results = {"toy": {"slug": "toy", "claims": [claim]}, "bare": {"slug": "bare", "claims": []}}
    line = line.replace("CLAIM", claim["id"])
    made = findings.Findings._card(SimpleNamespace(env=env), book, results, line)
    return made, claim


def test_a_card_says_what_the_chapter_says(book):
    made, claim = card(book, "toy CLAIM 2")
    assert 'href="book/notebooks/lowrank/toy.html">Toy: a title</a>' in made
    assert 'src="data:image/png;base64,Qg=="' in made
    assert claim["text"] in made
    assert verdict_html("holds") in made
    assert found_text(claim["conditions"][0], claim["unit"], 0.0) in made
    assert 'alt="a &lt; b"' in card(book, "toy CLAIM 1")[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("none CLAIM 1", "no results"),
        ("toy other 1", "no claim 'other'"),
        ("toy CLAIM 3", "has 2 figures, not 3"),
        ("toy CLAIM 0", "has 2 figures, not 0"),
    ],
)
def test_what_is_not_there_is_named(book, line, words):
    with pytest.raises(LookupError, match=words):
        card(book, line)


def test_the_first_page_shows_findings_that_exist():
    from toolkit.core import evidence

    text = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    lines = text.split("```{findings}\n")[1].split("```")[0].split("\n")
    known = {
        (result["slug"], claim["id"])
        for result in evidence.load_results(ROOT / "book" / "results")
        for claim in result["claims"]
    }
    shown = [tuple(line.split()[:2]) for line in lines if line]
    assert shown
    assert set(shown) <= known


def test_minutes_come_from_words_lines_and_figures():
    shown = '<figure class="house-figure"></figure><p>three more words</p><script>not read</script>'
    cells = [
        {"cell_type": "markdown", "source": ["word " * 177]},
        {"cell_type": "code", "source": ["a = 1\n", "b = 2"], "metadata": {}, "outputs": []},
        {"cell_type": "code", "source": ["hidden"], "metadata": {"tags": ["hide-input"]},
         "outputs": [{"data": {"text/html": [shown]}}]},
        {"cell_type": "code", "source": ["gone"], "metadata": {"tags": ["remove-cell"]}},
    ]  # fmt: skip
    assert times.counted({"cells": cells}) == {
        "words": 180, "lines of code": 2, "figures": 1, "minutes": 2,
    }  # fmt: skip
    cells[0]["source"] = ["word " * 177 * 3]
    assert times.counted({"cells": cells})["minutes"] == 4


def test_the_readme_says_what_was_found():
    """Each line: a claim's words, its verdict, and the effect of its deciding condition."""
    from toolkit.core import evidence
    from toolkit.core.evidence.table import counted_from
    from toolkit.core.show.card import deciding

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("<!-- findings -->")[1].split("<!-- end -->")[0].split("\n- ")[1:]
    assert len(lines) == 3
    known = [
        (claim["text"], claim["verdict"],
         found_text(deciding(claim), claim["unit"], counted_from(claim)))
        for result in evidence.load_results(ROOT / "book" / "results")
        for claim in result["claims"]
        if result["scale"] == "cpu" and claim["conditions"][0].get("low") is not None
    ]  # fmt: skip
    for line in lines:
        said = " ".join(line.split())
        assert any(f"{words} *{verdict}*, {number}" in said for words, verdict, number in known), (
            said
        )
