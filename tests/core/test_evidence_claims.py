"""A claim is declared whole, with a rule that can go either way, or refused."""

import math
import re

import numpy as np
import pytest

from tests.core.claims_toy import DIGITS, claim, conditions
from toolkit.core import evidence
from toolkit.core.evidence import Condition, Fact
from toolkit.core.evidence.claims import half_width


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"margin": None}, "claim 'rank': margin = None"),
        ({"margin": 0}, "margin = 0"),
        ({"margin": -1.0}, "margin = -1.0"),
        ({"unit": ""}, "unit is empty"),
        ({"unit": "  "}, "unit is empty"),
        ({"reason": ""}, "reason is empty"),
        ({"quantity": ""}, "quantity is empty"),
        ({"text": " "}, "text is empty"),
        ({"whose": ""}, "whose = ''"),
        ({"whose": "theirs"}, "whose = 'theirs'"),
        ({"whose": "code", "where": None}, "where is missing"),
        ({"where": None}, "where is missing"),  # a figure without its table
        ({"where": " "}, "where is empty"),
        ({"whose": "ours"}, "must be None for a question of our own"),
        ({"scale": "sqrt"}, "scale = 'sqrt'"),
        ({"better": "higher"}, "better = 'higher'"),
        ({"than": math.inf}, "than = inf"),
        ({"conditions": ()}, "name one or more"),
        ({"conditions": (DIGITS, DIGITS)}, "none twice"),
        ({"conditions": conditions("a", "b", decides=True)}, "more than one condition decides"),
        ({"scale": "bounded", "conditions": conditions("a", support=None)}, "needs support"),
        ({"id": "Rank 1"}, "hyphens"),
    ],
)
def test_an_incomplete_claim_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        claim(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": " "}, "name is empty"),
        ({"n": 7}, "declare 8 seeds or more"),
        ({"n": 20.0}, "declare 8 seeds or more"),
        ({"spread": 0}, "is a Fact"),
        ({"spread": math.nan}, "spread = nan"),
        ({"support": (1, 1)}, "smallest and the largest"),
        ({"support": (-math.inf, 1)}, "smallest and the largest"),
        ({"grid": (0.1, 0.9)}, "two ends are no grid"),
    ],
)
def test_an_impossible_condition_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Condition(**({"name": "digits", "n": 20, "spread": 1.0} | changes))


def test_sources_may_be_unread_or_our_own():
    assert claim(where=None, figure=None).where is None
    assert claim(whose="ours", where=None, figure=None).whose == "ours"
    assert claim(whose="code", where="loralib/layers.py, forward").whose == "code"


# ---------------------------------------------------------------- power
def test_a_rule_that_could_not_hold_is_refused_with_what_would_do():
    part = Condition("recall", n=8, spread=0.2, support=(-1, 0.3))
    with pytest.raises(ValueError, match="could never hold") as refusal:
        claim(margin=0.2, conditions=(part,))
    n = int(re.search(r"n = (\d+) or", str(refusal.value)).group(1))
    below = float(re.search(r"margin below ([\d.]+\d)", str(refusal.value)).group(1))
    assert half_width(n, 0.2) < 0.1 <= half_width(n - 1, 0.2)
    assert below == pytest.approx(0.3 - half_width(8, 0.2), rel=0.01)


def test_a_rule_that_could_not_be_refuted_is_refused_with_what_would_do():
    part = Condition("reviews", n=8, spread=2.0, support=(-100, 100))
    with pytest.raises(ValueError, match="could never be refuted") as refusal:
        claim(margin=1.0, conditions=(part,))
    n = int(re.search(r"n = (\d+) or", str(refusal.value)).group(1))
    assert claim(margin=1.0, conditions=(Condition("reviews", n, 2.0, (-100, 100)),))
    with pytest.raises(ValueError, match="could never be refuted"):
        claim(margin=1.0, conditions=(Condition("reviews", n - 1, 2.0, (-100, 100)),))
    above = float(re.search(r"margin above ([\d.]+\d)", str(refusal.value)).group(1))
    assert claim(margin=above * 1.01, conditions=(part,))


def test_a_support_that_starts_above_0_counts_from_there():
    part = Condition("share", n=8, spread=0.1, support=(0.95, 3))
    with pytest.raises(ValueError, match=r"true effect of 0\.95"):
        claim(margin=1.0, conditions=(part,))
    impossible = Condition("share", n=8, spread=0.1, support=(-2, -1))
    with pytest.raises(ValueError, match="choose another quantity"):
        claim(margin=1.0, conditions=(impossible,))


def test_what_passes_can_go_both_ways_in_a_simulation():
    part = conditions("digits", spread=0.9, n=8)[0]
    made = claim(conditions=(part,))
    rng = np.random.default_rng(0)

    def verdicts(effect):
        low, high = evidence.intervals.working(rng.normal(effect, 0.9, (400, 8))).ends(8)
        return [evidence.verdict(a, b, made.margin, 8) for a, b in zip(low, high, strict=True)]

    dismissed = ("refuted here", "no difference that matters")
    assert sum(word in dismissed for word in verdicts(0.0)) > 200
    assert verdicts(50.0).count("holds") == 400


# ---------------------------------------------------------------- a chapter's claims
def test_at_most_six_and_none_twice():
    seven = [claim(id=f"c{i}") for i in range(7)]
    assert len(evidence.declare(seven[:6]).claims) == 6
    with pytest.raises(ValueError, match="7 claims"):
        evidence.declare(seven)
    with pytest.raises(ValueError, match="declared twice"):
        evidence.declare([claim(), claim(margin=2.0)])


# ---------------------------------------------------------------- facts
def test_facts_print_what_they_are():
    assert Fact("count", "LoRA trains r(m + n) numbers.", True, 384, "numbers").found() == (
        "384 numbers"
    )
    assert Fact("zero", "No extra part.", True, 0.0, "parts").found() == "0 parts"
    assert Fact("gap", "Merged equals unmerged.", np.True_, np.float64(4.3e-14)).found() == (
        "4.3e-14"
    )
    assert Fact("plain", "It is so.", False).found() == ""
    assert Fact("plain", "It is so.", False).verdict == "not true"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("A b", "t", True), ValueError, "hyphens"),
        (("a", " ", True), ValueError, "text is empty"),
        (("a", "t", 0.3), TypeError, "passed is 0.3"),
        (("a", "t", 1.0), TypeError, "passed is 1.0"),
        (("a", "t", True, math.nan), ValueError, "finite"),
        (("a", "t", True, True), ValueError, "finite"),
    ],
)
def test_a_fact_without_an_outcome_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Fact(*arguments)
