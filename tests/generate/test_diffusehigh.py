"""DiffuseHigh: wavelets against published numbers, the guided stage, its limits, bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toolkit import DiffuseHigh
from toolkit.core.sample.loop import sample
from toolkit.core.sample.plans import DDIM, Heun
from toolkit.core.sample.schedule import EDM, Betas, LinearVP, Schedule
from toolkit.core.seeds import generator
from toolkit.generate.diffusehigh import (
    band_size,
    blur,
    dwt,
    enlarge,
    filters,
    idwt,
    sharpen,
    swap_low,
)
from toolkit.generate.diffusehigh.wavelets import PADDINGS
from toolkit.labs.generate import diffusehigh as lab
from toolkit.labs.generate import enlarged

DB4 = (
    -0.010597401784997278, 0.032883011666982945, 0.030841381835986965, -0.18703481171888114,
    -0.02798376941698385, 0.6308807679295904, 0.7148465705525415, 0.23037781330885523,
)  # fmt: skip
"""The low-pass filter that PyWavelets publishes."""
DB2 = ((1 - 3**0.5), (3 - 3**0.5), (3 + 3**0.5), (1 + 3**0.5))
"""Daubechies' own closed form, before division by 4 sqrt 2."""
DB4_HIGH = (-0.23037781330885523, 0.7148465705525415, -0.6308807679295904, -0.02798376941698385,
            0.18703481171888114, 0.030841381835986965, -0.032883011666982945,
            -0.010597401784997278)  # fmt: skip
SIZES = [(16, 16), (17, 20), (24, 19)]
PLAIN = {"guidance": 1.0, "guidance_high": 1.0}


def images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=generator(seed, "images"), dtype=dtype)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed, "normal"), dtype=dtype)


# wavelets


def test_filters_are_the_published_ones():
    low, high = filters("db4")
    assert np.allclose(low, DB4, atol=1e-12, rtol=0)
    assert np.allclose(high, DB4_HIGH, atol=1e-12, rtol=0)
    assert np.allclose(filters("db2")[0], np.array(DB2) / (4 * math.sqrt(2)), atol=1e-14)
    root = math.sqrt(0.5)
    assert np.allclose(filters("haar"), ((root, root), (-root, root)), atol=1e-15)
    assert filters("db1") == filters("haar")


@pytest.mark.parametrize("order", range(1, 11))
def test_filters_are_orthonormal_and_do_not_see_polynomials(order):
    low, high = map(np.array, filters(f"db{order}"))
    for shift in range(order):
        kept = len(low) - 2 * shift
        assert np.isclose(low[:kept] @ low[2 * shift :], float(shift == 0), atol=1e-9)
        assert np.isclose(high[:kept] @ low[2 * shift :], 0, atol=1e-9)
    powers = np.arange(2 * order) / (2 * order)
    for power in range(order):
        assert abs(high @ powers**power) < 1e-8


def by_hand(row, wavelet, padding):
    """One level of a row by the definition, c_k = sum_j h_j x_{2k+1-j}."""
    n, length = len(row), len(filters(wavelet)[0])
    if padding == "periodization":
        row = list(row) + list(row[-1:]) * (n % 2)
        offset, count, n = length // 2, (n + 1) // 2, len(row)
    else:
        offset, count = 1, (n + length - 1) // 2

    def value(i):
        if padding == "zero":
            return row[i] if 0 <= i < n else 0.0
        if padding == "symmetric":
            i %= 2 * n
            return row[min(i, 2 * n - 1 - i)]
        if padding == "reflect":
            i %= 2 * n - 2
            return row[min(i, 2 * n - 2 - i)]
        return row[i % n]

    return [
        [sum(h * value(2 * k + offset - j) for j, h in enumerate(taps)) for k in range(count)]
        for taps in filters(wavelet)
    ]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4"])
