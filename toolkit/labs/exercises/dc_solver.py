"""Checks of the DC-Solver chapter's exercises. Each computes what is right; none holds a
solution."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.generate.dc_solver import cpr_ratios, lagrange_weights


@exercise.check
def check_weight(answer):
    """The newest prediction's weight with K = 2, even times and ratio 2."""
    assert not callable(answer), "Give one number."
    found = lagrange_weights([0.1, 0.2, 0.3], 2.0)
    assert answer != 2, "That is a straight line through two predictions. K = 2 takes three."
    assert answer != 1, "That is ratio 1, where nothing changes."
    assert abs(answer - found[0]) < 1e-6, "Write both factors (t' - t_l)/(t_k - t_l) of k = 0."
    return "computed just now: " + ", ".join(f"{w:+.0f}" for w in found) + ". They sum to 1."


@exercise.check
def check_cpr(answer):
    """``predicted(phi, guidance, calls)``: the ratios that polynomials give."""
    phi = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for guidance, calls in ((7.5, 10), (1.0, 5)):
        got = answer(phi.clone(), guidance, calls)
        assert got is not None, "There is no answer yet: return a list of ratios."
        assert len(got) == calls, f"One ratio for each of the {calls} steps, got {len(got)}."
        wanted = cpr_ratios(phi, guidance, calls)
        assert list(map(float, got[:2])) == [1.0, 1.0], "Two steps have no history: give 1."
        off = max(abs(float(a) - b) for a, b in zip(got, wanted, strict=True))
        whole = max(map(abs, wanted))
        assert off < 1e-6 * whole, (
            "Look at the units: calls / 50, guidance / 12, and the step from 1 over the calls; the "
            "coefficients of guidance and calls fall in power, those of the step rise."
        )
    return "the same ratios as the toolkit's."
