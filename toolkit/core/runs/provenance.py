"""Where numbers come from: commit, versions, device and kind of processor, never the machine."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "transformers")


def provenance(root: Path, device: str, threads: int = 1) -> dict[str, Any]:
    """What a run was, as plain data without dates, times or names of machines.

    Args:
        root: the project's folder, with ``constraints.txt`` if it has one.
        device: "cpu" or "cuda".
        threads: PyTorch threads of each job.
    """
    code, dirty = commit(root)
    return {
        "commit": code,
        "dirty": dirty,
        "versions": versions(),
        "constraints": pins(root),
        "device": device,
        "processor": processor(device),
        "threads": threads,
    }


def pins(root: Path) -> str:
    """Hash of the lines of ``constraints.txt`` for packages that numbers depend on."""
    file = root / "constraints.txt"
    lines = file.read_text(encoding="utf-8").split() if file.is_file() else []
    pinned = sorted(p for p in lines if p.lower().partition("==")[0] in PACKAGES)
    return hashlib.sha256(json.dumps(pinned).encode()).hexdigest()[:20]


def commit(root: Path) -> tuple[str, bool]:
    """The commit that is checked out, "" outside a repository, and whether code differs from it.

    Results, pages and prose do not count as code: recording changes them.
    """
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", "toolkit", "data", "constraints.txt")
    return (head or "", bool(changed))


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here: a wheel, or a copy without history
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def processor(device: str = "cpu") -> str:
    """The kind of processor: its model name, or the GPU's."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