@pytest.mark.parametrize("size", [8, 9, 24])
def test_bands_follow_the_definition(wavelet, padding, size):
    x = images(1, 1, 8, size, seed=size)
    rows = [by_hand(row.tolist(), wavelet, padding) for row in x[0, 0]]
    halves = [torch.tensor([r[b] for r in rows], dtype=torch.float64) for b in (0, 1)]
    low, high = dwt(x, wavelet, 1, padding)
    wanted = [
        torch.tensor([by_hand(c.tolist(), wavelet, padding) for c in half.T]).double()
        for half in halves
    ]  # [along the width][column, band along the height, k]
    assert torch.allclose(low[0, 0], wanted[0][:, 0].T, atol=1e-6)
    assert torch.allclose(high[0][0, 0, 0], wanted[0][:, 1].T, atol=1e-6)
    assert torch.allclose(high[0][0, 0, 1], wanted[1][:, 0].T, atol=1e-6)
    assert torch.allclose(high[0][0, 0, 2], wanted[1][:, 1].T, atol=1e-6)
    assert low.shape[-1] == band_size(size, wavelet, padding)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("wavelet", ["haar", "db3", "db4"])
def test_what_is_taken_apart_comes_together(wavelet, padding):
    for size, levels in itertools.product(SIZES, (1, 2)):
        x = images(2, 3, *size)
        bands = dwt(x, wavelet, levels, padding)
        assert torch.allclose(idwt(bands, wavelet, padding, size), x, atol=1e-11)
        whole = idwt(bands, wavelet, padding)
        assert [n % 2 for n in whole.shape[-2:]] == [0, 0]
        single = idwt(dwt(x.float(), wavelet, levels, padding), wavelet, padding, size)
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), x, atol=1e-5)


def test_db4_makes_15_of_24_and_energy_is_kept_where_nothing_is_repeated():
    x = images(1, 1, 24, 24)
    assert dwt(x, "db4").low.shape == (1, 1, 15, 15)
    low, (high,) = dwt(x, "db4", padding="periodization")
    assert torch.isclose(low.square().sum() + high.square().sum(), x.square().sum())


def test_the_low_band_of_haar_is_twice_the_means_of_blocks_and_swapping_sets_them():
    x, guide = images(2, 3, 12, 10), images(2, 3, 12, 10, seed=1)
    low = dwt(guide, "haar").low
    assert torch.allclose(low, 2 * F.avg_pool2d(guide, 2), atol=1e-12)
    held = swap_low(x, low, "haar")
    means = F.avg_pool2d(guide, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    own = F.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(held, x - own + means, atol=1e-12)


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
@pytest.mark.parametrize("size", SIZES)
def test_swapping(wavelet, size):
    x, guide = images(2, 1, *size), images(2, 1, *size, seed=1)
    own, low = dwt(x, wavelet).low, dwt(guide, wavelet).low
    assert torch.allclose(swap_low(x, own, wavelet), x, atol=1e-11)
    held = dwt(swap_low(x, low, wavelet), wavelet)
    edge = 0 if wavelet == "haar" and not any(n % 2 for n in size) else 4
    inside = (..., slice(edge, -edge or None), slice(edge, -edge or None))
    assert torch.allclose(held.low[inside], low[inside], atol=1e-11)
    deep = swap_low(
        images(2, 1, 32, 32), dwt(images(2, 1, 32, 32, seed=1), "haar", 2).low, "haar", 2
    )
    assert torch.allclose(
        dwt(deep, "haar").high[0], dwt(images(2, 1, 32, 32), "haar").high[0], atol=1e-11
    )
    half = swap_low(x.half(), low, wavelet)
    assert half.dtype == torch.float16
    assert torch.allclose(half.double(), swap_low(x, low, wavelet), atol=5e-3)


# enlarging and sharpening


def test_sharpening_is_an_unsharp_mask():
    x = images(2, 3, 9, 7)
    at = torch.arange(-1, 2, dtype=torch.float64)
    w = (-at.square() / (2 * 0.8**2)).exp()
    w = torch.outer(w, w) / torch.outer(w, w).sum()
    soft = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w.expand(3, 1, 3, 3), groups=3)
    assert torch.allclose(blur(x, 3, 0.8), soft, atol=1e-12)
    assert torch.allclose(sharpen(x, 1.5, 3, 0.8), x + 1.5 * (x - soft), atol=1e-12)
    assert torch.equal(sharpen(x, 0.0), x)
    flat = torch.full((1, 1, 6, 6), 0.37, dtype=torch.float64)
    assert torch.allclose(sharpen(flat, 5.0, 5, 2.0), flat, atol=1e-12)


def test_enlarging_is_torchs_and_the_same_size_is_the_image():
    x = images(1, 1, 8, 6)
    for how in ("bicubic", "bilinear"):
        wanted = F.interpolate(x, (12, 9), mode=how, align_corners=False)
        assert torch.equal(enlarge(x, (12, 9), how), wanted)
        assert torch.allclose(enlarge(x, (8, 6), how), x, atol=1e-12)
    assert enlarge(images(1, 1, 4, 4), 8).shape == (1, 1, 8, 8)


