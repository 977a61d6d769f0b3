"""Checks of TriAdaptLoRA's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.adapt.put import adapt
from toolkit.core.show import exercise
from toolkit.labs.beds.tasks import planted_task
from toolkit.lowrank.triadaptlora import TriAdaptLoRA
from toolkit.lowrank.triadaptlora.layer import assemble, positions


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
def check_core(answer):
    """``build_core(lower, upper)``: C (r, r) from blocks of L (c, rho) and of U (rho, c)."""
    draw, widths = torch.Generator().manual_seed(0), [2, 1, 3]
    ends = [2, 3, 6]
    sizes = list(zip(widths, ends, strict=True))
    lower = [torch.randn(c, e, generator=draw) for c, e in sizes]
    upper = [torch.randn(e, c, generator=draw) for c, e in sizes]
    kept = [block.clone() for block in lower + upper]
    wanted = assemble(lower, upper, positions(widths))
    got = answer(lower, upper)
    assert torch.is_tensor(got), "Return a tensor."
    assert tuple(got.shape) == (6, 6), "Widths 2, 1 and 3: the side is 6."
    assert not torch.allclose(got, wanted.T), "Rows and columns are exchanged: L holds rows."
    off = torch.block_diag(*[torch.ones(c, c) for c in widths]) == 0
    assert not torch.allclose(got[off], wanted[off]) or torch.allclose(got, wanted), (
        "Beside the diagonal all is right. The diagonal blocks lie in both parts: add them."
    )
    assert torch.allclose(got, wanted), "On paper: in which row does the second block begin?"
    assert torch.allclose(answer(lower[:1], upper[:1]), lower[0] + upper[0]), "One block is a core."
    same = all(map(torch.equal, kept, lower + upper))
    assert same, "Leave the blocks as they are."
    return "blocks of any width find their place."
