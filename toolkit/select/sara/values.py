"""A trained model as its values alone: the mask follows from the base and the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.select.sara import SaRA


@torch.no_grad()
def values(adapted: Any) -> dict[str, Tensor]:
    """Layer name -> the values (k,) of all entries of the first choice, in order of their places.

    Those that the second stage left still are among them.
    """
    found = {}
    for name, layer in _layers(adapted).items():
        places = torch.cat([layer.index, layer.left]).argsort()
        found[name] = torch.cat([layer.values.detach(), layer.held])[places]
    return found


@torch.no_grad()
def fill(adapted: Any, saved: Mapping[str, Tensor]) -> None:
    """Put saved values into a base that was adapted with the same threshold just now.

    Raises:
        ValueError: other layers, or another number of entries: another threshold or base. The
            message has both counts. Nothing is changed then.
    """
    layers = _layers(adapted)
    if layers.keys() != saved.keys():
        raise ValueError(f"the values are of layers {sorted(saved)}, SaRA is on {sorted(layers)}")
    for name, layer in layers.items():
        if len(saved[name]) != layer.changed:
            raise ValueError(
                f"layer {name!r}: {len(saved[name])} values were saved, and {layer.changed} "
                f"entries lie below {adapted.sites[name].method.threshold_of(layer.site):.6g} "
                "here; use the threshold and the base that they were made with"
            )
    for name, layer in layers.items():
        layer.values.copy_(saved[name])


def _layers(adapted: Any) -> dict[str, Any]:
    return {n: p.layer.adapter for n, p in adapted.sites.items() if isinstance(p.method, SaRA)}
