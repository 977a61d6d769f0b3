"""HiPA: its adaptors, the one step, every term of the loss against plain NumPy, and bad input."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.contracts.contracts import CONTRACTS, check
from tests.contracts.rooms import Case
from toolkit import HiPA, adapt
from toolkit.core.nets.unet import unet
from toolkit.core.sample.loop import sample
from toolkit.core.sample.plans import DDIM
from toolkit.core.sample.precondition import Preconditioned
from toolkit.core.sample.schedule import Level, Schedule
from toolkit.generate.hipa import from_eps, from_v, make_pairs, one_step, plugged, terms, unplugged

DOUBLE = torch.float64
RUN = Schedule.edm(4, 0.01, 20.0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def denoiser(seed: int = 0) -> Preconditioned:
    network = Preconditioned(unet(1, (8, 16), 3, 16, 2, torch.Generator().manual_seed(seed)))
    draws = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draws)
    return network.eval()


def trained(rank: int = 2, alpha: float = 3.0):
    """A denoiser with adaptors that say something, the frozen one beside it, states and labels."""
    model = denoiser()
    base = copy.deepcopy(model)
    draws = torch.Generator().manual_seed(5)
    adapted = adapt(model, HiPA(rank=rank, alpha=alpha), ["*first", "*attention*"], generator=draws)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if name.endswith("B"):
                tensor.normal_(generator=draws)
    return adapted, base, 20 * drawn(5, 1, 8, 8).float(), torch.arange(5) % 3


# the adaptors -------------------------------------------------------------------------------


# a rank above the layer is an error here, not a warning
@pytest.mark.parametrize("contract", [n for n in CONTRACTS if "rank_above" not in n])
@pytest.mark.parametrize("room", ["linear", "conv2d"])
def test_the_adaptors_keep_the_contracts_of_every_method(contract, room):
    if contract in ("works_compiled", "second_gradients_are_right") and room == "conv2d":
        pytest.skip("one room each of the costly ones")
    check(contract, Case(HiPA(rank=3), room))


def test_at_the_start_one_step_is_the_frozen_models_to_the_bit():
    model, x, y = denoiser(), 20 * drawn(5, 1, 8, 8).float(), torch.arange(5) % 3
    before = one_step(model, x, RUN.levels[0], y)
    adapted = adapt(model, HiPA(rank=2), ["*first"])
    assert torch.equal(one_step(adapted, x, RUN.levels[0], y), before)


def test_plugged_unplugged_merged_and_unloaded():
    adapted, base, x, y = trained()
    on = one_step(adapted, x, RUN.levels[0], y)
    assert not torch.allclose(on, one_step(base, x, RUN.levels[0], y), atol=1e-2)
    many = sample(base, RUN, DDIM(), x, labels=y).x
    with unplugged(adapted):
        assert torch.equal(sample(adapted, RUN, DDIM(), x, labels=y).x, many)
    assert torch.equal(one_step(adapted, x, RUN.levels[0], y), on)
    with plugged(adapted, 0.5), plugged(adapted, 1.0):
        assert torch.equal(one_step(adapted, x, RUN.levels[0], y), on)
    with pytest.raises(KeyError), plugged(adapted, 0.3):
        raise KeyError
    assert torch.equal(one_step(adapted, x, RUN.levels[0], y), on)
    merged = adapted.merge()
    assert torch.allclose(one_step(merged, x, RUN.levels[0], y), on, atol=1e-4)
    adapted.unmerge().unload()
    now = dict(adapted.model.named_parameters())
    assert all(torch.equal(now[name], old) for name, old in base.named_parameters())


def test_half_the_strength_is_half_the_difference():
    layer = nn.Linear(6, 5).double()
    x, base = drawn(4, 6), layer(drawn(4, 6))
    adapted = adapt(nn.Sequential(layer), HiPA(rank=2, alpha=3.0))
    site = adapted.adapters["0"]
    with torch.no_grad():
        site.B.copy_(drawn(5, 2))
    whole = adapted(x) - base
    assert torch.allclose(whole, 1.5 * x @ site.A.T @ site.B.T)
    with plugged(adapted, 0.5):
        assert torch.allclose(adapted(x) - base, whole / 2)


def test_the_count_is_the_formula_and_that_of_the_abstract():
    adapted, *_ = trained()
    count = sum(2 * (placed.site.rows + placed.site.cols) for placed in adapted.sites.values())
    assert count == sum(p.numel() for p in adapted.parameters())
    # every attention projection of Stable Diffusion 2.1's U-Net: 16 blocks, width and how many
    numbers = 0
    for width, blocks in ((320, 5), (640, 5), (1280, 6)):
        own = 4 * (width + width)
        across = 2 * (width + width) + 2 * (width + 1024)
        numbers += blocks * 16 * (own + across)
    assert numbers == 3_319_808


def test_only_the_factors_get_gradients():
    adapted, _, x, y = trained()
    HiPA(terms="mse").loss(one_step(adapted, x, RUN.levels[0], y), torch.zeros_like(x)).backward()
    moved = {name for name, p in adapted.model.named_parameters() if p.grad is not None}
    assert moved
    assert all(name.rpartition(".")[2] in "AB" for name in moved)


# one step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.9, 0.1, 1 / 157])
def test_noise_and_v_give_the_same_clean_sample(alpha):
    std = math.sqrt(1 - alpha**2)
    clean, eps = drawn(3, 1, 4, 4), drawn(3, 1, 4, 4, seed=1)
    x, v = alpha * clean + std * eps, alpha * eps - std * clean
    assert torch.allclose(from_eps(x, eps, alpha, std), clean, atol=1e-12)
    assert torch.allclose(from_v(x, v, alpha, std), clean, atol=1e-12)
    level = Level(1.0, alpha, std)
    for said, what in ((clean, "clean"), (eps, "eps"), (v, "v")):
        made = one_step(lambda x, level, said=said: said, x, level, predicts=what)
        assert torch.allclose(made, clean, atol=1e-12)


def test_half_precision_is_left_before_alpha_divides():
    x, eps = drawn(1, 1, 4, 4).half(), drawn(1, 1, 4, 4, seed=1).half()
    made = from_eps(x, eps, 0.0064, 0.99998)
    assert made.dtype == torch.float32
    assert torch.allclose(made.double(), (x.double() - 0.99998 * eps.double()) / 0.0064, rtol=1e-5)
    assert from_v(eps, eps, 0.6, 0.8).dtype == torch.float32


def test_pairs_are_what_the_loop_makes_of_the_same_noise_in_any_batch():
    model, x, y = denoiser(), 20 * drawn(5, 1, 8, 8).float(), torch.arange(5) % 3
    found = make_pairs(model, RUN, DDIM(), x, y, batch=2)
    assert torch.allclose(found.wanted, sample(model, RUN, DDIM(), x, labels=y).x, atol=1e-5)
    assert torch.equal(found.rows(torch.tensor([3, 1])).start, x[[3, 1]])
    assert make_pairs(lambda x, level: x, RUN, DDIM(), x).labels is None


# the terms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("cutoff", [0.1, 0.25, 0.5])
def test_the_high_pass_is_a_projection(size, cutoff):
    x, y = drawn(3, 2, *size), drawn(3, 2, *size, seed=1)
    high = terms.high_pass(x, cutoff)
    assert torch.allclose(terms.high_pass(high, cutoff), high)
    assert torch.allclose(terms.high_pass(2 * x - y, cutoff), 2 * high - terms.high_pass(y, cutoff))
    assert torch.allclose(
        terms.high_pass(torch.ones_like(x), cutoff), torch.zeros_like(x), atol=1e-12
    )
    parts = high.square().sum() + (x - high).square().sum()
    assert torch.allclose(parts, x.square().sum())
    assert torch.allclose(terms.high_pass(x, -1e-9), x)
    assert torch.equal(terms.high_pass(x, 0.7072), torch.zeros_like(x))


def test_the_fourier_term_by_parseval_in_numpy():
    x, y = drawn(3, 2, 8, 6), drawn(3, 2, 8, 6, seed=1)
    power = np.abs(np.fft.fft2((x - y).numpy())) ** 2
    radius = np.hypot(np.fft.fftfreq(8)[:, None], np.fft.fftfreq(6)[None])
    wanted = (power * (radius > 0.25)).sum((-2, -1)).mean(1) / (8 * 6) ** 2
    assert np.allclose(terms.fourier(x, y, 0.25).numpy(), wanted)


def test_the_log_spectrum_in_numpy_and_that_it_does_not_see_where():
    x, y = drawn(3, 2, 8, 6), drawn(3, 2, 8, 6, seed=1)
    radius = np.hypot(np.fft.fftfreq(8)[:, None], np.fft.fftfreq(6)[None])
    one, other = (
        np.log(np.abs(np.fft.fft2(z.numpy())) ** 2 / 48 + 1e-3)[..., radius > 0.25] for z in (x, y)
    )
    assert np.allclose(terms.log_power(x, y).numpy(), ((one - other) ** 2).mean((1, 2)))
    assert torch.allclose(
        terms.log_power(x, x.roll(3, -1)), torch.zeros(3, dtype=DOUBLE), atol=1e-12
    )


def test_sobel_on_a_ramp_and_the_edge_term_in_numpy():
    ramp = torch.arange(6, dtype=DOUBLE).expand(1, 1, 5, 6) * 0.5
    across, down = terms.sobel(ramp)
    assert torch.equal(across[..., 1:-1], torch.full((1, 1, 5, 4), 4.0, dtype=DOUBLE))
    assert torch.equal(down, torch.zeros_like(down))
    assert torch.equal(terms.sobel(ramp.mT)[1], across.mT)
    x, y = drawn(2, 2, 5, 4), drawn(2, 2, 5, 4, seed=1)
    d = np.pad((x - y).numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    kernel, total = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]), 0
    for k in (kernel, kernel.T):
        slope = sum(k[i, j] * d[:, :, i : i + 5, j : j + 4] for i in range(3) for j in range(3))
        total = total + (slope**2).mean((1, 2, 3))
    assert np.allclose(terms.edge(x, y).numpy(), total)


def layers(x: torch.Tensor) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(3)
    w = torch.randn(3, 2, 3, 3, generator=draws, dtype=DOUBLE)
    one = torch.relu(nn.functional.conv2d(x, w))
    return [one, one[..., ::2, ::2]]


def test_dists_in_numpy_with_weights_and_without():
    x, y = drawn(3, 2, 8, 8), drawn(3, 2, 8, 8, seed=1)
    a, b = drawn(8, seed=4).abs(), drawn(8, seed=5).abs()
    wanted, even, place = np.ones(3), np.ones(3), 0
    total = float((a + b).sum())
    pairs = [(x, y), *zip(layers(x), layers(y), strict=True)]
    for one, other in pairs:
        for j in range(one.shape[1]):
            p, q = (z[:, j].reshape(3, -1).numpy() for z in (one, other))
            m, n, cov = p.mean(1), q.mean(1), (p * q).mean(1) - p.mean(1) * q.mean(1)
            t = (2 * m * n + 1e-6) / (m**2 + n**2 + 1e-6)
            s = (2 * cov + 1e-6) / (p.var(1) + q.var(1) + 1e-6)
            wanted -= (float(a[place]) * t + float(b[place]) * s) / total
            even -= (t + s) / (2 * one.shape[1] * len(pairs))
            place += 1
    assert np.allclose(terms.dists(x, y, layers, (a, b)).numpy(), wanted)
    assert np.allclose(terms.dists(x, y, layers).numpy(), even)


def test_what_every_term_must_be():
    x, y = drawn(3, 2, 8, 8), drawn(3, 2, 8, 8, seed=1)
    forms = {
        "spatial": lambda p, q: terms.dists(p, q, layers), "mse": terms.mse,
        "fourier": terms.fourier, "edge": terms.edge, "power": terms.log_power,
    }  # fmt: skip
    for name, form in forms.items():
        assert form(x, y).shape == (3,)
        assert torch.equal(form(x, x), torch.zeros(3, dtype=DOUBLE)), name
        assert torch.allclose(form(x, y), form(y, x)), name
        if name in ("fourier", "edge", "power"):
            assert torch.allclose(form(x + 0.7, y), form(x, y)), name
        assert torch.autograd.gradcheck(
            lambda p, form=form: form(p, y[:1, :, :5, :5]),
            x[:1, :, :5, :5].clone().requires_grad_(),
        )
    far = terms.dists(x, -x, layers)
    assert bool(((far > 0) & (far <= 2)).all())
    small = terms.dists(x.float(), (x + 1e-4 * y).float(), lambda z: [])
    assert bool((small > 0).all())  # not lost beside 1


def test_the_loss_is_the_weighted_sum_of_its_terms():
    x, y = drawn(3, 2, 8, 8), drawn(3, 2, 8, 8, seed=1)
    method = HiPA(terms="spatial+mse+fourier+edge+power", high_weight=0.3, cutoff=0.2, floor=0.01)
    found = method.loss_terms(x, y, layers)
    assert list(found) == ["spatial", "mse", "fourier", "edge", "power"]
    assert torch.equal(found["fourier"], terms.fourier(x, y, 0.2))
    assert torch.equal(found["power"], terms.log_power(x, y, 0.2, 0.01))
    m = {name: value.mean() for name, value in found.items()}
    wanted = m["spatial"] + m["mse"] + 0.3 * (m["fourier"] + m["edge"] + m["power"])
    assert torch.allclose(method.loss(x, y, layers), wanted)
    assert HiPA().chosen == ("spatial", "fourier", "edge")


def test_a_short_training_lowers_the_loss_and_moves_nothing_else():
    model, x, y = denoiser(), 20 * drawn(16, 1, 8, 8).float(), torch.arange(16) % 3
    base = copy.deepcopy(model)
    wanted = make_pairs(model, RUN, DDIM(), x, y).wanted
    method = HiPA(rank=4, alpha=4.0, terms="mse+fourier", high_weight=0.5)
    adapted = adapt(model, method, ["*first", "*second", "*attention*"])
    adam = torch.optim.Adam(adapted.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = method.loss(one_step(adapted, x, RUN.levels[0], y), wanted)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    adapted.unload()
    old = dict(base.named_parameters())
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


# bad input ----------------------------------------------------------------------------------

IMAGE, ONES, TOP = torch.zeros(2, 1, 8, 8), torch.ones(2), RUN.levels[0]


@pytest.mark.parametrize(
    ("bad", "error", "word"),
    [
        (lambda: adapt(nn.Sequential(nn.Linear(8, 4)), HiPA(rank=5)), ValueError, "rank: 5 is"),
        (lambda: HiPA(high_weight=-0.1), ValueError, "high_weight"),
        (lambda: HiPA(cutoff=0.0), ValueError, "cutoff"),
        (lambda: HiPA(cutoff=0.71), ValueError, "cutoff"),
        (lambda: HiPA(terms="spatial+colour"), ValueError, "terms"),
        (lambda: HiPA(terms="mse+mse"), ValueError, "terms"),
        (lambda: HiPA(terms=""), ValueError, "terms"),
        (lambda: HiPA(rank=2.5), TypeError, "rank"),
        (lambda: HiPA().loss(IMAGE, IMAGE), ValueError, "features"),
        (lambda: HiPA(terms="mse").loss(IMAGE, IMAGE[:1]), ValueError, "one shape"),
        (lambda: terms.mse(IMAGE[0], IMAGE[0]), ValueError, "images"),
        (lambda: terms.fourier(IMAGE, IMAGE, 0.8), ValueError, "cutoff"),
        (lambda: terms.log_power(IMAGE, IMAGE, floor=0.0), ValueError, "floor"),
        (lambda: terms.dists(IMAGE, IMAGE, None, (ONES, ONES)), ValueError, "weights"),
        (lambda: terms.dists(IMAGE, IMAGE, None, (-ONES[:1], ONES[:1])), ValueError, "negative"),
        (lambda: from_eps(IMAGE, IMAGE, 0.0, 1.0), ValueError, "alpha"),
        (lambda: from_eps(IMAGE, IMAGE[:1], 0.5, 1.0), ValueError, "eps: shape"),
        (lambda: from_v(IMAGE, IMAGE, 1.0, 80.0), ValueError, "alpha, std"),
        (lambda: one_step(lambda x, s: x[:1], IMAGE, TOP), ValueError, "network"),
        (lambda: one_step(lambda x, s: x, IMAGE, TOP, predicts="x"), ValueError, "predicts"),
        (lambda: make_pairs(lambda x, s: x, RUN, DDIM(), IMAGE, batch=0), ValueError, "batch"),
        (lambda: plugged(adapt(nn.Sequential(nn.Linear(8, 4)), HiPA(rank=2)), math.nan).__enter__(),
         ValueError, "strength"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(bad, error, word):
    with pytest.raises(error, match=word):
        bad()


def test_a_model_without_adaptors_has_nothing_to_unplug():
    from toolkit import LoRA

    adapted = adapt(nn.Sequential(nn.Linear(8, 4)), LoRA(rank=2))
    with pytest.raises(TypeError, match="HiPA"), unplugged(adapted):
        pass
