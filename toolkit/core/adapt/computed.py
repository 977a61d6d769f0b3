"""A weight that is computed when it is read: good for reading, and refused for writing."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Computed(Tensor):
    """A new weight, handed to code that reads an adapted layer's weight instead of calling it.

    It is formed anew at each reading, so what is written into it, or into a view of it, would be
    lost; every such write raises RuntimeError instead. What is computed from it is a plain tensor.
    """

    layer: str
    parameter: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for written in _written(func.__name__, args, kwargs):
            if isinstance(written, Computed):
                raise RuntimeError(
                    f"{func.__name__} would write into the {written.parameter} of layer "
                    f"{written.layer!r}, which is computed from the frozen one and its adapter at "
                    "each reading, so the write would be lost. Write into the frozen "
                    f"'{written.layer}.base.{written.parameter}', or merge() or unload() first"
                )
        source = next((a for a in args if isinstance(a, Computed)), None)
        if source is not None and func.__name__ in ("__deepcopy__", "__reduce_ex__"):
            return func(source.as_subclass(Tensor), *args[1:], **kwargs)
        return _released(super().__torch_function__(func, types, args, kwargs), source)


def computed(weight: Tensor, layer: str, parameter: str) -> Tensor:
    """A weight for a reader that is not torch itself, whose modules only read, and ask for types.

    Args:
        weight: just computed.
        layer, parameter: names of both, for the message.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return weight
    reader = sys._getframe(2).f_globals.get("__name__", "")
    if reader.partition(".")[0] == "torch" or not isinstance(weight, Tensor):
        return weight
    guarded = weight.as_subclass(Computed)
    guarded.layer, guarded.parameter = layer, parameter
    return guarded


def _written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a function of this name writes into, by torch's conventions on names."""
    found: list[Any] = []
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _SETTERS or kwargs.get("inplace"):
        found.append(next(iter((*args, *kwargs.values())), None))
    found.append(kwargs.get("out"))
    return tuple(t for f in found for t in (f if isinstance(f, list | tuple) else (f,)))


_SETTERS = frozenset(
    ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
     "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__")
)  # fmt: skip


def _released(result: Any, source: Computed | None) -> Any:
    """Plain tensors, but for those that share their memory with a computed weight."""
    if isinstance(result, list | tuple):
        kind = type(result)
        parts = [_released(r, source) for r in result]
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    if source is not None and isinstance(result, np.ndarray):
        result.setflags(write=False)
    if not isinstance(result, Computed):
        return result
    plain = result.as_subclass(Tensor)
    if source is None or plain.untyped_storage()._cdata != source.untyped_storage()._cdata:
        return plain
    result.layer, result.parameter = source.layer, source.parameter
    return result
