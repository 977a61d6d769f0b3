"""One search for all arms, and what makes its outcome unfit to report on."""

from __future__ import annotations

import math

import pytest

from toolkit.core.runs.tuning import Tuned, best, check, search, tune


def bowl(middles, calls=None):
    def evaluate(pairs):
        if calls is not None:
            calls.append(list(pairs))
        return {(arm, rate): math.log(rate / middles[arm]) ** 2 for arm, rate in pairs}

    return evaluate


@pytest.mark.parametrize("middle", [0.003, 0.01, 0.02, 0.5, 4e-5])
def test_the_search_ends_near_the_best_with_neighbours_at_most_two_apart(middle):
    found = search(bowl({"a": middle}), {"a": 0.01})["a"]
    rates = sorted(found.scores)
    at = rates.index(found.rate)
    assert not found.on_edge
    assert 0 < at < len(rates) - 1
    assert rates[at + 1] / rates[at] <= 2.0001
    assert rates[at] / rates[at - 1] <= 2.0001
    assert 1 / 1.5 < found.rate / middle < 1.5


def test_every_arm_is_searched_in_the_same_way_and_all_at_once():
    calls = []
    found = search(bowl({"a": 0.01, "b": 1.0}, calls), {"a": 0.01, "b": 0.01})
    assert sorted({arm for arm, _ in calls[0]}) == ["a", "b"]
    assert len(calls[0]) == 6
    assert len(found["b"].scores) > len(found["a"].scores)  # further, because it had to
    asked = [pair for call in calls for pair in call]
    assert len(asked) == len(set(asked))  # nothing is run twice


def test_a_search_that_may_not_look_further_ends_on_the_edge():
    found = search(bowl({"a": 100.0}), {"a": 0.01}, extensions=1)["a"]
    assert found.on_edge
    words = check({"a": found}, [1, 2, 3], [4], better="min")
    assert len(words) == 1
    assert "edge" in words[0]
    assert "'a'" in words[0]


def test_diverged_rates_count_as_worst():
    def evaluate(pairs):
        return {p: math.nan if p[1] > 0.02 else -math.log(p[1]) for p in pairs}

    found = search(evaluate, {"a": 0.01})["a"]
    assert found.rate <= 0.02
    assert math.inf in found.scores.values()
    with pytest.raises(ValueError, match="diverged"):
        search(lambda pairs: dict.fromkeys(pairs, math.nan), {"a": 0.01})


def test_one_rate_is_taken_as_it_is():
    found = search(bowl({"a": 1.0}), {"a": 0.01}, width=1)["a"]
    assert found.rate == 0.01
    assert check({"a": found}, [1, 2, 3], [4], better="min") == []


@pytest.mark.parametrize("bad", [{"width": 0}, {"factor": 1.0}, {"near": 1.0}, {"extensions": -1}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        search(bowl({"a": 1.0}), {"a": 0.01}, **bad)


def test_a_tuned_arm_worse_than_doing_nothing_is_found():
    found = {"a": Tuned(0.1, 50.0, {0.05: 40.0, 0.1: 50.0, 0.2: 45.0}, False)}
    assert check(found, [1, 2, 3], [4], better="max", nothing=49.9) == []
    (words,) = check(found, [1, 2, 3], [4], better="max", nothing=50.1)
    assert "worse than doing nothing" in words
    (words,) = check(found, [1, 2, 3], [4], better="min", nothing=49.9)
    assert "worse than doing nothing" in words


def test_few_seeds_and_shared_seeds_are_found():
    few, shared = check({}, [1, 1, 2], [2, 3], better="min")
    assert "2 seeds" in few
    assert "[2]" in shared


def test_best_and_tune_refuse_what_is_no_choice():
    with pytest.raises(ValueError, match="better"):
        best({1.0: 2.0}, "least")
    with pytest.raises(ValueError, match="no rate"):
        best({})
    with pytest.warns(UserWarning, match="edge of the grid"):
        assert tune(lambda rate: [rate, rate], [1.0, 2.0]).rate == 1.0
    assert tune(lambda rate: abs(rate - 2), [1.0, 2.0, 3.0]).on_edge is False
