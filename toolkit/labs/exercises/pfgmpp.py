"""Checks of the PFGM++ chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import math

import torch

from toolkit.core.show import exercise
from toolkit.generate.pfgmpp import PFGMpp, acted_on, drawn_taus


@exercise.check
def check_level(answer):
    """The noise level that the kernel acts on: N = D = 64, the state shows 2, told is 1."""
    assert not callable(answer), "Give one number."
    found = float(acted_on(2.0, 1.0, 64, 64.0))
    assert not math.isclose(answer, 2.5, abs_tol=0.02), "That is its square: take the root."
    assert not math.isclose(answer, 1.5, abs_tol=0.02), "Squares are averaged, not levels."
    assert answer not in (1, 2), "Both count: 64 parts of what is shown, 64 parts of what is told."
    assert math.isclose(answer, found, abs_tol=0.02), "Average both squares with weights N and D."
    return f"the toolkit computed {found:.2f} just now; two decimals are enough."


@exercise.check
def check_noisy(answer):
    """``noisy(y, sigma, normals, taus)``: states (batch, ...) with Student-t noise."""
    draws = torch.Generator().manual_seed(0)
    y, normals = (torch.randn(5, 1, 3, 2, generator=draws) for _ in range(2))
    sigma, taus = torch.rand(5, generator=draws) + 0.2, drawn_taus(5, 3.0, draws).float()
    got = answer(y, sigma, normals, taus)
    assert got is not None, "There is no answer yet: return the noisy states."
    assert got.shape == y.shape, f"States keep the shape {tuple(y.shape)}, got {tuple(got.shape)}."
    wanted = y + PFGMpp(D=3.0).offset(sigma, normals, taus=taus)
    by_r = y + math.sqrt(3.0) * (wanted - y)
    assert not torch.allclose(got, by_r, atol=1e-5), "Use sigma: the root of D is in the tau's law."
    lengths = (got - y).flatten(1).norm(dim=1) / (wanted - y).flatten(1).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(5), atol=1e-4), (
        f"The noise of the first image is {lengths[0]:.2f} times as long as it should be: one "
        "normal vector, divided by the root of its tau."
    )
    assert torch.allclose(got, wanted, atol=1e-5), "Its length is right, its direction is not."
    return "the same states as the toolkit's, one tail for each image."
