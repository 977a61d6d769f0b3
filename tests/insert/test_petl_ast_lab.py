"""The lab of the AST chapter: equal counts, what trains beside, and a recording to be heard."""

from __future__ import annotations

import copy

import pytest
import torch

from toolkit import adapt
from toolkit.labs.beds import speech
from toolkit.labs.insert import petl_ast as lab
from toolkit.labs.insert.zoo import arms, heard, runs

NETWORK = speech.empty("cpu")


def trained(arm: str, budget: str) -> int:
    """Numbers that an arm trains, head and norms included."""
    network, made = copy.deepcopy(NETWORK), arms.part(arm, "cpu", budget)
    names = arms.trains_beside(network, arm, made)
    adapted = adapt(network, made.method, made.targets, train=names)
    return sum(p.numel() for p in adapted.parameters())


@pytest.mark.parametrize("budget", arms.BUDGETS)
def test_families_train_about_as_many_numbers(budget):
    counts = [trained(arm, budget) for arm in (*arms.FAMILIES, "at attention")]
    assert max(counts) < 1.16 * min(counts), counts


def test_the_judged_arms_are_equal_within_four_per_cent():
    counts = [trained(arm, "middle") for arm in (*arms.FAMILIES, *arms.PLACES)]
    assert max(counts) < 1.04 * min(counts), counts


def test_the_norm_before_trains_for_adapters_only():
    norms = {"adapter": "norm2", "at attention": "norm1", "conformer": "norm2"}
    for arm in ("linear", *arms.FAMILIES, "at attention"):
        names = arms.trains_beside(NETWORK, arm, arms.part(arm, "cpu"))
        inside = {n.split(".")[2] for n in names if n.startswith("blocks")}
        assert inside == ({norms[arm]} if arm in norms else set()), arm
        assert {"norm.weight", "head.weight"} <= set(names)
    assert len(arms.trains_beside(NETWORK, "full", None)) == len(list(NETWORK.parameters()))


def test_fewer_recordings_are_a_part_of_all():
    every, some = runs.shown(0, "ci", None), runs.shown(0, "ci", 1)
    assert set(some.tolist()) < set(every.tolist())
    assert len(some) == 20
    digits = speech.load("ci").digit[some]
    assert torch.equal(digits.bincount(), torch.full((10,), 2))


def test_a_recording_has_the_rate_and_the_frames_of_the_bed():
    one = heard.recording("ci", digit=7, speaker=0)
    assert (one.rate, one.digit, tuple(one.frames.shape)) == (8000, 7, (48, 32))
    assert heard.seconds() == pytest.approx(0.768)
    with pytest.raises(ValueError, match="no recording of digit 11"):
        heard.recording("ci", digit=11, speaker=0)


def test_the_counts_are_those_of_the_paper():
    counts = lab.large_counts()
    assert counts["bottleneck"] == 230_544
    assert counts["conformer"] == 250_080
    assert counts["lora"] == 221_184
