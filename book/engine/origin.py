"""Where a recording comes from: its commit, whether files differ from it, and the processor."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from book.engine.key import device_class
from book.engine.project import Chapter, Project
from toolkit.core.runs.provenance import commit, processor


def origin(project: Project, chapter: Chapter, scale: str) -> dict[str, Any]:
    """Commit, whether the toolkit or the chapter differ from it, and the kind of processor."""
    head, dirty = commit(project.root)
    source = chapter.source.relative_to(project.root).as_posix()
    dirty = dirty or bool(head and git(project.root, "status", "--porcelain", "--", source))
    return {"commit": head, "dirty": dirty, "processor": processor(device_class(scale))}


def git(root: Path, *words: str) -> str | None:
    """What git says, without the line end; None if it refuses or is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
