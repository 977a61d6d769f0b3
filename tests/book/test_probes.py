"""Every probe runs with today's toolkit and prints something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from book.engine import probe
from book.engine.project import Project

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / probe.FOLDER).glob("*.py"))
ALONE = ROOT / probe.FOLDER / "downloads.py"  # it imports no torch
FORKS = """
import os, runpy, sys
import pandas, torch._dynamo, toolkit
toolkit.adapt  # imports the core
for program in sys.argv[1:]:
    child = os.fork()
    if not child:
        told = os.open(os.path.basename(program), os.O_CREAT | os.O_WRONLY)
        os.dup2(told, 1)
        os.dup2(told, 2)
        runpy.run_path(program, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_probe_prints_what_it_calls() -> None:
    words, failed = probe.printed(ALONE, Project(ROOT), None)
    assert failed == ""
    assert len(words.splitlines()) > 3


def test_the_other_probes_do_so_too(tmp_path: Path) -> None:
    """Each in a process of its own, forked from one that has imported what they share."""
    programs = [program for program in PROGRAMS if program != ALONE]
    assert programs
    done = subprocess.run(
        [sys.executable, "-P", "-c", FORKS, *programs],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=probe.SECONDS,
    )
    told = {program.stem: (tmp_path / program.name).read_text() for program in programs}
    assert done.stdout.split() == ["0"] * len(programs), told
    assert all(len(words.splitlines()) > 3 for words in told.values()), told
