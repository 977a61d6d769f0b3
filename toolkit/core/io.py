"""Files written whole or not at all, and folders that go with the process that works in them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: what a killed process left there stays until it is removed by hand
    fcntl = None

LEFT = re.compile(r"\..*\.[0-9a-f]{12}\.pim-part")
FULL = (errno.ENOSPC, errno.EDQUOT)
LEAST = 65536  # bytes: with less room than this a failure is put down to the full disk

_swept: set[Path] = set()


class DiskFull(OSError):
    """No room is left for a file; the message names the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    def __str__(self) -> str:
        return f"no space left on the disk that holds {self.filename}: free some and run again"


def is_full(folder: Path, error: BaseException | None = None) -> bool:
    """Whether there is no room in a folder, or an error says so.

    Args:
        folder: it, or the nearest folder above it that exists, is asked.
        error: what went wrong. A number of the system decides; without one, the room does.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    there = next((one for one in (folder, *folder.parents) if one.is_dir()), None)
    if there is None:
        return False
    with contextlib.suppress(OSError):  # a disk that cannot be asked is not known to be full
        return shutil.disk_usage(there).free < LEAST
    return False


@contextlib.contextmanager
def scratch(around: Path, name: str) -> Iterator[Path]:
    """A new folder that is removed at the end, or by a later process if this one is killed.

    It is locked as long as this process lives, so that :func:`sweep` tells the living from the
    dead.

    Args:
        around: the folder that takes it; exists.
        name: the start of its name.
    """
    while True:
        # drawn anew, as process ids repeat in a cluster
        folder = around / f".{name}.{uuid.uuid4().hex[:12]}.pim-part"
        folder.mkdir()
        lock = _locked(folder)
        if folder.is_dir():  # else it was swept between the two
            break
        _unlock(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def sweep(around: Path) -> None:
    """Remove the folders of :func:`scratch` whose process is gone. Those of the living stay.

    Where folders cannot be locked (some network disks) nothing is removed.
    """
    with contextlib.suppress(OSError):  # it may vanish, or be another's: sweeping is a courtesy
        for folder in around.iterdir():
            if LEFT.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                lock = _locked(folder)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    _unlock(lock)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, where folders can be locked.

    Raises:
        RuntimeError: another process holds it.
    """
    lock = _locked(folder)
    if lock is None and fcntl is not None and folder.is_dir():
        raise RuntimeError(f"another process works in {folder}; wait for it, or end it")
    try:
        yield
    finally:
        _unlock(lock)


def _locked(folder: Path) -> int | None:
    """A handle that holds the folder's lock; None if another holds it or locks do not work."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def write_beside(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a file beside the path, and move it there once it is whole and on disk.

    Readers see the old file or the new one, also after a kill, a full disk or a power cut. Several
    processes may write the same file; the last one wins. What killed processes left in the folder
    is removed at a process's first write there.

    Args:
        path: where the file shall lie; its folder exists.
        write: given the path of the file to fill.

    Returns:
        The path.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: a folder lies at the path.
        DiskFull: there is no room for it.
        OSError: it cannot be written. The old file is then untouched and nothing is left beside.
    """
    path = Path(path)
    write_together(path.parent, {path.name: write})
    return path


def write_together(folder: Path, writes: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files that belong together, as :func:`write_beside` does with one.

    None is moved before all are whole and on disk. The last one is moved last, and an old one of
    its name is taken away first unless it is the same: so a kill half-way leaves the old files, the
    new ones, or none of the last name, and never old and new ones that seem to belong together.

    Args:
        folder: where they shall lie; exists.
        writes: name -> what is given the path of the file to fill, in the order of moving.

    Raises:
        FileNotFoundError, IsADirectoryError, DiskFull, OSError: see :func:`write_beside`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; create it, then save again")
    for name in writes:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder: name a file")
    if folder not in _swept:
        sweep(folder)
        _swept.add(folder)
    *first, last = writes
    try:
        with scratch(folder, last[:40]) as room:
            for name, write in writes.items():
                _fill(room / name, write)
            if first and not _same(room / last, folder / last):
                (folder / last).unlink(missing_ok=True)
            for name in writes:
                os.replace(room / name, folder / name)
    except Exception as error:  # writers name a full disk in types of their own
        if is_full(folder, error):
            raise DiskFull(folder) from error
        raise


def _fill(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file, and wait until it is on disk."""
    file.touch()
    usual = file.stat().st_mode  # some writers make private files
    write(file)
    file.chmod(usual)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file as :func:`write_beside` does; missing folders are made."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full(path.parent, error):
            raise DiskFull(path.parent) from error
        raise
    return write_beside(path, lambda beside: beside.write_bytes(data))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write text as UTF-8 with plain line ends, as :func:`write_bytes` does."""
    return write_bytes(path, text.encode("utf-8"))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is no readable JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{Path(path).name} is not readable JSON ({error})") from error
