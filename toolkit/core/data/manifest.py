"""What data sets exist: the manifest, the data directory, and what can go wrong with them."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath


class DataError(RuntimeError):
    """A data set cannot be had; the message says why and what to do."""


class ChecksumError(DataError):
    """A file is not the one that was promised: cut short, too long or altered."""


class DownloadError(DataError):
    """No address of a file could be reached, or it has none."""


class DirectoryError(DataError):
    """The data directory cannot be written."""


@dataclass(frozen=True)
class File:
    """One file of a form; `path` is relative to the data directory.

    `bytes` is its length where `sha256` is known; `most` bounds it where only `content` is.

    Raises:
        ValueError: the path leads out of the data directory, or nothing bounds the length.
    """

    path: str
    sha256: str = ""
    bytes: int = 0
    content: str = ""
    urls: tuple[str, ...] = ()
    most: int = 0

    def __post_init__(self) -> None:
        place = PurePosixPath(self.path)
        if place.is_absolute() or ".." in place.parts or "\\" in self.path or not place.parts:
            raise ValueError(f"path {self.path!r} must lie inside the data directory")
        object.__setattr__(self, "most", self.bytes or self.most)
        if self.most <= 0:
            raise ValueError(f"{self.path}: `bytes`, or `most` beside `content`, must be above 0")


@dataclass(frozen=True)
class Form:
    """Files that one reader turns into a data set."""

    reader: str
    note: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Entry:
    """What the manifest says about one data set."""

    name: str
    title: str
    licence: str
    homepage: str
    citation: str
    forms: tuple[Form, ...]


def manifest_path() -> Path:
    """The manifest: beside this module when installed, else in the repository's `data/`."""
    here = Path(__file__).resolve()
    installed = here.with_name("manifest.toml")
    return installed if installed.is_file() else here.parents[3] / "data" / "manifest.toml"


@cache
def read_manifest(path: Path) -> dict[str, Entry]:
    """All entries of a manifest file by name."""

    def form(table: dict) -> Form:
        files = (File(**{**file, "urls": tuple(file.get("urls", ()))}) for file in table["files"])
        return Form(**{**table, "files": tuple(files)})

    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: Entry(name, **{**table, "forms": tuple(form(item) for item in table["forms"])})
        for name, table in entries.items()
    }


def directory() -> Path:
    """The data directory: TOOLKIT_DATA when set, else this user's cache folder."""
    named = os.environ.get("TOOLKIT_DATA")
    if named:
        return Path(named).expanduser()
    import pooch

    return Path(pooch.os_cache("parameters-in-motion"))
