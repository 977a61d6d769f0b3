"""Checks of the SPT chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from toolkit.core.show import exercise
from toolkit.select.spt import SPT
from toolkit.select.spt.allocation import decide


@exercise.check
def check_marks(answer):
    """The fewest marked entries with which a 64 x 64 matrix gets a module of rank 4."""
    assert not callable(answer), "Give one number: how many marked entries?"
    method = SPT(rank=4, alpha=10.0)
    assert answer >= 1, "Without a single mark nothing trains there."
    form = decide(method, (64, 64), int(answer)).form
    assert form == method.structured, "With so few it still trains these entries alone."
    less = decide(method, (64, 64), int(answer) - 1).form
    assert less == "entries", "It has a module with fewer marks already. What does a module cost?"
    cost = method.cost(64, 64)
    return f"from then on {cost} numbers train there, instead of {int(answer) - 1} entries."


@exercise.check
def check_gather(answer):
    """``gather(G, X, i, j)``: the gradient of the differences at entries (i, j)."""
    draw = torch.Generator().manual_seed(0)
    X, G = (torch.randn(40, k, generator=draw, dtype=torch.float64) for k in (6, 5))
    i, j = torch.tensor([0, 2, 2, 4]), torch.tensor([1, 0, 5, 3])
    delta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    W = torch.zeros(5, 6, dtype=torch.float64).index_put((i, j), delta)
    (wanted,) = torch.autograd.grad((F.linear(X, W) * G).sum(), delta)
    found = answer(G, X, i, j)
    assert found is not None, "There is no answer yet."
    assert found.shape != (4, 4), "Four entries need four numbers. You made a product of all pairs."
    assert found.shape == (4,), f"Four entries need four numbers, not {tuple(found.shape)}."
    assert not torch.allclose(found * len(X), wanted), "The loss holds any mean. Sum over tokens."
    assert torch.allclose(found, wanted), "Entry (i, j) multiplies input j and adds to output i."
    return "one number per entry, and never a product of all pairs."
