"""Probes: small programs that call what no chapter calls at ``ci``, for ``make verify``.

A chapter shows that the functions it calls still give the same. Reading foreign files, downloads,
refusals and their like are called by no chapter, so a change of them would leave every number that
could reach them stale. A probe in ``book/probes`` calls them and prints what they give. It is run
with the toolkit of the base and with today's, and what it prints is compared word for word.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from book.engine import lab, ran
from book.engine.project import Project

FOLDER = "book/probes"
SECONDS = 120
SHOWN = 6  # words that are printed of a probe that differs or fails


@dataclass
class Probed:
    """What came of one probe.

    Args:
        name: the program's.
        verdict: ``same``, ``differs`` or ``failed``.
        words: what differs, or why it failed.
        called: the functions of today's toolkit that it called.
    """

    name: str
    verdict: str
    words: list[str] = field(default_factory=list)
    called: set[str] = field(default_factory=set)


def run(project: Project, former: Project, scratch: Path) -> list[Probed]:
    """Run today's probes with the toolkit of a base and with today's.

    Args:
        project: today's.
        former: the base's.
        scratch: an empty folder.
    """
    found = []
    for program in sorted((project.root / FOLDER).glob("*.py")):
        name = f"probe {program.stem}"
        home = ran.prepare(project.root, scratch / program.stem)
        before, failed = printed(program, former, None)
        if not failed:
            now, failed = printed(program, project, home)
            where = "today"
        else:
            now, where = "", "at the base"
        called = ran.called(scratch / program.stem)
        if failed:
            found.append(Probed(name, "failed", [f"{where}: {failed}"], called))
        elif before != now:
            found.append(Probed(name, "differs", _differing(before, now), called))
        else:
            found.append(Probed(name, "same", [], called))
    return found


def printed(program: Path, project: Project, home: Path | None) -> tuple[str, str]:
    """What a program prints with a project's toolkit, and why it failed, '' when it did not."""
    with tempfile.TemporaryDirectory() as place:
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(program)],
                capture_output=True,
                text=True,
                cwd=place,
                env=lab.environment(project, Path(place), home) | {"OMP_NUM_THREADS": "1"},
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return "", f"not done after {SECONDS} s"
    if done.returncode:
        return "", (done.stderr.strip() or "no message").splitlines()[-1]
    return done.stdout, ""


def _differing(before: str, now: str) -> list[str]:
    old, new = before.splitlines(), now.splitlines()
    if len(old) != len(new):
        return [f"{len(old)} lines -> {len(new)} lines"]
    return [f"{a} -> {b}" for a, b in zip(old, new, strict=True) if a != b][:SHOWN]


def cleared(called: set[str], probes: list[Probed]) -> set[str]:
    """What was compared and agreed; a probe that does not agree clears nothing."""
    return called.union(*(p.called for p in probes if p.verdict == "same"))
