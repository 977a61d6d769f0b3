"""Gradients as a method may read them: there, dense, unscaled and finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        # the scaler would take them off after the step, and multiplies by what it finds
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
        raise _still_scaled(who)
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def refuse_scaler(optimizer: torch.optim.Optimizer, scaler: Any, who: str) -> None:
    """Raise RuntimeError where ``step(grad_scaler=...)`` would unscale only inside the step.

    That is the older way of telling a fused optimizer of a ``GradScaler``.
    """
    if scaler is None:
        return
    states = getattr(scaler, "_per_optimizer_states", {})
    stage = states.get(id(optimizer), {}).get("stage")
    if getattr(stage, "name", None) != "UNSCALED":
        raise _still_scaled(who)


def _still_scaled(who: str) -> RuntimeError:
    return RuntimeError(
        f"GradScaler leaves the gradients scaled for a fused optimizer, and {who} would read "
        "them so: call scaler.unscale_(optimizer) before scaler.step(optimizer), or build the "
        "optimizer with fused=False"
    )


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
        grads: by name, dense or sparse.
        step: number of the step, for the message.
        what: whose numbers they are, for the message.
    """
    numbers = {n: g if g.layout is torch.strided else g._values() for n, g in grads.items()}
    numbers = {name: g for name, g in numbers.items() if g.numel()}
    if not numbers:
        return
    # the largest entry, not the root of squares, which could overflow on its own
    sizes = torch._foreach_norm(list(numbers.values()), float("inf"))
    home = sizes[0].device
    good = torch.isfinite(torch.stack([size.to(home) for size in sizes]))
    if bool(good.all()):
        return
    where = list(numbers)[int((~good).nonzero()[0])]
    raise FloatingPointError(
        f"{what} of {where!r} is not finite at step {step}; no weight was changed. Lower the "
        "learning rate, clip gradients, or skip the step"
    )
