"""Checks of the exercises of *Beside, before or between?*; each computes what is right."""

from __future__ import annotations

import torch
from torch import nn

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.show import exercise
from toolkit.insert.ssf import SSF, places


@exercise.check
def check_pairs(answer):
    """Numbers that scales and shifts train in a vision transformer of some blocks and features."""
    assert not callable(answer), "Give one whole number."
    model = nets.digits_transformer(width=8, depth=3, heads=2)
    adapted = adapt(model, SSF(), places(model))
    counted = sum(p.numel() for p in adapted.parameters())
    assert answer != counted // 2, "That is one number per channel. A pair has two."
    assert answer != 22 * 8 * 3, "The blocks are right. What stands before and after them?"
    assert answer == counted, "Count the channels that leave each layer; fc1 has four times 8."
    return f"counted just now: {counted} numbers."


@exercise.check
def check_folded(answer):
    """``folded(weight, bias, gamma, beta)``: the linear layer in which a pair is folded."""
    draws = torch.Generator().manual_seed(0)
    for rows, columns in ((3, 5), (4, 4)):
        layer = nn.Linear(columns, rows).double()
        x = torch.randn(7, columns, generator=draws, dtype=torch.double)
        gamma, beta = torch.randn(2, rows, generator=draws, dtype=torch.double)
        found = answer(layer.weight.detach(), layer.bias.detach(), gamma, beta)
        assert found is not None, "There is no answer yet: return a weight and a bias."
        weight, bias = found
        assert weight.shape == (rows, columns), f"The weight must stay {rows} x {columns}."
        wanted = gamma * layer(x) + beta
        now = nn.functional.linear(x, weight, bias)
        tilted = layer.weight * gamma if rows == columns else None
        if tilted is not None:
            assert not torch.allclose(weight, tilted), "gamma belongs to rows, not to columns."
        without = gamma * layer(x) + beta - (gamma - 1) * layer.bias
        assert not torch.allclose(now, without), "The old bias is scaled, too."
        assert torch.allclose(now, wanted), "The layer should give gamma * (W x + b) + beta."
    return "the folded layer gives what layer and pair gave."
