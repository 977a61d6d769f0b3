"""Where a recording comes from: its commit, whether files differ from it, and the processor."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from book.engine.project import PACKAGE, Chapter, Project

MODEL = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)


def origin(project: Project, chapter: Chapter) -> dict[str, Any]:
    """Commit, whether the chapter or the toolkit differ from it, and the processor's model."""
    commit = git(project.root, "rev-parse", "--verify", "-q", "HEAD") or ""
    looked = [PACKAGE, "constraints.txt", chapter.source.relative_to(project.root).as_posix()]
    changed = git(project.root, "status", "--porcelain", "--", *looked) if commit else ""
    return {"commit": commit, "dirty": bool(changed), "processor": processor()}


def git(root: Path, *words: str) -> str | None:
    """What git says, without the line end; None if it refuses or is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """The processor's model, never the name of the machine."""
    file = Path("/proc/cpuinfo")
    if file.is_file():
        match = MODEL.search(file.read_text(encoding="utf-8", errors="replace"))
        if match:
            return " ".join(match[1].split())
    return platform.processor() or platform.machine()
