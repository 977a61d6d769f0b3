"""Scores of frozen weights measured on data, for methods that choose by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site

KINDS = ("gradient", "fisher", "sensitivity")


def measured(
    model: nn.Module,
    sites: Mapping[str, Site],
    layers: Mapping[str, nn.Module],
    kind: str,
    batches: Iterable[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> dict[str, Tensor]:
    r"""Scores of every entry of every site's matrix, (m, n), summed over batches.

    "gradient": :math:`|\sum_b g_b|`. "fisher": :math:`\sum_b g_b^2`. "sensitivity":
    :math:`\sum_b |w\, g_b|`. Here :math:`g_b` is the gradient of batch b's loss.

    Args:
        model: as it will be adapted; its weights, flags, gradients and mode are left as they were.
        sites, layers: by name.
        kind: one of :data:`KINDS`.
        batches: what ``loss`` is called with, one after the other.
        loss: ``(model, batch) -> scalar``.

    Raises:
        ValueError: an unknown kind, no ``batches`` or no ``loss``, no batch at all, or a weight
            that the loss does not reach.
    """
    if kind not in KINDS:
        raise ValueError(f"scores: choose one of {list(KINDS)}, got {kind!r}")
    if batches is None or loss is None:
        raise ValueError(
            "this method scores the weights on data: give adapt(..., batches=..., loss=...), where "
            "loss(model, batch) is a scalar"
        )
    weights = {n: getattr(layers[n], s.parameter) for n, s in sites.items() if s.parameter}
    flags = {p: p.requires_grad for p in model.parameters()}
    training = {m: m.training for m in model.modules()}
    totals = {n: torch.zeros_like(w, dtype=sites[n].dtype) for n, w in weights.items()}
    count = 0
    try:
        model.requires_grad_(False).eval()
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            count += 1
            with torch.enable_grad():
                value = loss(model, batch)
                if not value.requires_grad:
                    raise ValueError("the loss does not reach any layer; it must use the model")
                grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for (name, total), grad in zip(totals.items(), grads, strict=True):
                if grad is None:
                    raise ValueError(f"the loss does not reach layer {name!r}; leave it out")
                if kind == "fisher":
                    total.addcmul_(grad.to(total.dtype), grad.to(total.dtype))
                elif kind == "sensitivity":
                    total += (weights[name].detach() * grad).abs()
                else:
                    total += grad
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in training.items():
            module.training = mode
    if count == 0:
        raise ValueError("batches is empty: scores need at least one batch")
    if kind == "gradient":
        totals = {n: t.abs() for n, t in totals.items()}
    return {n: sites[n].to_matrix(t) for n, t in totals.items()}
