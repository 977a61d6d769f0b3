"""Noise laws, their inverses and views, and the levels that a schedule accepts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from toolkit.core.sample.schedule import (
    EDM,
    Betas,
    Level,
    LinearVP,
    Schedule,
    clean_from,
    rescaled,
)

LAWS = {
    "edm": (EDM(), [80.0, 1.3, 0.002]),
    "linear": (LinearVP(), [1.0, 0.4, 1e-3]),
    "constant": (LinearVP(2.0, 2.0), [1.0, 0.4, 1e-3]),
    "ddpm": (Betas.linear(), [999, 500.5, 17, 0]),
    "stable diffusion": (Betas.scaled_linear(), [999, 500.5, 17, 0]),
    "cosine": (Betas.cosine(), [999, 500.5, 17, 0]),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_time_is_found_again_from_its_noise(name: str) -> None:
    law, times = LAWS[name]
    for time in times:
        assert law.time(law.sigma(time)) == pytest.approx(time, rel=1e-9, abs=1e-9)
        level = law.level(time)
        assert level.time == time
        assert level.sigma == pytest.approx(law.sigma(time), rel=1e-15)
        assert level.log_snr == pytest.approx(-math.log(law.sigma(time)), abs=1e-12)
        size = level.alpha**2 + level.std**2 if law.preserving else level.alpha
        assert size == pytest.approx(1, abs=1e-15)


def test_the_linear_law_is_the_integral_of_its_rate() -> None:
    law = LinearVP(0.1, 20.0)
    times = torch.linspace(0, 0.7, 20_001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + times * 19.9, times)
    assert law.level(0.7).alpha ** 2 == pytest.approx(math.exp(-float(integral)), rel=1e-9)


def test_discrete_laws_are_products_of_their_rates() -> None:
    for law, betas in (
        (Betas.linear(), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        (
            Betas.scaled_linear(),
            torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2,
        ),
    ):
        kept = (1 - betas).cumprod(0)
        for time in (0, 1, 500, 999):
            assert law.level(time).alpha ** 2 == pytest.approx(float(kept[time]), rel=1e-12)
    signal = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (501, 0)]
    assert Betas.cosine().level(500).alpha ** 2 == pytest.approx(signal[0] / signal[1], rel=1e-9)


def test_views_hold_the_same_state() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    one = Schedule.edm(9, 0.01, 50.0)
    law = LinearVP()
    two = one.under(law)
    assert two.sigmas == pytest.approx(one.sigmas, rel=1e-15)
    for here, there in zip(one.levels, two.levels, strict=True):
        x = here.alpha * clean + here.std * noise
        wanted = there.alpha * clean + there.std * noise
        torch.testing.assert_close(rescaled(x, here, there), wanted, rtol=1e-14, atol=1e-14)
    assert two.levels[-1] == (0, 1, 0)
    back = two.under(EDM())
    assert back.sigmas == pytest.approx(one.sigmas, rel=1e-15)
    with pytest.raises(ValueError, match="equal noise"):
        rescaled(clean, one.levels[0], two.levels[1])


def test_the_levels_of_edm() -> None:
    found = Schedule.edm(18)
    wanted = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert found.sigmas == pytest.approx([*wanted, 0.0], rel=1e-12)
    assert found.steps == 18
    assert found.sigmas[0] == 80  # exactly: states start there
    ends = Schedule.edm(3, 0.1, 10, to_zero=False)
    assert (ends.steps, ends.sigmas[0]) == (3, 10)
    assert ends.sigmas[-1] == pytest.approx(0.1)


def test_even_levels() -> None:
    assert Schedule.even(LinearVP(), 4, 1.0, 0.2).times == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    logs = [level.log_snr for level in Schedule.even_log_snr(LinearVP(), 5, 1.0, 1e-3).levels]
    gaps = [b - a for a, b in itertools.pairwise(logs)]
    assert gaps == pytest.approx([gaps[0]] * 5)


def test_the_last_steps_alone() -> None:
    whole = Schedule.edm(10)
    part = whole.last(4)
    assert part.levels == whole.levels[6:]
    for steps in (0, 11):
        with pytest.raises(ValueError, match="steps"):
            whole.last(steps)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([1.0], "0 steps"),
        ([], "0 steps"),
        ([1.0, 2.0], "must fall.*0 to 1"),
        ([2.0, 1.0, 1.0], "must fall.*1 to 2"),
        ([2.0, 0.0, -1.0], "level 1 of 2 has no noise"),
        ([2.0, math.nan], "level 1.*finite"),
        ([math.inf, 1.0], "level 0.*finite"),
        ([2.0, -1.0], "level 1"),
    ],
)
def test_levels_that_do_not_fall_are_refused(times: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule.of(EDM(), times)


def test_noise_that_falls_while_times_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="times"):
        Schedule((Level(1.0, 1.0, 2.0), Level(2.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Schedule.edm(0), "steps: at least 1"),
        (lambda: Schedule.edm(-3), "steps"),
        (lambda: Schedule.edm(4, low=0.0), "low"),
        (lambda: Schedule.edm(4, low=2, high=1), "low, high"),
        (lambda: Schedule.edm(4, rho=0), "rho"),
        (lambda: Schedule.even(LinearVP(), 0, 1, 0), "steps"),
        (lambda: LinearVP(0.0, 1.0), "low, high"),
        (lambda: LinearVP(2.0, 1.0), "low, high"),
        (lambda: Betas([0.1]), "betas"),
        (lambda: Betas([0.1, 1.0]), "betas"),
        (lambda: Betas.linear().sigma(1000), "time: from 0 to 999"),
        (lambda: Betas.linear().time(1e-9), "sigma"),
        (lambda: clean_from(torch.sin, "score"), "what"),
    ],
)
def test_bad_numbers_are_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_steps_are_whole_numbers() -> None:
    for steps in (2.5, "3", True):
        with pytest.raises(TypeError, match="steps"):
            Schedule.edm(steps)


@pytest.mark.parametrize("law", [EDM(), LinearVP()])
def test_predictions_of_noise_and_velocity_say_the_same_clean_sample(law: object) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    level = law.level(0.4)
    x = level.alpha * clean + level.std * noise
    velocity = level.alpha * noise - level.std * clean
    for what, said in (("noise", noise), ("velocity", velocity), ("clean", clean)):
        denoiser = clean_from(lambda x, level, said=said: said, what)
        torch.testing.assert_close(denoiser(x, level), clean, rtol=1e-12, atol=1e-12)
