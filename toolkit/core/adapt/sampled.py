r"""A linear layer of which few entries move: only their gradient is computed.

.. math:: g_k = \sum_t G_{t,i_k}\,X_{t,j_k}

for k chosen entries instead of all of :math:`G^\top X`. A product of single pairs of columns is far
slower per number than one of matrices, so it pays for large matrices and small shares only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from toolkit.core.adapt.factored import fusible
from toolkit.core.adapt.forwards import has_own_forward, is_hooked
from toolkit.core.adapt.sites import Site

TOKENS = 128
"""Rows that are laid out anew at a time: longer columns would not stay in a core's own cache."""
SIDE, SHARE = 128, 1 / 32
"""Where it pays: mn / (m + n) from which on, and the share of the entries up to which."""

_patterns: Any = WeakIdKeyDictionary()  # index -> (its version, the pattern, the order of entries)


def pays(base: nn.Module, site: Site, values: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a call of a layer is plain enough, and large enough, for :func:`linear`.

    Args:
        base, site: the frozen layer.
        values: (k,) the entries that move.
        args: what the layer is called with.
    """
    if site.kind not in ("linear", "hf_conv1d") or len(args) != 1:
        return False
    x, size = args[0], site.rows * site.cols
    if size < SIDE * (site.rows + site.cols) or not 0 < len(values) <= SHARE * size:
        return False
    weight = base._parameters.get(site.parameter)
    return (
        torch.is_grad_enabled()
        and weight is not None
        and fusible(x, weight, values)
        and values.requires_grad
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == values.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= TOKENS * site.cols
        and not (has_own_forward(base) or is_hooked(base))
    )


def linear(
    site: Site, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor
) -> Tensor:
    """Output of a linear or Conv1D layer whose weight holds ``values`` at ``index``.

    Args:
        site: the layer's.
        x: (..., n) input.
        weight: the new weight in the layer's own layout, values included, without a graph.
        bias: (m,) or None.
        values: (k,) entries that get a gradient.
        index: (k,) their places in the weight's memory, each once.
    """
    return _Linear.apply(x, bias, values, weight, index, site.kind == "linear")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, values, weight, index, outputs_first: bool):
        ctx.save_for_backward(x, weight, index)
        ctx.values, ctx.outputs_first = values, outputs_first
        return F.linear(x, weight if outputs_first else weight.T, bias)

    @staticmethod
    def backward(ctx, grad):
        given, weight, index = ctx.saved_tensors
        again = torch.is_grad_enabled()  # double backward: through plain operations
        if again:
            own = (ctx.values - ctx.values.detach()).to(weight)  # 0, with the graph of the values
            weight = weight.reshape(-1).index_add(0, index, own).view_as(weight)
        x, g = given.reshape(-1, given.shape[-1]), grad.reshape(-1, grad.shape[-1])
        gx = gb = gv = None
        if ctx.needs_input_grad[0]:
            gx = (g @ (weight if ctx.outputs_first else weight.T)).view(given.shape)
        if ctx.needs_input_grad[1]:
            gb = g.sum(0)
        if ctx.needs_input_grad[2]:
            left, right = (g, x) if ctx.outputs_first else (x, g)
            gv = (left.T @ right).reshape(-1)[index] if again else products(left, right, index)
        return gx, gb, gv, None, None, None


def products(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """Entries of L^T R, (k,), and no other entry.

    Args:
        left, right: (t, p) and (t, q), float32 or float64, on CPU.
        index: (k,) places in the (p, q) product, counted row by row, each once.
    """
    pattern, back = _pattern(index, left.shape[1], right.shape[1], left.dtype)
    total = pattern
    for i, (a, b) in enumerate(zip(_columns(left), _columns(right), strict=True)):
        total = torch.sparse.sampled_addmm(total, a, b.T, beta=float(i > 0))
    found = total.values()
    return found if back is None else found[back]


def _columns(rows: Tensor) -> Tensor:
    """(t, p) -> (chunks, p, TOKENS), the columns laid out one after the other, padded with 0."""
    if more := -len(rows) % TOKENS:
        rows = F.pad(rows, (0, 0, 0, more))
    return rows.view(-1, TOKENS, rows.shape[1]).transpose(1, 2).contiguous()


def _pattern(index: Tensor, p: int, q: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The places as a sparse matrix of zeros, and the order of its entries if not ascending."""
    version, kind = index._version, (p, q, dtype)
    known = _patterns.get(index)
    if known is not None and known[:2] == (version, kind):
        return known[2:]
    flat, back = index.long(), None
    if bool((flat[1:] < flat[:-1]).any()):
        flat, order = flat.sort()
        back = order.argsort()
    counts = torch.bincount(flat // q, minlength=p)
    ends = F.pad(counts.cumsum(0), (1, 0)).int()
    with warnings.catch_warnings():  # torch tells once that its sparse tensors may change
        warnings.simplefilter("ignore")
        pattern = torch.sparse_csr_tensor(
            ends, (flat % q).int(), torch.zeros(len(flat), dtype=dtype), (p, q),
            check_invariants=False,
        )  # fmt: skip
    _patterns[index] = version, kind, pattern, back
    return pattern, back
