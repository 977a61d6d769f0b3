"""Exact denoisers, scores and densities, and the laws of the noise that goes with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from toolkit.core.sample.draws import Draws, gamma_quantiles, student_noise
from toolkit.core.sample.mixtures import Mixture, log_kernel
from toolkit.core.sample.schedule import EDM, LinearVP

FREEDOMS = (0.5, 4.0, 64.0, 1e6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(size: int = 3, scales: object = (0.5, 0.3, 0.7), **more: object) -> Mixture:
    means = 2 * torch.randn(3, size, dtype=torch.float64, generator=generator())
    return Mixture(means, scales, [1.0, 2.0, 3.0], **more)


def states(size: int = 3, count: int = 4) -> torch.Tensor:
    return 3 * torch.randn(count, size, dtype=torch.float64, generator=generator(1))


def integrated(mix: Mixture, z: torch.Tensor, sigma: float, freedom: float) -> tuple:
    """Log density and posterior mean of one state by brute force over the noise's width."""
    n, half = len(z), freedom / 2
    reach = max(200 / freedom, 20 / math.sqrt(freedom))
    nodes = 200_001 if freedom > 1e4 else 20_001
    u = torch.linspace(-reach - 25, min(reach, 8) + 5, nodes, dtype=torch.float64)
    squared = (z - mix.means).square().sum(1)
    width = mix.scales**2 + (sigma**2 / u.exp())[:, None]
    logs = half * (u - u.exp()) + half * math.log(half) - math.lgamma(half)
    logs = logs[:, None] + mix.log_weights - n / 2 * (2 * math.pi * width).log()
    logs = logs - squared / (2 * width)
    share, kept = logs.flatten().softmax(0).view_as(logs), mix.scales**2 / width
    mean = (share * (1 - kept)).sum(0) @ mix.means + (share * kept).sum() * z
    return logs.flatten().logsumexp(0) + (u[1] - u[0]).log(), mean


@pytest.mark.parametrize("freedom", FREEDOMS)
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_student_noise_on_a_mixture_is_integrated_exactly(freedom: float, sigma: float) -> None:
    mix, x, level = mixture(), states(count=2), EDM().level(sigma)
    density = mix.log_density(x, level, freedom=freedom)
    mean = mix.denoise(x, level, freedom=freedom)
    for row in range(2):
        wanted = integrated(mix, x[row], sigma, freedom)
        torch.testing.assert_close(density[row], wanted[0], rtol=0, atol=1e-8)
        torch.testing.assert_close(mean[row], wanted[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("freedom", [2.0, 64.0, math.inf])
@pytest.mark.parametrize("scales", [0.0, (0.5, 0.3, 0.7)])
@pytest.mark.parametrize("law", [EDM(), LinearVP()], ids=["edm", "vp"])
def test_scores_are_gradients_and_say_the_posterior_mean(freedom, scales, law) -> None:
    mix, level = mixture(scales=scales), law.level(0.6)
    x = states().requires_grad_()
    (gradient,) = torch.autograd.grad(mix.log_density(x, level, freedom=freedom).sum(), x)
    torch.testing.assert_close(mix.score(x, level, freedom=freedom), gradient)
    if math.isinf(freedom):  # Tweedie's formula, which holds for Gaussian noise alone
        mean = (x + level.std**2 * gradient) / level.alpha
        torch.testing.assert_close(mix.denoise(x, level), mean)


def test_densities_sum_to_one() -> None:
    mix = mixture(1)
    for law, time in ((EDM(), 0.7), (LinearVP(), 0.3)):
        for freedom in (3.0, math.inf):
            angle = torch.linspace(-1.57, 1.57, 2001, dtype=torch.float64)
            x = 3 * angle.tan()[:, None]  # the heavy tail included
            density = mix.log_density(x, law.level(time), freedom=freedom).exp()
            total = torch.trapezoid(density * 3 / angle.cos().square(), angle)
            assert float(total) == pytest.approx(1, abs=1e-6)


def test_one_gaussian_has_its_closed_form() -> None:
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    mix, level, x = Mixture(mean, 0.5), LinearVP().level(0.4), states(2)
    gain = level.alpha * 0.25 / (level.alpha**2 * 0.25 + level.std**2)
    torch.testing.assert_close(mix.denoise(x, level), mean + gain * (x - level.alpha * mean))


@pytest.mark.parametrize("scales", [0.0, 0.4])
def test_much_freedom_is_gaussian_noise_up_to_its_inverse(scales: float) -> None:
    mix, x, level = mixture(scales=scales), states(), EDM().level(0.8)
    errors = [
        float((mix.denoise(x, level, freedom=d) - mix.denoise(x, level)).abs().max())
        for d in (1e3, 1e4, 1e5)
    ]
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize("freedom", [1, 2.5, 50, 5000])
def test_points_follow_the_field_of_charges(freedom: float) -> None:
    """The field of PFGM++ by brute force: E_x / E_r = (x - mean) / r."""
    mix, x, sigma = mixture(scales=0.0), states(), 0.7
    r, n = sigma * math.sqrt(freedom), 3
    offsets = x[:, None] - mix.means
    falls = -(n + freedom) / 2 * (offsets.square().sum(-1) + r**2).log() + mix.log_weights
    falls = (falls - falls.amax(1, keepdim=True)).exp()[..., None]
    field = (offsets * falls).sum(1) / (r * falls).sum(1)
    mean = mix.denoise(x, EDM().level(sigma), freedom=freedom)
    torch.testing.assert_close((x - mean) / r, field, rtol=1e-9, atol=1e-12)
    # components of almost no width agree with points
    near = mixture(scales=1e-7).denoise(x, EDM().level(sigma), freedom=freedom)
    torch.testing.assert_close(near, mean, rtol=1e-8, atol=1e-8)


def test_one_point_is_found_from_anywhere() -> None:
    point = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    mix, x = Mixture(point), torch.randn(5, 2, 2, generator=generator()) * 100
    for freedom in (1.0, 64.0, math.inf):
        found = mix.denoise(x, EDM().level(3.0), freedom=freedom)
        assert torch.equal(found, point.expand(5, 2, 2))
        assert found.dtype == torch.float32


def test_the_posterior_mean_turns_with_the_data() -> None:
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator(2)))
    one, x, level = mixture(), states(), EDM().level(0.6)
    other = Mixture(one.means @ turn.T, one.scales, [1.0, 2.0, 3.0])
    for freedom in (5.0, math.inf):
        turned = other.denoise(x @ turn.T, level, freedom=freedom)
        torch.testing.assert_close(turned, one.denoise(x, level, freedom=freedom) @ turn.T)


