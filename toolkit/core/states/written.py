"""A merged model's folder: shards, index, configuration, tokenizer and recipe, whole or not at all.

Everything is written into a folder beside, which is moved into place at the end. What an
interrupted merge has written there is taken over by the next call with the same recipe.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from toolkit.core import io
from toolkit.core.states.plan import Plan
from toolkit.core.states.stored import CODES, INDEX, WHOLE, Fact, Stored, index_of, layout

RECIPE = "merge_recipe.json"
NOTES, SURVEY = "merging.json", "survey.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A merge in plain JSON, as ``python -m toolkit merge --like`` reads it.

    Attributes:
        rule: its slug.
        settings: its hyperparameters.
        weights: one per model.
        targets: name patterns, or None.
        heads, buffers, dtype, seed: as :func:`~toolkit.core.states.merging.merge` takes them.
        base, models: paths, or None for what was in memory.
    """

    rule: str
    settings: Mapping[str, Any]
    weights: Sequence[float]
    targets: Any
    heads: str | int
    buffers: str | int
    dtype: str | None
    seed: int
    base: str | None
    models: Sequence[str | None]

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


class Folder:
    """The folder that a merge fills.

    Args:
        out: where it shall lie; must not exist.
        plan: what becomes of each tensor.
        recipe: what is being done.
        base: whose configuration and tokenizer are taken.
        models: whose tokenizers must agree.
        shard_bytes: most bytes of a shard.
        tokenizer: "refuse" or "base".

    Raises:
        FileExistsError, FileNotFoundError: something lies at ``out``, or the folder above it does
            not exist.
        ValueError: tokenizers that differ; no positive number of bytes.
        toolkit.core.io.DiskFull: not enough room.
    """

    def __init__(
        self, out: Path, plan: Plan, recipe: Recipe, base: Stored, models: Sequence[Stored],
        shard_bytes: int, tokenizer: str,
    ) -> None:  # fmt: skip
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes={shard_bytes}: a shard has at least one byte")
        if tokenizer not in ("refuse", "base"):
            raise ValueError(f"tokenizer={tokenizer!r}: write 'refuse' or 'base'")
        if os.path.lexists(out):
            raise FileExistsError(f"out={out} exists: name a new folder, or remove it")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"folder {out.absolute().parent} does not exist; create it")
        if tokenizer == "refuse":
            _same_words(base, models)
        self.out, self.plan, self.recipe, self.base = out.absolute(), plan, recipe, base
        kept = {n: fact for n, fact in plan.facts.items() if n in plan.how and n not in plan.tied}
        shards = layout(kept, shard_bytes)
        if len(shards) == 1:
            self.shards = {WHOLE: shards[0]}
        else:
            count = len(shards)
            self.shards = {
                f"model-{i:05}-of-{count:05}.safetensors": names
                for i, names in enumerate(shards, 1)
            }
        self.part = self.out.parent / f".{self.out.name}.merging"
        self.notes = json.dumps(
            [asdict(recipe), self.shards, [one.identity() for one in (base, *models)]]
        )
        done = sum((self.part / file).stat().st_size for file in self._there())
        if shutil.disk_usage(self.out.parent).free < sum(f.bytes for f in kept.values()) - done:
            raise io.DiskFull(self.out.parent)

    def _there(self) -> list[str]:
        """Shards that an interrupted merge with the same recipe and files has left."""
        notes = self.part / NOTES
        in_memory = any(one is None for one in json.loads(self.notes)[2])
        if in_memory or not notes.is_file() or notes.read_text(encoding="utf-8") != self.notes:
            return []
        return [file for file in self.shards if (self.part / file).is_file()]

    def fill(
        self, survey: Callable[[], dict[str, Any]],
        parts: Callable[[str, Mapping[str, Any]], Iterator[Tensor]], loud: bool,
    ) -> Path:  # fmt: skip
        """Compute what is not there yet, write it, and move the folder into place.

        Args:
            survey: what the rule must know of the whole model.
            parts: one tensor of the result in flat parts, from its name and the survey.
            loud: whether to show a bar.
        """
        there = self._there()
        if not there:
            shutil.rmtree(self.part, ignore_errors=True)
            self.part.mkdir()
        with io.alone(self.part):
            if not there:
                io.write_text(self.part / NOTES, self.notes)
            try:
                self._fill(there, survey, parts, loud)
            except ValueError:  # what cannot be merged now cannot be merged later
                shutil.rmtree(self.part, ignore_errors=True)
                raise
            os.replace(self.part, self.out)
        return self.out

    def _fill(self, there: list[str], survey: Callable, parts: Callable, loud: bool) -> None:
        todo = {file: names for file, names in self.shards.items() if file not in there}
        facts = self._surveyed(survey) if todo else {}
        total = sum(map(len, self.shards.values()))
        done = total - sum(map(len, todo.values()))
        with tqdm(
            total=total, initial=done, desc="merge", unit="tensor", disable=not loud
        ) as progress:
            for file, names in todo.items():
                shard = {name: self.plan.facts[name] for name in names}

                def numbers(name: str) -> Iterator[Tensor]:
                    yield from parts(name, facts)
                    progress.update()

                _write(self.part / file, shard, numbers)
        if len(self.shards) > 1:
            io.write_text(self.part / INDEX, index_of(self.shards, self.plan.facts))
        self._beside()
        io.write_text(self.part / RECIPE, self.recipe.text())
        (self.part / NOTES).unlink()
        (self.part / SURVEY).unlink(missing_ok=True)

    def _surveyed(self, survey: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.part / SURVEY
        if path.is_file():
            return io.read_json(path)
        facts = survey()
        io.write_text(path, json.dumps(facts))
        return facts

    def _beside(self) -> None:
        """Configuration, tokenizer and what else small lies in the base's folder."""
        folder = self.base.folder
        if folder is None:
            return
        for file in sorted(folder.rglob("*")):
            place = file.relative_to(folder)
            hidden = any(part.startswith(".") for part in place.parts)
            passed = file.suffix in WEIGHTS or file.name.endswith(".index.json")
            if not file.is_file() or hidden or passed:
                continue
            (self.part / place).parent.mkdir(parents=True, exist_ok=True)
            io.write_bytes(self.part / place, file.read_bytes())
        config = self.part / "config.json"
        if self.recipe.dtype is not None and config.is_file():
            told = io.read_json(config)
            key = "dtype" if "dtype" in told else "torch_dtype"
            io.write_text(config, json.dumps(told | {key: self.recipe.dtype}, indent=2) + "\n")


def _write(
    path: Path, facts: Mapping[str, Fact], numbers: Callable[[str], Iterator[Tensor]]
) -> None:
    """Write a safetensors file part by part.

    The library writes tensors that are there whole; a header and numbers in its order are all that
    the format is, and written so, no tensor and no shard need be in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # the format wants wide numbers first, so that all are aligned
    names = sorted(facts, key=lambda name: -facts[name].dtype.itemsize)
    start = 0
    for name in names:
        fact, end = facts[name], start + facts[name].bytes
        header[name] = {
            "dtype": CODES[fact.dtype], "shape": list(fact.shape), "data_offsets": [start, end],
        }  # fmt: skip
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def fill(file: Path) -> None:
        with file.open("wb", buffering=0) as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                for part in numbers(name):
                    view = memoryview(part.contiguous().view(torch.uint8).numpy())
                    while view:  # a disk may take less than it is given
                        view = view[stream.write(view) :]

    io.write_beside(path, fill)


def _same_words(base: Stored, models: Sequence[Stored]) -> None:
    if base.folder is None:
        return
    for model in models:
        if model.folder is None:
            continue
        for name in VOCABULARIES:
            mine, theirs = base.folder / name, model.folder / name
            if theirs.is_file() and (
                not mine.is_file() or mine.read_bytes() != theirs.read_bytes()
            ):
                raise ValueError(
                    f"{model.label}: its {name} is not that of {base.label}, so the same token "
                    "numbers mean other words; if that is meant, write tokenizer='base'"
                )
