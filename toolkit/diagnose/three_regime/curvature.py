"""Curvature of the loss at many networks at once: the Hessian's top eigenvalue and its trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.core.lanes.nets import LaneNet, States
from toolkit.core.lanes.steps import cross_entropy


class _Curvature:
    """Products of every lane's Hessian with a vector, on the whole training set."""

    def __init__(self, net: LaneNet, states: States, x: Tensor, y: Tensor):
        self.leaves = [states[n].detach().requires_grad_() for n in net.parameters]
        named = dict(states) | dict(zip(net.parameters, self.leaves, strict=True))
        out = net.shared(named, x)
        total = cross_entropy(out, y.expand(len(out), -1)).mean(1).sum()
        self.grads = torch.autograd.grad(total, self.leaves, create_graph=True)

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(self.grads, self.leaves, v, retain_graph=True))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True))


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 1))


def hessian_top(
    net: LaneNet,
    states: States,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    iterations: int = 20,
) -> Tensor:
    """Eigenvalue of largest size (M,) of the loss's Hessian, by power iteration.

    Args:
        net, states: the lanes, in evaluation mode.
        x, y: the examples that define the loss; all are used at once.
        generator: draws the first vector.
        iterations: products with the Hessian.
    """
    curvature = _Curvature(net, states, x, y)
    v = [torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
         for w in curvature.leaves]  # fmt: skip
    value = v[0].new_zeros(len(v[0]))
    for _ in range(iterations):
        size = _dot(v, v).sqrt()
        v = [w / _column(size, w) for w in v]
        product = curvature.product(v)
        value, v = _dot(v, product), product
    return value.detach()


def hessian_trace(
    net: LaneNet, states: States, x: Tensor, y: Tensor, generator: torch.Generator, draws: int = 20
) -> Tensor:
    """Trace (M,) of the loss's Hessian, by Hutchinson's estimate with random signs."""
    curvature = _Curvature(net, states, x, y)
    total = curvature.leaves[0].new_zeros(len(curvature.leaves[0]))
    for _ in range(draws):
        v = [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w)
             for w in curvature.leaves]  # fmt: skip
        total = total + _dot(v, curvature.product(v))
    return (total / draws).detach()
