"""Data sets by name, each file checked; pretrained files."""

from toolkit.core.data.datasets import Images, Retrieval, Speech
from toolkit.core.data.manifest import (
    ChecksumError,
    DataError,
    DirectoryError,
    DownloadError,
    directory,
)
from toolkit.core.data.sets import available, describe, digits, hashes, load

__all__ = [
    "ChecksumError",
    "DataError",
    "DirectoryError",
    "DownloadError",
    "Images",
    "Retrieval",
    "Speech",
    "available",
    "describe",
    "digits",
    "directory",
    "hashes",
    "load",
]
