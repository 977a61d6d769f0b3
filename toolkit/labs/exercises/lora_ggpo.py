"""Checks of the LoRA-GGPO chapter's exercises. Each computes what is right; no solutions."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from toolkit.core.show import exercise


def _rise(size: float) -> float:
    """Mean rise of a parabola under noise that is ``size`` or ``-size`` with equal chances."""
    return sum(0.5 * (1 + e) ** 2 - 0.5 for e in (size, -size)) / 2


@exercise.check
def check_tax_factor(answer):
    """The factor by which the mean rise of a parabola grows when the noise grows tenfold."""
    assert not callable(answer), "Give one number: by what factor does the mean rise grow?"
    assert answer > 1, "More noise lifts the mean loss of a valley. By how much more?"
    factor = _rise(0.3) / _rise(0.03)
    assert abs(answer - factor**0.5) > 1e-6, (
        "The part that is linear in the noise averages out. What is left is its square."
    )
    assert abs(answer - factor) < 1e-6, "Average a parabola at w + e and w - e, and compare."
    return "what noise costs grows with its square, so a tenth of the noise is nearly none."


@exercise.check
def check_row_squares(answer):
    """``row_squares(L, R)``: squared length of each row of L R, without forming the product."""
    draw = torch.Generator().manual_seed(0)
    L, R = torch.randn(5, 2, generator=draw), torch.randn(2, 7, generator=draw)
    want, got = (L @ R).square().sum(1), answer(L, R)
    assert got is not None, "There is no answer yet: return one number for each row of L."
    assert tuple(got.shape) == (5,), "Return one number for each row of L."
    assert not torch.allclose(got, L.square().sum(1) * R.square().sum(), atol=1e-4), (
        "Lengths do not multiply: the rows of R are neither perpendicular nor equally long."
    )
    assert not torch.allclose(got, want.sqrt(), atol=1e-4), "Squared lengths were asked for."
    assert torch.allclose(got, want, atol=1e-4), (
        "Write a row as L_i R. Its squared length is L_i, a small square matrix, and L_i again."
    )
    tall, wide = torch.ones(2000, 2), torch.ones(2, 2000)
    with FlopCounterMode(display=False) as counted:
        big = answer(tall, wide)
    assert torch.allclose(big, torch.full((2000,), 8000.0), rtol=1e-3), "Not right for big ones."
    assert counted.get_total_flops() < 1_000_000, (
        "You formed the big matrix. The product R R^T is only 2 by 2 here: start there."
    )
    return "norms of rows cost next to nothing, so the noise is cheap to scale."
