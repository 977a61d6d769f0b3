"""Checks of the DiffuseHigh chapter's exercises. Each computes what is right; none holds a
solution."""

from __future__ import annotations

import torch

from toolkit.core.sample.schedule import Schedule
from toolkit.core.show import exercise
from toolkit.generate.diffusehigh import DiffuseHigh, dwt, swap_low

PREDICTED, GUIDE = (0.9, 0.7, 0.2, 0.2), (0.8, 0.8, 0.4, 0.4)


def _block(values):
    """Four pixels as an image."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 2, 2)


@exercise.check
def check_pixel(answer):
    """The first pixel of a block after its low band, of Haar, was replaced by the guide's."""
    assert not callable(answer), "Give one number."
    held = swap_low(_block(PREDICTED), dwt(_block(GUIDE), "haar").low, "haar")
    found = float(held[0, 0, 0, 0])
    value = float(answer)
    assert abs(value - GUIDE[0]) > 1e-6, "Only the mean comes from the guide, not the pixel."
    assert abs(value - PREDICTED[0]) > 1e-6, "The means differ, so every pixel moves."
    assert abs(value - found) < 1e-6, "Move all four pixels by the difference of the two means."
    return f"the block became {[round(v, 2) for v in held.flatten().tolist()]} just now."


@exercise.check
def check_noised(answer):
    """``noised(guide, sigmas, tau, noise)``: the state that the last tau steps start from."""
    draws = torch.Generator().manual_seed(0)
    schedule = Schedule.edm(10, 0.02, 5.0)
    picture = torch.rand(2, 1, 8, 8, generator=draws, dtype=torch.float64)
    noise = torch.randn(2, 1, 16, 16, generator=draws, dtype=torch.float64)
    for tau in (1, 4, 10):
        how = DiffuseHigh(tau, 0, wavelet="haar", guidance_high=1.0)
        stage = how.stage(lambda z, level: z * 0, schedule, picture, 16, noise, keep=True)
        guide = stage.guide.picture.clone()
        got = answer(guide, list(schedule.sigmas), tau, noise)
        assert got is not None, "There is no answer yet: return the noisy state."
        assert torch.equal(guide, stage.guide.picture), "The guide must stay: work on a copy."
        assert got.shape == noise.shape, "Return one number for each of the guide."
        used = float((got - guide).flatten() @ noise.flatten() / noise.square().sum())
        assert torch.allclose(got, guide + used * noise, atol=1e-9), (
            "Keep the guide as it is and add a multiple of the noise: here alpha is 1."
        )
        right = schedule.sigmas[-tau - 1]
        assert abs(used - right) < 1e-9, (
            f"With tau = {tau} of 10 you add noise of {used:.3g}, but tau steps before the end of "
            f"the list it is {right:.3g}."
        )
    return "the same noise as the toolkit's for 1, 4 and 10 of 10 steps."