@pytest.mark.parametrize("freedom", [1, 5, 50, 5000, math.inf])
def test_the_kernel_is_the_students_law(freedom: float) -> None:
    x, sigma = states(4), 0.6
    law = stats.multivariate_t(shape=sigma**2 * np.eye(4), df=freedom)
    wanted = torch.from_numpy(law.logpdf(x.numpy()))
    torch.testing.assert_close(log_kernel(x, sigma, freedom), wanted, rtol=1e-9, atol=1e-9)
    if freedom < math.inf:  # the form of the paper, up to a constant
        paper = -(4 + freedom) / 2 * (x.square().sum(1) + freedom * sigma**2).log()
        gaps = log_kernel(x, sigma, freedom) - paper
        torch.testing.assert_close(gaps, gaps[:1].expand(4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("freedom", [0.7, 2.0, 40.0])
def test_drawn_noise_has_the_radius_of_the_students_law(freedom: float) -> None:
    size = 6
    noise = Draws(range(3000)).student((2, 3), freedom, torch.float64)
    ratio = noise.flatten(1).square().sum(1) / freedom  # R^2 / r^2 at sigma = 1
    law = stats.betaprime(size / 2, freedom / 2)
    assert stats.kstest(ratio.numpy(), law.cdf).pvalue > 1e-3
    # one tail per sample: coordinates of a sample are uncorrelated, their squares are not
    squares = noise.flatten(1).square().log()
    assert float(torch.corrcoef(squares.T)[0, 1]) > 0.05 * (freedom < 10)


def test_the_beta_form_of_the_radius_agrees() -> None:
    draws = torch.distributions.Beta(3.0, 1.25)
    torch.manual_seed(0)
    share = draws.sample((4000,)).double()
    ratio = Draws(range(4000)).student((6,), 2.5, torch.float64).square().sum(1) / 2.5
    assert stats.ks_2samp((share / (1 - share)).numpy(), ratio.numpy()).pvalue > 1e-3


def test_infinite_freedom_draws_the_same_normal_numbers() -> None:
    one, two = Draws([3, 4]), Draws([3, 4])
    assert torch.equal(one.normal((5,)), two.student((5,), math.inf))
    heavy = Draws([3, 4]).student((5,), 4.0, torch.float64)
    ratio = heavy / Draws([3, 4]).normal((5,), torch.float64)
    torch.testing.assert_close(ratio, ratio[:, :1].expand(2, 5))


def test_a_seed_draws_the_same_in_any_batch_order_and_precision() -> None:
    both = Draws([7, 8], "a")
    first, second = both.normal((3, 2)), both.normal((3, 2))
    assert not torch.equal(first, second)
    alone = Draws([8], "a")
    assert torch.equal(alone.normal((3, 2))[0], first[1])
    assert torch.equal(alone.normal((3, 2))[0], second[1])
    assert not torch.equal(Draws([8], "b").normal((3, 2))[0], first[1])
    half = Draws([7, 8], "a").normal((3, 2), torch.float64)
    assert torch.equal(half.float(), first)


def test_noise_of_a_batch_from_one_generator() -> None:
    shape = (3000, 2, 3)
    plain = torch.randn(shape, generator=generator())
    assert torch.equal(student_noise(shape, generator=generator()), plain)
    heavy = student_noise(shape, 2.5, generator())
    ratio = (heavy / plain).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    law = stats.betaprime(3, 1.25)
    radius = heavy.double().flatten(1).square().sum(1) / 2.5
    assert stats.kstest(radius.numpy(), law.cdf).pvalue > 1e-3
    for shape in ((), (3,), (0, 2)):
        with pytest.raises(ValueError, match="shape"):
            student_noise(shape)
    with pytest.raises(ValueError, match="D must be positive"):
        student_noise((2, 2), 0.0)


def test_quantiles_of_the_width() -> None:
    shares = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)
    wanted = stats.gamma(2.5, scale=1 / 2.5).ppf(shares.numpy())
    torch.testing.assert_close(gamma_quantiles(shares, 5.0), torch.from_numpy(wanted))


def test_labels_restrict_the_components() -> None:
    mix, x, level = mixture(classes=[0, 1, 1]), states(), EDM().level(0.5)
    assert mix.untold == 2
    only = Mixture(mix.means[1:], mix.scales[1:], [2.0, 3.0])
    told = mix.denoise(x, level, torch.tensor([1, 1, 2, 2]))
    torch.testing.assert_close(told[:2], only.denoise(x[:2], level))
    torch.testing.assert_close(told[2:], mix.denoise(x[2:], level))
    density = mix.log_density(x, level, [1, 1, 1, 1], freedom=3.0)
    torch.testing.assert_close(density, only.log_density(x, level, freedom=3.0))


def test_draws_of_a_mixture_have_its_moments() -> None:
    mix = Mixture(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), [0.5, 1.0], [3.0, 1.0])
    x, chosen = mix.draw(20_000, generator())
    assert float((chosen == 1).double().mean()) == pytest.approx(0.25, abs=0.015)
    assert float(x[:, 0].mean()) == pytest.approx(1.0, abs=0.05)
    assert float(x[chosen == 1, 1].std()) == pytest.approx(1.0, abs=0.03)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("freedom", [0, -2.0, math.nan])
