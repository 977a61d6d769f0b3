"""Checks of the DAREx chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.merge.darex.theory import moments


@exercise.check
def check_spread(answer):
    """How many times wider a neuron's change spreads under DARE at p = 0.99 than at p = 0.9."""
    assert not callable(answer), "Give one number."
    c = torch.linspace(-1, 2, 50, dtype=torch.float64)
    wide, narrow = (moments(c, p).variance for p in (0.99, 0.9))
    ratio, found = float(wide / narrow), float((wide / narrow).sqrt())
    assert abs(answer - ratio) > 0.05 * ratio, "That is the ratio of the variances."
    assert abs(answer - 10) > 0.3, "Rescaling alone is ten times stronger. Fewer are kept, too."
    assert abs(answer - found) < 0.02 * found, "Var H = p / (1 - p) Q. Take the root of a ratio."
    return f"the moments of fifty inputs say {found:.3f}; what the inputs are does not matter."


@exercise.check
def check_divisor(answer):
    """``best_q(c, p)``: the divisor with the least mean square change, summed over rows of c."""
    draws = torch.Generator().manual_seed(0)
    c = torch.randn(40, 30, generator=draws, dtype=torch.float64) + 0.3
    for p in (0.5, 0.9):
        q = answer(c.clone(), p)
        assert q is not None, "There is no answer yet: return a number."
        q = float(q)
        assert abs(q - (1 - p)) > 1e-6, "That is DARE: no bias, but is the mean square the least?"
        assert q > 1 - p, "A divisor below 1 - p makes bias and variance larger."
        tried = torch.arange(1 - p, 2.0, 1e-3, dtype=torch.float64).tolist()
        cost = [float(moments(c, p, one).square.sum()) for one in tried]
        best = tried[min(range(len(cost)), key=cost.__getitem__)]
        assert abs(q - best) < 2e-3, (
            f"at p = {p} the mean square is least at q = {best:.3f}, yours is {q:.3f}: square each "
            "row's sum, then add the rows."
        )
    return "no grid of divisors has a smaller mean square change."
