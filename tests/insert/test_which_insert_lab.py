"""The closing page of what is inserted: equal counts, starts, what learns from answers alone."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from toolkit import adapt
from toolkit.labs.beds import images
from toolkit.labs.insert import which_insert as lab
from toolkit.labs.insert.kinds import arms, outside

ARMS = [(budget, arm) for budget, kinds in arms.KINDS.items() for arm in kinds]
WANTED = {"many": 5888, "few": 1536}


def base() -> Any:
    return images.empty("vit", "cpu", torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize(("budget", "arm"), ARMS)
def test_arms_of_a_budget_train_about_as_many_numbers(budget: str, arm: str) -> None:
    model = base()
    made = arms.dressed(budget, arm, model)
    adapted = adapt(model, made.method, made.targets)
    count = sum(p.numel() for p in adapted.parameters())
    assert count == pytest.approx(WANTED[budget], rel=0.09)
    x = torch.rand(2, 28, 28)
    assert torch.equal(model(x), base()(x)) == (arm not in lab.TOKENS)
    assert all(m.info.mergeable for m in adapted.methods) == arms.KINDS[budget][arm].merges


@pytest.mark.parametrize("arm", lab.OUTSIDE)
def test_answers_alone_start_as_nothing_and_learn(arm: str) -> None:
    nothing = arms.run("none", "nothing", 1.0, 900, "ci", "test")
    still = outside.run(arm, 1e-9, 900, "ci", "test")
    learned = outside.run(arm, 0.05, 900, "ci", "test")
    assert still["loss"] == pytest.approx(nothing["loss"], rel=1e-4)
    assert learned["loss"] < still["loss"] - 0.1
    assert learned["trained"] == {"map": 110, "pair": 20}[arm]


def test_the_arms_of_a_seed_see_the_same_images() -> None:
    one, again, other = (arms.run("few", "lora", 0.01, seed, "ci", "test") for seed in (1, 1, 2))
    assert one == again
    assert one["loss"] != other["loss"]
    assert one["trained"] - arms.run("none", "head", 0.01, 1, "ci", "test")["trained"] == 96


class Found:
    """Losses of two seeds for every arm, as a lab finds them."""

    def values(self, table: str, column: str, budget: str, arm: str) -> dict[int, float]:
        level = {"nothing": 5.0, "head": 1.0, "full": 0.5}.get(arm, 0.75)
        spread = 0.1 if budget == "none" else 0.0
        return {0: level - spread, 1: level + spread}

    def tuned(self, table: str) -> dict[str, Any]:
        return {
            "deep, few": {"scores": {0.1: 0.9, 0.2: None}},
            "prefix, few": {"scores": {0.1: 0.95, 0.2: 0.8}},
        }


def test_gains_run_from_the_head_alone_to_full_training() -> None:
    gains = lab.gains(Found())
    means = {key: pd.Series(values).mean() for key, values in gains.items()}
    assert means["none", "head"] == pytest.approx(0)
    assert means["none", "full"] == pytest.approx(100)
    assert means["many", "ssf"] == pytest.approx(50)
    assert means["none", "nothing"] == pytest.approx(-800)
    assert gains["many", "ssf"][1] == pytest.approx(70)  # beside the head of its own seed


def test_validation_chooses_and_leaves_out_rates_that_failed() -> None:
    assert lab.chosen(Found(), "few", lab.TOKENS) == "prefix"
