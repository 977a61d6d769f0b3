"""Checks of the inside-and-aside chapter's exercises. Each computes what is right."""

from __future__ import annotations

import torch
from torch import nn

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.show import exercise
from toolkit.insert.connected_peft_ir import Connected
from toolkit.insert.connected_peft_ir.scoring import info_nce


@exercise.check
def check_count(answer):
    """Numbers trained in one block of width 64: two adapters of 4 hidden units, an aside of 8."""
    assert not callable(answer), "Give one number."
    block = nets.transformer.Block(64, 4, 128)
    adapted = adapt(nn.Sequential(block), Connected(variant="layer", rank=8, inside_rank=4))
    right = sum(p.numel() for p in adapted.parameters())
    assert answer != 2 * 64 * (4 + 4 + 8), "Both maps have a bias: 4 and 64 more in an adapter."
    assert answer != right - 64 - 4 - 2 * 4 * 64, "There are two adapters inside, not one."
    assert answer == right, "A module has 2rm + r + m numbers. Which three are there?"
    return "so many were counted in a block just now."


@exercise.check
def check_contrast(answer):
    """``contrast(queries, documents, relevant, temperature)``: the loss of a batch."""
    draws = torch.Generator().manual_seed(0)
    q, d = torch.randn(2, 6, 5, generator=draws, dtype=torch.float64)
    relevant = torch.eye(6, dtype=torch.bool)
    relevant[0, 3] = relevant[4, 1] = True
    got = answer(q.clone(), d.clone(), relevant.clone(), 0.5)
    assert got is not None, "There is no answer yet: return one number."
    assert torch.is_tensor(got), "Return the mean over queries as a tensor."
    assert got.dim() == 0, "Return the mean over queries, one number."
    right = info_nce(q, d, relevant=relevant, temperature=0.5)
    assert not torch.allclose(got, info_nce(q, d, temperature=0.5)), (
        "Document 3 answers query 0 as well: it may not count as wrong."
    )
    assert not torch.allclose(got, info_nce(q, d, relevant=relevant)), "Divide by the temperature."
    assert not torch.allclose(got, info_nce(q, d, relevant=relevant.T, temperature=0.5)), (
        "Rows are queries: relevant[i, j] says that document j answers query i."
    )
    assert torch.allclose(got, right), (
        "The right document of query i is document i; the sum runs over it and those that do not "
        "answer."
    )
    return "the same loss as the toolkit's."
