"""Files written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_beside(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a file beside the path, and move it there once it is whole and on disk.

    Readers see the old file or the new one, also after a kill, a full disk or a power cut. Several
    processes may write the same file; the last one wins.

    Args:
        path: where the file shall lie; its folder exists.
        write: given the path of the file to fill.

    Returns:
        The path.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: it cannot be written. The old file is then untouched and nothing is left beside.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist; create it, then save again")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process ids repeat in a cluster
    try:
        beside.touch()
        usual = beside.stat().st_mode  # some writers make private files
        write(beside)
        beside.chmod(usual)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file as :func:`write_beside` does; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_beside(path, lambda beside: beside.write_bytes(data))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write text as UTF-8 with plain line ends, as :func:`write_bytes` does."""
    return write_bytes(path, text.encode("utf-8"))
