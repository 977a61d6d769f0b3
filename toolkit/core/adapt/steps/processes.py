"""What the processes of a distributed run must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.core.adapt.steps import shapes


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average(tensors: Sequence[Tensor]) -> None:
    """Mean over the processes of a distributed run, in place; nothing happens in a lone process."""
    if not several():
        return
    for places in shapes.groups(tensors, lambda t: (t.dtype, t.device)):
        same = [tensors[i] for i in places]
        flat = torch.cat([t.flatten() for t in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for t, mean in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(mean.view_as(t))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """:func:`average` of their gradients, one that is missing counting as 0."""
    if several():
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        average([p.grad for p in parameters])
