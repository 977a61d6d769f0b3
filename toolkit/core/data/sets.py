"""Data sets by name, and the generated ones.

`load("sst2")` gives the set, from the data directory when it is there and from its hosts
otherwise. Every file is checked against `manifest.toml`. The data directory is the folder
that the environment variable TOOLKIT_DATA names, or this user's cache folder.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.core.data import download, manifest, pretrained
from toolkit.core.data.datasets import Images
from toolkit.core.data.manifest import (
    directory,
)
from toolkit.core.data.readers import READERS


def _entries() -> dict[str, manifest.Entry]:
    return manifest.read_manifest(manifest.manifest_path())


def available() -> tuple[str, ...]:
    """The names that `load` knows, in alphabetical order."""
    return tuple(sorted([*_entries(), *_GENERATED]))


def _entry(name: str) -> manifest.Entry:
    if name not in _entries():
        near = difflib.get_close_matches(str(name).lower(), available(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"name: unknown data set {name!r}.{hint} Choose one of {', '.join(available())}."
        )
    return _entries()[name]


def describe(name: str) -> dict[str, str]:
    """Title, licence, homepage and citation of a downloaded set.

    Raises:
        ValueError: the name is not in the manifest.
    """
    entry = _entry(name)
    fields = ("title", "licence", "homepage", "citation")
    return {field: getattr(entry, field) for field in fields}


def load(name: str, *, progress: bool | None = None, **options: Any) -> Any:
    """A data set by name.

    Args:
        name: one of `available()`. Image sets give `Images`; `sst2` and `cola` a dictionary
            of tables with columns sentence and label; `fsdd` gives `Speech`, `cranfield`
            `Retrieval`, `tinyshakespeare` a string.
        progress: show a bar for each download. Left out: yes, except while a chapter is
            being recorded (environment variable TOOLKIT_RESULTS).
        **options: passed on to a generated set; `digits` takes `test` and `seed`.

    Raises:
        ValueError: unknown name; the message suggests the nearest.
        TypeError: options for a set that takes none.
        ChecksumError, DownloadError, DirectoryError: see `toolkit.core.data.download`.
    """
    if name in _GENERATED:
        return _GENERATED[name](**options)
    entry = _entry(name)
    if options:
        raise TypeError(f"data set {name!r} takes no options, got {', '.join(options)}")
    if progress is None:
        progress = "TOOLKIT_RESULTS" not in os.environ
    form, paths = download.obtain(entry, directory(), progress)
    loaded = READERS[form.reader](paths)
    return loaded._replace(note=form.note) if hasattr(loaded, "note") else loaded


def hashes(names: Iterable[str]) -> dict[str, str]:
    """What each set must hold, as one checksum a name; nothing is read or downloaded.

    Accepts the names of `available()` and of pretrained models. A set with several forms
    has one checksum over all of them.

    Raises:
        ValueError: unknown name.
    """
    found = {}
    for name in names:
        if name in _GENERATED:
            found[name] = "scikit-learn"  # its version is part of the constraints
        elif name in pretrained.MODELS:
            found[name] = _joined(pretrained.MODELS[name].files.values())
        else:
            forms = _entry(name).forms
            files = (file for form in forms for file in form.files)
            found[name] = _joined(file.path + file.sha256 + file.content for file in files)
    return found


def _joined(facts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def digits(test: int = 360, seed: int = 0) -> Images:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn.

    Args:
        test: how many images the test split holds.
        seed: of the shuffle before the split.

    Returns:
        `Images` with pixels divided by 16, (n, 8, 8) float32 in [0, 1].

    Raises:
        ValueError: no image would be left in one of the splits.
    """
    pixels, labels = _digits()
    if not 0 < test < len(labels):
        raise ValueError(f"test: must lie between 1 and {len(labels) - 1}, got {test}")
    order = np.random.default_rng(seed).permutation(len(labels))
    x = (pixels[order].reshape(-1, 8, 8) / 16).astype(np.float32)
    y = labels[order].astype(np.int64)
    names = tuple("0123456789")
    return Images(x[:-test], y[:-test], x[-test:], y[-test:], names, "scikit-learn digits")


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 64) in 0 to 16 and labels (1797,), read without importing scikit-learn.

    Its import takes longer than a chapter's first experiment, and nothing else here needs it. Read
    once, as a lab asks hundreds of times; nobody else may change these arrays.
    """
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


_GENERATED: dict[str, Callable[..., Any]] = {"digits": digits}
