"""Every probe runs with today's toolkit, and prints the same twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from book.engine import probe
from book.engine.project import Project

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "program", sorted((ROOT / probe.FOLDER).glob("*.py")), ids=lambda path: path.stem
)
def test_a_probe_prints_the_same_twice(program: Path) -> None:
    first, second = (probe.printed(program, Project(ROOT), None) for _ in range(2))
    assert first[1] == ""
    assert len(first[0].splitlines()) > 3
    assert first == second
    assert sys.executable not in first[0]