def test_freedom_must_be_positive(freedom: float) -> None:
    x, level = states(), EDM().level(1.0)
    for call in (
        lambda: mixture().denoise(x, level, freedom=freedom),
        lambda: Draws([0]).student((2,), freedom),
        lambda: log_kernel(x, 1.0, freedom),
    ):
        with pytest.raises(ValueError, match="freedom: D must be positive"):
            call()
    with pytest.raises(TypeError, match="freedom"):
        Draws([0]).student((2,), "4")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Mixture(torch.zeros(3)), "means"),
        (lambda: Mixture(torch.zeros(3, 2), -1.0), "scales"),
        (lambda: Mixture(torch.zeros(3, 2), 0.0, [1.0, 0.0, 1.0]), "weights"),
        (lambda: Mixture(torch.zeros(3, 2), 0.0, [1.0]), "weights"),
        (lambda: Mixture(torch.zeros(3, 2), 0.0, classes=[0, 1]), "classes"),
        (lambda: mixture().denoise(torch.zeros(2, 4), EDM().level(1.0)), r"shape \(2, 4\)"),
        (lambda: mixture().denoise(states(), EDM().level(1.0), [0] * 4), "labels.*no classes"),
        (
            lambda: mixture(classes=[0, 2, 2]).denoise(states(), EDM().level(1.0), [1] * 4),
            "no component is of class 1",
        ),
        (
            lambda: mixture(classes=[0, 1, 1]).denoise(states(), EDM().level(1.0), [5] * 4),
            "labels hold 5",
        ),
        (lambda: mixture(scales=0.0).denoise(states(), EDM().level(0.0)), "noise above 0"),
        (lambda: mixture().denoise(states(), EDM().level(0.0), freedom=3.0), "noise above 0"),
        (lambda: log_kernel(states(), 0.0), "sigma"),
        (lambda: Draws([]), "seeds"),
        (lambda: Draws([-1]), "seed"),
        (lambda: Draws([0]).normal((2, 0)), "shape"),
        (lambda: Draws([0, 1]).normal((3, 10**6, 10**6)), "shape.*GB are free.*smaller"),
    ],
)
def test_bad_input_is_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_many_components_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.core.sample import mixtures

    x, level = states(count=7), EDM().level(0.5)
    whole = [mixture().denoise(x, level, freedom=d) for d in (4.0, math.inf)]
    monkeypatch.setattr(mixtures, "MOST", 200)
    parts = [mixture().denoise(x, level, freedom=d) for d in (4.0, math.inf)]
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
