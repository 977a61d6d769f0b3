"""Sensitivities: squared gradients of named parameters, summed over batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def sensitivity(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    passes: int | None = None,
    training: bool = False,
) -> dict[str, Tensor]:
    r"""s = sum over batches of the squared gradient, for every scalar of the named parameters.

    A batch's gradient is that of its mean loss and is squared whole, so the size of the batches
    matters: it is not the mean of the examples' squared gradients. It is the first-order loss drop
    of one gradient step that moves this scalar alone.

    Args:
        model: its weights, flags, gradients, buffers and mode are left as they were.
        names: parameters to score.
        batches: what ``loss`` is called with.
        loss: ``(model, batch) -> scalar``.
        passes: most batches that are read; None reads all.
        training: score in train mode, with dropout drawing; else in eval mode.

    Returns:
        Name -> scores in the parameter's shape, in float32 or wider; 0 where the loss does not
        reach.

    Raises:
        ValueError: no batch, a loss that reaches no parameter, or a score that is not finite.
    """
    every = dict(model.named_parameters())
    wanted = {name: every[name] for name in names}
    flags = {p: p.requires_grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    buffers = {b: b.clone() for b in model.buffers()}
    totals = {n: torch.zeros_like(p, dtype=_wide(p.dtype)) for n, p in wanted.items()}
    count = 0
    try:
        model.requires_grad_(False).train(training)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        for batch in itertools.islice(batches, passes):
            count += 1
            with torch.enable_grad():
                value = loss(model, batch)
                if not value.requires_grad:
                    raise ValueError("the loss does not reach any candidate; it must use the model")
                found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
            for total, grad in zip(totals.values(), found, strict=True):
                if grad is not None:
                    total += grad.detach().to(total.dtype).square()
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
    if not count:
        raise ValueError("batches is empty: scores need at least one batch")
    check(totals)
    return totals


def check(scores: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor with a score below 0 or not finite."""
    for name, score in scores.items():
        if not bool((torch.isfinite(score) & (score >= 0)).all()):
            raise ValueError(
                f"scores of {name!r} hold numbers that are not finite, or below 0; look at the "
                "loss of each batch"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
