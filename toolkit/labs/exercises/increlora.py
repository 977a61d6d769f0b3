"""Checks of the IncreLoRA chapter's exercises. Each computes what is right, none tells it."""

from __future__ import annotations

import itertools

from toolkit.core.show import exercise
from toolkit.labs.beds.tasks import PLANTED


def _covered(ranks):
    return sum(min(have, want) for have, want in zip(ranks, PLANTED, strict=True))


@exercise.check
def check_most_covered(answer):
    """How many of the eight planted ranks growth from 1 to ten ranks in all can cover."""
    assert not callable(answer), "Give one number: how many planted ranks can be covered?"
    ends = [r for r in itertools.product(range(1, 7), repeat=len(PLANTED)) if sum(r) == 10]
    most = max(map(_covered, ends))
    assert answer != sum(PLANTED), (
        "Every layer starts at rank 1 and keeps it. What is left to give?"
    )
    assert answer != 10 - len(PLANTED), (
        "Layers 2 and 4 start with a rank of their own. Count it too."
    )
    assert answer == most, "Count what layers 2 and 4 have at the start, and what growth can add."
    return f"of {len(ends)} ways to end with ten ranks none covers more."


@exercise.check
def check_who_grows(answer):
    """``who_grows(scores, missing, top)``: one truth value for each layer, by the code's rule."""
    got = answer([0.2, 0.9, 0.5, 0.1], 8, 2)
    assert got is not None, "There is no answer yet: return one True or False for each layer."
    got = [bool(v) for v in got]
    assert len(got) == 4, "One answer for each layer."
    assert got != [True, False, False, True], "Those are the lowest. The highest grow."
    assert sum(got) == 2, "With top = 2 and no ties two layers grow."
    assert got[1], "The highest score grows first."
    assert got[2], "With top = 2 the second highest grows too."
    assert sum(map(bool, answer([0.2, 0.9, 0.5, 0.1], 1, 2))) == 1, (
        "Only one rank is missing: the threshold is not always the top-th score."
    )
    assert all(answer([0.0, 0.0, 0.0, 0.0], 8, 2)), (
        "All scores tie. At or above the threshold: how many layers are that?"
    )
    assert all(answer([0.3, 0.7], 8, 5)), "There may be fewer layers than top."
    return "ties included, and never asked for more than is missing."
