"""Checks of the exercises of *Which weights, when?*; each computes what is right."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from toolkit.core.adapt.put import adapt
from toolkit.core.baselines.sparse_mask import SparseMask
from toolkit.core.show import exercise
from toolkit.labs.select.sara import source_at


def _stored(share: float) -> tuple[float, float]:
    """Bytes of the chosen entries of one matrix, and of the matrix."""
    layer = nn.Linear(100, 100, bias=False)
    adapted = adapt(nn.Sequential(layer), SparseMask(share=share, by="largest"))
    return adapted.costs()["stored_bytes"], 4.0 * 100 * 100


@exercise.check
def check_break_even(answer):
    """Per cent of entries from which on places and values take more room than the matrix."""
    assert not callable(answer), "Give one number, in per cent."
    assert 0 < answer < 100, "Give a share of the entries in per cent, between 0 and 100."
    shares = np.arange(1, 100) / 100
    larger = [share for share in shares if np.greater(*_stored(float(share)))]
    first = 100 * min(larger)
    assert answer < 99, "That counts the values alone. A file must say where they go, too."
    assert abs(answer - 50) > 1, "So it would be with places of four bytes. These have eight."
    assert abs(answer - first) <= 1, "How many bytes does one entry take, value and place?"
    return f"counted: at {first:.0f} % the list is larger than the whole matrix for the first time."


@exercise.check
def check_source_at(answer):
    """``source_at(targets, sources, level)``: the source loss at one loss on the target."""
    targets, sources = [5.0, 3.0, 2.0, 2.2, 1.0], [0.1, 0.5, 0.9, 1.5, 1.3]
    found = answer(targets, sources, 2.5)
    assert found is not None, "There is no answer yet: return a source loss."
    wanted = source_at(targets, sources, 2.5)
    assert not np.isclose(found, 0.9), "That is the first check below; go back along the line."
    assert np.isclose(found, wanted), "2.5 lies half way between the second and the third check."
    last = answer(targets, sources, 2.1)
    assert np.isclose(last, source_at(targets, sources, 2.1)), (
        "The target loss may rise again on the way. Take the first time that it falls to the level."
    )
    assert np.isclose(answer(targets, sources, 5.0), 0.1), "At the start nothing is forgotten yet."
    draws = torch.Generator().manual_seed(0)
    for _ in range(5):
        falling = torch.rand(6, generator=draws).sort(descending=True).values.tolist()
        rising = torch.rand(6, generator=draws).sort().values.tolist()
        level = 0.5 * (falling[0] + falling[-1])
        given, right = answer(falling, rising, level), source_at(falling, rising, level)
        assert np.isclose(given, right), "Two checks enclose the level; take the line between them."
    return f"at a target loss of 2.5 the source loss is {wanted:.2f}."
