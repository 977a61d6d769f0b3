"""The worlds and arms of DC-Solver's lab, against the toolkit's own mixtures and loop."""

from __future__ import annotations

import pytest
import torch

from toolkit.core.sample.guidance import guided
from toolkit.core.sample.plans import DDIM, UniPC
from toolkit.labs.exercises import dc_solver as exercises
from toolkit.labs.generate import dc_solver as lab
from toolkit.labs.generate.compensation import arms, worlds


@pytest.mark.parametrize("kind", worlds.KINDS)
@pytest.mark.parametrize("weight", [1.0, 7.5])
def test_the_quick_denoiser_is_the_mixtures_own(kind, weight):
    data, world = worlds.mixture(kind, 3), worlds.mixtures(kind, 3, "ci")
    x, labels = world.noise(6, "test")
    for time in (1.0, 0.4, 1e-3):
        level = world.law.level(time)
        got = world.network(labels, weight)(level.alpha * x, level)
        wanted = guided(data.denoise, labels, weight, data.untold)(level.alpha * x, level)
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


def test_seeds_and_streams_have_worlds_and_noises_of_their_own():
    one, two = (worlds.mixtures("round", seed, "ci") for seed in (0, 1))
    assert not torch.equal(one.noise(4, "search")[0], two.noise(4, "search")[0])
    assert not torch.equal(one.noise(4, "search")[0], one.noise(4, "held out")[0])
    assert not torch.equal(worlds.mixture("round", 0).means, worlds.mixture("sharp", 0).means)


def test_predictions_of_a_predictor_belong_to_the_states_that_they_are_used_at():
    world = worlds.mixtures("round", 0, "ci")
    x, labels = world.noise(8, "held out")
    assert arms.alignment(world, DDIM(), 5, 4.0, x, labels) == [0.0] * 4
    kept = arms.alignment(world, UniPC(2), 5, 4.0, x, labels)
    assert len(kept) == 4
    assert min(kept) > 0
    moved = arms.alignment(world, arms.OURS.given([1, 1, 1, 1, 0.0]), 5, 4.0, x, labels)
    assert moved[:3] == kept[:3]
    assert moved[3] != kept[3]


def test_heun_has_as_many_calls_as_the_others_and_the_static_ratio_is_the_best_of_its_grid():
    world = worlds.mixtures("round", 0, "ci")
    x, labels = world.noise(8, "search")
    assert arms.heun(world, 6, x, labels, 1.0).shape == x.shape
    with pytest.raises(ValueError, match="even number"):
        arms.heun(world, 5, x, labels, 1.0)
    goal = world.truth(x, labels, 1.0)
    off = {r: arms.distance(world.run(arms.OURS.given([r]), 5, x, labels, 1.0), goal)
           for r in (0.8, 1.0, 1.3)}  # fmt: skip
    assert arms.best_static(world, arms.OURS, 5, 1.0, 8, tuple(off)) == min(off, key=off.get)


def test_the_record_of_a_mixture_fits_its_settings():
    record = lab.mixture_run("sharp", 5, "ci")
    places = lab.settings("ci")
    assert all(len(record[name]) == len(places) for name in ("unipc", "dc", "cpr", "heun"))
    assert record["static 1"] == record["unipc"]
    assert len(record["ratios"]) == sum(calls for _, calls in places)
    assert [e is None for e in record["heun"]] == [calls % 2 == 1 for _, calls in places]


def test_one_ratio_moves_and_the_curve_passes_through_the_searched_error():
    world = worlds.mixtures("round", 0, "ci")
    x, labels = world.noise(8, "held out")
    goal, ratios = world.truth(x, labels, 1.0), [1.0, 1.0, 1.1, 1.2, 1.3]
    here = arms.distance(world.run(arms.OURS.given(ratios), 5, x, labels, 1.0), goal)
    curve = arms.along(world, ratios, 5, 1.0, 3, (0.5, 1.2), x, labels, goal)
    assert curve[1] == here
    assert curve[0] != here


def test_checks_of_the_exercises(capsys):
    exercises.check_weight(3)
    assert "+3, -3, +1" in capsys.readouterr().out
    exercises.check_weight(2)
    assert "straight line" in capsys.readouterr().out
