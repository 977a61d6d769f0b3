"""Checks of the PVP chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch
from torch import nn

from toolkit.core.adapt.put import adapt
from toolkit.core.show import exercise
from toolkit.insert.pvp import Modules, few_shot, start_from
from toolkit.lowrank.lora import LoRA


def _share(t: float) -> float:
    """Which share of a trained difference a start at t holds, by projection."""
    draw = torch.Generator().manual_seed(0)
    method = LoRA(rank=8, alpha=8.0)
    adapted = adapt(nn.Sequential(nn.Linear(400, 300)), method, generator=draw)
    factors = adapted.adapters["0"]
    with torch.no_grad():
        factors.B.normal_(generator=draw)
        factors.A.normal_(generator=draw)
    found, goal = Modules.of(adapted), (factors.B @ factors.A).detach()
    fresh = adapt(nn.Sequential(nn.Linear(400, 300)), method, generator=draw)
    factors = start_from(fresh, found, t).adapters["0"]
    made = (factors.B @ factors.A).detach()
    return ((made * goal).sum() / goal.square().sum()).item()


@exercise.check
def check_half_way(answer):
    """The share of the trained difference that LoRA holds when it starts at t = 1/2."""
    assert not callable(answer), "Give one number: a share of the trained difference."
    right = _share(0.5)
    assert abs(answer) > 1e-6, "At t = 0 nothing of it is there. Here t is a half."
    assert abs(answer - 0.5) > 0.02, "Each factor is half way. What of their product?"
    assert abs(answer - 1) > 0.02, "That is t = 1."
    assert abs(answer - right) < 0.03, "B is half of what it was; the trained part of A as well."
    return f"computed just now: {right:.2f}. Half way for the factors is not so for the weight."


@exercise.check
def check_draw(answer):
    """``draw(labels, k, generator)``: rows of exactly k examples of each class."""
    labels = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))
    least = int(labels.bincount().min())

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    rows = answer(labels, 3, seeded(0))
    assert rows is not None, "There is no answer yet: return row numbers, shape (C k,)."
    assert torch.is_tensor(rows), "Return a tensor of row numbers."
    assert rows.shape == few_shot(labels, 3, seeded(0)).shape, "Four classes, three rows each: 12."
    counts = labels[rows].bincount(minlength=4).tolist()
    assert counts == [3] * 4, f"The classes came {counts} times; each must come exactly k times."
    assert len(set(rows.tolist())) == len(rows), "An example came twice: draw without replacement."
    whole = answer(labels, least, seeded(3))
    assert len(set(whole.tolist())) == len(whole), "An example came twice when all were asked for."
    assert torch.equal(rows, answer(labels, 3, seeded(0))), "The same generator, another draw."
    others = [answer(labels, 3, seeded(seed)) for seed in (1, 2, 3)]
    assert any(set(rows.tolist()) != set(other.tolist()) for other in others), (
        "Every generator gives the same examples: nothing is drawn."
    )
    try:
        answer(labels, least + 1, seeded(0))
    except ValueError:
        return "exactly k of each class, and an error where a class is too small."
    raise AssertionError(
        f"One class has {least} examples. Asked for {least + 1}, raise a ValueError."
    )
