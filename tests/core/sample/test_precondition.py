"""The preconditioned denoiser and the U-Net behind it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from toolkit.core.nets.unet import unet
from toolkit.core.sample.loop import generate
from toolkit.core.sample.plans import UniPC
from toolkit.core.sample.precondition import Preconditioned, drawn_sigmas
from toolkit.core.sample.schedule import EDM, LinearVP, Schedule


class Asked(nn.Module):
    """Keeps what it is given and answers with ``answer`` times it."""

    def __init__(self, answer: float = 0.0) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x, noise, labels):
        self.given = x, noise, labels
        return self.answer * x


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_inputs_and_targets_have_size_one_at_every_noise() -> None:
    clean = 0.5 * torch.randn(20_000, 4, generator=generator())
    for sigma in (0.01, 0.5, 30.0):
        net = Asked()
        denoiser = Preconditioned(net, 0.5)
        x = clean + sigma * torch.randn(20_000, 4, generator=generator(1))
        levels = torch.full((20_000,), sigma)
        skipped = denoiser(x, levels)
        assert float(net.given[0].std()) == pytest.approx(1, abs=0.02)
        assert float(net.given[1][0]) == pytest.approx(math.log(sigma) / 4)
        # what the network must answer, and the weight under which its error counts alike
        weight = float(denoiser.weight(torch.tensor(sigma)))
        target = (clean - skipped).double() * weight**0.5
        assert float(target.std()) == pytest.approx(1, abs=0.02)


def test_the_formula_and_labels() -> None:
    net = Asked(0.3)
    x, sigma = torch.randn(3, 1, 2, 2, generator=generator()), torch.tensor([0.1, 1.0, 9.0])
    said = Preconditioned(net, 0.6)(x, sigma, torch.tensor([1, 2, 3]))
    s = sigma.view(-1, 1, 1, 1)
    root = (s**2 + 0.36).sqrt()
    torch.testing.assert_close(said, 0.36 / root**2 * x + s * 0.6 / root * (0.3 * x / root))
    assert net.given[2].tolist() == [1, 2, 3]


def test_a_level_of_any_view_says_the_same() -> None:
    denoiser = Preconditioned(Asked(0.3))
    x = torch.randn(3, 4, generator=generator())
    edm, vp = EDM().level(0.7), LinearVP().at(0.7)
    wanted = denoiser(x, torch.full((3,), 0.7))
    torch.testing.assert_close(denoiser(x, edm), wanted)
    torch.testing.assert_close(denoiser(x * vp.alpha, vp), wanted)


def test_noise_levels_are_log_normal() -> None:
    logs = drawn_sigmas(20_000, generator()).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.03)
    assert torch.equal(drawn_sigmas(3, generator()), drawn_sigmas(3, generator()))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_the_deviation_of_the_data_is_positive(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma_data"):
        Preconditioned(Asked(), sigma)


def small(**more: object) -> nn.Module:
    sizes = {"widths": (8, 16), "classes": 3, "code": 16, "heads": 2} | more
    return unet(generator=generator(), **sizes)


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("heads", [0, 2])
def test_the_unet_keeps_the_shape_and_starts_at_zero(side: int, heads: int) -> None:
    net = small(channels=2, heads=heads)
    x = torch.randn(3, 2, side, side, generator=generator(1))
    assert torch.equal(net(x, torch.zeros(3), torch.tensor([0, 1, 3])), torch.zeros_like(x))


def stirred(**more: object) -> nn.Module:
    """A network whose blocks all do something."""
    net = small(**more)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator(2)) * 0.1)
    return net


def test_noise_and_labels_reach_every_sample_of_their_own() -> None:
    net = stirred()
    x = torch.randn(1, 1, 8, 8, generator=generator(1)).expand(4, -1, -1, -1)
    noise, labels = torch.tensor([0.1, 0.1, 0.3, 0.1]), torch.tensor([0, 1, 0, 0])
    out = net(x, noise, labels)
    assert torch.allclose(out[0], out[3], atol=1e-6)
    for other in (1, 2):
        assert (out[0] - out[other]).abs().max() > 1e-3
    told = net(x, noise, torch.full((4,), 3))
    torch.testing.assert_close(net(x, noise), told)
    assert net.classes == 3


def test_without_attention_a_pixel_sees_its_surroundings_only() -> None:
    far = {}
    for heads in (0, 2):
        net = stirred(heads=heads)
        x = torch.randn(1, 1, 64, 64, generator=generator(1))
        other = x.clone()
        other[..., -1, -1] += 1
        # group normalisation looks everywhere; taken as constant it does not
        for part in net.modules():
            if isinstance(part, nn.GroupNorm):
                part.forward = lambda h: h
        gap = (net(x, torch.zeros(1)) - net(other, torch.zeros(1))).abs()
        assert gap[..., -1, -1] > 0
        far[heads] = gap[..., 0, 0].item()
    assert far[0] == 0 < far[2]


def test_the_unet_takes_its_numbers_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two = small(), small()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    assert "noise.0.frequencies" not in one.state_dict()


def test_a_network_samples_by_seed_in_any_batch() -> None:
    denoiser = Preconditioned(stirred()).eval()
    schedule = Schedule.edm(4, 0.01, 20.0)

    def made(batch: int):
        return generate(
            denoiser, schedule, UniPC(), (1, 8, 8), range(3), labels=[0, 1, 2], batch=batch,
            guidance=2.0, untold=3,
        )  # fmt: skip

    one, all_ = made(1), made(3)
    assert one.calls == 4
    torch.testing.assert_close(one.x, all_.x, rtol=1e-4, atol=1e-4)
    assert not all_.x.requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": (8,)}, "widths"),
        ({"widths": (8, 12)}, "widths"),
        ({"widths": (0, 8)}, "widths"),
        ({"heads": 3}, "heads: 3"),
        ({"heads": -1}, "heads"),
        ({"channels": 0}, "channels"),
        ({"classes": -1}, "classes"),
    ],
)
def test_sizes_that_cannot_be_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**options)