# the method


def soft_denoiser(x, level, labels=None):
    """Exact for independent normal pixels of mean 0.5 and deviation 0.3."""
    share = 0.09 / (0.09 + level.sigma**2)
    return 0.5 + share * (x / level.alpha - 0.5)


def reference_stage(picture, size, noise, sigmas, tau, delta, a, wavelet, clamp):
    """The stage as the card writes it, in the view with alpha = 1."""
    u = F.interpolate(picture, (size, size), mode="bicubic", align_corners=False)
    g = (1 + a) * u - a * blur(u)
    low = dwt(g, wavelet).low
    sigmas = sigmas[-tau - 1 :]
    z = g + sigmas[0] * noise
    for i in range(tau):
        share = 0.09 / (0.09 + sigmas[i] ** 2)
        z0 = 0.5 + share * (z - 0.5)
        if i < delta:
            seen = z0.clamp(0, 1) if clamp else z0
            bands = dwt(seen, wavelet)
            z0 = idwt((low, bands.high), wavelet, size=(size, size))
        z = z + (sigmas[i + 1] - sigmas[i]) * (z - z0) / sigmas[i]
    return z


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
@pytest.mark.parametrize("clamp", [True, False])
def test_a_stage_is_the_cards(wavelet, clamp):
    schedule = Schedule.edm(10, 0.02, 5.0)
    x, noise = images(3, 2, 8, 8), normal(3, 2, 12, 12)
    how = DiffuseHigh(4, 2, strength=1.5, wavelet=wavelet, clamp=clamp, **PLAIN)
    got = how.stage(soft_denoiser, schedule, x, 12, noise)
    wanted = reference_stage(x, 12, noise, schedule.sigmas, 4, 2, 1.5, wavelet, clamp)
    assert torch.allclose(got.picture, wanted, atol=1e-12)
    assert got.calls == 4
    other = DiffuseHigh(4, 2, strength=1.5, wavelet=wavelet, clamp=not clamp, **PLAIN)
    assert not torch.equal(other.stage(soft_denoiser, schedule, x, 12, noise).picture, got.picture)


def test_views_agree():
    x, noise = images(2, 1, 8, 8), normal(2, 1, 16, 16)
    how = DiffuseHigh(5, 3, **PLAIN)
    law = LinearVP()
    preserving = Schedule.even(law, 12, 0.9, 1e-3)
    plain = Schedule(tuple(level._replace(time=level.sigma, alpha=1.0, std=level.sigma)
                           for level in preserving.levels))  # fmt: skip
    one = how.stage(soft_denoiser, preserving, x, 16, noise).picture / preserving.levels[-1].alpha
    two = how.stage(soft_denoiser, plain, x, 16, noise).picture
    assert torch.allclose(one, two, atol=1e-10)
    discrete = Schedule.of(Betas.scaled_linear(), [981, 741, 501, 261, 21, -1])
    assert how.at(5).stage(soft_denoiser, discrete, x, 16, noise).picture.isfinite().all()


def test_a_whole_run_is_native_and_stages():
    schedule = Schedule.edm(8, 0.02, 5.0)
    start = 5.0 * normal(2, 1, 8, 8)
    noises = [normal(2, 1, 12, 12, seed=1), normal(2, 1, 16, 20, seed=2)]
    how = DiffuseHigh(3, 1, **PLAIN)
    made = how.sample(soft_denoiser, schedule, start, [12, (16, 20)], noises, keep=True)
    native = sample(soft_denoiser, schedule, DDIM(), start).x
    assert torch.equal(made.native, native)
    first = how.stage(soft_denoiser, schedule, native, 12, noises[0]).picture
    assert torch.equal(made.stages[0].picture, first)
    last = how.stage(soft_denoiser, schedule, first, (16, 20), noises[1]).picture
    assert torch.equal(made.picture, last)
    assert made.calls == 8 + 3 + 3
    assert [s.calls for s in made.stages] == [3, 3]
    assert [len(s.path) for s in made.stages] == [4, 4]


