"""Checks of the long-tail chapter's exercises. Each computes what is right; none solves."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.diagnose.longtail_bias.checks import prior_from_counts

COUNTS = torch.tensor([90.0, 10.0])


def _probability(times: int) -> float:
    """Of the frequent class, for an input that speaks for neither, after so many adjustments."""
    prior = prior_from_counts(COUNTS)
    z = prior.log()  # what cross-entropy teaches about such an input
    for _ in range(times):
        z = z - prior.log()
    return float(z.softmax(0)[0])


@exercise.check
def check_twice(answer):
    """The probability of the frequent class after the prior was subtracted twice."""
    assert not callable(answer), "Give one number: the probability of the frequent class."
    assert 0 <= answer <= 1, "A probability lies between 0 and 1."
    assert abs(answer - _probability(0)) > 1e-3, "That is the answer without any adjustment."
    assert abs(answer - _probability(1)) > 1e-3, "That is right after one adjustment. And two?"
    assert abs(answer - _probability(2)) < 1e-3, "Write down both logits, and subtract twice."
    return "the bias is as large as before, and points the other way."


@exercise.check
def check_adjusted(answer):
    """``adjusted(z, counts, tau)``: logits (N, K) of a model trained with cross-entropy."""
    z = torch.zeros(1, 2)
    found = answer(z, COUNTS, 1.0)
    assert found is not None, "There is no answer yet: return logits of shape (N, K)."
    assert found.argmax() != 0, "Two equal logits: which class must win now, frequent or rare?"
    prior = prior_from_counts(COUNTS)
    shift = float(prior.log()[0] - prior.log()[1])
    moved = float(found[0, 1] - found[0, 0])
    share = float(prior[0] - prior[1])
    assert abs(moved - share) > 1e-3, "Not the shares: a prior multiplies a probability."
    assert abs(moved - shift) < 1e-4, "By how much do the two logits of log P(y) differ?"
    assert torch.allclose(answer(z, COUNTS, 0.0), z), "A strength of 0 changes nothing."
    twice = float(answer(z, COUNTS, 2.0).diff())
    assert abs(twice - 2 * shift) < 1e-4, "Twice the strength is twice the shift."
    return "the logarithm of the prior goes away, and the rare class is heard."
