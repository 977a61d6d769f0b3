"""Every probe runs with today's toolkit and prints something."""

from __future__ import annotations

from pathlib import Path

import pytest

from book.engine import probe
from book.engine.project import Project

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "program", sorted((ROOT / probe.FOLDER).glob("*.py")), ids=lambda path: path.stem
)
def test_a_probe_prints_what_it_calls(program: Path) -> None:
    words, failed = probe.printed(program, Project(ROOT), None)
    assert failed == ""
    assert len(words.splitlines()) > 3
