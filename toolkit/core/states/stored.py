"""Models as named tensors, wherever they lie: in memory or in files, read one tensor at a time.

A folder is read in the Hugging Face layout: ``model.safetensors``, or shards with their index, or
one file of another name. Nothing unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from toolkit.core import io

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Fact:
    """What a tensor is, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Numbers it holds."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A model whose tensors are read by name.

    Attributes:
        label: how messages call it.
        facts: name -> shape and dtype, in the model's order.
        read: the tensor of a name, flat or not, not to be written to.
        folder: where its configuration and tokenizer lie, if it comes from a folder.
        files: what it is read from.
        same: name -> the first name of the same memory, for tied tensors.
        buffers: names that are known to be no parameters.
    """

    label: str
    facts: Mapping[str, Fact]
    read: Callable[[str], Tensor]
    folder: Path | None = None
    files: tuple[Path, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()

    def identity(self) -> Any:
        """What tells this model from another one later, as plain JSON; None for one in memory."""
        stats = [(path.name, path.stat()) for path in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats] or None


def stored(model: Any, label: str) -> Stored:
    """A state dict, a module, a folder or a safetensors file as named tensors.

    Args:
        model: it.
        label: how messages shall call it.

    Raises:
        FileNotFoundError: no such folder or file, or a shard that the index names is missing.
        ValueError: a file that is damaged or no safetensors, or names that index and shards do
            not share.
        TypeError: something else.
    """
    if isinstance(model, Stored):
        return model
    if isinstance(model, nn.Module):
        kept = model.state_dict(keep_vars=True)
        return _in_memory(kept, label, frozenset(kept) - dict(_parameters(model)).keys())
    if isinstance(model, Mapping):
        return _in_memory(model, label, frozenset())
    if isinstance(model, (str, Path)):
        return _on_disk(Path(model), label)
    raise TypeError(
        f"{label} is a {type(model).__name__}: give a state dict, a module, or the path of a "
        "folder or file of safetensors"
    )


def _parameters(model: nn.Module) -> Any:
    return model.named_parameters(remove_duplicate=False)


def _in_memory(tensors: Mapping[str, Any], label: str, buffers: frozenset[str]) -> Stored:
    wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"{label}: {wrong[0]!r} is no tensor; give a state dict of tensors alone")
    facts: dict[str, Fact] = {}
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, tensor in tensors.items():
        facts[name] = Fact(tuple(tensor.shape), tensor.dtype)
        if tensor.numel() and tensor.device.type != "meta":
            key = tensor.data_ptr(), facts[name], tensor.stride(), tensor.device
            same[name] = first.setdefault(key, name)
    same = {name: other for name, other in same.items() if name != other}
    return Stored(label, facts, lambda n: tensors[n].detach(), same=same, buffers=buffers)


def _on_disk(path: Path, label: str) -> Stored:
    where = f"{label} ({path})"
    if path.is_file():
        files = {path.name: path}
    elif path.is_dir():
        files = _files(path, where)
    else:
        raise FileNotFoundError(f"{where}: no such folder or file")
    handles = {name: _opened(file, where) for name, file in files.items()}
    place = {key: name for name, handle in handles.items() for key in handle.keys()}  # noqa: SIM118
    if (index := path / INDEX).is_file():
        _agree(io.read_json(index)["weight_map"], place, where)
    facts = {}
    for key, name in place.items():
        part = handles[name].get_slice(key)
        if part.get_dtype() not in DTYPES:
            raise ValueError(f"{where}: {key!r} is of type {part.get_dtype()}, which PyTorch lacks")
        facts[key] = Fact(tuple(part.get_shape()), DTYPES[part.get_dtype()])
    folder = path if path.is_dir() else None
    read = lambda key: handles[place[key]].get_tensor(key)  # noqa: E731
    return Stored(where, facts, read, folder, tuple(files.values()))


def _files(folder: Path, where: str) -> dict[str, Path]:
    """The safetensors files of a folder, by name."""
    index, whole = folder / INDEX, folder / WHOLE
    if index.is_file():
        try:
            names = sorted(set(io.read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{where}: {INDEX} has no weight_map of names to files") from error
        missing = [name for name in names if not (folder / name).is_file()]
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{where}: {INDEX} names files outside the folder: {outside}")
        if missing:
            raise FileNotFoundError(f"{where}: its shards {missing} are missing")
        return {name: folder / name for name in names}
    if whole.is_file():
        return {WHOLE: whole}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0].name: found[0]}
    if found:
        names = [p.name for p in found]
        raise ValueError(f"{where}: several files {names} and no {INDEX}; name one file")
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    remedy = "; convert them to safetensors, pickles are not read" if pickled else ""
    raise FileNotFoundError(f"{where}: no safetensors file in it{remedy}")


def _opened(file: Path, where: str) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}: {file.name} is damaged ({error}); get it again") from error


def _agree(index: Mapping[str, str], place: Mapping[str, str], where: str) -> None:
    wrong = sorted(key for key in {*index, *place} if index.get(key) != place.get(key))
    if wrong:
        raise ValueError(
            f"{where}: {INDEX} and the shards disagree on {len(wrong)} tensors: "
            f"{', '.join(wrong[:8])}; get the folder again"
        )


def layout(facts: Mapping[str, Fact], most: int) -> list[list[str]]:
    """Names in shards of at most so many bytes, in order; a larger tensor has its own."""
    shards: list[list[str]] = []
    size = most + 1
    for name, fact in facts.items():
        if size + fact.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += fact.bytes
    return shards


def index_of(shards: Mapping[str, list[str]], facts: Mapping[str, Fact]) -> str:
    """The text of the index of shards: file -> names."""
    total = sum(facts[name].bytes for names in shards.values() for name in names)
    places = {name: file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
