"""The parameters that an adapted layer itself has: none, and who looks for its layer's is told so.

``weight_norm``, ``spectral_norm``, pruning and parametrisations take a parameter out of a layer and
compute it anew at each call. An adapted layer does that already, so they are refused by name,
before they have changed anything.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


class Own(dict[str, Any]):
    """``_parameters`` of an adapted layer.

    Args:
        base: the frozen layer.
        name: the layer's, for messages.
    """

    def __init__(self, base: nn.Module, name: str):
        super().__init__()
        self.base, self.name = base, name

    def __missing__(self, key: str) -> Any:
        self.refuse(key)
        raise KeyError(key)

    def __delitem__(self, key: str) -> None:
        if not super().__contains__(key):
            self.refuse(key)
        super().__delitem__(key)

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        if not found and _asked_by("torch.nn.utils.parametrize"):
            self.refuse(key)
        return found

    def refuse(self, key: object) -> None:
        """Raise RuntimeError if it is one of the frozen layer's parameters that is asked for."""
        if key in self.base._parameters:
            raise RuntimeError(
                f"layer {self.name!r} is adapted: its {key} is the frozen one with the adapter's "
                "change, so nothing else can take it over (weight_norm, spectral_norm, pruning, a "
                "parametrisation). Put that on before adapting, and make it final or leave the "
                "layer out of targets; or merge() or unload() first"
            )


def refuse_pruning(own: dict[str, Any], key: str) -> None:
    """Raise RuntimeError if pruning reads a parameter: it does so before it changes the layer."""
    if isinstance(own, Own) and _asked_by("torch.nn.utils.prune", 3):
        own.refuse(key)


def _asked_by(module: str, depth: int = 2) -> bool:
    """Whether code of this module called the function that called this one."""
    if torch.compiler.is_compiling():
        return False
    return sys._getframe(depth).f_globals.get("__name__") == module
