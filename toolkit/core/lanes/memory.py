"""How many lanes train together: what fits the budget and suits the device."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.core.lanes.lane import Lane
from toolkit.core.lanes.nets import LaneNet, States, lanes_of

CACHE = 64 * 2**20
"""Bytes of one step's tensors up to which lanes are put together on a CPU; measured."""


def held_bytes(states: States, snapshots: int) -> int:
    return (2 + snapshots) * sum(t.nbytes for t in states.values())


def chunk_size(
    net: LaneNet,
    lane: Lane,
    x: Tensor,
    states: States,
    held: int,
    memory_gib: float,
    workers: int,
    chunk: int | None,
    optimizer: str,
) -> int:
    """How many lanes train together."""
    weights = sum(t[0].nbytes for t in states.values())
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        one = {n: t[:1].detach().clone().requires_grad_(n in net.parameters)
               for n, t in states.items()}  # fmt: skip
        net(one, x[: lane.batch][None].clone(), train=True)  # a view would count all of x
    # weight, gradient, moments, mask, and SAM's second weights; activations twice, for gradients
    need = weights * (7 if optimizer == "adamw" or lane.rho else 5) + 2 * sum(kept.values())
    room = memory_gib * 2**30 - held
    if room < need:
        raise ValueError(
            f"memory_gib={memory_gib}: the results of {lanes_of(states)} lanes take "
            f"{held / 2**30:.3g} GiB and one lane in training {need / 2**30:.3g} more. Set "
            f"memory_gib to at least {(held + need) / 2**30:.3g}, or train fewer lanes or keep "
            "fewer snapshots at a time."
        )
    fits = max(1, int(room // need // workers))
    # on a CPU a chunk whose step stays in the cache is faster than a larger one
    suits = max(1, CACHE // need) if x.device.type == "cpu" else fits
    return max(1, min(fits, chunk if chunk is not None else suits))
