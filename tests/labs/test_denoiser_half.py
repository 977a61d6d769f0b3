"""The denoiser of digits at half their size: frames, halves, training, and what its entry says."""

from __future__ import annotations

import pytest
import torch

from tests.labs.test_beds_data import needs
from toolkit.core.data import ChecksumError
from toolkit.core.sample.loop import generate
from toolkit.core.sample.plans import UniPC
from toolkit.core.sample.schedule import Schedule
from toolkit.labs.beds import bases, denoiser, denoiser_half


@pytest.fixture
def digits(monkeypatch):
    """Scikit-learn's digits in place of MNIST, enlarged to 28 x 28."""
    small = denoiser.load("ci")

    def part(pair):
        return torch.nn.functional.interpolate(pair[0][:200], (28, 28)), pair[1][:200]

    parts = denoiser.Parts(*map(part, small))
    monkeypatch.setattr(denoiser, "load", lambda scale: parts)
    denoiser_half.load.cache_clear()
    yield parts
    denoiser_half.load.cache_clear()


def test_digits_get_a_frame_and_are_halved(digits):
    x, _ = denoiser_half.load().test
    assert x.shape[1:] == (1, 32, 32)
    assert torch.equal(x[..., 2:-2, 2:-2], digits.test[0])
    assert float(x.sum() - digits.test[0].sum()) == -len(x) * (32**2 - 28**2)
    half = denoiser_half.halved(x)
    assert half.shape[1:] == (1, 16, 16)
    assert float(half[3, 0, 5, 7]) == pytest.approx(float(x[3, 0, 10:12, 14:16].mean()))


def test_pretraining_learns_and_repeats(digits, monkeypatch):
    # few images: a processor without instructions for bfloat16 takes ten times as long for each
    monkeypatch.setattr(denoiser_half, "BATCH", 8)
    (one, facts), (two, _) = denoiser_half.pretrain(20), denoiser_half.pretrain(20)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    before = denoiser_half.judged(denoiser_half.empty())
    assert facts["reached"] < 0.9 * sum(before.values()) / 4


def test_a_base_that_is_not_there_says_how_to_make_it(monkeypatch):
    monkeypatch.setattr(bases, "entries", lambda: {})
    denoiser_half._base.cache_clear()
    with pytest.raises(ChecksumError, match="pretrain denoiser_half"):
        denoiser_half.network()


def test_the_base_reaches_what_it_says_and_draws_digits():
    needs("mnist")
    denoiser_half.load.cache_clear()
    network = denoiser_half.network()
    said = bases.entries()[denoiser_half.BASE]["reached"]
    found = denoiser_half.judged(network, 250)
    assert sum(found.values()) / 4 == pytest.approx(said, rel=0.1)
    labels = torch.arange(40) % 10
    made = generate(
        network, Schedule.edm(10), UniPC(3), (1, 16, 16), range(40), labels=labels
    ).x  # fmt: skip
    x, y = (part[:10_000] for part in denoiser_half.load().pool)
    nearest = torch.cdist(made.flatten(1), denoiser_half.halved(x).flatten(1)).argmin(1)
    assert float((y[nearest] == labels).double().mean()) >= 0.75
