"""Checks of BlackVIP's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.insert.blackvip import BlackBox, BlackVIP, Frame, two_sided


@exercise.check
def check_images_sent(answer):
    """Images sent in 100 steps with K = 5 directions and batches of 16."""
    assert not callable(answer), "Give one number."
    box = BlackBox(lambda x: torch.full((len(x), 2), 0.5))
    draws = torch.Generator().manual_seed(0)
    tuner = BlackVIP(directions=5).start(Frame(4, 1, 1), generator=draws)
    x, y = torch.zeros(16, 1, 4, 4), torch.zeros(16, dtype=torch.int64)
    for _ in range(100):
        tuner.step(box, x, y)
    right = box.images
    assert answer != right // 2, "Each direction is tried on both sides."
    assert answer != right // 16, "Every query is a whole batch: count images."
    assert answer != 100 * 16, "A step does not send its batch once: each direction sends it twice."
    assert answer == right, "Steps, times directions, times sides, times images of a batch."
    return "so many images were counted just now, while a box was asked."


@exercise.check
def check_estimate(answer):
    """``estimate(loss, phi, delta, c)``: the gradient (P,) from losses along directions (K, P)."""
    draws = torch.Generator().manual_seed(0)
    phi, g = torch.randn(2, 5, dtype=torch.float64, generator=draws)
    delta = 0.5 + 0.5 * torch.rand(3, 5, dtype=torch.float64, generator=draws)
    delta[1, ::2] *= -1
    asked = []

    def loss(vector):
        assert getattr(vector, "shape", None) == (5,), "Give the loss one vector at a time."
        asked.append(vector.clone())
        return (vector @ g).exp()

    kept, c = phi.clone(), 0.1
    got = answer(loss, phi, delta, c)
    assert got is not None, "There is no answer yet: return the estimate."
    assert torch.equal(phi, kept), "phi must stay where it is."
    assert getattr(got, "shape", None) == (5,), "Return one number for each of the 5 in phi."
    up, down = ((phi + sign * c * delta) @ g for sign in (1, -1))
    up, down = up.exp(), down.exp()
    wanted = two_sided(up, down, delta, c)
    slope = (up - down) / (2 * c)
    centre = (phi @ g).exp()
    for wrong, words in (
        ((slope[:, None] * delta).mean(0), "Divide by the direction, do not multiply by it."),
        (3 * wanted, "Take the mean over the directions, not the sum."),
        (2 * wanted, "The two points are 2c apart, not c."),
        (two_sided(up, 2 * centre - up, delta, c), "Ask on both sides, not at phi itself."),
    ):
        assert not torch.allclose(got, wrong, atol=1e-10), words
    assert torch.allclose(got, wanted, atol=1e-10), "The numbers differ: read the formula again."
    assert len(asked) == 6, f"Six queries would do, {len(asked)} were made."
    return "the toolkit's estimate, with two queries a direction."
