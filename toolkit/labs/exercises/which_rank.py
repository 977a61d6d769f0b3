"""Checks of the exercises of *Which rank, when?*; each computes what is right."""

from __future__ import annotations

import numpy as np

from toolkit.core.show import exercise


@exercise.check
def check_chance(answer):
    """Percent of studies in which at least one of five equal methods seems better."""
    assert not callable(answer), "Give one number, in per cent."
    assert 0 < answer < 100, "Give a share of studies in per cent, between 0 and 100."
    draw = np.random.default_rng(0)
    above = draw.random((200_000, 5)) < 0.025  # an interval of 95 % that lies above zero
    one, any_of_five = 100 * above[:, 0].mean(), 100 * above.any(1).mean()
    assert abs(answer - one) > 0.5, "That is the chance of one method. Here are five."
    assert abs(answer - 2 * one) > 0.5, "Only intervals that lie above zero count, not those below."
    assert abs(answer - any_of_five) < 1, "Ask first how often none of the five lies above."
    return f"in {any_of_five:.0f} of 100 such studies somebody would write a paper."


@exercise.check
def check_gain(answer):
    """``gain(ours, theirs)``: mean and standard error of the differences, seed by seed."""
    draw = np.random.default_rng(1)
    hard = draw.normal(0, 5, 12)  # what makes a seed hard for both arms
    theirs, ours = 70 + hard + draw.normal(0, 0.3, 12), 71 + hard + draw.normal(0, 0.3, 12)
    found = answer(ours, theirs)
    assert found is not None, "There is no answer yet: return two numbers."
    mean, error = found
    assert np.isclose(mean, (ours - theirs).mean()), "First the mean of ours minus theirs."
    apart = ((ours.var(ddof=1) + theirs.var(ddof=1)) / 12) ** 0.5
    assert not np.isclose(error, apart, rtol=0.05), "Both arms had the same seeds: use that."
    difference = (ours - theirs).std(ddof=1)
    assert not np.isclose(error, difference), "That is the spread of one difference."
    assert np.isclose(error, difference / 12**0.5, rtol=0.05), "Take the differences first."
    return f"paired, the error is {error:.2f} points; unpaired it would be {apart:.2f}."
