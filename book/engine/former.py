"""The project as it was at a commit, checked out beside today's for as long as it is needed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from book.engine.origin import git
from book.engine.project import PACKAGE, EngineError, Project


def commit_of(project: Project, base: str) -> str:
    """The full name of a commit with chapters and a toolkit.

    Raises:
        EngineError: ``base`` is no commit here, or holds no chapters that can be compared.
    """
    if git(project.root, "rev-parse", "--git-dir") is None:
        raise EngineError(f"{project.root} is no git repository, so no commit can be compared with")
    found = git(
        project.root, "rev-parse", "--verify", "-q", "--end-of-options", f"{base}^{{commit}}"
    )
    if not found:
        raise EngineError(f"BASE {base!r} is no commit here; see `git log --oneline`, or fetch it")
    tree = git(project.root, "ls-tree", "-d", "--name-only", found, "book/chapters", PACKAGE) or ""
    for folder in ("book/chapters", PACKAGE):
        if folder not in tree.splitlines():
            raise EngineError(
                f"BASE {base!r} has no folder {folder}: it is of another format, or of a time "
                "before it; choose a later commit"
            )
    return found


@contextlib.contextmanager
def checked_out(project: Project, commit: str) -> Iterator[Project]:
    """The commit's files in a folder of their own, removed however this ends."""
    folder = project.root / "_build" / "verify"
    locks = project.root / "_build" / "engine" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(locks / "verify.lock", timeout=0).acquire()
    except filelock.Timeout as error:
        raise EngineError("another `verify` is at work here; wait for its end") from error
    with lock:
        _remove(project, folder)  # what a killed run left
        try:
            tree = folder / "base"
            if git(project.root, "worktree", "add", "--detach", "-f", str(tree), commit) is None:
                raise EngineError(f"git could not check {commit[:9]} out into {tree}")
            former = Project(tree)
            if not former.chapters:
                raise EngineError(f"BASE {commit[:9]} has no chapters; choose a later commit")
            yield former
        finally:
            _remove(project, folder)


def _remove(project: Project, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    git(project.root, "worktree", "prune")
