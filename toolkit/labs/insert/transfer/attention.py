"""How much attention prompts get."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def mass(model: Any, adapted: Any, images: Tensor) -> list[float]:
    """Share of the attention of a network's own tokens that goes to the prompts, by block.

    Args:
        model: a ``DigitsTransformer`` with prompts.
        adapted: its handle.
        images: (n, 28, 28).

    Returns:
        Per cent, mean over images, heads and tokens.
    """
    seen: list[Tensor] = []
    layers = [adapted.sites[name].layer.base.attention for name in adapted.sites]
    hooks = [
        part.register_forward_hook(lambda _, __, out: seen.append(out))
        for layer in layers
        for part in (layer.query, layer.key)
    ]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for i, (name, layer) in enumerate(zip(adapted.sites, layers, strict=True)):
        query, key = (
            part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for part in seen[2 * i : 2 * i + 2]
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        added = adapted.adapters[name]
        prompt = torch.zeros(weights.shape[-1], dtype=torch.bool)
        prompt[added.after : added.after + len(added.tokens)] = True
        found.append(100 * weights[:, :, ~prompt][..., prompt].sum(-1).mean().item())
    return found
