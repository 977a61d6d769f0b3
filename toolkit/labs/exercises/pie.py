"""Checks of the PIE chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.sample.mixtures import Mixture
from toolkit.core.sample.schedule import Betas
from toolkit.core.show import exercise
from toolkit.generate.pie import PIE, leading


@exercise.check
def check_images_seen(answer):
    """Images that the network sees for one original: 50 steps, strength 0.58, ten rounds, w = 3."""
    assert not callable(answer), "Give one number."
    seen = []

    def counting(x, level, labels):
        seen.append(len(x))
        return x

    PIE(rounds=10, strength=0.58, guidance=3.0).edit(
        counting, leading(Betas.scaled_linear(), 50), torch.zeros(1, 2), [0], untold=1,
        noise=torch.zeros(1, 2),
    )  # fmt: skip
    right = sum(seen)
    assert answer != 50 * 10 * 2, "A round takes the last steps only, not all 50."
    assert answer != right // 2, "Guidance asks twice: with the label and without."
    assert answer != 29 * 10 * 2, (
        "50 * 0.58 is just below 29 in floating point, and is rounded down: print it."
    )
    assert answer == right, "Steps of a round, times rounds, times what guidance asks for."
    return "so many images were counted just now, while a network was asked."


@exercise.check
def check_round(answer):
    """``one_round(denoise, levels, x, before, mask, first, second)``: the image after a round that
    keeps 0.01 of an edit outside the mask and 0.75 inside."""
    draws = torch.Generator().manual_seed(0)
    x, first, second = torch.randn(3, 4, 6, dtype=torch.float64, generator=draws)
    before = x + 0.5 * torch.randn(4, 6, dtype=torch.float64, generator=draws)
    mix = Mixture(torch.randn(3, 6, dtype=torch.float64, generator=draws), 0.4)
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    part = PIE().part(leading(Betas.scaled_linear(), 12))
    given = [t.clone() for t in (x, before, first, second)]
    got = answer(mix.denoise, part.levels, x, before, mask, first, second)
    assert got is not None, "There is no answer yet: return the image after the round."
    assert all(map(torch.equal, given, (x, before, first, second))), "What is given must stay."
    assert getattr(got, "shape", None) == x.shape, f"Return images of shape {tuple(x.shape)}."
    wanted = _round(mix.denoise, part.levels, x, before, mask, first, second)
    for other, words in (
        ({"anchor": "previous"}, "Mix with the original x, not with the image before."),
        ({"known": "previous"}, "Outside the mask the original x is put back, not the one before."),
        ({"known": "none"}, "Before every step but the first, overwrite what is outside the mask."),
        ({"at_first": True}, "At the first step nothing is overwritten yet."),
        ({"one": True}, "Overwriting takes the second noise, not the first."),
        ({"unmixed": True}, "The last step is missing: pull the edit back to the original."),
    ):
        wrong = _round(mix.denoise, part.levels, x, before, mask, first, second, **other)
        assert not torch.allclose(got, wrong, atol=1e-8), words
    assert torch.allclose(got, wanted, atol=1e-8), (
        "The numbers differ: noise the image before, go down the levels by DDIM, then mix."
    )
    return "the same image as after a round of the toolkit."


def _round(denoise, levels, x, before, mask, first, second, anchor="", known="", **off):
    """A round, or one with a mistake."""
    from toolkit.core.sample.loop import sample
    from toolkit.core.sample.plans import DDIM
    from toolkit.core.sample.schedule import Schedule
    from toolkit.generate.pie import mixed, replaced

    kept, noise = before if known == "previous" else x, first if off.get("one") else second
    hook = replaced(kept, mask, noise)

    def state(z, number, level):
        return hook(z, number + 1 if off.get("at_first") else number, level)

    z = levels[0].alpha * before + levels[0].std * first
    z = sample(denoise, Schedule(tuple(levels)), DDIM(), z,
               state=None if known == "none" else state).x  # fmt: skip
    if off.get("unmixed"):
        return z
    return mixed(z, before if anchor == "previous" else x, mask, 0.01, 0.75)
