"""The closing page of the samplers: equal ends and calls, noises of a seed, what is ranked."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from toolkit.core.sample.plans import DDIM
from toolkit.labs.generate import which_sampler as lab


@pytest.mark.parametrize("name", lab.SCHEDULES)
def test_schedules_have_the_same_ends_and_the_steps_asked_for(name: str) -> None:
    for steps in (1, 2, 6, 10):
        levels = lab.schedule(name, steps)
        assert levels.steps == steps
        assert levels.sigmas[0] == pytest.approx(lab.HIGH)
        assert levels.sigmas[-1] == pytest.approx(lab.LOW)
        for level in levels.levels:
            assert level.alpha**2 + level.std**2 == pytest.approx(1)
    with pytest.raises(ValueError, match="one of edm, log_snr, time"):
        lab.schedule("cosine", 3)


def test_schedules_differ_between_their_ends() -> None:
    middles = {lab.schedule(name, 6).sigmas[3] for name in lab.SCHEDULES}
    assert len({round(sigma, 3) for sigma in middles}) == 3


def test_a_seed_gives_the_same_pictures_and_another_does_not() -> None:
    one, again, other = lab.Sampler(3, "ci"), lab.Sampler(3, "ci"), lab.Sampler(4, "ci")
    images = one.drawn("unipc", "edm", 4)
    assert torch.equal(images, again.drawn("unipc", "edm", 4))
    assert not torch.equal(images, other.drawn("unipc", "edm", 4))
    assert not torch.equal(one.noise[:10], one._noise(10, "search"))


def test_one_step_of_euler_from_the_top_is_nearly_the_guess() -> None:
    """At the top the state is nearly all noise, so the picture is what the network answers."""
    one = lab.Sampler(0, "ci")
    levels = lab.schedule("edm", 1)
    said = one.network(one.noise * levels.levels[0].std, levels.levels[0], one.labels)
    left = lab.LOW / lab.HIGH
    state = one.noise * levels.levels[0].std / levels.levels[0].alpha
    assert torch.allclose(one.run(DDIM(), levels), left * state + (1 - left) * said, atol=1e-4)


def test_ratios_are_searched_for_this_schedule() -> None:
    one = lab.Sampler(0, "ci")
    plan: Any = one.plan("dc_solver", lab.schedule("edm", 5))
    ratios = [float(r) for r in plan.ratios.split(",")]
    assert len(ratios) == 5
    assert ratios[:2] == [1, 1]
    assert plan.ratios != one.plan("dc_solver", lab.schedule("time", 5)).ratios


class Found(dict):
    """Tables by name, as a lab's results give them."""


def test_correlation_is_one_where_error_orders_the_pictures() -> None:
    places = [f"{s} on {n}" for s in lab.PLANS for n in lab.SCHEDULES]
    like = {f"{p}: error": float(i) for i, p in enumerate(places)}
    like |= {f"{p}: frechet": float(i) ** 2 for i, p in enumerate(places)}
    against = {k: (-v if "frechet" in k else v) for k, v in like.items()}
    rows = [like | {"seed": 0}, against | {"seed": 1}]
    told = lab.correlations(Found(pictures=pd.DataFrame(rows)))
    assert told == pytest.approx({0: 1.0, 1: -1.0})


def test_the_schedule_of_least_distance_is_chosen() -> None:
    rows = [
        {"solver": s, "name": n, "seed": seed, "frechet": 1.0 + (i - j) ** 2 + 0.01 * seed}
        for i, s in enumerate(lab.PLANS)
        for j, n in enumerate(lab.SCHEDULES)
        for seed in (0, 1)
    ]
    found = Found(schedules=pd.DataFrame(rows))
    assert lab.schedules(found) == {
        "ddim": "edm", "dpmpp_2m": "log_snr", "unipc": "time", "dc_solver": "time",
    }  # fmt: skip
    assert lab.worst(found, "unipc") == "edm"
    assert lab.few(found) == "ddim"
