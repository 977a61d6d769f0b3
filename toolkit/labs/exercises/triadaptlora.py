"""Checks of TriAdaptLoRA's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.adapt.put import adapt
from toolkit.core.adapt.steps.growth import choose
from toolkit.core.show import exercise
from toolkit.labs.beds.tasks import planted_task
from toolkit.lowrank.triadaptlora import TriAdaptLoRA


def _held_back(norm):
    """Score of a layer of two blocks that grew at one look and learned nothing until the next."""
    adapted = adapt(planted_task(0)[0], TriAdaptLoRA(target_rank=4, block=1))
    for layer in adapted.adapters.values():
        layer.grow(1)
    adapted.attach(torch.optim.Adam(adapted.parameters()), total_steps=100)
    controller, layer = adapted.controller, next(iter(adapted.adapters.values()))
    torch.nn.init.zeros_(layer.U0)
    torch.nn.init.constant_(layer.L0, norm)
    before = controller.measure()
    layer.grow(1)
    return float((controller.measure() - before)[0])


@exercise.check
def check_brake(answer):
    """The score of a layer whose core has the norm 6, after it grew from two blocks to three."""
    assert not callable(answer), "Give one number: the score S at the next look."
    truth = _held_back(6.0)
    assert answer != 0, "The norm did not change. But by what is it divided, then and now?"
    assert (answer < 0) == (truth < 0), "Look at the sign: is F larger or smaller than before?"
    assert abs(answer - truth) < 1e-4, "F before is 6 / 2. What is it with three blocks?"
    return "a layer of the toolkit was grown just now, and got this score."


@exercise.check
def check_who(answer):
    """``who_grows(before, now, blocks_before, blocks_now, M)``: the layers that grow, as a set."""
    norms, blocks = [[6.0, 2.0, 5.0, 1.0], [10.0, 3.0, 5.5, 4.0]], [[2, 1, 2, 1], [3, 1, 2, 1]]

    def truth(before, now, p, q, top):
        measured = [torch.tensor(n) / torch.tensor(b) for n, b in ((before, p), (now, q))]
        amounts = choose(measured[1] - measured[0], 99, 1, top, [99] * len(p)).amounts
        return {k for k, amount in enumerate(amounts) if amount}

    given = (*norms, *blocks)
    got = answer(*given, 1)
    assert got is not None, "There is no answer yet: return a set of layers, counted from 0."
    assert isinstance(got, set), "Return a set of layers, counted from 0."
    assert got == truth(*given, 1), "The norm of layer 0 rose most. But F divides it by the blocks."
    assert answer(*given, 2) == truth(*given, 2), (
        "Divide each norm by the blocks of its own time, then take the difference."
    )
    assert answer(*given, 4) == truth(*given, 4), "With M = 4 all four grow."
    tied = ([1.0, 1.0, 1.0], [3.0, 2.0, 3.0], [1, 1, 1], [1, 1, 1])
    assert answer(*tied, 1) == truth(*tied, 1), "Layers 0 and 2 tie. Who ties with the last grows."
    return "ties included, as in the author's files."
