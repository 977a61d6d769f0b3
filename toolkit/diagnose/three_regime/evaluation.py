"""Errors and losses of many networks at once, in evaluation mode.

States are stacked along a lane axis (see ``toolkit.core.lanes.nets``); answers are for all lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.core.lanes.nets import LaneNet, States, lanes_of
from toolkit.core.lanes.steps import cross_entropy

CELLS = 2**16
"""Examples times lanes that are evaluated together; bounds the memory of activations."""


def errors(net: LaneNet, states: States, x: Tensor, y: Tensor) -> Tensor:
    """Share of wrong answers (M,) to inputs x (N, ...) with labels y (N,)."""
    batch = max(1, CELLS // lanes_of(states))
    wrong = torch.zeros(lanes_of(states), device=x.device)
    with torch.no_grad():
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            wrong += (net.shared(states, part).argmax(-1) != labels).sum(1)
    return wrong / len(y)


def losses(net: LaneNet, states: States, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy (M,), in nats, of inputs x (N, ...) with labels y (N,).

    It is summed in the dtype of the inputs, but in single precision at least.
    """
    batch = max(1, CELLS // lanes_of(states))
    kind = torch.promote_types(x.dtype, torch.float32)  # a sum in half precision overflows
    total = torch.zeros(lanes_of(states), device=x.device, dtype=kind)
    with torch.no_grad():
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            out = net.shared(states, part)
            total += cross_entropy(out, labels.expand(len(out), -1)).sum(1, dtype=kind)
    return total / len(y)
