"""Checks of the AdaLoRA chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.labs.beds.tasks import PLANTED, planted_train
from toolkit.lowrank.adalora import AdaLoRA


def _ranks(start, total, steps=120):
    """Final ranks of one short run on the planted task."""
    method = AdaLoRA(rank=start, total_rank=total, warmup=15, final=40, interval=2)
    return planted_train(method, 2e-2, 0, steps=steps)[1]["ranks"]


@exercise.check
def check_cap(answer):
    """How many of the eight planted pieces AdaLoRA can keep from a start rank of 3."""
    assert not callable(answer), "Give one number of pieces."
    start, total = 3, 10
    most = min(total, sum(min(start, needed) for needed in PLANTED))
    assert answer <= sum(PLANTED), "Only eight pieces were planted."
    assert answer != sum(PLANTED), "Ranks only shrink. How many pieces can layer 2 hold at most?"
    assert answer >= most, "Too few: the budget of 10 is not what binds. What is?"
    assert answer <= most, "Layer by layer: the smaller of what is planted and the start rank."
    ranks = _ranks(start, total)
    found = sum(min(r, needed) for r, needed in zip(ranks, PLANTED, strict=True))
    assert found <= most, f"a run kept {found}: look again."
    return "a run from rank 3 was trained just now, and it kept no more than that."


@exercise.check
def check_prune(answer):
    """``prune(lam, S, b)``: strengths (b0,) after pruning to a budget b, by the scores S (b0,)."""
    lam = torch.tensor([0.5, -2.0, 0.1, 3.0, -0.3])
    S = torch.tensor([4.0, 1.0, 3.0, 2.0, 5.0])
    given = lam.clone()
    got = answer(lam, S, 3)
    assert got is not None, "There is no answer yet: return the new strengths, shape (b0,)."
    assert torch.is_tensor(got), "Return the new strengths, shape (b0,)."
    assert torch.equal(lam, given), "Leave the input as it is and return a new tensor."
    assert torch.equal(answer(lam, S, 5), lam), "With a budget for all, all stay."
    by_size = torch.where(lam.abs() < 0.5, 0.0, lam)
    assert not torch.equal(got, by_size), (
        "You went by the size of the strengths; the score decides."
    )
    dropped = (got == 0).nonzero()[:, 0].tolist()
    lowest = S.argsort()[:2].sort().values.tolist()
    assert dropped == lowest, "Of five, the two with the lowest scores must go."
    tied = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0])
    left = (answer(lam, tied, 4) != 0).sum()
    assert left == 2, "Three scores tie at the limit. At or below it: all three go."
    return "ties included: the code may prune more than it was asked to."
