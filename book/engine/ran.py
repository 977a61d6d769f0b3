"""Which functions of a toolkit run, in every process that a chapter or a lab starts.

A ``sitecustomize`` in a folder of its own is put before all others that Python imports from. It
writes each function down when it is called for the first time, so that a killed process loses
nothing.
"""

from __future__ import annotations

from pathlib import Path

PROGRAM = '''\
"""Writes down which functions are called; see book/engine/ran.py."""
import os
import sys
import threading

ROOT = {root!r}
FOLDER = {folder!r}
seen = set()


def note(frame, event, _):
    if event != "call":
        return
    code = frame.f_code
    if code in seen:
        return
    seen.add(code)
    name = code.co_filename
    if name.startswith(ROOT):
        with open(os.path.join(FOLDER, str(os.getpid())), "a", encoding="utf-8") as file:
            file.write(name[len(ROOT) :] + ":" + code.co_qualname + "\\n")


threading.setprofile(note)
sys.setprofile(note)
'''


def prepare(root: Path, folder: Path) -> Path:
    """Write the ``sitecustomize`` that watches the code under ``root``.

    Args:
        root: a project's folder.
        folder: an empty one, for the program and what it writes.

    Returns:
        The folder to put on ``PYTHONPATH``.
    """
    home, notes = folder / "home", folder / "notes"
    home.mkdir(parents=True)
    notes.mkdir()
    text = PROGRAM.format(root=f"{root}/", folder=str(notes))
    (home / "sitecustomize.py").write_text(text, encoding="utf-8")
    return home


def called(folder: Path) -> set[str]:
    """What ran, as ``toolkit/core/nets.py:mlp`` or ``...:Class.method``."""
    found: set[str] = set()
    for file in (folder / "notes").iterdir():
        found |= set(file.read_text(encoding="utf-8").splitlines())
    return found
