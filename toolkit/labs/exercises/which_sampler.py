"""Checks of the exercises on what a call buys; each computes what is right."""

from __future__ import annotations

import math

import torch

from toolkit.core.sample.loop import sample
from toolkit.core.sample.plans import Heun
from toolkit.core.sample.schedule import LinearVP, Schedule
from toolkit.core.show import exercise


@exercise.check
def check_calls(answer):
    """How often seven steps of Heun to no noise ask the network."""
    assert not callable(answer), "Give one number of calls."
    asked = sample(lambda x, level: 0.5 * x, Schedule.edm(7), Heun(), torch.ones(1, 2)).calls
    assert answer != 7, "That is once a step. How often does a step of second order ask?"
    assert answer != asked + 1, "Nearly: is there a slope at a level without noise?"
    assert answer == asked, f"Sampled just now: it is another number than {answer}."
    return f"sampled just now: {asked} calls."


@exercise.check
def check_levels(answer):
    """``even_levels(steps, high, low)``: levels whose logarithms have equal distances."""
    law = LinearVP()
    for steps, high, low in ((6, 80.0, 0.01), (1, 10.0, 0.5), (9, 3.0, 0.02)):
        found = answer(steps, high, low)
        assert found is not None, "There is no answer yet: return a list of levels."
        found = [float(level) for level in found]
        assert len(found) == steps + 1, f"{steps} steps have {steps + 1} levels, not {len(found)}."
        ends = math.isclose(found[0], high) and math.isclose(found[-1], low)
        assert ends, f"The first is {high:g} and the last {low:g}."
        right = Schedule.even_log_snr(law, steps, law.time(high), law.time(low)).sigmas
        off = max(abs(math.log(a / b)) for a, b in zip(found, right, strict=True))
        assert off < 1e-6, "Equal distances of the logarithms mean equal ratios of the levels."
    return f"the last had ratios of {right[1] / right[0]:.3f} from level to level."
