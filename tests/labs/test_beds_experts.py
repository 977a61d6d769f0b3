"""The bed of experts: what is drawn, what is merged, what a search takes."""

from __future__ import annotations

import pytest
import torch

from toolkit.core.baselines.task_arithmetic import TaskArithmetic
from toolkit.core.baselines.ties import TIES
from toolkit.labs.beds import experts


@pytest.fixture(scope="module", params=experts.NAMES)
def found(request) -> experts.Experts:
    return experts.load(request.param, 2e-3, 3, "ci")


def test_experts_differ_from_the_base_and_do_better_on_their_own_task(found) -> None:
    assert all(not torch.equal(model, found.base) for model in found.models)
    base = found.scores(found.base, "test", range(len(found.tasks)))
    assert sum(found.own("test")) < sum(base)


def test_a_seed_draws_the_order_and_the_same_experts_again(found) -> None:
    bed = "images" if len(found.tasks) == 4 else "texts"
    again = experts.load(bed, 2e-3, 3, "ci", count=1)
    assert again.tasks == found.tasks
    assert torch.equal(again.models[0], found.models[0])
    orders = {experts.load(bed, 2e-3, seed, "ci", count=0).tasks for seed in range(6)}
    assert len(orders) > 1


def test_a_search_takes_the_least_validation_score_of_all_it_tried(found) -> None:
    rules = [TIES(density=0.2), TIES(density=1.0)]
    best = found.search(rules, (0.5, 1.0), 2)
    assert len(best.scores) == 4
    assert found.mean(best.merged, "validation", 2) == min(best.scores)
    place = best.scores.index(min(best.scores))
    assert (best.rule, best.scale) == (place // 2, (0.5, 1.0)[place % 2])


def test_scaling_what_is_added_is_the_rule_at_that_scale(found) -> None:
    whole = found.merged(TaskArithmetic(scale=1.0), 2)
    half = found.merged(TaskArithmetic(scale=0.5), 2)
    assert torch.allclose(torch.lerp(found.base, whole, 0.5), half, atol=1e-6)


def test_no_image_judges_two_tasks() -> None:
    hands = experts._dealt(40, 4, 10, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(hands).sort().values, torch.arange(40))


def test_an_unknown_bed_is_refused() -> None:
    with pytest.raises(ValueError, match="bed: choose one of images, texts"):
        experts.load("sounds", 1e-3, 0, "ci")
