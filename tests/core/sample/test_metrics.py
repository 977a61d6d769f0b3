"""Distances between sets against closed forms, and spectra that keep the energy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import linalg

from toolkit.core.sample import metrics
from toolkit.core.sample.metrics import (
    energy_distance,
    features_of,
    frechet,
    high_share,
    spectrum,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_is_the_formula_with_a_matrix_root() -> None:
    one, other = normal(50, 4), normal(40, 4, seed=1) @ normal(4, 4, seed=2) + 1
    means, spreads = zip(*((x.mean(0), x.T.cov()) for x in (one, other)), strict=True)
    root = torch.from_numpy(linalg.sqrtm((spreads[0] @ spreads[1]).numpy()).real)
    wanted = (means[0] - means[1]).square().sum() + (spreads[0] + spreads[1] - 2 * root).trace()
    assert frechet(one, other) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet(other, one) == pytest.approx(float(wanted), rel=1e-9)
    turn, _ = torch.linalg.qr(normal(4, 4, seed=3))
    assert frechet(one @ turn + 5, other @ turn + 5) == pytest.approx(float(wanted), rel=1e-9)


def test_frechet_of_gaussians_in_one_dimension() -> None:
    one = normal(200, 1)
    assert frechet(one, one) == pytest.approx(0, abs=1e-12)
    assert frechet(one, one + 3) == pytest.approx(9, rel=1e-9)
    assert frechet(one, 3 * one) == pytest.approx(
        float(4 * one.mean() ** 2 + 4 * one.var()), rel=1e-9
    )


def test_frechet_with_fewer_rows_than_columns() -> None:
    one, other = normal(5, 30), normal(6, 30, seed=1)
    assert frechet(one, one) == pytest.approx(0, abs=1e-10)
    assert 0 < frechet(one, other) < 100


def test_features_are_those_of_a_function_of_the_user() -> None:
    images = normal(30, 1, 4, 4).float()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    rows = net(images).detach().double()
    torch.testing.assert_close(features_of(net, images, batch=7), rows, rtol=1e-6, atol=1e-6)
    assert not features_of(net, images).requires_grad
    found = frechet(images[:15], images[15:], net)
    assert found == pytest.approx(frechet(rows[:15], rows[15:]), rel=1e-4)
    with pytest.raises(ValueError, match="features: one row per sample"):
        frechet(images, images, lambda x: x.mean())


def test_energy_distance_of_points_and_of_equal_laws() -> None:
    one, other = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]).expand(5, 2)
    assert energy_distance(one, other) == pytest.approx(10)
    far = [energy_distance(normal(300, 3, seed=s), normal(300, 3, seed=s + 50)) for s in range(20)]
    mean = sum(far) / 20
    spread = (sum((f - mean) ** 2 for f in far) / 19) ** 0.5
    assert abs(mean) < 3 * spread / math.sqrt(20)
    assert energy_distance(normal(300, 3), normal(300, 3, seed=1) + 0.5) > 6 * spread


def test_energy_distance_by_hand_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(4, 2), normal(3, 2, seed=1)

    def mean(a, b, skip):
        pairs = [
            float((p - q).norm())
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (skip and i == j)
        ]
        return sum(pairs) / len(pairs)

    wanted = 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)
    assert energy_distance(x, y) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr(metrics, "ROWS", 4)
    assert energy_distance(x, y) == pytest.approx(wanted, rel=1e-12)
    # near points far from 0 keep their digits
    shift = 1e6
    assert energy_distance(x + shift, y + shift) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("call", [frechet, energy_distance])
@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (torch.zeros(1, 2), torch.zeros(3, 2), "one: two rows"),
        (torch.zeros(3, 2), torch.zeros(0, 2), "other: two rows"),
        (torch.zeros(3, 2), torch.zeros(3, 3), "same width, got 2 and 3"),
        (torch.zeros(3, 2), torch.full((3, 2), math.nan), "other: holds numbers that are not"),
        (torch.full((3, 2), math.inf), torch.zeros(3, 2), "one: holds numbers that are not"),
    ],
)
def test_sets_that_do_not_compare_are_refused(call, one, other, words) -> None:
    with pytest.raises(ValueError, match=words):
        call(one, other)


def test_a_wave_stands_at_its_frequency() -> None:
    at = torch.arange(32.0)
    wave = torch.cos(2 * math.pi * 5 * at / 32).expand(32, 32)
    frequencies, power = spectrum(wave[None, None])
    assert float(frequencies[power.argmax()]) == pytest.approx(5 / 32)
    assert float(power.max()) * 32 > 0.99 * float(power.sum())
    assert high_share(wave[None, None] + 7, above=0.15) == pytest.approx(1)
    assert high_share(wave[None, None] + 7, above=0.16) == pytest.approx(0, abs=1e-9)
    assert high_share(wave.T[None, None], above=0.15) == pytest.approx(1)


def test_white_noise_has_a_flat_spectrum() -> None:
    images = normal(400, 2, 16, 16)
    frequencies, power = spectrum(images)
    assert len(frequencies) == len(power) == 9
    assert float(frequencies[-1]) == 0.5
    torch.testing.assert_close(power, torch.ones_like(power), rtol=0.1, atol=0)
    radius = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(16)] * 2, indexing="ij"))
    share = float((radius > 0.25).sum() / (radius > 0).sum())
    assert high_share(images) == pytest.approx(share, abs=0.01)


def test_the_rings_hold_the_energy() -> None:
    """Parseval: below half a cycle per pixel all energy of a smooth image is in the rings."""
    at = torch.arange(16.0)
    images = (torch.cos(2 * math.pi * at / 16)[:, None] + torch.sin(6 * math.pi * at / 16))[None]
    images = torch.stack([images, images * 2])
    _, power = spectrum(images)
    rings = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(16)] * 2, indexing="ij")) * 16
    sizes = torch.bincount(rings.round().long().flatten())[: len(power)]
    energy = images.square().sum((1, 2, 3)).double().mean()
    torch.testing.assert_close((power * sizes).sum(), energy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spectrum(torch.zeros(3, 8, 8)), "images"),
        (lambda: spectrum(torch.full((1, 1, 8, 8), math.nan)), "images"),
        (lambda: spectrum(torch.zeros(1, 1, 8, 8), bins=50), "bins: 50 rings"),
        (lambda: high_share(torch.zeros(1, 1, 8, 8), above=0.8), "above"),
        (lambda: high_share(torch.ones(1, 1, 8, 8)), "no contrast"),
    ],
)
def test_bad_images_are_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