def test_maps_lead_between_pictures_and_states():
    schedule = Schedule.edm(6, 0.02, 5.0)
    x, noise = images(2, 1, 8, 8), normal(2, 1, 16, 16)

    def doubled(z, level, labels=None):
        return 2 * soft_denoiser((z + 1) / 2, level._replace(std=level.std / 2)) - 1

    how = DiffuseHigh(3, 2, **PLAIN)
    got = how.stage(doubled, schedule, x, 16, noise,
                    encode=lambda p: 2 * p - 1, decode=lambda z: (z + 1) / 2)  # fmt: skip
    halved = Schedule.of(EDM(), [s / 2 for s in schedule.sigmas])
    wanted = how.stage(soft_denoiser, halved, x, 16, noise)
    assert torch.allclose(got.picture, wanted.picture, atol=1e-12)


def test_special_cases():
    schedule = Schedule.edm(8, 0.02, 5.0)
    x, noise = images(2, 1, 8, 8), normal(2, 1, 16, 16)

    def made(**options):
        return DiffuseHigh(**{"renoised": 4, "guided": 0, "wavelet": "haar", **PLAIN} | options)

    # without steps: the sharpened enlargement; and the image itself at its own size
    sharp = sharpen(enlarge(x, 16), 1.0)
    assert torch.equal(made(renoised=0).stage(soft_denoiser, schedule, x, 16, noise).picture, sharp)
    same = made(renoised=0, strength=0.0).stage(soft_denoiser, schedule, x, 8, noise).picture
    assert torch.allclose(same, x, atol=1e-12)
    # unguided: noise and denoise, as SDEdit does
    last = schedule.last(4)
    sdedit = sample(soft_denoiser, last, DDIM(), sharp + last.levels[0].std * noise).x
    assert torch.equal(made().stage(soft_denoiser, schedule, x, 16, noise).picture, sdedit)
    # guided to the end: the guide's means, to rounding
    end = made(guided=4).stage(soft_denoiser, schedule, x, 16, noise).picture
    assert torch.allclose(F.avg_pool2d(end, 2), F.avg_pool2d(sharp, 2), atol=1e-12)
    # a denoiser that knows the answer: its details, and with guidance to the end the guide's means
    truth = images(2, 1, 16, 16, seed=5)
    knows = made(guided=4).stage(lambda z, level: truth, schedule, x, 16, noise).picture
    assert torch.allclose(knows, swap_low(truth, dwt(sharp, "haar").low, "haar"), atol=1e-12)
    # another solver takes the hook as well
    heun = made(guided=4).stage(soft_denoiser, schedule, x, 16, noise, plan=Heun())
    assert heun.calls == 7
    assert heun.picture.isfinite().all()


def test_guidance_by_class_at_each_size():
    schedule = Schedule.edm(6, 0.02, 5.0)
    seen = []

    def told(z, level, labels):
        seen.append((len(z), z.shape[-1], labels.tolist()))
        return soft_denoiser(z, level) + 0.01 * labels.view(-1, 1, 1, 1)

    how = DiffuseHigh(2, 1, guidance=1.0, guidance_high=3.0, wavelet="haar")
    how.sample(told, schedule, 5 * normal(2, 1, 8, 8), [16], [normal(2, 1, 16, 16)],
               labels=torch.tensor([3, 4]), untold=0)  # fmt: skip
    assert seen[0] == (2, 8, [3, 4])
    assert seen[-1] == (4, 16, [3, 4, 0, 0])
    with pytest.raises(ValueError, match="labels"):
        DiffuseHigh(2, 1, wavelet="haar").sample(
            told, schedule, 5 * normal(2, 1, 8, 8), [16], [normal(2, 1, 16, 16)]
        )


