"""Seeds, independent random streams, and one search for a learning rate."""

import math

import pytest
import torch

from toolkit.core import evidence


# ---------------------------------------------------------------- seeds and streams
def test_seeds_count_from_base_and_refuse_nonsense():
    assert evidence.seeds(3, base=7) == [7, 8, 9]
    with pytest.raises(ValueError, match="n = 0"):
        evidence.seeds(0)
    with pytest.raises(ValueError, match="base = -1"):
        evidence.seeds(2, base=-1)


def test_generator_streams_repeat_and_are_independent():
    def draw(*key):
        return torch.randn(4000, generator=evidence.generator(*key))

    assert torch.equal(draw(3, "init"), draw(3, "init"))
    streams = [draw(0), draw(1), draw(0, "init"), draw(0, "data"), draw(0, "init", 1)]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(5)
    assert correlation.abs().max() < 0.08  # five standard errors of 4000 draws


@pytest.mark.parametrize(("key", "error"), [((-1,), ValueError), ((0, 1.5), TypeError)])
def test_generator_refuses(key, error):
    with pytest.raises(error):
        evidence.generator(*key)


# ---------------------------------------------------------------- tuning
def test_tune_takes_the_best_inner_rate():
    tuned = evidence.tune(lambda rate: [(math.log10(rate) + 2) ** 2] * 3, [1e-1, 1e-3, 1e-2])
    assert tuned.rate == 1e-2
    assert tuned.score == pytest.approx(0)
    assert not tuned.on_edge
    assert list(tuned.scores) == [1e-3, 1e-2, 1e-1]


@pytest.mark.parametrize(("better", "best"), [("min", 0.1), ("max", 10)])
def test_tune_warns_on_either_edge(better, best):
    with pytest.warns(UserWarning, match="edge of the grid"):
        tuned = evidence.tune(float, [0.1, 1, 10], better)
    assert tuned.rate == best
    assert tuned.on_edge


@pytest.mark.parametrize("better", ["min", "max"])
def test_tune_never_chooses_a_diverged_rate(better):
    score = {0.1: 2.0, 1: 1.0, 10: math.nan} if better == "min" else {0.1: 1, 1: 2, 10: math.inf}
    tuned = evidence.tune(score.__getitem__, [0.1, 1, 10], better)
    assert tuned.rate == 1
    assert not tuned.on_edge
    assert math.isinf(tuned.scores[10])


@pytest.mark.parametrize(
    ("rates", "better", "words"),
    [
        ([], "min", "at least one"),
        ([1, 1], "min", "none twice"),
        ([0.0, 1], "min", "positive"),
        ([1, 2], "best", "better"),
        ([1, 2], "min", "every rate"),
    ],
)
def test_tune_refuses(rates, better, words):
    with pytest.raises(ValueError, match=words):
        evidence.tune(lambda rate: math.inf, rates, better)
