"""The shapes in which data sets are handed over."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np


class Images(NamedTuple):
    """Labelled images in two splits.

    `x_train`, `x_test`: (n, height, width) or (n, height, width, 3), as stored (uint8 for
    downloaded sets). `y_train`, `y_test`: (n,) int64. `classes`: names by label.
    `note`: which copy this is; print it beside any number.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    note: str = ""


class Speech(NamedTuple):
    """Spoken digits: all recordings end to end, with one row of facts for each.

    `samples`: (total,) int16. `lengths`: (n,) samples in each recording. `digit`,
    `speaker`, `index`: (n,). By the authors' convention `index` 0 to 4 is the test set.
    """

    samples: np.ndarray
    lengths: np.ndarray
    digit: np.ndarray
    speaker: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # a column, not the tuple's method
    sample_rate: int
    note: str = ""

    def recordings(self) -> list[np.ndarray]:
        """Views of the single recordings, each (length,) int16."""
        return np.split(self.samples, np.cumsum(self.lengths)[:-1])


class Retrieval(NamedTuple):
    """A retrieval test collection as three tables.

    `documents`: id, title, author, source, text. `queries`: id, text.
    `judgements`: query, document, grade.
    """

    documents: Any
    queries: Any
    judgements: Any
    note: str = ""


def content_digest(dataset: NamedTuple) -> str:
    """SHA-256 over the arrays of a set: names, types, shapes and bytes, whatever the packing."""
    digest = hashlib.sha256()
    for name, value in sorted(dataset._asdict().items()):
        if name != "note":
            array = np.ascontiguousarray(value)
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
