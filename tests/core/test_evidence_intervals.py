"""Intervals cover what they say, on every scale, and bad numbers are refused."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from toolkit.core import evidence
from toolkit.core.evidence import Interval, intervals
from toolkit.core.evidence.intervals import working

DRAWS = 20_000  # the standard error of a coverage of 95 % is then 0.15 %


def coverage(values, mean, *scale) -> float:
    low, high = working(values, *scale).ends(values.shape[-1])
    return float(np.mean((low <= mean) & (mean <= high)))


# ---------------------------------------------------------------- coverage
def test_coverage_of_normal_differences_is_between_94_and_96_per_cent_at_every_n():
    rng = np.random.default_rng(0)
    found = {}
    for n in (*range(3, 31), 60):
        a, b = rng.normal(70, 3, size=(2, DRAWS, n)) + rng.normal(size=(DRAWS, n))
        found[n] = coverage(a - b + 0.4, 0.4)
    assert all(0.94 < share < 0.96 for share in found.values()), found


def test_the_simulation_and_the_function_are_the_same_interval():
    values = np.random.default_rng(1).normal(size=(5, 12))
    low, high = working(values).ends(12)
    for row, ends in zip(values, zip(low, high, strict=True), strict=True):
        found = evidence.interval(row)
        assert (found.low, found.high) == pytest.approx(ends)
        half = stats.t.ppf(0.975, 11) * row.std(ddof=1) / 12**0.5
        assert found.high - found.estimate == pytest.approx(half)


def test_the_bootstrap_that_was_used_before_covers_too_little():
    draws = np.random.default_rng(2).normal(size=(1500, 10))
    found = stats.bootstrap(
        (draws,), np.mean, n_resamples=400, method="BCa", axis=1, rng=np.random.default_rng(3)
    ).confidence_interval
    share = np.mean((found.low <= 0) & (found.high >= 0))
    assert 0.89 < share < 0.925
    assert 0.94 < coverage(draws, 0) < 0.97
    assert not hasattr(evidence, "bootstrap")


SKEWED = {
    "Beta(2, 50)": (lambda rng, size: rng.beta(2, 50, size), 2 / 52),
    "Beta(0.5, 10)": (lambda rng, size: rng.beta(0.5, 10, size), 0.5 / 10.5),
    "right of 200": (lambda rng, size: rng.binomial(200, 0.99, size) / 200, 0.99),
}


@pytest.mark.parametrize("name", SKEWED)
def test_coverage_of_skewed_bounded_values_is_what_the_docstring_says(name):
    draw, mean = SKEWED[name]
    table = intervals.__doc__
    row = re.search(rf"^{re.escape(name)}.*bounded +([\d. ]+)\n.*identity +([\d. ]+)$", table, re.M)
    rng = np.random.default_rng(4)
    said = [[float(number) for number in group.split()] for group in row.groups()]
    for n, bounded, identity in zip((3, 8, 20, 30), *said, strict=True):
        values = draw(rng, (DRAWS, n))
        print(name, n, coverage(values, mean, "bounded", (0, 1)), coverage(values, mean))
        assert coverage(values, mean, "bounded", (0, 1)) == pytest.approx(bounded, abs=0.01)
        assert coverage(values, mean) == pytest.approx(identity, abs=0.013)
        assert 0.91 < bounded < 0.96  # never as bad as the ordinary scale for such values


# ---------------------------------------------------------------- scales
def test_bounded_never_leaves_its_bounds():
    rng = np.random.default_rng(5)
    for n in (2, 3, 8, 20):
        values = rng.beta(0.2, 0.2, size=(4000, n)) * 100
        values[rng.random(values.shape) < 0.3] = 100.0
        values[rng.random(values.shape) < 0.3] = 0.0
        low, high = working(values, "bounded", (0, 100)).ends(n)
        assert low.min() >= 0
        assert high.max() <= 100
        assert np.isfinite(low).all()
        assert (low <= values.mean(1) + 1e-9).all()
        assert (values.mean(1) <= high + 1e-9).all()
    plain_low, plain_high = working(values[:, :3]).ends(3)
    assert plain_low.min() < 0 < 100 < plain_high.max()  # the ordinary interval does leave them


def test_bounded_takes_values_on_the_bounds_and_is_ordinary_far_from_them():
    edge = evidence.interval([1.0, 1.0, 0.9], scale="bounded", bounds=(0, 1))
    assert 0 < edge.low < edge.estimate < edge.high < 1
    at = evidence.interval([1.0, 1.0, 1.0], scale="bounded", bounds=(0, 1))
    assert (at.low, at.estimate, at.high) == (1.0, 1.0, 1.0)
    values = [49.0, 50.0, 50.5, 51.0, 50.2]
    far = evidence.interval(values, scale="bounded", bounds=(0, 100))
    near = evidence.interval(values)
    assert (far.low, far.high) == pytest.approx((near.low, near.high), abs=1e-3)


def test_paired_bounded_keeps_the_difference_within_the_bounds_distance():
    a, b = [100.0, 100.0, 60.0], [0.0, 0.0, 0.0]
    found = evidence.paired(a, b, scale="bounded", bounds=(0, 100))
    assert found.estimate == pytest.approx(260 / 3)
    assert -100 <= found.low < found.high <= 100
    assert evidence.paired(a, b).high > 100


def test_log_works_on_factors():
    values = [0.1, 0.2, 0.4]
    found = evidence.interval(values, scale="log")
    logs = evidence.interval(np.log(values))
    assert found.estimate == pytest.approx(0.2)
    assert found.low == pytest.approx(math.exp(logs.low))
    twice = evidence.paired([2.0, 4.4, 1.8], [1.0, 2.0, 1.0], scale="log")
    assert twice.estimate == pytest.approx(100 * ((2 * 2.2 * 1.8) ** (1 / 3) - 1))
    assert twice.low > -100


def test_log_covers_the_median_of_lognormal_values():
    values = np.exp(np.random.default_rng(6).normal(size=(DRAWS, 8)))
    assert 0.94 < coverage(values, 1.0, "log") < 0.96


# ---------------------------------------------------------------- one interval
def test_t_interval_matches_the_textbook():
    found = evidence.interval([1.0, 2.0, 3.0])
    assert (found.method, found.n, found.estimate) == ("t", 3, 2.0)
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) times s / sqrt(n), s = 1
    assert found.low == pytest.approx(2 - half)
    assert found.high == pytest.approx(2 + half)
    assert found.sd == pytest.approx(1.0)
    assert evidence.interval([1, 2, 4], level=0.99).high > evidence.interval([1, 2, 4]).high


def test_equal_values_have_no_width_at_all():
    found = evidence.interval([0.1] * 7)  # their mean is not 0.1 in floating point
    assert (found.low, found.high) == (0.1, 0.1)


def test_paired_matches_by_seed_and_is_narrower_than_the_arms():
    noise = np.array([0.0, 5.0, -3.0, 2.0])
    a = dict(enumerate(noise + np.array([1.0, 1.1, 0.9, 1.0])))
    b = {seed: noise[seed] for seed in (3, 1, 0, 2)}
    found = evidence.paired(a, b)
    assert found.estimate == pytest.approx(1.0)
    assert 0.8 < found.low < found.high < 1.2
    assert found == evidence.paired(pd.Series(a), pd.Series(b))
    assert found == evidence.paired(list(a.values()), list(noise))


def test_interval_text_shows_two_digits_of_spread():
    assert Interval(0.31234, 0.12, 0.50, 3).text("points") == "0.31 [0.12, 0.50] points (n = 3)"
    assert evidence.exact(1536).text() == "1536 (exact)"
    assert evidence.single(0.5).text("nats") == "0.5 nats (one run)"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: evidence.interval([1.0]), "evidence.single"),
        (lambda: evidence.interval([1.0, math.nan]), r"values\[1\] is nan"),
        (lambda: evidence.interval([[1.0, 2.0]]), "one number per repeat"),
        (lambda: evidence.interval([1, 2], level=95), "level = 95"),
        (lambda: evidence.interval([1, 2], scale="root"), "scale = 'root'"),
        (lambda: evidence.interval([0.0, 1.0], scale="log"), "positive"),
        (lambda: evidence.interval([0.0, 1.0], scale="bounded"), "bounds go with"),
        (lambda: evidence.interval([0.0, 1.0], bounds=(0, 1)), "bounds go with"),
        (lambda: evidence.interval([0, 2], scale="bounded", bounds=(0, 1)), "outside bounds"),
        (lambda: evidence.interval([0, 1], scale="bounded", bounds=(1, 0)), "the smaller first"),
        (lambda: evidence.paired([-1, 2], [1, 2], scale="log"), "positive"),
        (lambda: evidence.paired([1, 2], [1, 2, 3]), r"shape \(2,\)"),
        (lambda: evidence.paired({0: 1, 1: 2}, {0: 1, 2: 2}), "same seeds"),
        (lambda: evidence.paired({0: 1, 1: 2}, [1, 2]), "keyed by seed"),
        (lambda: Interval(1, None, 2, 3), "both"),
        (lambda: Interval(1, 3, 2, 3), "above high"),
        (lambda: evidence.exact(math.inf), "finite"),
    ],
)
def test_bad_numbers_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
