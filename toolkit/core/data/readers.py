"""Turning the files of a data set into arrays, tables or text.

One reader per form of the manifest: it takes the checked files of that form, in the
manifest's order, and returns the set. Nothing here downloads or checks anything.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import wave
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from toolkit.core.data.datasets import Images, Retrieval, Speech

UNPACKED = 2**29  # bytes; the largest archive here holds 184 million
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


class _Bounded:
    """What a packed file holds, as long as it is not more than any data set here."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self.stream, self.left = stream, UNPACKED

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {UNPACKED:,} bytes")
        return data


def _members(path: Path, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """The files of a packed archive whose names match, in its order; nothing is unpacked to disk.

    Raises:
        ValueError: one is there twice, is a link or the like, or the archive has no end.
    """
    seen = set()
    with gzip.open(path) as stream:
        bounded: Any = _Bounded(stream)
        with tarfile.open(fileobj=bounded, mode="r|") as archive:
            for member in archive:
                name = re.search(pattern, member.name)
                if name is None:
                    continue
                if name[1] in seen:
                    raise ValueError(f"{name[1]} is there twice")
                seen.add(name[1])
                content = archive.extractfile(member) if member.isreg() else None
                if content is None:
                    raise ValueError(f"{name[1]} is no plain file")
                yield name, content.read()


def _mnist(x_train, y_train, x_test, y_test) -> Images:
    splits = []
    for images, labels in ((x_train, y_train), (x_test, y_test)):
        # Copies differ in their order, some are sorted by class. Ordering by a digest of each
        # row makes all copies equal, and mixes the classes.
        rows = zip(images, labels, strict=True)
        keys = [hashlib.blake2b(x.tobytes() + bytes([y]), digest_size=8).digest() for x, y in rows]
        order = np.argsort(np.array(keys, dtype="S8"), kind="stable")
        splits += [images[order], labels[order].astype(np.int64)]
    return Images(splits[0], splits[1], splits[2], splits[3], tuple("0123456789"))


def mnist_npz(paths: Sequence[Path]) -> Images:
    """MNIST from one file with `x_train`, `y_train`, `x_test`, `y_test`."""
    arrays = _arrays(paths[0])
    return _mnist(*(arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")))


def mnist_idx(paths: Sequence[Path]) -> Images:
    """MNIST from its four IDX files: training images, labels, test images, labels."""
    arrays = []
    for path in paths:
        data = gzip.decompress(path.read_bytes())
        # An IDX header: two zero bytes, the type (8 is uint8), the number of dimensions,
        # then each dimension as a big-endian 32-bit number.
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
        arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape))
    return _mnist(*arrays)


def cifar_npz(paths: Sequence[Path]) -> Images:
    """CIFAR-10 from one file with the four arrays and `classes`."""
    arrays = _arrays(paths[0])
    return Images(
        arrays["x_train"],
        arrays["y_train"].astype(np.int64),
        arrays["x_test"],
        arrays["y_test"].astype(np.int64),
        tuple(str(name) for name in arrays["classes"]),
    )


def cifar_binary(paths: Sequence[Path]) -> Images:
    """CIFAR-10 from the authors' binary archive: rows of one label and 3 x 32 x 32 bytes."""
    batches = {
        name[1]: np.frombuffer(content, np.uint8).reshape(-1, 3073)
        for name, content in _members(paths[0], r"((?:data_batch_\d|test_batch)\.bin)$")
    }
    train = np.concatenate([batches[f"data_batch_{number}.bin"] for number in range(1, 6)])
    splits: list[np.ndarray] = []
    for rows in (train, batches["test_batch.bin"]):
        images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits += [np.ascontiguousarray(images), rows[:, 0].astype(np.int64)]
    return Images(splits[0], splits[1], splits[2], splits[3], CIFAR_CLASSES)


def fsdd_npz(paths: Sequence[Path]) -> Speech:
    """Spoken digits from one file of joined recordings."""
    arrays = _arrays(paths[0])
    facts: dict[str, Any] = {**arrays, "sample_rate": int(arrays["sample_rate"])}
    return Speech(**facts)


def fsdd_tar(paths: Sequence[Path]) -> Speech:
    """Spoken digits from the release archive: `recordings/<digit>_<speaker>_<index>.wav`."""
    recordings: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name, content in _members(paths[0], r"/recordings/((\d)_(\w+)_(\d+)\.wav)$"):
        with wave.open(io.BytesIO(content)) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
        recordings[name[1]] = (name.groups()[1:], samples)
    facts = [recordings[name][0] for name in sorted(recordings)]
    sounds = [recordings[name][1] for name in sorted(recordings)]
    return Speech(
        samples=np.concatenate(sounds),
        lengths=np.array([len(sound) for sound in sounds], dtype=np.int64),
        digit=np.array([digit for digit, _, _ in facts], dtype=np.uint8),
        speaker=np.array([speaker for _, speaker, _ in facts]),
        index=np.array([index for _, _, index in facts], dtype=np.int16),
        sample_rate=8000,
    )


def _table(source: Any, columns: Sequence[str]) -> Any:
    import pandas as pd

    # No quoting and no missing-value words: a sentence may hold a lone quote or be "null".
    return pd.read_csv(
        source, sep="\t", header=None, names=list(columns), quoting=3, keep_default_na=False
    )


def sst2_tsv(paths: Sequence[Path]) -> dict[str, Any]:
    """SST-2: tables `train`, `dev`, `test` with columns sentence, label (0 or 1)."""
    splits = zip(("train", "dev", "test"), paths, strict=True)
    return {split: _table(path, ("sentence", "label")) for split, path in splits}


def _cola(sources: Sequence[Any]) -> dict[str, Any]:
    tables = {}
    for split, source in zip(("train", "dev", "dev_out_of_domain"), sources, strict=True):
        table = _table(source, ("source", "label", "mark", "sentence"))
        tables[split] = table[["sentence", "label", "source"]]
    return tables


def cola_tsv(paths: Sequence[Path]) -> dict[str, Any]:
    """CoLA: `train`, `dev`, `dev_out_of_domain` with columns sentence, label, source."""
    return _cola(paths)


def cola_zip(paths: Sequence[Path]) -> dict[str, Any]:
    """CoLA from the authors' archive; the same tables as `cola_tsv`."""
    names = ("in_domain_train", "in_domain_dev", "out_of_domain_dev")
    with zipfile.ZipFile(paths[0]) as archive:
        return _cola([io.BytesIO(archive.read(f"cola_public/raw/{name}.tsv")) for name in names])


def text(paths: Sequence[Path]) -> str:
    """One plain text."""
    return paths[0].read_text(encoding="utf-8")


def cranfield(paths: Sequence[Path]) -> Retrieval:
    """The Cranfield collection from its TREC-style files."""
    import pandas as pd

    def elements(path: Path, tag: str) -> list[ElementTree.Element]:
        # The documents stand side by side without the single root that XML asks for.
        body = re.sub(r"^\s*<\?xml.*?\?>", "", path.read_text(encoding="utf-8"))
        return list(ElementTree.fromstring(f"<all>{body}</all>").iter(tag))

    def words(element: ElementTree.Element, tag: str) -> str:
        return (element.findtext(tag) or "").strip()

    tags = {"title": "title", "author": "author", "source": "bib", "text": "text"}
    documents = pd.DataFrame(
        {"id": int(words(doc, "docno")), **{key: words(doc, tag) for key, tag in tags.items()}}
        for doc in elements(paths[0], "doc")
    )
    # The judgements count queries 1, 2, 3, ... and not by the number each query carries.
    queries = pd.DataFrame(
        {"id": number, "text": words(query, "title")}
        for number, query in enumerate(elements(paths[1], "top"), start=1)
    )
    columns = ["query", "iteration", "document", "grade"]
    judgements = pd.read_csv(paths[2], sep=r"\s+", header=None, names=columns)
    return Retrieval(documents, queries, judgements.drop(columns="iteration"))


READERS: dict[str, Callable[[Sequence[Path]], Any]] = {
    reader.__name__: reader
    for reader in (
        mnist_npz, mnist_idx, cifar_npz, cifar_binary, fsdd_npz, fsdd_tar,
        sst2_tsv, cola_tsv, cola_zip, text, cranfield,
    )
}  # fmt: skip
