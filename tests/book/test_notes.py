"""Lab notes: a page for each lab from its results, outside the reading order, and its links."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sphinx.cmd import build as sphinx

from book.engine.record import provenance_text
from tests.book import notes_toy
from toolkit.core.evidence.results import load_results

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from motion_book.notes import RUN, page  # noqa: E402  (needs the path)
from motion_book.notes.experiments import mean  # noqa: E402

MOST = 2_500_000  # bytes of a page
CHAPTER = "book/notebooks/lowrank/lora"
REAL = sorted((ROOT / "book" / "results").glob("*.cpu.json"))
NOTEBOOKS = sorted((ROOT / "book" / "notebooks").glob("*/*.ipynb"))


def text(body: str) -> str:
    """What a reader sees, each cell beside the next."""
    return html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", body)))


def told(found: dict[str, Any], times: dict[str, Any] | None = None) -> dict[str, str]:
    """The words of each section."""
    notes = page.made(found, notes_toy.times(found) if times is None else times)
    return {section.anchor: text(section.body) for section in notes.sections}


def promised(sections: dict[str, str]) -> list[str]:
    """Which promises the sections break."""
    wanted = {
        "declared": ("6 claims", "All of them were declared before", "Margin", "points",
                     "two recordings of a page differ by less", "20 repeats", "5eed",
                     "then dropped: gave up", "abad1dea99", "decade7777"),
        "blocks": ("all seeds", "block 1 alone", "95 % interval", "(n = 20)"),
        "searches": ("12 runs on seeds 900 to 901", "smallest mean of \u201cvalidation loss\u201d",
                     "Doing nothing scores 2.5", "full 0.2 1.25 3 0.1 0.4 yes",
                     "LoRA-Pro 0.2 1.25 3 0.1 0.4 no", "full 0.1 1.5 1.495 1.505",
                     "full 0.4 diverged diverged diverged", "full 0.2 1.25 1.245 1.255 chosen"),
        "experiments": ("8 runs, seeds 0 to 1, 400 to 401", "The same in all: steps 300",
                        "curve (2)", "full 4 10.5 [9.6, 11.4] 1,234", "20.3",
                        "(3 of 4)"),
        "crashed": ("5 of 20 runs", "digits, tuning full 2 6", "digits LoRA-Pro 1 4",
                    "FloatingPointError: overflow"),
        "provenance": ("c0ffee1234", "A fine processor", "3.99", "2031-05-06", "2031-07-08",
                       "95 s", "digits, tuning 12 12 2 s 2 s"),
    }  # fmt: skip
    return [f"{name}: {w}" for name, words in wanted.items() for w in words
            if w not in sections[name]]  # fmt: skip


def test_a_page_tells_everything_that_was_declared_searched_and_measured() -> None:
    assert promised(told(notes_toy.document())) == []


LOST: dict[str, Callable[[dict], Any]] = {
    "a run": lambda d: d["experiments"]["digits"]["jobs"].pop(0),
    "a search": lambda d: d["tuning"]["digits"].pop("lora_pro"),
    "a score": lambda d: d["tuning"]["digits"]["full"]["scores"].pop("0.1"),
    "a margin's reason": lambda d: [c.update(reason="") for c in d["claims"]],
    "a dropped claim": lambda d: d["declaration"]["dropped"].clear(),
    "an error": lambda d: d["experiments"]["digits"]["jobs"][-1].update(error=None, record={}),
    "blocks": lambda d: [p.update(blocks=[]) for c in d["claims"] for p in c["conditions"]],
    "a version": lambda d: d["provenance"][0].update(versions={"torch": "9.8"}),
}


@pytest.mark.parametrize("what", LOST)
def test_what_is_missing_is_seen_to_be_missing(what: str) -> None:
    found = json.loads(json.dumps(notes_toy.document()))
    LOST[what](found)
    assert promised(told(found)) != []


def test_late_claims_are_named_and_the_others_said_to_be_declared_before() -> None:
    found = notes_toy.document()
    found["claims"][2]["late"] = True
    words = told(found)["declared"]
    assert "1 came or changed after the first measurement" in words
    assert "late: added or changed after the first measurement" in words


def test_lists_have_no_means_and_seeds_of_a_search_inside_are_told_apart() -> None:
    found = notes_toy.document()
    jobs = [notes_toy.job({"grid": [[1, 2, 3]] * 2}, seeds=[0, 1], bed="pairs")]
    jobs += [notes_toy.job({"loss": 1.0 + s}, rate=0.5, seed=s) for s in (0, 1, 900, 901)]
    found["experiments"] = {"lists": {"functions": {}, "jobs": jobs[:1]},
                            "both": {"functions": {}, "jobs": jobs[1:]}}  # fmt: skip
    words = told(found)["experiments"]
    assert "grid (2 by 3)" in words
    assert "reported 2 2 [" in words
    assert "of the search 2 902 [" in words


def test_means_name_what_they_leave_out() -> None:
    assert mean([2.0, 2.0], 2) == "2"
    assert mean([1.0, None, 3.0], 3).endswith("] (2 of 3)")
    assert mean([None], 1) == "not finite"
    assert mean([True, False, True], 3) == "yes in 2 of 3"


def test_long_tables_are_folded_and_words_of_results_are_no_html() -> None:
    found = notes_toy.document()
    jobs = [notes_toy.job({"test": float(k + s)}, arm=f"<b>{k}", seed=s)
            for k in range(11) for s in (0, 1)]  # fmt: skip
    found["experiments"]["digits"]["jobs"] = jobs
    notes = page.made(found, {})
    body = next(s.body for s in notes.sections if s.anchor == "experiments")
    assert "<details" in body
    assert "11 rows" in body
    assert "<b>" not in body
    assert "were not kept" in text(notes.sections[-1].body)


# ---------------------------------------------------------------- as pages of a site
@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A book with one chapter, whose lab has results, and the list of notes."""
    notes_toy.write(tmp_path)
    place = tmp_path / f"{CHAPTER}.md"
    place.parent.mkdir(parents=True)
    place.write_text(f"# Chapter\n\n## Limits\n\n*{RUN}* scale cpu\n", encoding="utf-8")
    (tmp_path / "_toc.yml").write_text(f"- file: {CHAPTER}\n", encoding="utf-8")
    listed = "# Lab notes\n\n```{lab-notes}\n```\n"
    (tmp_path / "book" / "notes.md").write_text(listed, encoding="utf-8")
    contents = f"# Book\n\n```{{toctree}}\nbook/notes\n{CHAPTER}\n```\n"
    (tmp_path / "index.md").write_text(contents, encoding="utf-8")
    return tmp_path


