"""Checks of the SNELLA chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit.core.adapt.put import adapt
from toolkit.core.show import exercise
from toolkit.select.snella.competition import sparsify
from toolkit.select.snella.snell import SNELL


def _growth(like: Any) -> float:
    """By how much the kept change grows when every number of both factors doubles."""
    method = SNELL(rank=4, sparsity=0.9, like=like)
    draw = torch.Generator().manual_seed(0)
    layer = adapt(nn.Sequential(nn.Linear(40, 30)), method, generator=draw).adapters["0"]
    with torch.no_grad():
        before = layer.delta().norm()
        for factor in (layer.A, layer.B):
            factor.mul_(2)
        return (layer.delta().norm() / before).item()


@exercise.check
def check_growth(answer):
    """By how much the change that is kept grows when both factors double."""
    assert not callable(answer), "Give one number: by what factor does the change grow?"
    assert abs(answer - 1) > 1e-6, "The kernel measures distances. What does doubling do to them?"
    alone = _growth("hard")
    assert abs(answer - alone) > 1e-3, "So grow the distances. Then each is multiplied by its size."
    assert abs(answer - _growth("code")) < 1e-3, (
        "Distances grow by 2. Their product with their size?"
    )
    return "a layer was doubled just now: that is why it starts so slowly, and then runs."


@exercise.check
def check_gradient(answer):
    """``gradient(G, D, kept)``: from the kept change back to the change, all of shape (m, n)."""
    draw = torch.Generator().manual_seed(0)
    G, D = (torch.randn(6, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    change = D.clone().requires_grad_(True)
    after = sparsify(change, 0.5)
    kept = after.detach() != 0
    (right,) = torch.autograd.grad(after, change, G)
    got = answer(G, D, kept)
    assert got is not None, "There is no answer yet: return the gradient, shape (m, n)."
    assert torch.is_tensor(got), "Return a tensor of shape (m, n)."
    assert got.shape == D.shape, "The gradient has the shape of D."
    assert not got[~kept].any(), "What is dropped does not reach the loss: no gradient there."
    assert not torch.allclose(got, 2 * right), (
        "That is the slope of D|D|. Here the factor |D| is a constant."
    )
    assert torch.allclose(got, right), "By what is each kept entry multiplied on its way to D^s?"
    return "large entries get large gradients, and what is dropped gets none."
