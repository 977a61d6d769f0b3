"""Checks of the SSF chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.show import exercise
from toolkit.insert.ssf import SSF, Pair, put_pairs


def _change(role: str, shift: float) -> float:
    """Largest change of the scores when the outputs of one role are shifted in every block."""
    draw = torch.Generator().manual_seed(0)
    model = nets.digits_transformer(16, 2, 4, 10, 2, generator=draw).double()
    x = torch.rand(5, 8, 8, generator=draw).double()
    with torch.no_grad():
        before = model(x)
        adapted = adapt(model, SSF(), f"*.{role}")
        ones = torch.ones(16, dtype=torch.float64)
        put_pairs(adapted, {name: Pair(ones, shift * ones) for name in adapted.adapters})
        return (model(x) - before).abs().max().item()


@exercise.check
def check_keys(answer):
    """By how much scores change when every key is shifted by 5."""
    assert not callable(answer), "Give one number: by how much does the largest score change?"
    got, queries = _change("key", 5.0), _change("query", 5.0)
    assert abs(answer - 5) > 1e-6, (
        "5 is added to every number of a key. How does a key reach the scores?"
    )
    assert abs(answer - got) < 1e-6, (
        "Write the product of a query with a shifted key. Which part of it differs from key to "
        f"key? A softmax does not see the rest. (Queries shifted as much: {queries:.2f}.)"
    )
    return f"nothing; the same shift of the queries changes a score by {queries:.2f}."


@exercise.check
def check_fold(answer):
    """``fold(W, b, gamma, beta)``: weight and bias of a convolution with the pair inside."""
    draw = torch.Generator().manual_seed(0)
    for groups, bias in ((1, True), (4, True), (4, False)):
        layer = nn.Conv2d(4, 8, 3, groups=groups, bias=bias).double()
        gamma, beta = (torch.randn(8, generator=draw, dtype=torch.float64) for _ in range(2))
        x = torch.randn(2, 4, 6, 6, generator=draw, dtype=torch.float64)
        right = gamma[:, None, None] * layer(x) + beta[:, None, None]
        old = None if layer.bias is None else layer.bias.detach()
        got: Any = answer(layer.weight.detach(), old, gamma, beta)
        assert got is not None, "There is no answer yet: return the new weight and the new bias."
        assert isinstance(got, tuple), "Return a pair: weight, bias."
        weight, new = got
        assert weight.shape == layer.weight.shape, "The weight keeps its shape (out, in, k, k)."
        assert new is not None, "A layer without a bias gets one: something must hold the shift."
        assert new.shape == (8,), "There is one bias per output channel."
        found = nn.functional.conv2d(x, weight, new, groups=groups)
        if old is not None:
            forgot = right - ((gamma - 1) * old)[:, None, None]
            assert not torch.allclose(found, forgot), (
                "The old bias comes out of the layer too, so what scales it?"
            )
        assert torch.allclose(found, right), (
            "Compare with gamma * conv(x) + beta. On which axis of the weight are the outputs?"
        )
    return "a convolution, one channel by channel, and one without a bias give the same images."
