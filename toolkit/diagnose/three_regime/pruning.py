"""One-shot magnitude pruning with exact counts, for one network or for many lanes."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.core.lanes.nets import States, lanes_of, stack, weighted

SCOPES = ("uniform", "global")


def prunable(template: nn.Module) -> list[str]:
    """Names of the weights that are pruned: all linear and convolution layers but the classifier.

    A network with convolutions is pruned in those alone, as in the official code (the first one
    and 1 x 1 shortcuts included). The classifier is the last linear layer.
    """
    layers = list(weighted(template))
    convolutions = [f"{name}.weight" for name, m in layers if not isinstance(m, nn.Linear)]
    return convolutions or [f"{name}.weight" for name, _ in layers[:-1]]


def magnitude_masks(
    states: States | nn.Module,
    density: float | Sequence[float],
    names: Sequence[str] | None = None,
    scope: str = "uniform",
) -> States:
    r"""Masks that keep the largest weights: name -> (M, ...) of 0 and 1.

    ``uniform`` removes :math:`\mathrm{round}((1-d)\,n)` of the n weights of every layer, smallest
    magnitude first; ``global`` removes as many of all layers together, so layers may end with
    different densities. Counts are exact: among equal magnitudes the first in memory goes last.
    Masks of one network are nested: what a lower density keeps, a higher one keeps too. A layer
    pruned uniformly keeps at least one weight.

    Args:
        states: stacked states, or one network (then M = 1).
        density: share of weights kept, in (0, 1]; one for all lanes, or one per lane. Any real
            number, array or tensor; one of less than double precision stands for the shortest
            decimal that it rounds, so that float32's 0.9 keeps what 0.9 keeps.
        names: weights to prune; for a network :func:`prunable` is the default.
        scope: ``uniform`` or ``global``.

    Raises:
        TypeError: a density that is no number, such as text or a bool.
        ValueError: a density outside (0, 1], an unknown scope or name, or not one density per lane.
    """
    if isinstance(states, nn.Module):
        names = prunable(states) if names is None else names
        states = stack([states])
    if scope not in SCOPES:
        raise ValueError(f'scope={scope!r}: choose "uniform" or "global".')
    if not names:
        raise ValueError("names: say which weights to prune, for example prunable(network).")
    unknown = [n for n in names if n not in states]
    if unknown:
        raise ValueError(f"names={unknown}: no such tensor; there are {list(states)[:6]} ...")
    lanes = lanes_of(states)
    densities = _shares(density, lanes)
    if len(densities) != lanes:
        raise ValueError(f"density has {len(densities)} values for {lanes} lanes: give one each.")
    for d in densities:
        if not 0 < d <= 1:
            raise ValueError(f"density={d}: the share of weights kept must lie in (0, 1].")
    sizes = [states[n][0].numel() for n in names]
    flat = [states[n].detach().flatten(1).abs() for n in names]
    if scope == "global":
        kept = _largest(torch.cat(flat, 1), densities, at_least=0).split(sizes, 1)
    else:
        kept = [_largest(f, densities, at_least=1) for f in flat]
    return {
        name: mask.view_as(states[name]).to(states[name].dtype)
        for name, mask in zip(names, kept, strict=True)
    }


def _shares(density: Any, lanes: int) -> list[float]:
    """One density per lane, from a number or from one number per lane."""
    if isinstance(density, str | bytes | Mapping | Set):
        raise TypeError(f"density={density!r}: give a number, or one number per lane in order.")
    try:
        many = list(density)  # a tensor or an array of no axis is one number
    except TypeError:
        return [_share(density)] * lanes
    return [_share(one) for one in many]


def _share(density: Any) -> float:
    if isinstance(density, Tensor) and density.dim() == 0:
        density = density.detach().cpu()
        density = density.double() if density.dtype == torch.bfloat16 else density
        density = density.numpy()[()]
    elif isinstance(density, np.ndarray) and density.ndim == 0:
        density = density[()]
    if isinstance(density, bool | np.bool_) or not isinstance(density, numbers.Real):
        raise TypeError(
            f"density={density!r} is a {type(density).__name__}: give a number in (0, 1], such as "
            "0.5."
        )
    # a half or single rounds a decimal: 1 - float32(0.9) is larger than 1 - 0.9
    return float(str(density)) if isinstance(density, np.floating) else float(density)


def _largest(magnitude: Tensor, densities: Sequence[float], at_least: int) -> Tensor:
    """(M, n) booleans: the largest entries of each row, exactly as many as its density says."""
    n = magnitude.shape[1]
    counts = [max(at_least, n - round((1 - d) * n)) for d in densities]
    place = magnitude.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return place < torch.tensor(counts, device=magnitude.device)[:, None]
