"""Checks of the SNELLA chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit.core.adapt.put import adapt
from toolkit.core.show import exercise
from toolkit.select.snella.allocation import share_out
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
def check_share_out(answer):
    """``share_out(V, p, N)``: V non-zeros among layers with shares p (L,) and room for N (L,)."""
    p, N = torch.tensor([0.7, 0.1, 0.2]), torch.tensor([400.0, 400.0, 400.0])
    given = N.clone()
    got = answer(300.0, p, N)
    assert got is not None, "There is no answer yet: return how many each layer gets, shape (L,)."
    assert torch.is_tensor(got), "Return a tensor of shape (L,)."
    assert torch.equal(N, given), "Leave the inputs as they are."
    assert (got - torch.tensor([210.0, 30.0, 60.0])).abs().max() <= 1, (
        "Where all have room, each gets its share of V."
    )
    got = answer(900.0, p, N)
    assert bool((got <= N + 1e-3).all()), "A layer has more non-zeros than entries."
    assert abs(float(got.sum()) - 900) <= 3, "What a full layer cannot take must go to the others."
    right = torch.tensor(share_out(900.0, p, N))
    assert (got - right).abs().max() <= 1, "Hand the rest out in proportion to the shares p."
    return "full layers stop, and the others take what is left by their shares."
