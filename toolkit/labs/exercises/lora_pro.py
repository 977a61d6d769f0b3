"""Checks of the LoRA-Pro chapter's exercises. Each computes what is right; none holds a solution.

The factors are small and random, in double precision.
"""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.lowrank.lora_pro.projection import adjusted, equivalent_gradient


def _numbers():
    draws = torch.Generator().manual_seed(0)
    shapes = (6, 5), (2, 5), (6, 2)
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]


def _moved(s, pro):
    """Length of the weight's move by gradient descent, to first order, at scale s."""
    g, A, B = _numbers()
    pair = s * B.T @ g, s * g @ A.T
    if pro:
        pair = adjusted(*pair, A, B, s, damping=0.0)
    return equivalent_gradient(*pair, A, B, s).norm().item()


@exercise.check
def check_scale(answer):
    """The factor by which LoRA-Pro's move of the weight grows when the scale s is doubled."""
    assert not callable(answer), "Give one number: how many times as long is the move?"
    lora, pro = (_moved(2.0, which) / _moved(1.0, which) for which in (False, True))
    assert abs(answer - lora) > 1e-9, "That is LoRA's. What does LoRA-Pro divide by?"
    assert answer > 0, "The move has a length above 0. How many times as long is it?"
    assert abs(answer - pro) < 1e-9, (
        "How often does s stand in the pair, and how often in the move?"
    )
    return "LoRA's move grows fourfold instead."


@exercise.check
def check_nearest(answer):
    """``nearest(g, A, B)`` is the matrix B Y + Z A nearest to g."""
    g, A, B = _numbers()
    got = answer(g, A, B)
    assert isinstance(got, torch.Tensor), "There is no answer yet: return a matrix."
    assert tuple(got.shape) == (6, 5), "The answer has the shape of g."
    PB, PA = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    lora = B @ B.T @ g + g @ A.T @ A
    assert not torch.allclose(got, lora), "That is where LoRA goes. It is not the nearest."
    assert not torch.allclose(got, PB @ g @ PA), (
        "You kept only the corner that both can reach. A step of A alone reaches more than that."
    )
    assert not torch.allclose(got, PB @ g + g @ PA), (
        "The corner that both can reach is in both terms. You counted it twice."
    )
    assert torch.allclose(answer(got, A, B), got), (
        "What is within reach already must stay as it is."
    )
    left = (g - got).norm()
    best = (g - PB @ g - (g - PB @ g) @ PA).norm()
    assert left <= best * (1 + 1e-9), "Something within reach is nearer."
    return f"{100 * left / g.norm():.0f} % of this gradient's length is out of reach."
