"""The lab of the closing page on merging: equal searches, examples, interference, shares."""

from __future__ import annotations

import statistics

import pandas as pd
import pytest
import torch
from torch.nn.utils import vector_to_parameters

from toolkit.labs.beds import expert_sentences, experts
from toolkit.labs.merge import which_merge as lab
from toolkit.labs.merge.rivals import search as searches
from toolkit.labs.merge.rivals.answers import answers
from toolkit.labs.merge.rivals.interference import lost, pair

SEED = 5


def trained(bed: str) -> experts.Experts:
    if bed == "sentences":
        return expert_sentences.load(1e-3, SEED, "ci")
    return experts.load(bed, 2e-3, SEED, "ci")


@pytest.fixture(scope="module")
def made() -> dict[str, experts.Experts]:
    return {bed: trained(bed) for bed in lab.BEDS}


@pytest.mark.parametrize("bed", lab.BEDS)
def test_every_rule_that_searches_has_as_many_evaluations(bed: str, made) -> None:
    found, count = made[bed], len(made[bed].tasks)
    asks = answers(bed, found, SEED, "ci")
    for name in lab.OF[bed]:
        asked = searches.search(name, found, asks, SEED)
        assert asked.judged == searches.EVALUATIONS * count, name
        assert asked.best is not None
        assert found.mean(asked.best[0], "validation", count) == min(asked.scores), name


@pytest.mark.parametrize("bed", ["images", "texts"])
def test_breeding_sees_the_examples_that_the_judge_asks(bed: str, made) -> None:
    found = made[bed]
    asks = answers(bed, found, SEED, "ci")
    for task, model in enumerate(found.models):
        vector_to_parameters(model, found.network.parameters())
        rows, score = asks(found.network, task), found.judge(found.network, "validation", task)
        told = 100 - 100 * rows.mean() if bed == "images" else -rows.log().mean()
        assert float(told) == pytest.approx(score, abs=1e-3)


def test_the_grids_are_what_the_searches_try_in_their_order(made) -> None:
    found = made["texts"]
    for name, (densities, scales) in searches.GRIDS.items():
        assert len(densities) * len(scales) == searches.EVALUATIONS
        asked = searches.search(name, found, answers("texts", found, SEED, "ci"), SEED)
        place = asked.scores.index(min(asked.scores))
        assert asked.best[1] == {
            "density": densities[place // len(scales)], "scale": scales[place % len(scales)],
        }  # fmt: skip


def test_darex_divides_each_experts_kept_numbers_by_its_own_best_divisor() -> None:
    base = torch.zeros(4000)
    models = torch.ones(2, 4000) * torch.tensor([[1.0], [2.0]])

    def judge(network, part, task):  # least where the mean change is the expert's own
        flat = torch.nn.utils.parameters_to_vector(network.parameters())
        return abs(float(flat.detach().mean()) - float(models[task].mean()))

    network = torch.nn.Linear(4000, 1, bias=False)
    found = experts.Experts(("a", "b"), network, base, tuple(models), judge)
    asked = searches.Asked(found)
    searches.divided(asked, 0)
    first = len(searches.SUMS)
    # with q = 1 - p both means are right, so at scale s the sum's mean is 3 s
    for scale, score in zip(searches.SUMS, asked.scores[:first], strict=True):
        wanted = statistics.fmean(abs(3 * scale - own) for own in (1.0, 2.0))
        assert score == pytest.approx(wanted, abs=0.15)


def test_a_pair_compares_what_is_large_in_both() -> None:
    one = torch.tensor([3.0, -2.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    other = torch.tensor([3.0, 2.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, -0.1])
    met = pair(one, other, share=0.2)
    assert met.both == pytest.approx(20.0)
    assert met.opposed == pytest.approx(50.0)
    assert pair(one, one).cosine == pytest.approx(1.0, abs=1e-6)
    assert pair(one, -one).opposed == 100.0
    with pytest.raises(ValueError, match="share: above 0"):
        pair(one, other, share=0.0)


def test_what_is_lost_is_the_average_of_two_against_each_alone(made) -> None:
    found = made["images"]
    own = found.own("test")
    losses = lost(found, own)
    assert len(losses) == 6
    middle = (found.models[0] + found.models[1]) / 2
    scores = found.scores(middle, "test", (0, 1))
    assert losses[0] == pytest.approx(statistics.fmean(scores) - statistics.fmean(own[:2]))


class Found(dict):
    """What a lab measured, of two seeds."""

    def values(self, name, column):
        return dict(zip(self[name].seed, self[name][column], strict=True))


def test_shares_and_what_validation_prefers() -> None:
    scores = {f"{name}, scores": [[9.0], [9.0]] for name in lab.OF["images"]}
    scores["ties, scores"], scores["pcb, scores"] = [[8.0, 1.0], [7.0]], [[2.0], [3.0]]
    table = pd.DataFrame(
        {"seed": [0, 1], "nothing": [80.0, 60.0], "own": [10.0, 30.0], "ties": [45.0, 45.0],
         "pcb": [20.0, 20.0]} | scores | {name: [70.0, 70.0] for name in lab.OF["images"]
                                          if name not in ("ties", "pcb")}
    )  # fmt: skip
    found = Found(images=table)
    assert lab.shares(found, "images", ["ties"]) == {"ties": {0: 70.0, 1: 30.0}}
    assert lab.preferred(found, "images", lab.FIXED) == {0: "ties", 1: "pcb"}
    assert lab.best(found, "images") == {0: 70.0, 1: 80.0}


def test_the_correlation_is_of_ranks() -> None:
    table = pd.DataFrame(
        {"seed": [0, 1], "opposed": [[1, 2, 3], [1, 2, 3]], "lost": [[0, 5, 900], [3, 2, 1]]}
    )
    assert lab.correlations(Found(images=table)) == {0: pytest.approx(1.0), 1: pytest.approx(-1.0)}
