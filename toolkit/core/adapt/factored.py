"""The output of a layer whose weight matrix is W + s B A, without ever forming B A.

This is the factored route that all low-rank methods share; ``merged`` is the materialised route
(:mod:`toolkit.core.adapt.lowrank`). Tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from toolkit.core.adapt.forwards import is_hooked, refuse_trace
from toolkit.core.adapt.sites import Site


class _LowRankLinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T for a frozen W, with no temporary of the size of x or y.

    Composed from separate operations, the branch writes s u B^T, the sum, the scaled gradient and
    the sum of two input gradients to memory. Accumulating inside the matrix products avoids all
    four, which is where the time of a small rank goes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s):
        flat = x.reshape(-1, x.shape[-1])
        u = flat @ A.T
        if x.dim() == 2:
            y = rows = F.linear(flat, weight, bias)
        else:
            # Written into a tensor of y's own shape: a function may not return a view, since
            # autograd lets nobody work on that in place, as activations may.
            y = x.new_empty(*x.shape[:-1], len(weight))
            rows = y.view(len(flat), len(weight))
            if bias is None:
                torch.mm(flat, weight.T, out=rows)
            else:
                torch.addmm(bias, flat, weight.T, out=rows)
        rows.addmm_(u, B.T, alpha=s)
        ctx.s = s
        # x itself: a reshaped x made here would be cut off from the graph under double backward
        ctx.save_for_backward(x, weight, A, B, u)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        given, weight, A, B, u = ctx.saved_tensors
        x = given.reshape(-1, given.shape[-1])
        if torch.is_grad_enabled():
            # Under double backward u must carry its own graph.
            u = x @ A.T
        g = grad.reshape(-1, grad.shape[-1])
        # Matrix products with one side of length r are slow in some layouts (up to four times
        # with MKL), so B is brought to (r, m) and its gradient computed transposed.
        gu = F.linear(g, B.T.contiguous()) * ctx.s
        gx = gb = gA = gB = None
        if ctx.needs_input_grad[0]:
            gx = (g @ weight).addmm_(gu, A).view(given.shape)
        if ctx.needs_input_grad[2]:
            gb = g.sum(0)
        if ctx.needs_input_grad[3]:
            gA = gu.T @ x
        if ctx.needs_input_grad[4]:
            gB = (u.T @ g).T * ctx.s
        return gx, None, gb, gA, gB, None


_TENSORS = frozenset((Tensor, nn.Parameter))


def fusible(x: Any, weight: Tensor, A: Tensor) -> bool:
    """Whether plain tensors meet plain autograd, and nothing that must see each operation."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in _TENSORS
        or type(weight) not in _TENSORS
        or type(A) not in _TENSORS
        or weight.requires_grad
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
    )


def apply(
    base: nn.Module,
    site: Site,
    A: Tensor,
    B: Tensor,
    s: float,
    drop: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    passed: Callable[[nn.Module, Tensor, Tensor], None],
) -> Any:
    r"""Output of ``base`` with its weight matrix W replaced by W + s B A.

    .. math:: y = x W^\top + b + s\,\mathrm{drop}(x) A^\top B^\top

    Args:
        base: the frozen layer; its forward is the plain map of its kind.
        site: its description; the matrix is (m, n).
        A: (r, n) right factor.
        B: (m, r) left factor.
        s: scale of the product.
        drop: probability of dropping an input of the low-rank branch.
        args, kwargs: what the layer was called with.
        passed: is told the base, what went into the plain map and what came out of it.
    """
    if site.kind == "conv" and isinstance(A, Tensor) and not len(A):
        return base(*args, **kwargs)  # compaction left no kernel to run
    if is_hooked(base):
        return _inside_hooks(base, site, A, B, s, drop, args, kwargs, passed)
    x = args[0] if len(args) == 1 and not kwargs else _only_input(base, site, args, kwargs)
    if site.kind in ("linear", "hf_conv1d") and not drop:
        weight = base.weight if site.kind == "linear" else base.weight.T
        if fusible(x, weight, A):
            if A.dtype != x.dtype:
                A, B = A.to(x.dtype), B.to(x.dtype)
            y = _LowRankLinear.apply(x, weight, base.bias, A, B, s)
            passed(base, x, y)
            return y
        if isinstance(x, fx.Proxy) or torch.jit.is_tracing():
            return _recorded(base, site, x, A, B, s)
    y = base(x) + _branch(base, site, x, A, B, s, drop)
    passed(base, x, y)
    return y


def _recorded(base: nn.Module, site: Site, x: Any, A: Tensor, B: Tensor, s: float) -> Any:
    """The products of :class:`_LowRankLinear`, to the bit, as operations that a trace records."""
    A, B, y = A.to(x.dtype), B.to(x.dtype), base(x)
    u = x.reshape(-1, site.cols) @ A.T
    return torch.addmm(y.reshape(-1, site.rows), u, B.T, alpha=s).view_as(y)


def _only_input(base: nn.Module, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's one input, which may be given by its name."""
    name = "x" if site.kind == "hf_conv1d" else "input"
    if args or kwargs.keys() != {name}:
        raise TypeError(f"layer {site.name!r} takes one input, {name}")
    return kwargs[name]


def _inside_hooks(
    base: nn.Module, site: Site, A: Tensor, B: Tensor, s: float, drop: float, args: Any,
    kwargs: Any, passed: Callable[[nn.Module, Tensor, Tensor], None],
) -> Any:  # fmt: skip
    """The same where hooks of the layer stand before and after its forward: in between them."""
    refuse_trace(site.name, (*args, *kwargs.values()))
    plain = base.forward

    def added(*given: Any, **named: Any) -> Tensor:
        x = given[0] if len(given) == 1 and not named else _only_input(base, site, given, named)
        y = plain(*given, **named) + _branch(base, site, x, A, B, s, drop)
        passed(base, x, y)
        return y

    # not as one more hook: those of all modules come before the layer's own
    base.__dict__["forward"] = added
    try:
        return base(*args, **kwargs)
    finally:
        del base.__dict__["forward"]


def _branch(
    base: nn.Module, site: Site, x: Any, A: Tensor, B: Tensor, s: float, drop: float
) -> Tensor:
    """s drop(x) A^T B^T, to be added to the plain output."""
    if site.kind == "embedding":
        rows = F.embedding(x, A.T, padding_idx=base.padding_idx)
        if base.padding_idx is not None:
            rows = rows.masked_fill((x == base.padding_idx)[..., None], 0.0)
        return s * F.linear(F.dropout(rows, drop), B).to(base.weight.dtype)
    traced = isinstance(x, fx.Proxy)  # whose dtype is known only when the graph runs
    if traced or (A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
        A, B = A.to(x.dtype), B.to(x.dtype)
    x = F.dropout(x, drop) if drop else x
    if site.kind == "conv":
        return s * _conv_branch(base, site, x, A, B)
    return s * F.linear(F.linear(x, A), B)


def _conv_branch(base: nn.Module, site: Site, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A as a convolution with the layer's kernel, B as one of size 1; A is shared by all groups."""
    g, ones = site.groups, [1] * (len(site.shape) - 2)
    kernel = A.view(-1, *site.shape[1:])
    if g > 1:
        kernel = kernel.repeat(g, 1, *ones)
    u = base._conv_forward(x, kernel, None)
    point = B.view(site.rows, -1, *ones)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(site.shape)]
    return convolve(u, point, groups=g)