def test_shares_of_another_schedule():
    assert DiffuseHigh().at(50) == DiffuseHigh()
    small = DiffuseHigh().at(20)
    assert (small.renoised, small.guided) == (6, 2)
    assert (DiffuseHigh().at(3).renoised, DiffuseHigh().at(3).guided) == (1, 1)
    assert (DiffuseHigh(15, 0).at(20).guided, DiffuseHigh(0, 0).at(20).renoised) == (0, 0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: DiffuseHigh(3, 4), "guided"),
        (lambda: DiffuseHigh(wavelet="sym4"), "wavelet"),
        (lambda: DiffuseHigh(wavelet="db11"), "wavelet"),
        (lambda: DiffuseHigh(kernel=4), "kernel"),
        (lambda: DiffuseHigh(padding="mirror"), "padding"),
        (lambda: DiffuseHigh(sigma=0.0), "sigma"),
        (lambda: dwt(images(1, 1, 6, 8), "db4"), "wavelet"),
        (lambda: dwt(images(1, 1, 8, 8), "db4", 3, "periodization"), "level"),
        (lambda: dwt(images(1, 8, 8), "haar"), "images"),
        (lambda: dwt(images(1, 1, 8, 8), "haar", 0), "levels"),
        (lambda: dwt(images(1, 1, 8, 8), "haar", 1, "constant"), "padding"),
        (lambda: swap_low(images(1, 1, 8, 8), images(1, 1, 5, 4), "haar"), "low"),
        (lambda: idwt(dwt(images(1, 1, 8, 8), "haar"), "haar", size=(10, 8)), "size"),
        (lambda: idwt((images(1, 1, 8, 8), (images(1, 1, 3, 4, 4),)), "haar"), "bands"),
        (lambda: enlarge(images(1, 1, 8, 8), 7), "size"),
        (lambda: enlarge(images(1, 1, 8, 8), 16, "nearest"), "interpolation"),
        (lambda: blur(images(1, 1, 3, 3), 7), "kernel"),
        (lambda: blur(images(1, 1, 8, 8), 3, 0.0), "sigma"),
    ],
)  # fmt: skip
def test_what_is_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="sharpness_factor"):
        DiffuseHigh(sharpness_factor=2.0)


def test_nothing_is_asked_before_all_fits():
    schedule = Schedule.edm(8, 0.02, 5.0)
    start, noise = normal(2, 1, 8, 8), normal(2, 1, 16, 16)

    def asked(*_):
        raise AssertionError("the network was asked")

    how = DiffuseHigh(3, 1, **PLAIN)
    for sizes, noises, word in (
        ([16], [], "noises"),
        ([16], [normal(2, 1, 15, 16)], "noises"),
        ([16], [normal(1, 1, 16, 16)], "noises"),
        ([16, 12], [noise, noise], "sizes"),
        ([6], [noise], "wavelet"),
    ):
        with pytest.raises(ValueError, match=word):
            how.sample(asked, schedule, start, sizes, noises)
    with pytest.raises(ValueError, match="renoised"):
        DiffuseHigh(9, 1, **PLAIN).sample(asked, schedule, start, [16], [noise])
    with pytest.raises(ValueError, match="noise"):
        how.stage(asked, schedule, images(2, 1, 8, 8), 16, normal(2, 1, 8, 8))
    with pytest.raises(ValueError, match="smaller"):
        DiffuseHigh(3, 1, wavelet="haar", **PLAIN).sample(
            asked, schedule, normal(2, 1, 16, 16), [8], [normal(2, 1, 8, 8)]
        )


def test_gradients_flow_through_the_swap():
    x = images(1, 1, 8, 8).requires_grad_()
    low = dwt(images(1, 1, 8, 8, seed=1), "db2").low
    assert torch.autograd.gradcheck(lambda t: swap_low(t, low, "db2"), x)


# the lab


def test_pieces_are_counted_picture_by_picture():
    from scipy import ndimage

    x = (images(60, 1, 9, 9) > 0.8).double()
    x[0], x[1] = 0, 0
    x[1, 0, 4, 4] = 1
    counts = [ndimage.label(one[0].numpy() > 0.5, np.ones((3, 3)))[1] for one in x]
    assert enlarged.whole(x) == pytest.approx(100 * np.mean([c == 1 for c in counts]))
    assert 0 < enlarged.whole(x) < 100


def test_native_pixels_held_are_the_native_picture():
    drawn = enlarged.Drawn(enlarged.bed("known", "ci"), 1, 4)
    made = drawn.high(enlarged.own_means(enlarged.method(guided=6)))
    assert torch.allclose(F.avg_pool2d(made, 2), drawn.native, atol=1e-5)
    same = drawn.high(enlarged.method(guided=6))
    assert not torch.allclose(F.avg_pool2d(same, 2), drawn.native, atol=1e-2)


def test_every_way_has_as_many_settings():
    from toolkit.core.scale import scale

    for name in ("ci", "cpu"):
        counts = {len(lab.settings(way, scale(name))) for way in (*lab.WAYS, "sharpened")}
        assert len(counts) == 1
    assert {lab.setting(way, 6, 1.0).guided for way in lab.WAYS} == {0, 2, 6}
