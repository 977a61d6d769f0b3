"""Gradients as a method may read them: there, dense, unscaled and, where it matters, finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def skipped(optimizer: torch.optim.Optimizer, who: str) -> bool:
    """Whether a ``GradScaler`` has told a fused optimizer to skip the coming step.

    Args:
        optimizer: what steps.
        who: name of the method, for messages.

    Raises:
        RuntimeError: the scaler leaves the gradients scaled, so that a method would read them so.
    """
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            f"GradScaler leaves the gradients scaled for a fused optimizer, and {who} would read "
            "them so: call scaler.unscale_(optimizer) before scaler.step(optimizer), or build the "
            "optimizer with fused=False"
        )
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def present(named: Mapping[str, nn.Parameter], who: str) -> dict[str, Tensor]:
    """Name -> gradient of the tensors that have one.

    Args:
        named: tensors by layer and leaf name.
        who: name of the method, for messages.

    Raises:
        RuntimeError: there is no gradient at all. TypeError: one is sparse.
    """
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    if not grads:
        raise RuntimeError(
            f"optimizer.step() was called before any backward pass: {who} reads gradients. Call "
            "loss.backward() first, and zero_grad() only after step()"
        )
    for name, grad in grads.items():
        if grad.layout is not torch.strided:
            raise TypeError(
                f"the gradient of {name!r} is sparse, and {who} reads dense ones; build the layer "
                "with sparse=False, or call .to_dense() on it"
            )
    return grads


def finite(grads: Mapping[str, Tensor], step: int, what: str = "the gradient") -> None:
    """Raise FloatingPointError naming the first tensor with an entry that is not finite.

    Args:
        grads: by name.
        step: number of the step, for the message.
        what: whose numbers they are, for the message.
    """
    # the largest entry, not the root of squares, which could overflow on its own
    sizes = torch._foreach_norm(list(grads.values()), float("inf"))
    home = sizes[0].device
    good = torch.isfinite(torch.stack([size.to(home) for size in sizes]))
    if bool(good.all()):
        return
    where = list(grads)[int((~good).nonzero()[0])]
    raise FloatingPointError(
        f"{what} of {where!r} is not finite at step {step}; no weight was changed. Lower the "
        "learning rate, clip gradients, or skip the step"
    )
