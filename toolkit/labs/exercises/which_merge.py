"""Checks of the exercises of *Average, trim, breed or cut?*; each computes what is right."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.core.baselines.average import Average
from toolkit.core.baselines.task_arithmetic import TaskArithmetic
from toolkit.core.show import exercise
from toolkit.core.states.merging import merge
from toolkit.labs.merge.rivals.interference import pair


def _gap(scale: float) -> float:
    """How far task arithmetic of four experts ends from their average, as a share of its way."""
    draws = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(500, generator=draws)}
    models = [{"w": base["w"] + torch.randn(500, generator=draws)} for _ in range(4)]
    mean, added = (merge(base, models, rule) for rule in (Average(), TaskArithmetic(scale=scale)))
    assert isinstance(mean, dict)
    assert isinstance(added, dict)
    away = (added["w"] - mean["w"]).norm() / (mean["w"] - base["w"]).norm()
    return float(away)


@exercise.check
def check_scale(answer):
    """The scale at which task arithmetic of four experts is their average."""
    assert not callable(answer), "Give one number, the scale."
    assert 0 < answer <= 4, "Task arithmetic adds: give a scale above 0 and of at most 4."
    gap = _gap(float(answer))
    assert abs(answer - 1) > 1e-6, f"At 1 all four add up whole: {gap:.0f} times too far."
    assert answer < 1, "That is longer than the sum. Does an average go further than a sum?"
    assert gap < 0.02, f"Merged just now: it ends {gap:.2f} of the average's way from the average."
    return f"merged just now: average and sum end {gap:.3f} of the way apart."


def _vectors(seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    one, noise = torch.randn(2, 2000, generator=draws)
    return one, 0.5 * one + noise


@exercise.check
def check_opposed(answer):
    """``opposed(one, other, share)``: per cent of what is large in both whose signs oppose."""
    one = torch.tensor([3.0, -2.0, 0.1, 0.2])
    found = answer(one, torch.tensor([4.0, 5.0, 0.1, -0.2]), 0.5)
    assert found is not None, "There is no answer yet: return a number, in per cent."
    found = float(found)
    assert found != 25.0, "Divide by the coordinates that are large in both, not by all."
    assert abs(found - 0.5) > 1e-6, "In per cent: half of them is 50."
    assert abs(found - 50.0) < 1e-4, "Of two coordinates that are large in both, one opposes."
    signed = float(
        answer(torch.tensor([-9.0, 1.0, 2.0, 3.0]), torch.tensor([9.0, 1.0, 2.0, 3.0]), 0.25)
    )
    assert abs(signed - 100.0) < 1e-4, "Large means far from 0: a change of -9 is larger than 3."
    for seed in range(3):
        one, other = _vectors(seed)
        given, right = float(answer(one, other, 0.1)), pair(one, other, 0.1).opposed
        either = (one.abs() >= one.abs().sort().values[-200]) | (
            other.abs() >= other.abs().sort().values[-200]
        )
        loose = 100 * float(((one * other)[either] < 0).double().mean())
        assert abs(given - loose) > 0.5 or abs(right - loose) < 0.5, (
            "Keep what is large in both vectors, not in either."
        )
        assert abs(given - right) < 0.5, "Among what is large in both: whose product is negative?"
    return f"of the last pair's large coordinates {right:.1f} % oppose each other."
