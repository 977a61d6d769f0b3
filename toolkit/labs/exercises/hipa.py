"""Checks of the HiPA chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.generate.hipa import terms


@exercise.check
def check_phase(answer):
    """The Fourier term between a checkerboard of plus and minus 1 and its negative."""
    assert not callable(answer), "Give one number."
    board = torch.ones(1, 1, 8, 8)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    found = float(terms.fourier(board, -board, 0.25))
    assert answer != 0, "Both have the same spectrum, but the term compares pixels, after a filter."
    assert answer not in (1, 2), "The difference is 2 in size everywhere, and it is squared."
    assert abs(answer - found) < 1e-6, "Which part of the difference passes the filter?"
    power = float(terms.log_power(board, -board, 0.25))
    return f"the Fourier term is {found:g}; a term on the power alone would say {power:g}."


@exercise.check
def check_high_pass(answer):
    """``high_pass(images, cutoff)``: what lies above a frequency, of images (n, 1, h, w)."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 8, 6, generator=draws, dtype=torch.float64)
    got = answer(x, 0.25)
    assert got is not None, "There is no answer yet: return the filtered images."
    assert got.shape == x.shape, f"The shape is {tuple(got.shape)}, not that of the images."
    assert not torch.is_complex(got), "Return real numbers: the imaginary part is rounding."
    flat = answer(torch.ones_like(x), 0.25)
    assert float(flat.abs().max()) < 1e-9, (
        "A constant image has no high frequencies, yet some pass."
    )
    assert torch.allclose(answer(got, 0.25), got), "Filtered twice must be filtered once."
    for cutoff in (0.1, 0.25, 0.4):
        wanted = terms.high_pass(x, cutoff)
        assert torch.allclose(answer(x, cutoff), wanted), (
            "Look at the radius of both frequencies together, in cycles per pixel, as fftfreq "
            "gives them: those in the second half are negative."
        )
    return "the same images as the toolkit's, at three cutoffs."
