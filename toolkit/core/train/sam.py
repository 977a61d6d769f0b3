r"""Sharpness-aware minimisation (SAM): the gradient at the worst nearby point, by two passes.

.. math:: g = \nabla\mathcal L\Big(\theta + \rho\,\frac{\nabla\mathcal L(\theta)}
    {\|\nabla\mathcal L(\theta)\|_2}\Big)

Source: Foret et al., arXiv 2010.01412, algorithm 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def sam_step(
    parameters: Iterable[nn.Parameter], closure: Callable[[], Tensor], rho: float
) -> Tensor:
    """Leave SAM's g in the parameters' ``grad`` and the parameters bit for bit as they were.

    The optimizer's step is yours.

    Args:
        parameters: the tensors to move, such as ``adapted.parameters()``.
        closure: clears the gradients, computes the loss, calls ``backward()``, returns the loss.
            It is called twice and must see the same batch both times.
        rho: radius, in the units of the parameters.

    Returns:
        The loss of the first pass, at the parameters themselves. Where the gradient is zero there
        is no direction, and the first pass is all.

    Raises:
        ValueError: ``rho`` is not positive, or no parameter has a gradient after the closure.
        FloatingPointError: the first gradient is not finite; nothing was moved.
    """
    if not rho > 0:
        raise ValueError(f"sam_step(rho={rho}): rho must be positive; SAM with 0 is plain training")
    parameters = list(parameters)
    loss = closure()
    moved = [p for p in parameters if p.grad is not None]
    if not moved:
        raise ValueError("no parameter has a gradient: the closure must call loss.backward()")
    grads = [p.grad for p in moved]
    # in the parameters' own precision, and half precisions in float32, where squares fit
    wide = functools.reduce(torch.promote_types, (g.dtype for g in grads), torch.float32)
    norms = torch._foreach_norm(grads, 2, wide)
    norm = float(torch.stack([n.to(norms[0].device) for n in norms]).norm())
    if not norm < float("inf"):
        raise FloatingPointError(
            f"SAM's first gradient has norm {norm}; nothing was moved. Lower the learning rate, "
            "clip gradients, or skip the step"
        )
    if norm == 0:
        return loss
    with torch.no_grad():
        old = [p.clone() for p in moved]
        torch._foreach_add_(moved, torch._foreach_mul(grads, rho / norm))
    try:
        closure()
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, old)  # adding and subtracting would leave rounding behind
    return loss
