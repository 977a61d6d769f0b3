"""Checks of the LoRA chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

from functools import partial

import torch

from toolkit.core.show import exercise

SGD = torch.optim.SGD
ADAM = partial(torch.optim.Adam, eps=1e-30)


def _numbers(*shapes):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def _moves_alike(factor, c, optimizer):
    """Whether c times the scale with a rate times ``factor`` visits the same merged weights."""
    x, y, A, B = _numbers((20, 6), (20, 5), (2, 6), (5, 2))

    def end(s, rate, shrink):
        first, second = ((part / shrink**0.5).requires_grad_() for part in (A, B))
        descent = optimizer([first, second], lr=rate)
        for _ in range(10):
            descent.zero_grad()
            (x @ (s * second @ first).T - y).square().mean().backward()
            descent.step()
        return s * second @ first

    return torch.allclose(end(1.0, 0.02, 1.0), end(c, 0.02 * factor, c), atol=1e-8)


@exercise.check
def check_best_rate(answer):
    """The factor by which the best rate of Adam changes when the scale is multiplied by 4."""
    assert not callable(answer), "Give one number: by what factor does the best rate change?"
    assert 0 < answer < 1, "A larger scale makes every step longer. What must the rate do?"
    assert not _moves_alike(answer, 4.0, SGD), "That is SGD's rule. Adam's steps differ."
    assert _moves_alike(answer, 4.0, ADAM), "W is a product of two factors. Each moves by the rate."
    return "both runs visit the same weights, once A and B start smaller by that factor too."


@exercise.check
def check_merge(answer):
    """``merge(layer)`` writes W + s B A into ``layer["W"]``, once."""
    W, A, B = _numbers((4, 5), (2, 5), (4, 2))
    layer = {"W": W.clone(), "A": A, "B": B, "s": 0.5, "merged": False}
    answer(layer)
    moved, wanted = layer["W"] - W, B @ A
    assert moved.abs().sum() > 0, "There is no answer yet: layer['W'] did not change."
    assert not torch.allclose(moved, wanted), "Close. By what is the product of the factors scaled?"
    assert torch.allclose(moved / layer["s"], wanted), "After one call W must hold the new weight."
    answer(layer)
    assert torch.allclose(layer["W"] - W, moved), "Calling it twice added the difference twice."
    return "one merge, however often it is called."