def build(root: Path) -> tuple[int, str]:
    """Build it in this process; exit code and what was said against it."""
    chosen = ["-q", "-b", "html", "-C", "-D", "extensions=myst_parser,motion_book.notes"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = sphinx.main([*chosen, str(root), str(root / "out")])
    return code, said.getvalue()


def test_notes_are_listed_and_linked_but_in_no_reading_order(site: Path) -> None:
    code, said = build(site)
    assert (code, said) == (0, "")
    out = site / "out" / "book"
    notes = (out / "notes" / "lora.html").read_text(encoding="utf-8")
    assert 'rel="next"' not in notes
    assert 'rel="prev"' not in notes
    assert 'href="../notebooks/lowrank/lora.html"' in notes
    assert 'href="../notes.html"' in notes
    assert "c0ffee1234" in notes
    listed = (out / "notes.html").read_text(encoding="utf-8")
    assert '<a href="notes/lora.html">LoRA</a>' in listed
    assert "6 2 20 5 2031-05-06" in text(listed)
    chapter = (out / "notebooks" / "lowrank" / "lora.html").read_text(encoding="utf-8")
    assert re.search(rf"{RUN}.*href=\"../../notes/lora.html\">Lab notes</a></p>", chapter)
    for file in (site / "out").rglob("*.html"):
        order = re.findall(r'<link rel="(?:next|prev)"[^>]*>', file.read_text(encoding="utf-8"))
        assert not [link for link in order if "notes/" in link]


def test_a_chapter_is_read_again_when_its_lab_gets_results_or_loses_them(site: Path) -> None:
    path = site / "book" / "results" / "lora.cpu.json"
    kept = path.read_bytes()
    chapter = site / "out" / f"{CHAPTER}.html"
    path.unlink()
    build(site)
    assert "Lab notes</a></p>" not in chapter.read_text(encoding="utf-8")
    assert "Nothing has been measured yet" in (site / "out/book/notes.html").read_text("utf-8")
    path.write_bytes(kept)
    build(site)
    assert "Lab notes</a></p>" in chapter.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d.pop("tuning"), "lacks 'tuning'"),
        (lambda d: d["experiments"]["digits"]["jobs"][0]["record"].update(test=1.0), "altered"),
        (lambda d: d["claims"][0].update(verdict="mixed"), "follows from its"),
        (lambda d: d.update(schema=9), "schema 9"),
    ],
)
def test_damaged_results_stop_the_build_and_are_named(site: Path, damage, words: str) -> None:
    path = site / "book" / "results" / "lora.cpu.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    damage(found)
    path.write_text(json.dumps(found), encoding="utf-8")
    code, said = build(site)
    assert code != 0
    assert "lora.cpu.json is damaged" in said
    assert words in said


# ---------------------------------------------------------------- of this book
def test_the_engine_writes_the_line_that_the_link_stands_behind() -> None:
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        lines = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        assert sum(f"*{RUN}*" in line for line in lines) == 1, notebook.name
    assert RUN in provenance_text.__globals__["_run_line"].__code__.co_consts.__repr__()


def test_the_book_lists_the_notes_once() -> None:
    contents = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    assert contents.count("book/notes\n") == 1
    assert "book/notes/" not in contents


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_every_lab_of_the_book_has_whole_and_light_notes(path: Path) -> None:
    slug = path.name.removesuffix(".cpu.json")
    notes = page.read(path.parent, slug, "cpu")
    body = str(page.context(notes, slug, None, None)["body"])
    assert len(body.encode()) < MOST / 2  # the theme's own part is far below the other half
    words = text(body)
    result = next(r for r in load_results(path.parent) if r["slug"] == slug)
    assert [c["id"] for c in result["claims"] if c["text"] not in words] == []
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [n for n in found["experiments"] if n.removesuffix(", tuning") not in words] == []
    anchors = re.findall(r' id="([^"]+)"', body)
    assert len(anchors) == len(set(anchors))
    assert {link[1:] for link in re.findall(r'href="(#[^"]+)"', body)} <= set(anchors)
