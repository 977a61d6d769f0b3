"""Safetensors files whose metadata says what they are: read whole, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

T = TypeVar("T")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32)


def read(
    path: Any, what: str, form: str, make: Callable[[Mapping[str, str], dict[str, Tensor]], T]
) -> T:
    """What a file of one form holds.

    Args:
        path: of the file.
        what: what it holds, for messages, such as "sparse difference".
        form: the value of ``format`` in its metadata that marks it.
        make: of the metadata and the tensors by name, which it takes out; what it raises over them
            counts as damage, and so do tensors that it leaves.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no whole file of this form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if facts.get("format") != form:
            raise ValueError(f"format {facts.get('format')!r}, expected {form!r}")
        found = make(facts, tensors)
        if tensors:
            raise ValueError(f"names and tensors do not agree: nothing for {sorted(tensors)[:3]}")
    except _DAMAGE as error:
        raise ValueError(f"{path} is no {what} ({error}); save it again") from error
    return found


_DAMAGE = (
    SafetensorError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip


def words(facts: Mapping[str, str], key: str) -> dict[str, str]:
    """An object of text by name from a file's metadata.

    Raises:
        KeyError: it is missing. ValueError: it is none.
    """
    found = json.loads(facts[key])
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"its {key} are no object of text")
    return found


def floats(tensors: dict[str, Tensor], name: str, part: str = "") -> Tensor:
    """Take out a tensor (n,) of finite numbers, the part of a name.

    Raises:
        KeyError: it is missing. ValueError: it is none.
    """
    found = tensors.pop(name + part)
    if found.dim() != 1 or found.dtype not in FLOATS or not bool(found.isfinite().all()):
        raise ValueError(f"numbers of {name!r} are damaged: no row of finite floats")
    return found


def places(tensors: dict[str, Tensor], name: str, part: str) -> Tensor:
    """Take out a tensor (n,) of places, ascending from 0 on, as int64: the part of a name.

    Raises:
        KeyError: it is missing. ValueError: it is none.
    """
    found = tensors.pop(name + part)
    if found.dim() == 1 and found.dtype in WHOLE:
        found = found.long()
        if bool((found[1:] > found[:-1]).all()) and (not len(found) or int(found[0]) >= 0):
            return found
    raise ValueError(f"places in {name!r} are damaged: no ascending row of whole numbers")
