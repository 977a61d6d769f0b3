"""Checks of the PCB-Merging chapter's exercises. Each computes what is right."""

from __future__ import annotations

import torch

from toolkit.core.baselines.average import Average
from toolkit.core.show import exercise
from toolkit.core.states.merging import merge
from toolkit.merge.pcb_merging import PCBMerging


def _alone() -> tuple[float, float]:
    """What average and PCB make of a number that one of four tasks changed, and by most."""
    draws = torch.Generator().manual_seed(0)
    vectors = 0.001 * torch.randn(4, 1000, generator=draws)
    vectors[:, 0] = torch.tensor([0.02, 0.0, 0.0, 0.0])
    base, models = {"w": torch.zeros(1000)}, [{"w": vector} for vector in vectors]
    rules = Average(), PCBMerging(clip=0.0)
    mean, ours = (float(merge(base, models, rule)["w"][0]) for rule in rules)  # type: ignore[index]
    return mean, ours


@exercise.check
def check_alone(answer):
    """How many times the average's change PCB makes of a change that one of four tasks has."""
    assert not callable(answer), "Give one number: how many times as large."
    mean, ours = _alone()
    assert answer > 0, "Both change the number in the same direction."
    assert abs(answer - 1) > 1e-6, "The average divides by four. Does PCB, where only one is kept?"
    assert answer > 1, "Which of the two divides by the number of tasks?"
    assert abs(answer - ours / mean) < 0.05, (
        "Where one task alone is kept, the weighted mean is that task's own change."
    )
    return f"merged: the average makes 0.02 to {mean:.3f}, PCB to {ours:.3f}."


@exercise.check
def check_agreement(answer):
    """``agreement(u)``: for each task, how much all tasks agree with it; u is (n, k)."""
    pair = torch.tensor([[0.9], [-0.9]])
    found = answer(pair)
    assert found is not None, "There is no answer yet: return a tensor shaped like u."
    assert found.shape == pair.shape, f"Return a number for each of u, {tuple(pair.shape)}."
    assert not torch.allclose(found, torch.tanh(-pair * pair)), (
        "The sum goes over all tasks, the task itself among them."
    )
    assert torch.allclose(found, torch.zeros(2, 1), atol=1e-6), (
        "Two tasks of one size that oppose each other agree by 0: a task agrees with itself."
    )
    draws = torch.Generator().manual_seed(0)
    u = 2 * torch.rand(4, 50, generator=draws) - 1
    right = torch.stack([sum(torch.tanh(one * other) for other in u) for one in u])
    assert not torch.allclose(answer(u), torch.tanh(u * u.sum(0)), atol=1e-4), (
        "That is tanh of the sum. Take tanh of each product first, then add."
    )
    assert torch.allclose(answer(u), right, atol=1e-6), "Add tanh(u_i u_j) over all tasks j."
    return f"among four tasks, {(right < 0).float().mean():.0%} of the changes are outvoted."
