"""PFGM++: laws of the noise, field, loss, sampler, probes, and its lab's pieces."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from toolkit import PFGMpp
from toolkit.core.sample.draws import Draws, student_noise
from toolkit.core.sample.loop import sample
from toolkit.core.sample.mixtures import Mixture, log_kernel
from toolkit.core.sample.plans import Heun
from toolkit.core.sample.precondition import Preconditioned, drawn_sigmas
from toolkit.core.sample.schedule import EDM, Schedule
from toolkit.generate import pfgmpp as package
from toolkit.generate.pfgmpp import (
    Told,
    acted_on,
    beta_quantiles,
    drawn_betas,
    drawn_taus,
    excess,
    few_bits,
    field,
    injected,
    posterior_mean,
    quantised,
    radii,
)
from toolkit.labs.generate.tails import exact, network

FREEDOMS = (0.5, 4.0, 64.0, 5000.0)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


# the law of the noise


@pytest.mark.parametrize("D", [1.0, 5.0, 50.0, 5000.0])
def test_kernel_is_the_multivariate_student_t_law(D: float) -> None:
    x, y, sigma, N = normal(6, 7), normal(7, seed=1), 0.8, 7
    wanted = stats.multivariate_t(y.numpy(), sigma**2 * np.eye(N), df=D).logpdf(x.numpy())
    r = PFGMpp(D=D).r(sigma)
    ours = -(N + D) / 2 * ((x - y).square().sum(1) + r**2).log()
    shift = torch.from_numpy(wanted) - ours
    torch.testing.assert_close(shift, shift[:1].expand(6), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_kernel(x - y, sigma, D), torch.from_numpy(wanted))


@pytest.mark.parametrize("D", FREEDOMS)
def test_beta_and_gamma_samplers_have_the_radii_of_beta_prime(D: float) -> None:
    N, sigma, count = 12, 0.7, 4000
    law = stats.betaprime(N / 2, D / 2)
    method = PFGMpp(D=D)
    normals = normal(count, 3, 4)
    by_beta = method.offset(sigma, normals, betas=drawn_betas(count, N, D, draws(1)))
    by_gamma = method.offset(sigma, normals, taus=drawn_taus(count, D, draws(2)))
    for made in (by_beta, by_gamma, method.noise((count, 3, 4), sigma, draws(3))):
        ratio = made.flatten(1).square().sum(1) / method.r(sigma) ** 2
        assert stats.kstest(ratio.numpy(), law.cdf).pvalue > 1e-3
    angles = by_beta.flatten(1) / by_beta.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(angles, normals.flatten(1) / normals.flatten(1).norm(dim=1)[:, None])


def test_radii_of_given_draws_are_the_equation() -> None:
    betas = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(radii(betas, 2.0), 2 * (betas / (1 - betas)).sqrt())
    shares = torch.tensor([0.01, 0.5, 0.99])
    wanted = stats.beta(3.5, 1.5).ppf(shares.double().numpy())
    np.testing.assert_allclose(beta_quantiles(shares, 7, 3.0), wanted)
    sigma = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    made = PFGMpp(D=3.0).offset(sigma, normal(3, 7), betas=betas)
    torch.testing.assert_close(
        made.norm(dim=1), sigma * math.sqrt(3) * (betas / (1 - betas)).sqrt()
    )


def test_one_tail_for_each_sample_and_not_for_each_number() -> None:
    made = PFGMpp(D=1.0).noise((3000, 40), 1.0, draws())
    inside = made / made.square().mean(1, keepdim=True).sqrt()
    assert inside.abs().max() < 6.4  # a Cauchy number of its own in each place would pass this
    assert made.norm(dim=1).max() > 1000


@pytest.mark.parametrize("like", ["paper", "code"])
def test_code_clips_and_guards_in_training_alone(like: str) -> None:
    betas = torch.tensor([1e-6, 0.3, 1 - 1e-6], dtype=torch.float64)
    method, normals = PFGMpp(D=2.0, like=like), normal(3, 5)
    held = np.clip(betas.numpy(), 1e-3, 1 - 1e-3) if like == "code" else betas.numpy()
    guard = 1e-8 if like == "code" else 0.0
    wanted = 0.4 * math.sqrt(2) * np.sqrt(held / (1 - held + guard) + guard)
    made = method.offset(0.4, normals, betas=betas)
    np.testing.assert_allclose(made.norm(dim=1), wanted, rtol=1e-12)
    free = method.offset(0.4, normals, betas=betas, training=False)
    np.testing.assert_allclose(free.norm(dim=1), 0.4 * np.sqrt(2 * betas / (1 - betas)), rtol=1e-9)


def test_clip_is_an_option_of_its_own_and_bounds_the_tail() -> None:
    method = PFGMpp(D=0.2, clip=0.01)
    made = method.noise((2000, 6), 1.0, draws())
    assert made.norm(dim=1).max() <= 1.001 * math.sqrt(0.2 * 0.99 / 0.01)
    assert PFGMpp(D=0.2).noise((2000, 6), 1.0, draws()).norm(dim=1).max() > 1e3
    unclipped = PFGMpp(D=0.2, like="code", clip=0.0)
    assert unclipped.noise((2000, 6), 1.0, draws()).norm(dim=1).max() > 1e3


def test_infinite_d_is_edm_bit_for_bit_and_large_d_comes_near() -> None:
    normals, sigma = torch.randn(5, 3, 2, generator=draws()), drawn_sigmas(5, draws(1))
    edm = PFGMpp(D=math.inf)
    assert torch.equal(edm.offset(sigma, normals), normals * sigma[:, None, None])
    assert torch.equal(edm.levels(torch.randn(5, generator=draws(1))), sigma)
    assert torch.equal(edm.noise((5, 3, 2), sigma, draws()), normals * sigma[:, None, None])
    start = edm.start((3, 2), 80.0, Draws([4, 5], "here"))
    assert torch.equal(start, 80.0 * Draws([4, 5], "here").normal((3, 2)))
    gaps = []
    for D in (1e3, 1e5):
        taus = drawn_taus(5, D, draws(2))
        gaps.append(
            (PFGMpp(D=D).offset(sigma, normals, taus=taus) - edm.offset(sigma, normals)).abs().max()
        )
    assert gaps[1] < 0.2 * gaps[0] < 0.1  # one over the root of D


def test_posterior_mean_goes_to_the_gaussian_one_like_one_over_d() -> None:
    data, x = normal(9, 4), normal(5, 4, seed=1)
    limit = posterior_mean(x, 0.7, data, math.inf)
    errors = [(posterior_mean(x, 0.7, data, D) - limit).abs().max() for D in (1e4, 1e6)]
    assert errors[0] < 0.01
    assert errors[1] / errors[0] == pytest.approx(0.01, rel=0.05)


# field and denoiser


@pytest.mark.parametrize("D", [0.5, 3.0, 128.0, 2048.0])
def test_field_is_the_sum_over_charges_and_points_from_the_posterior_mean(D: float) -> None:
    data, x, r = normal(8, 2, 3), 2 * normal(4, 2, 3, seed=1), torch.tensor([0.9, 2.0, 9.0, 50.0])
    made = field(x, r, data, D)
    squares = (x[:, None] - data).flatten(2).square().sum(2) + r.double()[:, None] ** 2
    with np.errstate(over="ignore"):
        logs = -(6 + D) / 2 * np.log(squares.numpy())
    scaled = torch.from_numpy(np.exp(logs - logs.max(1, keepdims=True)))
    along = (scaled[:, :, None, None] * (x[:, None] - data)).sum(1)
    torch.testing.assert_close(made.x, along)
    torch.testing.assert_close(made.r, r.double() * scaled.sum(1))
    np.testing.assert_allclose(made.log_scale, logs.max(1))
    sigma = PFGMpp(D=D).sigma(r.double())
    mean = posterior_mean(x, sigma, data, D)
    torch.testing.assert_close(made.slope, (x - mean) / r.double()[:, None, None])


@pytest.mark.parametrize("D", [0.5, 16.0, math.inf])
def test_posterior_mean_is_the_mixtures_and_turns_with_the_data(D: float) -> None:
    data, x = normal(7, 5), normal(4, 5, seed=1)
    wanted = Mixture(data).denoise(x, EDM().level(0.6), freedom=D)
    torch.testing.assert_close(posterior_mean(x, 0.6, data, D), wanted)
    turn = torch.linalg.qr(normal(5, 5, seed=2)).Q
    turned = posterior_mean(x @ turn, 0.6, data @ turn, D)
    torch.testing.assert_close(turned, wanted @ turn)


@pytest.mark.parametrize("D", [1.0, 64.0, math.inf])
def test_samples_of_the_exact_denoiser_end_on_the_data(D: float) -> None:
    data, schedule = 3 * normal(6, 2), Schedule.edm(18, 0.01, 20.0)
    made = PFGMpp(D=D).sample(
        lambda x, level: posterior_mean(x, level.std, data, D), schedule, (2,), range(40)
    )
    assert made.calls == 35
    assert torch.cdist(made.x.double(), data).min(1).values.max() < 0.01
    single = data[:1]
    one = PFGMpp(D=D).sample(
        lambda x, level: posterior_mean(x, level.std, single, D), schedule, (2,), range(3)
    )
    torch.testing.assert_close(one.x.double(), single.expand(3, 2), rtol=0, atol=1e-5)


def test_kernel_pulls_like_a_gaussian_of_the_level_it_acts_on() -> None:
    """Of the level that a state shows, N parts; of the level that is told, D parts."""
    N, D, told = 6, 4.0, 0.5
    x = (2 * normal(3, N)).requires_grad_()
    (pull,) = torch.autograd.grad(log_kernel(x, told, D).sum(), x)
    seen = x.detach().norm(dim=1) / math.sqrt(N)
    acts = acted_on(seen, told, N, D)
    torch.testing.assert_close(pull, -x.detach() / acts.square()[:, None])
    torch.testing.assert_close(acted_on(seen, told, N, math.inf), torch.full_like(seen, told))


# loss


def test_loss_is_edms_and_its_gradient_is_zero_at_the_posterior_mean() -> None:
    data, D, count = normal(3, 2), 3.0, 200_000
    method = PFGMpp(D=D, sigma_data=0.8)
    y = data[torch.randint(3, (count,), generator=draws(1))]
    sigma = torch.full((count,), 0.6, dtype=torch.float64)
    noise = method.offset(sigma, normal(count, 2, seed=2), taus=drawn_taus(count, D, draws(3)))
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    error = method.loss(
        lambda x, s: posterior_mean(x, s, data, D) + shift + 0.1 * shift * x.abs().clamp(max=1),
        y,
        sigma,
        noise,
    )
    weight = (0.6**2 + 0.8**2) / (0.6 * 0.8) ** 2
    said = posterior_mean(y + noise, 0.6, data, D)
    torch.testing.assert_close(error.detach(), weight * (said - y).square())
    (gradient,) = torch.autograd.grad(error.sum(1).mean(), shift)
    scale = 2 * weight * (said - y).std() / math.sqrt(count)
    assert (gradient.abs() < 5 * scale).all()


def test_denoiser_form_is_the_papers_objective_times_a_weight() -> None:
    method, y = PFGMpp(D=8.0), normal(5, 3)
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64)
    noise = method.offset(sigma, normal(5, 3, seed=1), betas=drawn_betas(5, 3, 8.0, draws(2)))
    guess = normal(5, 3, seed=3)  # f_theta
    error = method.loss(lambda x, s: x - s[:, None] * guess, y, sigma, noise)
    papers = (guess - noise / (method.r(sigma) / math.sqrt(8))[:, None]).square()
    torch.testing.assert_close(error, (method.weight(sigma) * sigma**2)[:, None] * papers)


def test_stable_target_takes_the_place_of_the_data() -> None:
    method, y = PFGMpp(D=8.0), normal(5, 3)
    sigma = torch.full((5,), 0.7, dtype=torch.float64)
    noise = method.noise((5, 3), sigma.float(), draws()).double()
    target = posterior_mean(y + noise, sigma, y, 8.0)
    made = method.loss(lambda x, s: target, y, sigma, noise, target=target)
    assert (made == 0).all()
    assert (method.loss(lambda x, s: target, y, sigma, noise) > 0).any()


def test_other_alignment_makes_r_the_root_of_n_plus_d() -> None:
    method = PFGMpp(D=12.0)
    assert method.r(method.aligned(0.5, 30)) == pytest.approx(0.5 * math.sqrt(42))
    assert PFGMpp(D=math.inf).aligned(0.5, 30) == 0.5


# sampling and probes


def test_sampler_is_heun_in_sigma_written_out() -> None:
    data, D = normal(5, 3), 4.0
    schedule, method = Schedule.edm(5, 0.02, 10.0), PFGMpp(D=D)
    eps = [normal(6, 3, seed=9 + i).float() for i in range(5)]

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return posterior_mean(x, sigma, data, D)

    start = method.start((3,), 10.0, Draws(range(6)))
    made = sample(
        lambda x, level: denoise(x, level.std), schedule, Heun(), start, state=injected(0.3, eps)
    )
    x, sigmas = start, schedule.sigmas
    for i, (here, there) in enumerate(itertools.pairwise(sigmas)):
        x = x + 0.3 * here * eps[i]
        slope = (x - denoise(x, here)) / here
        moved = x + (there - here) * slope
        if there > 0:
            end = (moved - denoise(moved, there)) / there
            moved = x + (there - here) * (slope + end) / 2
        x = moved
    torch.testing.assert_close(made.x, x, rtol=1e-4, atol=1e-5)


def test_seeds_give_the_same_samples_in_any_batch_with_noise_inside_too() -> None:
    data = normal(6, 2)
    schedule = Schedule.edm(4, 0.02, 10.0)

    def run(batch: int, alpha: float) -> torch.Tensor:
        return PFGMpp(D=5.0).sample(
            lambda x, level: posterior_mean(x, level.std, data, 5.0), schedule, (2,), range(7),
            alpha=alpha, batch=batch,
        ).x  # fmt: skip

    torch.testing.assert_close(run(7, 0.4), run(3, 0.4))
    assert not torch.allclose(run(7, 0.4), run(7, 0.0))


def test_network_is_told_sigma_and_the_start_has_the_tail() -> None:
    told, method = [], PFGMpp(D=2048.0)
    method.sample(
        lambda x, level: told.append(level.std) or x, Schedule.edm(3, 1.0, 80.0), (4,), [0]
    )
    assert told[0] == 80.0
    shares = student_noise((4000, 4), 2.0, draws())
    start = PFGMpp(D=2.0).start((4,), 3.0, Draws(range(2000)))
    assert stats.ks_2samp(start.norm(dim=1) / 3, shares.norm(dim=1)).pvalue > 1e-3


def test_told_raises_the_level_by_what_injections_leave() -> None:
    seen = []
    knowing = Told(
        lambda x, level: seen.append(level.std) or 0 * x, 0.5, lambda i, x: torch.ones_like(x)
    )
    sample(knowing, Schedule.edm(2, 1.0, 4.0), Heun(), torch.zeros(1, 2), state=knowing.hook)
    wanted = [4 * math.sqrt(1.25), math.sqrt(1.25), math.sqrt(1.5)]
    assert seen == pytest.approx(wanted)
    assert excess(0.0, 9) == 1.0


def test_noise_that_a_denoiser_leaves_alone_adds_up_as_excess_says() -> None:
    data, x = torch.zeros(1, 400, dtype=torch.float64), normal(30, 400)
    path = sample(
        lambda x, level: posterior_mean(x, level.std, data, math.inf), Schedule.edm(6, 1.0, 20.0),
        Heun(), 20 * x, state=injected(0.4, [normal(30, 400, seed=50 + i) for i in range(6)]),
        keep=True,
    ).path  # fmt: skip
    for number, (state, sigma) in enumerate(
        zip(path[1:-1], Schedule.edm(6, 1.0, 20.0).sigmas[1:-1], strict=True)
    ):
        assert float(state.std() / sigma) == pytest.approx(excess(0.4, number), rel=0.03)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_rounded_weights_are_the_affine_map_written_out(bits: int) -> None:
    w = normal(20, 7).float() + 0.1
    low, high, most = float(w.min()), float(w.max()), 2**bits - 1
    step = np.float32((high - low) / most)
    zero = int(min(max(-low / step, 0), most))
    wanted = step * (np.round(np.clip(w.numpy() / step + zero, 0, most)) - zero)
    made = quantised(w, bits)
    np.testing.assert_allclose(made.numpy(), wanted, atol=1e-6)
    assert len(made.unique()) <= 2**bits
    assert torch.equal(quantised(torch.full((3,), 0.7), bits), torch.full((3,), 0.7))


def test_few_bits_rounds_what_the_code_rounds_and_gives_it_back() -> None:
    net = network.Net(8)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with few_bits(net, 3) as kept:
        changed = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    wanted = {"stem.weight", "head.weight"}
    wanted |= {f"blocks.{i}.{part}.weight" for i in range(3) for part in ("first", "second")}
    assert changed == set(kept) == wanted
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), few_bits(net, 3):
        raise RuntimeError("stop")
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


# bad input


@pytest.mark.parametrize("D", [0, -1.0, math.nan, -math.inf])
def test_a_d_that_is_not_positive_is_refused(D: float) -> None:
    with pytest.raises(ValueError, match="D must lie"):
        PFGMpp(D=D)
    with pytest.raises(ValueError, match="must be positive"):
        posterior_mean(normal(2, 3), 1.0, normal(2, 3), D)


def test_other_fields_are_checked_at_an_infinite_d_too() -> None:
    with pytest.raises(ValueError, match="P_std"):
        PFGMpp(D=math.inf, P_std=-1.0)
    with pytest.raises(TypeError, match="D must be float"):
        PFGMpp(D="16")


EDM_ = PFGMpp(D=math.inf)
REFUSED = {
    "sigma: must be above 0": lambda m: m.offset(0.0, normal(2, 3), taus=torch.ones(2)),
    "sigma: must be above 0 and": lambda m: m.offset(math.nan, normal(2, 3), taus=torch.ones(2)),
    "one sample or more": lambda m: m.offset(1.0, normal(0, 3), taus=torch.ones(0)),
    "one of them for a finite D": lambda m: m.offset(1.0, normal(2, 3)),
    "neither for an infinite": lambda m: EDM_.offset(1.0, normal(2, 3), taus=torch.ones(2)),
    "taus: must be above 0": lambda m: m.offset(1.0, normal(2, 3), taus=torch.zeros(2)),
    "betas: shares from 0 to 1": lambda m: m.offset(1.0, normal(2, 3), betas=torch.full((2,), 1.5)),
    "finite D": lambda m: EDM_.r(1.0),
    "the same, and": lambda m: m.loss(lambda x, s: x, normal(0, 3), torch.ones(0), normal(0, 3)),
    "x, data": lambda m: field(normal(2, 3), 1.0, normal(2, 4), 4.0),
    "data: holds numbers": lambda m: posterior_mean(normal(1, 2), 1.0, math.nan * normal(1, 2), 4),
    "r: must be above 0": lambda m: field(normal(2, 3), 0.0, normal(2, 3), 4.0),
    "alpha: 0 or more": lambda m: injected(-0.1, []),
    "noises: 1 given": lambda m: injected(0.1, [normal(1, 2)])(normal(1, 2), 1, EDM().level(1.0)),
    "bits: from 1 to 16": lambda m: quantised(normal(3), 0),
    "weight: holds numbers": lambda m: quantised(torch.tensor([1.0, math.inf]), 4),
    "leaves no weight": lambda m: few_bits(nn.LayerNorm(3), 4, ["weight"]).__enter__(),
    "seeds, batch": lambda m: m.sample(lambda x, level: x, Schedule.edm(2, 1.0, 2.0), (2,), []),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_named(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        REFUSED[words](PFGMpp(D=4.0))


def test_bits_must_be_whole() -> None:
    with pytest.raises(TypeError, match="whole number"):
        quantised(normal(3), 4.0)


def test_what_the_package_offers_is_there() -> None:
    assert all(hasattr(package, name) for name in package.__all__)


# the lab's pieces


def test_random_scale_is_spread_as_the_tail_of_d() -> None:
    uniforms = torch.rand(50_000, generator=draws(), dtype=torch.float64)
    ours = network.lognormal(uniforms, 16.0).log()
    tails = -drawn_taus(50_000, 16.0, draws(1)).log() / 2
    assert float(ours.std()) == pytest.approx(float(tails.std()), rel=0.02)


def test_arms_train_from_the_same_numbers_and_the_infinite_one_on_gaussian_noise() -> None:
    sigma, normals = torch.tensor([0.5, 2.0]), torch.randn(2, 64, generator=draws())
    middle = torch.full((2,), 0.5, dtype=torch.float64)
    gaussian = network.ARMS["inf"].offset(sigma, normals, middle)
    assert torch.equal(gaussian, normals * sigma[:, None])
    torch.testing.assert_close(network.ARMS["scale"].offset(sigma, normals, middle), gaussian)
    wide = network.ARMS["wide"].method.levels(torch.ones(1)) / network.ARMS["inf"].method.levels(
        torch.ones(1)
    )
    assert float(wide) == pytest.approx(math.exp(0.6))


def test_training_learns_and_is_the_same_twice() -> None:
    one, two = (network.train("16", 4e-3, 3, "ci") for _ in range(2))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    untrained = Preconditioned(network.Net(16), network.SPREAD)
    nn.init.zeros_(untrained.network.head.weight)
    factors = (1.0,)
    assert network.misled(one, 3, 0.5, factors) < network.misled(untrained, 3, 0.5, factors)


def test_exact_samples_keep_more_noise_the_larger_d_is() -> None:
    left = [exact.tried(D, 5, 20, 3, 0.4, False) for D in (16.0, math.inf)]
    assert 1.2 < left[0] < left[1]
    assert exact.tried(math.inf, 5, 20, 3, 0.4, True) == pytest.approx(1.0, abs=0.2)
    assert exact.left_over(
        exact.mixture(5, 3).draw(400, draws())[0], exact.mixture(5, 3)
    ) == pytest.approx(1, abs=0.05)
