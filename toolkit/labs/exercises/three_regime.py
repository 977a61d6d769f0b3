"""Checks of the exercises on three regimes. Each computes what is right; none holds a solution."""

from __future__ import annotations

import numpy as np

from toolkit.core.show import exercise
from toolkit.labs.diagnose.cases.temperature import walk

COLUMN = (-0.35, -0.02, 0.0, 0.0, 0.01)
"""LMC of one density, from cold to hot."""


@exercise.check
def check_copies(answer):
    """How many copies the walk from the coldest network of ``COLUMN`` retrains."""
    assert answer is not None, "Give one number: how many copies are retrained until it stops?"
    connected = np.array(COLUMN) >= -0.05
    _, visited = walk(connected, 0, 1)
    assert answer != 2, "Two copies tell about one network. Does the walk stop where it begins?"
    assert answer != 2 * len(COLUMN), "It need not look at all: where does the advice turn?"
    assert answer != visited, "So many networks it visits. How many copies does each need?"
    assert answer == 2 * visited, "Go hotter until a network is connected. Count its copies too."
    return "the walk stops at the first connected network."


@exercise.check
def check_lmc(answer):
    """``lmc(e)`` gives LMC from the errors along a line."""
    hill = [0.25, 0.25, 0.5, 0.75, 0.5, 0.25, 0.25]
    assert answer(hill) is not None, "There is no answer yet."
    assert answer(hill) != max(hill), "That is the largest error. How far is it from the ends?"
    assert answer(hill) != 0.5, "The size is right. Is a barrier a good thing or a bad one here?"
    assert answer(hill) == -0.5, "On level ground only the hill's height over the ground counts."
    assert answer([0.5, 0.25, 0.0, 0.25, 0.5]) == 0.5, "The curve may also sink below its ends."
    ends = "The ends differ here: take their mean, and let them take part."
    assert answer([0.25, 0.5, 0.75, 0.75]) == 0.25, ends
    return "the largest deviation from the mean of the ends, with its sign."
