"""Files written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file beside its place and move it there once it is whole and on the disk.

    Readers see the old file or the new one, also after a kill, a full disk or a power cut. Several
    processes may write the same file; the last one wins.

    Args:
        path: Where the file shall lie. Missing folders are made.
        data: What it shall hold.

    Returns:
        The path.

    Raises:
        OSError: If it cannot be written. The old file is then untouched and nothing is left beside.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process ids repeat in a cluster
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write text as UTF-8 with plain line ends, as :func:`write_bytes` does."""
    return write_bytes(path, text.encode("utf-8"))
