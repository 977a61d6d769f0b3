"""Checks of the ID3 chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.select.id3 import ID3
from toolkit.select.id3.tensors import unmask

BUDGET, STEPS = 40, 20


def _counted(schedule):
    """Updates of single weights in a run of ID3, counted in the loop."""
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = torch.optim.SGD([p], lr=0.1)
    rule = unmask(ID3(budget=BUDGET, schedule=schedule), {"p": p}, optimizer, STEPS)
    draws = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        p.grad = torch.randn(100, generator=draws)
        optimizer.step()
    return rule.updates


@exercise.check
def check_updates(answer):
    """How many updates of single weights ID3 makes with a budget of 40 in 20 steps."""
    assert not callable(answer), "Give one number: updates of single weights in the whole run."
    assert answer != _counted("once"), "So many there are when all 40 join in the first step."
    assert answer > STEPS, "In step 1 two weights move, in step 2 four. How many over 20 steps?"
    counted = _counted("uniform")
    assert answer != counted - BUDGET // 2, "Weights move in the very step in which they join."
    assert answer == counted, "Add up 2, 4, 6, ... over the 20 steps."
    return f"counted in a run: {counted}, against {_counted('once')} for one choice at the start."


def _scores():
    draws = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=draws) for shape in ((3, 4), (5,))]
    weights = [torch.randn(shape, generator=draws) for shape in ((3, 4), (5,))]
    masks = [torch.zeros(shape, dtype=torch.bool) for shape in ((3, 4), (5,))]
    return weights, grads, masks


@exercise.check
def check_join(answer):
    """``join(weights, grads, masks, u)`` gives the masks after one more choice."""
    weights, grads, masks = _scores()
    first = answer(weights, grads, [m.clone() for m in masks], 4)
    assert first is not None, "There is no answer yet: return a list of masks."
    shapes = [tuple(m.shape) for m in first]
    assert shapes == [(3, 4), (5,)], "Return one mask per tensor, in its shape."
    count = sum(int(m.sum()) for m in first)
    assert count == 4, f"{count} weights are unmasked over both tensors; it must be u = 4 in all."
    wanted = torch.cat(
        [(g.abs() / (w.abs() + 1)).flatten() for w, g in zip(weights, grads, strict=True)]
    )
    best = set(wanted.topk(4).indices.tolist())
    found = set(torch.cat([m.flatten() for m in first]).nonzero()[:, 0].tolist())
    assert found == best, "Other weights have a higher |gradient| / (|weight| + 1)."
    second = answer(weights, grads, [m.clone() for m in first], 4)
    count = sum(int(m.sum()) for m in second)
    kept = all(bool(new[old].all()) for new, old in zip(second, first, strict=True))
    assert kept, "A weight that was unmasked before must stay so."
    assert count == 8, (
        f"After a second choice {count} are unmasked. Only masked ones may be ranked."
    )
    level = [torch.ones(3, 4), torch.ones(5)]
    ties = answer(level, level, [torch.zeros_like(m) for m in masks], 4)
    count = sum(int(m.sum()) for m in ties)
    assert count == 4, f"With all scores equal {count} join instead of 4: a cut-off takes all ties."
    return "four join each time, nobody leaves, and ties do not break the budget."
