"""The bed of denoisers: learns, repeats, ends as its entry says, and its samples are judged."""

from __future__ import annotations

import pytest
import torch

from tests.labs.test_beds_data import needs
from toolkit.labs.beds import bases, denoiser, samples


def test_images_run_from_minus_one_to_one() -> None:
    parts = denoiser.load("ci")
    for x, y in parts:
        assert x.shape[1:] == (1, 8, 8)
        assert (float(x.min()), float(x.max())) == (-1, 1)
        assert set(y.tolist()) == set(range(10))
    assert len(parts.pool[0]) + len(parts.test[0]) == 1797


def test_pretraining_learns_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"ci": denoiser.Size((8, 16), 8, 40, 16, 4e-3, False, 100)}
    monkeypatch.setattr(denoiser, "SIZES", short)
    (one, facts), (two, _) = denoiser.pretrain("ci"), denoiser.pretrain("ci")
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    before = denoiser.judged(denoiser.empty("ci"), "ci")
    assert facts["reached"] < 0.8 * sum(before.values()) / 4


def test_an_untrained_denoiser_has_the_error_of_its_skip() -> None:
    """It answers with a share of its input, whose error is known."""
    model = denoiser.empty("ci")
    x, _ = (part[:200] for part in denoiser.load("ci").test)
    for sigma, found in denoiser.judged(model, "ci").items():
        share = 0.25 / (sigma**2 + 0.25)
        wanted = (1 - share) ** 2 * float(x.square().mean()) + share**2 * sigma**2
        weight = (sigma**2 + 0.25) / (0.25 * sigma**2)
        assert found == pytest.approx(weight * wanted, rel=0.05)
    assert denoiser.judged(model, "ci", 50) != denoiser.judged(model, "ci")


def test_half_precision_in_training_is_near_single() -> None:
    model = denoiser.empty("ci", bases.seeded())
    with torch.no_grad():
        model.network.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = (x, torch.full((4,), 0.5), torch.tensor([0, 1, 2, 10]))
    half, single = (denoiser.Noised(model, h)(batch) for h in (True, False))
    assert half.dtype == torch.float32
    assert 0 < (half - single).abs().max().item() < 0.05


def test_real_images_are_read_and_near() -> None:
    needs("mnist")
    x, y = (part[:300] for part in denoiser.load().test)
    real = denoiser.quality(x, y)
    assert real["frechet"] == pytest.approx(0, abs=1e-6)
    assert real["read"] > 96
    assert denoiser.quality(x, (y + 1) % 10)["read"] < 3
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert denoiser.quality(noisy, y)["frechet"] > 1


def test_samples_of_the_small_bed_are_judged_too() -> None:
    x, y = denoiser.load("ci").test
    found = denoiser.quality(x[:50].flip(0), y[:50].flip(0), "ci")
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert 0 <= found["read"] <= 100
    with pytest.raises(ValueError, match="samples: at most 360"):
        denoiser.quality(torch.zeros(361, 1, 8, 8), torch.zeros(361), "ci")


def test_the_table_of_samples_has_real_images_first_and_counts_calls() -> None:
    found = samples.table("ci", 60)
    assert list(found.images) == ["of training", "Heun", "UniPC"]
    assert list(found.calls) == [0, 35, 10]
    x, y = (part[:60] for part in denoiser.load("ci").pool)
    assert found.frechet[0] == pytest.approx(denoiser.quality(x, y, "ci")["frechet"])
    again = samples.table("ci", 60)
    assert found.equals(again)
    assert len(set(found.frechet)) == 3
    with pytest.raises(ValueError, match="at most 360"):
        samples.table("ci", 361)
