"""Checks of the AST chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.adapt.sites import Site
from toolkit.core.show import exercise
from toolkit.insert.petl_ast import ASTAdapter
from toolkit.insert.petl_ast.mixtures import Soft, SoftMoA


def _block(width: int) -> Site:
    return Site("block", "module", width, 0, "", (), 1, torch.float32, torch.device("cpu"))


def _numbers(place: str) -> int:
    """Numbers of bottlenecks of rate 96 in 12 blocks of width 768."""
    method = ASTAdapter("bottleneck", 96, place="both" if place == "both" else "ffn")
    return 12 * method.count(_block(768))


@exercise.check
def check_numbers(answer):
    """How many numbers Houlsby's two bottlenecks a block train in AST, at rate 96."""
    assert not callable(answer), "Give one number."
    assert answer != _numbers("ffn"), "So many with one adapter a block. Houlsby has two."
    weights = 12 * 2 * 2 * 768 * 8
    assert answer != weights, "Those are the matrices. Each layer has a bias as well."
    assert answer == _numbers("both"), "b = round(768 / 96). Count down, up and both biases."
    return "counted just now on two adapters in each of 12 blocks."


@exercise.check
def check_mixture(answer):
    """``mixture(x, slots, adapters)``: tokens (batch, M, d), slots (d, n, p), n functions."""
    draw = torch.Generator().manual_seed(0)
    one = Soft(SoftMoA(adapters=3, slots=2, reduction=4, start="redrawn"), _block(16), draw)
    x = torch.randn(2, 7, 16, generator=draw)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
        got, right = answer(x, one.slots, list(one.adapters)), one(x)
        assert got is not None, "There is no answer yet: return tokens of the shape of x."
        assert torch.is_tensor(got), "Return a tensor of the shape of x."
        assert got.shape == x.shape, "The tokens that leave have the shape of those that enter."
        logits = torch.einsum("bmd,dnp->bmnp", x, one.slots)
        dispatch = logits.flatten(2).softmax(-1).view(logits.shape)
        swapped = torch.stack([
            a(z) for a, z in zip(
                one.adapters, torch.einsum("bmd,bmnp->nbpd", x, dispatch), strict=True
            )
        ])  # fmt: skip
        wrong = torch.einsum("nbpd,bmnp->bmd", swapped, logits.softmax(1))
        assert not torch.allclose(got, wrong, atol=1e-4), (
            "The two softmaxes are exchanged: a slot mixes tokens, a token mixes slots."
        )
        assert torch.allclose(got, right, atol=1e-4), (
            "Which axis does each softmax sum over? C sums to 1 over all n p slots together."
        )
    return "every slot is a mean of tokens, every token a mean of slots."
