"""The page of the test beds: tables from the results, a missing bed said, a damaged one refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
from sphinx.cmd import build as sphinx

from toolkit.labs.beds import arms

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))  # of the extension


def build(folder: Path, text: str) -> tuple[int, str]:
    """Build a page in this process, which has PyTorch already; exit code and warnings."""
    (folder / "index.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
    chosen = ["-q", "-b", "html", "-C", "-D", "extensions=myst_parser,motion_book.beds"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = sphinx.main([*chosen, str(folder), str(folder / "out")])
    return code, said.getvalue()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "book" / "results" / "beds"
    folder.mkdir(parents=True)
    jobs = [
        {"args": {"arm": arm, "rate": 1e-3, "seed": seed, "split": 0},
         "record": {"test": 2.0 + place / 10 + seed / 100, "trained": 1000 * place}}
        for seed in range(3) for place, arm in enumerate(arms.NAMES)
    ]  # fmt: skip
    found = {"experiments": {"characters": {"jobs": jobs}}, "seeds": {"characters": [0, 1, 2]}}
    (folder / "characters.cpu.json").write_text(json.dumps(found), encoding="utf-8")
    return tmp_path


def test_tables_show_every_arm_and_what_is_not_measured(results: Path) -> None:
    code, said = build(results, "```{bed-tables} characters\n```\n\n```{bed-tables} speech\n```")
    assert code == 0, said
    page = re.sub("<[^>]+>", "", (results / "out" / "index.html").read_text(encoding="utf-8"))
    assert all(title in page for title in arms.TITLES.values())
    for words in ("2.4100", "4,000", "20 seeds settle", "3 seeds", "Not measured yet"):
        assert words in page
    assert "toolkit.labs.beds speech --scale cpu" in page


def test_a_damaged_file_and_an_unknown_bed_are_named(results: Path) -> None:
    path = results / "book" / "results" / "beds" / "characters.cpu.json"
    path.write_text(json.dumps({"experiments": {}}), encoding="utf-8")
    _, said = build(results, "```{bed-tables} characters\n```\n\n```{bed-tables} cola\n```")
    assert "characters.cpu.json is damaged" in said
    assert "no bed 'cola'" in said
