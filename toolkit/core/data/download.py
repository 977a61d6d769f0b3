"""Finding, checking and fetching the files of a data set.

A file is used only when its checksum is right, wherever it came from. A download is
written beside its place and moved there once it is checked, so that a failure of any
kind leaves either the whole file or none.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from toolkit.core.data.datasets import content_digest
from toolkit.core.data.fetch import Refused, TooSlow, Unreachable, fetch, time_for
from toolkit.core.data.manifest import (
    ChecksumError,
    DirectoryError,
    DownloadError,
    Entry,
    File,
    Form,
)
from toolkit.core.data.readers import READERS
from toolkit.core.io import write_beside

RETRIES = 2  # further attempts for each address before the next one is tried
TRUNCATED = "truncated"


@cache
def _digest(path: Path, size: int, changed: int, reader: str) -> str:
    # `size` and `changed` belong to the key: a file that was replaced is read again.
    if reader:
        return content_digest(READERS[reader]([path]))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, computed once per process as long as the file stays the same."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns, "")


def fault(path: Path, file: File, reader: str = "") -> str:
    """What is wrong with the file at `path`, in words; empty when it is right.

    Args:
        path: the file, or what lies in its place.
        file: what the manifest promises.
        reader: the form's reader, needed when the promise is about the content.
    """
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not stat.S_ISREG(status.st_mode):  # to read a pipe or a device might never end
        return "not a plain file"
    if status.st_size > file.most and not file.sha256:
        return f"too long: {status.st_size:,} bytes, at most {file.most:,} are expected"
    if file.sha256:
        if status.st_size < file.bytes:
            return f"{TRUNCATED}: {status.st_size:,} of {file.bytes:,} bytes"
        if status.st_size > file.bytes:
            return f"too long: {status.st_size:,} instead of {file.bytes:,} bytes"
        found = sha256(path)
        return "" if found == file.sha256 else f"sha256 is {found}, not {file.sha256}"
    try:
        found = _digest(path, status.st_size, status.st_mtime_ns, reader)
    except Exception as error:  # any way in which a damaged archive can fail to be read
        return f"not a readable archive ({type(error).__name__}: {error})"
    return "" if found == file.content else f"content sha256 is {found}, not {file.content}"


def _promise(file: File) -> str:
    if file.sha256:
        return f"{file.path} ({file.bytes:,} bytes, sha256 {file.sha256})"
    return f"{file.path} (sha256 of its content {file.content})"


def _remedy(entry: Entry, folder: Path) -> str:
    ways = "\n  or ".join(", ".join(_promise(file) for file in form.files) for form in entry.forms)
    return (
        f"Put the files yourself into a folder and set TOOLKIT_DATA to it "
        f"(now {folder}):\n  {ways}\n  See {entry.homepage}"
    )


def obtain(entry: Entry, folder: Path, progress: bool) -> tuple[Form, list[Path]]:
    """The files of one form of a data set, all checked; downloaded where need be.

    Args:
        entry: the data set.
        folder: the data directory.
        progress: show a bar for each download.

    Raises:
        ChecksumError: a file is there, or arrived, with the wrong content.
        DownloadError: no address answers, or there is none.
        DirectoryError: the folder cannot be written.
    """
    wrong: dict[str, list[str]] = {}
    right: set[File] = set()
    for form in entry.forms:
        for file in form.files:
            path = folder / file.path
            if os.path.lexists(path):
                reason = fault(path, file, form.reader)
                if reason:
                    wrong.setdefault(file.path, []).append(reason)
                else:
                    right.add(file)
        if all(file in right for file in form.files):
            return form, [folder / file.path for file in form.files]
    wrong = {path: why for path, why in wrong.items() if path not in {file.path for file in right}}
    if wrong:
        lines = "\n  ".join(f"{folder / path}: {'; or '.join(why)}" for path, why in wrong.items())
        raise ChecksumError(
            f"data set {entry.name!r}: a file is not the expected one.\n  {lines}\n"
            f"Delete it to have it downloaded again, or put the right one in its place.\n"
            f"{_remedy(entry, folder)}"
        )
    failures: list[str] = []
    only_mismatches = True
    for form in entry.forms:
        missing = [file for file in form.files if file not in right]
        if not all(file.urls for file in missing):
            continue
        _require_writable(folder)
        for file in missing:
            reasons, mismatch = _download(file, folder, form.reader, progress)
            failures += reasons
            only_mismatches &= mismatch
            if reasons:
                break
        else:
            return form, [folder / file.path for file in form.files]
    if not failures:
        raise DownloadError(
            f"data set {entry.name!r} is not in {folder} and has no address to download from. "
            f"{_remedy(entry, folder)}"
        )
    tried = "\n  ".join(failures)
    if only_mismatches:
        raise ChecksumError(
            f"data set {entry.name!r}: every address gave a file with a wrong checksum; "
            f"nothing was kept.\n  {tried}\n{_remedy(entry, folder)}"
        )
    raise DownloadError(
        f"data set {entry.name!r} could not be downloaded.\n  {tried}\n"
        f"Connect to the network and run this again. Or without a network: "
        f"{_remedy(entry, folder)}"
    )


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DirectoryError(
            f"the data directory {folder} cannot be written ({error.strerror or error}). "
            f"Set TOOLKIT_DATA to a folder that you may write to"
        ) from error


def _download(file: File, folder: Path, reader: str, progress: bool) -> tuple[Sequence[str], bool]:
    """Try each address of a file; what went wrong (empty on success), and whether every
    failure was a wrong content rather than a silent host."""
    path = folder / file.path
    reasons, mismatch = [], True
    for url in file.urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_beside(path, functools.partial(_whole, url, file, reader, progress))
            return [], True
        except (Refused, Unreachable) as error:
            mismatch &= isinstance(error, Refused) and not isinstance(error, TooSlow)
            reasons.append(f"{url}: {error}")
        except OSError as error:
            raise DirectoryError(
                f"{path} could not be written ({error.strerror or error}); "
                f"nothing was kept. Set TOOLKIT_DATA to a folder that you may write to and "
                f"that has room"
            ) from error
    return reasons, mismatch


def _whole(url: str, file: File, reader: str, progress: bool, target: Path) -> None:
    """Fetch and check a file, again if the host fails, all of it within the file's time."""
    end = time.monotonic() + time_for(file.most)
    for attempt in range(RETRIES + 1):
        try:
            fetch(url, target, file.most, end - time.monotonic(), progress)
            reason = fault(target, file, reader)
            if not reason:
                return
            if not reason.startswith(TRUNCATED):
                raise Refused(reason)
            trouble: Exception = Refused(reason)
        except Unreachable as error:
            trouble = error
        if attempt < RETRIES:
            time.sleep(min(1.0 + attempt, max(end - time.monotonic(), 0.0)))
    raise trouble
