"""PIE: rounds beside a plain loop, the theory of one Gaussian, limits, bad input, and its lab."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from toolkit import PIE
from toolkit.core.declare.catalogue import catalogue
from toolkit.core.sample.draws import Draws
from toolkit.core.sample.loop import sample
from toolkit.core.sample.mixtures import Mixture
from toolkit.core.sample.plans import DDIM
from toolkit.core.sample.schedule import EDM, Betas, Schedule, clean_from
from toolkit.core.seeds import generator
from toolkit.generate.pie import (
    ddim_factor,
    expected_path,
    fixed_point,
    flow_factor,
    inverted,
    kappa,
    leading,
    mixed,
    path_variance,
    replaced,
)
from toolkit.labs.generate import pie as lab
from toolkit.labs.generate.severity import arms, exact, world

LAW = Betas.scaled_linear()
ROOTS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
KEPT = (1 - ROOTS**2).cumprod(0)  # alpha bar
UNTOLD = 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed, "pie"))


WEIGHT, CODES = 0.3 * numbers(6, 6, seed=1), numbers(4, 6, seed=2)


def noise_of(x, time, labels):
    """A network that predicts noise, far from linear."""
    return torch.tanh(x @ WEIGHT.to(x) + CODES.to(x)[labels] * (time / 1000))


DENOISER = clean_from(lambda x, level, labels: noise_of(x, level.time, labels), "noise")
X, LABELS = numbers(3, 6, seed=3), torch.tensor([0, 1, 2])
MASK = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.3, 1.0], dtype=torch.float64)
FIRST, SECOND = numbers(4, 3, 6, seed=4), numbers(4, 3, 6, seed=5)


def plain_loop(method, steps, mask, to_one=False):
    """The rounds as they are written down, with whole times and alpha bars."""
    gap = 1000 // steps
    times = [i * gap + 1 for i in range(steps)][::-1]
    times = times[steps - min(int(steps * method.strength), steps) :]
    path, edits = [X], []
    for k in range(method.rounds):
        before = path[-1]
        anchor = X if method.anchor == "original" else before
        known = X if method.known == "original" else before
        a = KEPT[times[0]]
        z = a.sqrt() * before + (1 - a).sqrt() * FIRST[k]
        for i, time in enumerate(times):
            a, low = KEPT[time], time - gap
            b = KEPT[low] if low >= 0 else (torch.ones(()) if to_one else KEPT[0])
            if mask is not None and i > 0 and method.known != "none":
                noisy = a.sqrt() * known + (1 - a).sqrt() * SECOND[k]
                z = mask * z + (1 - mask) * noisy
            e = noise_of(z, time, LABELS)
            if method.guidance > 1:
                e0 = noise_of(z, time, torch.full_like(LABELS, UNTOLD))
                e = e0 + method.guidance * (e - e0)
            clean = (z - (1 - a).sqrt() * e) / a.sqrt()
            if method.clip is not None:
                clean = clean.clamp(-method.clip, method.clip)
                e = (z - a.sqrt() * clean) / (1 - a).sqrt()
            z = b.sqrt() * clean + (1 - b).sqrt() * e
        edits.append(z)
        if mask is not None:
            z = anchor + (method.outside * (1 - mask) + method.inside * mask) * (z - anchor)
        path.append(z)
    return torch.stack(path), torch.stack(edits)


def run(method, steps=20, mask=MASK, to_one=False, x=X, **more):
    given = {"untold": UNTOLD, "noise": FIRST, "known_noise": SECOND} | more
    return method.edit(DENOISER, leading(LAW, steps, to_one=to_one), x, LABELS, mask=mask, **given)


# the rounds


@pytest.mark.parametrize("mask", [MASK, None], ids=["mask", "none"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"guidance": 1.0}, {"guidance": 0.4}, {"strength": 0.3}, {"strength": 1.0},
        {"outside": 0.2, "inside": 1.0}, {"anchor": "previous"}, {"known": "previous"},
        {"known": "none"}, {"clip": 0.8}, {"anchor": "previous", "known": "previous"},
    ],
    ids=str,
)  # fmt: skip
def test_rounds_are_those_of_a_plain_loop(changes, mask):
    method = PIE(rounds=4, **changes)
    for steps, to_one in ((20, False), (50, True)):
        made = run(method, steps, mask, to_one)
        path, edits = plain_loop(method, steps, mask, to_one)
        torch.testing.assert_close(made.path, path, rtol=0, atol=1e-11)
        torch.testing.assert_close(made.edits, edits, rtol=0, atol=1e-11)
        assert made.calls == 4 * method.kept(steps)
        assert torch.equal(made.x, made.path[-1])


def test_weak_guidance_is_none_and_does_not_ask_twice():
    sizes = []

    def counting(x, level, labels):
        sizes.append(len(x))
        return DENOISER(x, level, labels)

    for weight, each in ((0.0, 3), (1.0, 3), (1.5, 6)):
        sizes.clear()
        PIE(rounds=1, guidance=weight).edit(
            counting, leading(LAW, 8), X, LABELS, untold=UNTOLD, noise=FIRST[:1]
        )
        assert set(sizes) == {each}


def test_the_times_are_those_of_the_code():
    schedule = leading(LAW, 50)
    assert schedule.times[:3] == (981, 961, 941)
    assert schedule.times[-2:] == (1, 0)
    assert math.isclose(schedule.levels[-1].alpha ** 2, float(KEPT[0]), rel_tol=1e-12)
    assert leading(LAW, 50, to_one=True).levels[-1].std == 0
    assert leading(LAW, 7).times[0] == 6 * 142 + 1
    part = PIE(strength=0.3).part(schedule)
    assert part.steps == 15
    assert part.times[0] == 281


@pytest.mark.parametrize(
    ("steps", "strength", "kept"),
    [(50, 0.5, 25), (50, 1.0, 50), (50, 0.02, 1), (50, 0.58, 28), (20, 0.35, 7), (7, 0.5, 3)],
)
def test_kept_steps_are_the_last_floor_of_n_gamma(steps, strength, kept):
    assert PIE(strength=strength).kept(steps) == kept


def test_views_of_a_schedule_give_the_same_rounds():
    mix, x, noise = Mixture(numbers(4, 6, seed=6), 0.4), numbers(5, 6), numbers(3, 5, 6, seed=7)
    vp = Schedule.even(LAW, 12, 900, 20)
    method = PIE(rounds=3, guidance=1.0, known="original")
    found = []
    for schedule in (vp, vp.under(EDM())):
        made = method.edit(mix.denoise, schedule, x, mask=MASK, noise=noise, known_noise=noise)
        # the last level holds noise: bring both ends to one view
        found.append(made.edits[0] / schedule.levels[-1].alpha)
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)
    ends = []
    for law in (LAW, EDM()):
        schedule = Schedule((*vp.levels, LAW.at(0.0))).under(law)
        made = method.edit(mix.denoise, schedule, x, mask=MASK, noise=noise, known_noise=noise)
        ends.append(made.path)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)


def test_noise_for_all_rounds_may_be_given_once():
    method = PIE(rounds=4)
    once = run(method, noise=FIRST[0], known_noise=SECOND[0])
    each = run(method, noise=FIRST[:1].expand(4, -1, -1), known_noise=SECOND[:1].expand(4, -1, -1))
    assert torch.equal(once.path, each.path)


def test_draws_give_each_image_its_own_and_two_different_noises():
    method = PIE(rounds=3)
    one = run(method, noise=None, known_noise=None, draws=Draws([5, 6, 7]))
    again = run(method, noise=None, known_noise=None, draws=Draws([5, 6, 7]))
    assert torch.equal(one.path, again.path)
    alone = method.edit(DENOISER, leading(LAW, 20), X[1:2], LABELS[1:2], mask=MASK, untold=UNTOLD,
                        draws=Draws([6]))  # fmt: skip
    torch.testing.assert_close(alone.path[:, 0], one.path[:, 1])
    draws = Draws([5, 6, 7])
    first, second = (draws.normal((3, 6), torch.float64).transpose(0, 1) for _ in range(2))
    assert not torch.equal(first, second)
    given = run(method, noise=first, known_noise=second)
    assert torch.equal(given.path, one.path)
    # the noises of the rounds do not depend on whether there is a mask
    bare = run(method, mask=None, noise=None, draws=Draws([5, 6, 7]))
    assert torch.equal(bare.path, run(method, mask=None, noise=first).path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_that_of_the_images(dtype):
    made = run(PIE(rounds=2), x=X.to(dtype), noise=FIRST[:2], known_noise=SECOND[:2])
    assert made.path.dtype == dtype
    assert not made.path.requires_grad


# limits


def test_an_empty_mask_and_no_outside_return_the_original():
    made = run(PIE(rounds=4, outside=0.0), mask=torch.zeros(6))
    assert all(torch.equal(image, X) for image in made.path)


def test_a_full_mask_that_keeps_all_is_no_mask():
    full = run(PIE(rounds=4, outside=1.0, inside=1.0), mask=torch.ones(6))
    none = run(PIE(rounds=4, outside=0.3, inside=0.1), mask=None)  # ignored without a mask
    torch.testing.assert_close(full.path, none.path, rtol=0, atol=1e-13)


def test_outside_the_mask_an_image_moves_by_beta_1_times_the_edit():
    made, hard = run(PIE(rounds=4), mask=(MASK == 1).double()), MASK == 1
    gap, moved = made.edits - X, made.path[1:] - X
    torch.testing.assert_close(moved[..., ~hard], 0.01 * gap[..., ~hard])
    torch.testing.assert_close(moved[..., hard], 0.75 * gap[..., hard])


def test_at_full_strength_the_image_before_counts_by_alpha_only():
    method, schedule = PIE(rounds=1, strength=1.0, guidance=1.0), leading(LAW, 50)
    alpha = method.part(schedule).levels[0].alpha
    assert alpha < 0.1
    ends = [run(method, 50, None, x=x, noise=FIRST[:1]).x for x in (X, X + 1)]
    shifted = run(method, 50, None, noise=FIRST[:1] + alpha / math.sqrt(1 - alpha**2)).x
    torch.testing.assert_close(ends[1], shifted, rtol=0, atol=1e-12)


def test_mixing_with_the_previous_image_drifts_outside_and_the_original_holds():
    far = {}
    for anchor in ("original", "previous"):
        method = PIE(rounds=4, anchor=anchor, known=anchor, outside=0.2, guidance=1.0)
        far[anchor] = (run(method).path - X)[..., 2:4].square().mean((1, 2))
    assert bool((far["previous"].diff() > 0).all())
    assert far["previous"][-1] > 2 * far["original"][-1]


def test_the_hook_and_the_mixing_are_there_alone():
    level = leading(LAW, 10).levels[3]
    hook, z = replaced(X, MASK, SECOND[0]), numbers(3, 6, seed=9)
    assert hook(z, 0, level) is z
    wanted = MASK * z + (1 - MASK) * (level.alpha * X + level.std * SECOND[0])
    torch.testing.assert_close(hook(z, 1, level), wanted)
    assert mixed(z, X, None, 0.1, 0.2) is z
    torch.testing.assert_close(mixed(z, X, MASK, 0.0, 1.0), X + MASK * (z - X))


# the way back by inversion


def test_inversion_comes_back_as_steps_grow_small():
    mix, x = Mixture(numbers(3, 6, seed=6), 0.5), numbers(5, 6, seed=8)
    off = []
    for steps in (25, 100, 400):
        method = PIE(rounds=1, back="inversion", guidance=1.0)
        made = method.edit(mix.denoise, leading(LAW, steps), x)
        off.append(float((made.x - x).abs().max()))
        assert made.calls == 2 * method.kept(steps)
    assert off[0] > 2 * off[1] > 4 * off[2]
    assert off[2] < 0.02


def test_inversion_undoes_a_step_whose_noise_is_known():
    constant = clean_from(lambda x, level, *_: SECOND[0], "noise")
    schedule = leading(LAW, 20, to_one=True).last(9)
    begin = schedule.levels[0]
    torch.testing.assert_close(
        inverted(constant, schedule, X), begin.alpha * X + begin.std * SECOND[0]
    )


def test_inversion_is_told_the_source():
    told = []

    def listening(x, level, labels):
        told.append(labels.tolist())
        return DENOISER(x, level, labels)

    method = PIE(rounds=1, back="inversion", guidance=1.0)
    for more, wanted in (
        ({"source": [1, 1, 1]}, [1] * 3),
        ({"untold": 3}, [3] * 3),
        ({}, [0, 1, 2]),
    ):
        told.clear()
        method.edit(listening, leading(LAW, 8), X, LABELS, **more)
        assert told[0] == wanted
        assert told[-1] == [0, 1, 2]


# one Gaussian


def gaussian(spread=0.5, seed=11):
    mean = numbers(1, 16, seed=seed)
    return Mixture(mean, spread), mean


@pytest.mark.parametrize(
    ("strength", "factor"), [(0.1, 0.83), (0.2, 0.66), (0.3, 0.52), (0.5, 0.30), (0.7, 0.15)]
)
def test_kappa_of_stable_diffusions_noise(strength, factor):
    level = PIE(strength=strength).part(leading(LAW, 500)).levels[0]
    assert abs(kappa(level, 0.5) - factor) < 0.006


@pytest.mark.parametrize("law", [LAW, EDM()])
def test_the_flow_of_one_gaussian(law):
    mix, mean = gaussian()
    levels = Schedule.even_log_snr(LAW, 2000, 400, 0).under(law).levels
    schedule, start = Schedule((*levels, law.at(0.0))), levels[0]
    z = numbers(4, 16)
    made = sample(mix.denoise, schedule, DDIM(), z).x
    wanted = mean + flow_factor(start, 0.5) * (z - start.alpha * mean)
    torch.testing.assert_close(made, wanted, rtol=0, atol=6e-3)
    exactly = mean + ddim_factor(schedule, 0.5) * (z - start.alpha * mean)
    torch.testing.assert_close(made, exactly, rtol=0, atol=1e-10)


@pytest.mark.parametrize("beta", [1.0, 0.75, 0.3])
def test_without_noise_the_path_is_the_formula(beta):
    mix, mean = gaussian()
    schedule, x = leading(LAW, 300, to_one=True), 2 * numbers(3, 16)
    method = PIE(rounds=6, strength=0.3, inside=beta, guidance=1.0, known="none")
    made = method.edit(mix.denoise, schedule, x, mask=torch.ones(16), noise=torch.zeros(3, 16))
    part = method.part(schedule)
    factor = part.levels[0].alpha * ddim_factor(part, 0.5)
    torch.testing.assert_close(
        made.path, expected_path(x, mean, factor, beta, 6), rtol=0, atol=1e-10
    )
    assert abs(factor - kappa(part.levels[0], 0.5)) < 0.01
    rest = fixed_point(x, mean, factor, beta)
    gaps = (made.path - rest).norm(dim=(1, 2))
    torch.testing.assert_close(gaps[1:] / gaps[:-1], torch.full((6,), beta * factor).double())


def test_the_mean_over_noises_goes_to_the_fixed_point():
    mix, mean = gaussian()
    x = numbers(1, 16).expand(2000, 16).contiguous()
    schedule = leading(LAW, 250, to_one=True)
    method = PIE(rounds=8, strength=0.3, inside=0.75, guidance=1.0, known="none")
    noise = torch.randn(8, 2000, 16, dtype=torch.float64, generator=generator(0, "mean"))
    made = method.edit(mix.denoise, schedule, x, mask=torch.ones(16), noise=noise).path
    part = method.part(schedule)
    factor = part.levels[0].alpha * ddim_factor(part, 0.5)
    said = expected_path(x[:1], mean, factor, 0.75, 8)[:, 0]
    torch.testing.assert_close(made.mean(1), said, rtol=0, atol=0.03)
    wide = torch.tensor(path_variance(part.levels[0], 0.5, 0.75, 8)).double()
    torch.testing.assert_close(made.var(1).mean(1)[1:], wide[1:], rtol=0.05, atol=0)


def test_without_a_mask_the_noises_spread_as_wide_as_the_class():
    level = PIE(strength=0.2).part(leading(LAW, 50)).levels[0]
    wide = path_variance(level, 0.7, 1.0, 300)
    assert wide[0] == 0
    assert all(b > a for a, b in itertools.pairwise(wide[:20]))
    assert math.isclose(wide[-1], 0.49, rel_tol=1e-12)


def test_a_class_without_spread_is_reached_in_one_round():
    level = leading(LAW, 50).levels[20]
    assert kappa(level, 0.0) == 0
    assert torch.equal(expected_path(X, X[:1], 0.0, 1.0, 2)[1], X[:1].expand(3, -1))


# refused before any work


def refusing(x, level, *labels):
    raise AssertionError("the network was asked")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"strength": 0.0}, "strength"), ({"strength": 1.1}, "strength"), ({"rounds": 0}, "rounds"),
        ({"inside": 1.2}, "inside"), ({"outside": -0.1}, "outside"),
        ({"guidance": -1.0}, "guidance"),
        ({"back": "code"}, "back"), ({"anchor": "none"}, "anchor"), ({"known": "all"}, "known"),
        ({"clip": 0.0}, "clip"), ({"strength": float("nan")}, "strength"),
    ],
)  # fmt: skip
def test_values_outside_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        PIE(**changes)


@pytest.mark.parametrize(
    ("method", "more", "word"),
    [
        (PIE(strength=0.01), {}, "keeps none; give at least 0.05"),
        (PIE(), {"mask": torch.ones(5)}, r"mask: shape \(5,\) does not broadcast"),
        (PIE(), {"mask": torch.ones(2, 3, 6)}, "mask"),
        (PIE(), {"mask": 255 * torch.ones(6)}, "divide bytes by 255"),
        (PIE(), {"noise": None}, "noise: give it, or draws"),
        (PIE(), {"noise": None, "draws": Draws([1])}, "1 seeds for 3 images"),
        (PIE(rounds=2), {"noise": FIRST}, "noise: shape"),
        (PIE(), {"known_noise": SECOND[:, :2]}, "known_noise: shape"),
        (PIE(), {"labels": [0, 1]}, "labels: 2 labels for 3 images"),
        (PIE(), {"untold": None}, "untold"),
        (PIE(back="inversion"), {"untold": None}, "untold"),
        (PIE(), {"x": X[0]}, "x: images"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_network_is_asked(method, more, word):
    given = {"x": X, "labels": LABELS, "mask": MASK, "untold": UNTOLD, "noise": FIRST[:1],
             "known_noise": SECOND[:1]} | more  # fmt: skip
    if "noise" not in more and "known_noise" not in more:
        method = dataclasses.replace(method, rounds=1)
    elif "known_noise" in more:
        given["noise"] = FIRST[0]
    with pytest.raises(ValueError, match=word):
        method.edit(refusing, leading(LAW, 20), given.pop("x"), given.pop("labels"), **given)


def test_whole_numbers_are_no_images():
    with pytest.raises(TypeError, match="x: images"):
        run(PIE(), x=X.long())


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: leading(LAW, 0), "steps"),
        (lambda: leading(LAW, 1001), "steps"),
        (lambda: leading(LAW, 50, offset=0), "offset"),
        (lambda: flow_factor(leading(LAW, 50).levels[0], -1.0), "spread"),
        (lambda: fixed_point(X, X, 1.0), "kappa"),
        (lambda: fixed_point(X, X, 0.5, 1.5), "beta"),
        (lambda: expected_path(X, X, 0.5, 0.5, 0), "rounds"),
    ],
)
def test_pieces_refuse_by_name(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_a_network_that_breaks_down_is_named():
    def broken(x, level, labels):
        return DENOISER(x, level, labels) * (math.nan if level.time < 300 else 1)

    with pytest.raises(FloatingPointError, match="not finite"):
        PIE(rounds=2).edit(broken, leading(LAW, 20), X, LABELS, untold=UNTOLD, noise=FIRST[0])


# the lab


def test_it_is_in_the_catalogue():
    assert {entry.slug: entry.colour for entry in catalogue()}["pie"] == "#6B8E23"


def test_masks_take_a_quarter_of_the_pixels_and_seeds_share_no_image():
    for pair in world.PAIRS:
        mask = world.roi(*pair, "ci")
        assert mask.shape == (1, 8, 8)
        assert mask.sum() == 16
        assert set(mask.unique().tolist()) == {0.0, 1.0}
    tasks = [world.task(seed, 2, "ci").x.flatten(1) for seed in (0, 1, 400, 401)]
    every = torch.cat(tasks)
    assert len(every.unique(dim=0)) == len(every)


def test_log_odds_rms_and_recognition():
    this = world.task(0, 2, "ci")
    odds = world.log_odds(this.x, this.target, "ci")
    scores = lab.denoiser.features(this.x, "ci")[1].double().softmax(1)
    wanted = scores.gather(1, this.target[:, None])[:, 0]
    torch.testing.assert_close(odds.sigmoid(), wanted)
    assert torch.equal(world.rms(torch.full((2, 1, 4, 4), 3.0)), torch.tensor([3.0, 3.0]).double())
    own, known = numbers(4, 5), {0: numbers(9, 5, seed=1), 1: numbers(9, 5, seed=2)}
    source = torch.tensor([0, 0, 1, 1])
    assert world.recognised(own, own, source, known) == 100
    assert world.recognised(-own, own, source, known) == 0


def test_slerp_keeps_lengths_of_equal_length_and_ends_where_it_should():
    a, b = (F.normalize(numbers(3, 7, seed=s), dim=1) for s in (1, 2))
    torch.testing.assert_close(arms.slerp(a, b, 0.0), a)
    torch.testing.assert_close(arms.slerp(a, b, 1.0), b)
    torch.testing.assert_close(arms.slerp(a, b, 0.3).norm(dim=1), torch.ones(3).double())


def test_equal_confidence_is_interpolated_and_never_beyond_what_was_measured():
    sure, change = [1.0, 11.0, 31.0], [0.0, 10.0, 14.0]
    assert arms.at_equal(sure, change, 6.0) == 5.0
    assert arms.at_equal(sure, change, 21.0) == 12.0
    assert arms.at_equal(sure, change, 0.5) == 0.0
    assert math.isnan(arms.at_equal(sure, change, 40.0))
    assert arms.at_equal([1.0, 9.0, 5.0], change, 5.0) == 5.0


def test_known_classes_paths_follow_the_formula_in_the_mean():
    found = exact.courses("one Gaussian", 0.5, 1.0, 3, "ci")
    mean, said = (torch.tensor(found[name]) for name in ("mean", "formula"))
    torch.testing.assert_close(mean, said, rtol=0.02, atol=1e-3)
    assert found["path"][-1] > 3 * found["mean"][-1]
    cosine, langevin, share = exact.direction("one Gaussian", 0.5, 3, "ci")
    assert cosine > 0.999
    assert 1 < langevin < 2
    assert 0 < share < 1


def test_the_change_kept_counts_the_last_three_rounds():
    assert lab.kept([4.0, 9.0, 2.0, 3.0, 1.0]) == 50.0
