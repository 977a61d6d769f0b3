"""Losses of all lanes at once: cross-entropy, and one module per lane."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from toolkit.core.lanes.nets import States, stack

LaneLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor, lanes: Tensor | None = None) -> Tensor:
    """Cross-entropy (M, b) of logits (M, b, K) and labels (M, b), the same for all lanes."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def lane_loss(losses: Sequence[nn.Module]) -> LaneLoss:
    """One loss for all lanes from one module per lane.

    Modules that are alike in all but their buffers are computed at once.

    Args:
        losses: M modules over logits (b, K) and labels (b,), each returning a number.

    Returns:
        What ``train`` takes as ``loss``: the modules' values (M',) for the lanes at hand.

    Raises:
        ValueError: no module.
    """
    kinds: dict[str, list[int]] = {}
    for m, module in enumerate(losses):
        settings = [
            (name, type(part), {k: v for k, v in sorted(vars(part).items()) if k[0] != "_"})
            for name, part in module.named_modules()
        ]
        shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        kinds.setdefault(f"{settings} {shapes}", []).append(m)
    if not kinds:
        raise ValueError("losses is empty: give one module per lane.")
    parts = [(losses[own[0]], stack([losses[m] for m in own]), own) for own in kinds.values()]
    spot = torch.empty(len(losses), dtype=torch.int64)
    for _, _, own in parts:
        spot[own] = torch.arange(len(own))

    local = threading.local()

    def loss(logits: Tensor, y: Tensor, lanes: Tensor) -> Tensor:
        # calling a module with other buffers is not safe in two threads at once
        if not hasattr(local, "modules"):
            local.modules = [copy.deepcopy(module) for module, _, _ in parts]
        if len(parts) == 1:
            return _batched(local.modules[0], parts[0][1], lanes, logits, y)
        numbers = lanes.tolist()
        value = logits.new_zeros(len(numbers))
        for module, (_, states, own) in zip(local.modules, parts, strict=True):
            members = set(own)
            here = [i for i, m in enumerate(numbers) if m in members]
            if here:
                at = torch.tensor(here, device=logits.device)
                place = spot[[numbers[i] for i in here]].to(logits.device)
                value = value.index_copy(0, at, _batched(module, states, place, logits[at], y[at]))
        return value

    return loss


def _batched(module: nn.Module, states: States, place: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    own = {name: t.to(logits.device)[place] for name, t in states.items()}
    return vmap(lambda s, z, t: functional_call(module, s, (z, t)))(own, logits, y)
