"""Layers of one shape as one stack, so that a step works on few large tensors, not many small."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def alike(*tensors: Tensor) -> Hashable:
    """What tensors must share to be stacked: shapes, dtypes and devices."""
    return tuple((t.shape, t.dtype, t.device) for t in tensors)


def groups(items: Sequence[Item], key: Callable[[Item], Hashable]) -> list[list[int]]:
    """Places of the items that share a key, group by group, in the order of first appearance."""
    found: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        found.setdefault(key(item), []).append(i)
    return list(found.values())


def stacked(tensors: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """The tensors at these places as one, (k, ...)."""
    return torch.stack([tensors[i] for i in places])
