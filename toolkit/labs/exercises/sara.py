"""Checks of the SaRA chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch
from torch import nn

from toolkit.core.adapt.put import adapt
from toolkit.core.show import exercise
from toolkit.select.sara import SaRA


def _held(rows, cols, share):
    """Numbers of the gradient and of Adam's moments after one step of SaRA on one matrix."""
    model = nn.Sequential(nn.Linear(cols, rows, bias=False))
    adapted = adapt(model, SaRA(share=share, switch=None, rank_weight=0.0))
    optimizer = torch.optim.Adam(adapted.parameters())
    adapted.attach(optimizer)
    model(torch.ones(1, cols)).square().sum().backward()
    optimizer.step()
    moments = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    return sum(t.numel() for t in [*moments, *(p.grad for p in adapted.parameters())])


@exercise.check
def check_numbers(answer):
    """How many numbers gradient and Adam hold for a tenth of a matrix of 500 x 400."""
    assert not callable(answer), "Give one number."
    entries, found = 500 * 400, _held(500, 400, 0.1)
    assert answer != 3 * entries, "That is full training: here frozen entries keep nothing."
    assert answer != entries // 10, "So many entries move. What does Adam keep for each of them?"
    assert answer != 2 * entries // 10, "Those are the moments. The gradient lives, too."
    assert answer != 2 * entries + entries // 10, "The moments are as short as the gradient."
    assert answer == found, "One gradient and two moments for each entry that moves."
    return "a layer was adapted just now and took a step: it held just as many."


@exercise.check
def check_weight(answer):
    """``weight(P0, index, p)``: the matrix P0 with its entries at ``index`` replaced by ``p``."""
    P0 = torch.tensor([[0.5, -0.1, 0.02], [-0.03, 1.0, -2.0]])
    given, index = P0.clone(), torch.tensor([1, 2, 3])
    p = torch.tensor([-0.1, 0.02, -0.03], requires_grad=True)
    got = answer(P0, index, p)
    assert got is not None, "There is no answer yet: return the new matrix."
    assert torch.is_tensor(got), "Return the new matrix."
    assert got.shape == P0.shape, "The matrix keeps its shape."
    flipped = got.detach().reshape(-1)[index]
    assert not torch.equal(flipped, p.detach().abs()), (
        "Small negative weights became positive: that is the published code's mistake."
    )
    assert torch.equal(got, given), "With the old values nothing may change."
    assert torch.equal(P0, given), "P0 is frozen: leave it as it is and return a new tensor."
    assert got.requires_grad, "The values get no gradient: do not detach them."
    G = torch.arange(6.0).view(2, 3)
    (slope,) = torch.autograd.grad(answer(P0, index, p), p, G)
    assert torch.equal(slope, G.reshape(-1)[index]), "The gradient must be that of these entries."
    answer(P0, index, 2 * p)
    assert torch.equal(P0, given), "P0 is frozen: leave it as it is and return a new tensor."
    return "values go in, their gradient comes back, and P0 stays."
