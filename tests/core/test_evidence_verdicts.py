"""Every boundary of the rule, every combination of verdicts, and the errors to expect."""

import itertools
import math

import numpy as np
import pytest

from toolkit.core import evidence
from toolkit.core.evidence import verdicts
from toolkit.core.evidence.verdicts import false_chance, missed_chance

HOLDS, DIRECTION, OPEN, UNTESTABLE, NO_DIFFERENCE, REFUTED = evidence.VERDICTS
TINY = 1e-9


def test_the_words_are_exactly_these():
    assert evidence.VERDICTS == (
        "holds",
        "direction only",
        "open",
        "not testable here",
        "no difference that matters",
        "refuted here",
    )
    assert (*evidence.VERDICTS, "mixed", "unstable") == evidence.CLAIM_VERDICTS


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (1 + TINY, 3, HOLDS),
        (1, 3, DIRECTION),  # l = m is not above it
        (1, 1, DIRECTION),
        (TINY, 3, DIRECTION),
        (TINY, 1, DIRECTION),  # u = m is not below it
        (TINY, 1 - TINY, NO_DIFFERENCE),  # comes before direction only
        (0, 1 - TINY, NO_DIFFERENCE),
        (0, 1, OPEN),
        (0, 3, OPEN),
        (-0.5, 1, OPEN),
        (-5, 5, OPEN),
        (-5, 1, OPEN),
        (-1 + TINY, 1 - TINY, NO_DIFFERENCE),
        (-1, 1 - TINY, REFUTED),  # l = -m: a harm of that size is not excluded
        (-1, -1, REFUTED),
        (-5, 1 - TINY, REFUTED),
        (-5, -2, REFUTED),
        (0, 0, NO_DIFFERENCE),
    ],
)
def test_every_boundary(low, high, word):
    assert evidence.verdict(low, high, 1.0) == word
    assert evidence.verdict(low, high, 1.0, n=8) == word
    assert evidence.verdict(low, high, 1.0, n=7) == OPEN
    assert evidence.verdict(10 * low, 10 * high, 10.0) == word


def test_a_claim_is_open_exactly_if_its_interval_holds_both_0_and_the_margin():
    ends = np.linspace(-3, 3, 25)  # with 0 and 1 among them
    for low, high in itertools.combinations_with_replacement(ends, 2):
        both = low <= 0 and high >= 1
        assert (evidence.verdict(low, high, 1.0) == OPEN) == both


@pytest.mark.parametrize("margin", [0, 0.0, -1, math.nan, math.inf, None, "1", True])
def test_a_margin_must_be_positive(margin):
    with pytest.raises(ValueError, match="smallest difference that matters"):
        evidence.verdict(0, 1, margin)


@pytest.mark.parametrize("ends", [(1, 0), (math.nan, 1), (0, math.nan)])
def test_an_interval_must_be_one(ends):
    with pytest.raises(ValueError, match="no interval"):
        evidence.verdict(*ends, 1.0)


# ---------------------------------------------------------------- several conditions
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([HOLDS], HOLDS),
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, DIRECTION], DIRECTION),
        ([HOLDS, OPEN], OPEN),
        ([HOLDS, UNTESTABLE], UNTESTABLE),
        ([HOLDS, NO_DIFFERENCE], NO_DIFFERENCE),
        ([HOLDS, REFUTED], "mixed"),
        ([HOLDS, OPEN, REFUTED], "mixed"),
        ([DIRECTION, REFUTED], REFUTED),
        ([OPEN, REFUTED], REFUTED),
        ([UNTESTABLE, OPEN], UNTESTABLE),
        ([DIRECTION, OPEN], OPEN),
    ],
)
def test_combining_conditions(words, expected):
    assert evidence.combine(words) == expected


def test_over_all_combinations_of_up_to_four_conditions():
    for size in (1, 2, 3, 4):
        for words in itertools.product(evidence.VERDICTS, repeat=size):
            found = evidence.combine(words)
            if REFUTED in words:
                assert found == ("mixed" if HOLDS in words else REFUTED)
            else:
                assert found in words
                worse = evidence.VERDICTS[evidence.VERDICTS.index(found) + 1 :]
                assert not set(worse) & set(words)
            assert (found == HOLDS) == (set(words) == {HOLDS})
            assert found == evidence.combine(words[::-1])


@pytest.mark.parametrize("words", [[], ["holds in part"], ["mixed"], [HOLDS, "unstable"]])
def test_unknown_verdicts_are_refused(words):
    with pytest.raises(ValueError, match="one or more"):
        evidence.combine(words)


# ---------------------------------------------------------------- what would settle it
def ends_of(mean, sd):
    def ends(n):
        half = verdicts.quantile(n) * sd / n**0.5
        return mean - half, mean + half

    return ends


@pytest.mark.parametrize(("mean", "sd"), [(0.4, 2), (1, 3), (0, 2), (-0.7, 5), (0.5, 1.1)])
def test_the_n_that_settles_is_the_smallest(mean, sd):
    ends = ends_of(mean, sd)
    n = evidence.needed(ends, 1.0)
    assert evidence.verdict(*ends(n), 1.0) != OPEN
    assert n == 8 or evidence.verdict(*ends(n - 1), 1.0) == OPEN


def test_a_hopeless_claim_says_so_in_words():
    assert evidence.needed(ends_of(0.5, 100), 1.0) is None
    assert "more than 1,000" in verdicts.needed_text(None)
    assert "about 23 repeats" in verdicts.needed_text(23)


# ---------------------------------------------------------------- errors to expect
@pytest.mark.parametrize(("n", "sd"), [(8, 1.0), (8, 0.4), (20, 1.0), (20, 0.35), (12, 5.0)])
def test_false_verdicts_are_as_frequent_as_the_formula_says(n, sd):
    draws = 60_000
    values = sd * np.random.default_rng(n).normal(size=(draws, n))
    low, high = evidence.intervals.working(values).ends(n)
    words = [evidence.verdict(a, b, 1.0, n) for a, b in zip(low, high, strict=True)]
    share = sum(word in (HOLDS, DIRECTION) for word in words) / draws
    expected = false_chance(sd, n, 1.0)
    assert share == pytest.approx(expected, abs=4 * (0.025 / draws) ** 0.5 + 1e-4)
    above = [evidence.verdict(a + 1, b + 1, 1.0, n) for a, b in zip(low, high, strict=True)]
    missed = sum(word in (REFUTED, NO_DIFFERENCE) for word in above) / draws
    assert missed == pytest.approx(missed_chance(n), abs=4 * (0.025 / draws) ** 0.5)


def test_the_chance_of_a_false_verdict_has_its_limits():
    assert false_chance(50.0, 20, 1.0) == pytest.approx(0.025, abs=1e-6)
    assert false_chance(0.01, 20, 1.0) < 1e-5  # then "no difference that matters" says it
    assert false_chance(1.0, 7, 1.0) == 0.0 == missed_chance(7)
