"""The output of a layer whose weight matrix is W + s B A, without ever forming B A.

This is the factored route that all low-rank methods share; ``merged`` is the materialised route.
Tests hold the two equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

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
        y = F.linear(flat, weight, bias)
        y.addmm_(u, B.T, alpha=s)
        ctx.s = s
        # x itself: a reshaped x made here would be cut off from the graph under double backward
        ctx.save_for_backward(x, weight, A, B, u)
        return y.view(*x.shape[:-1], y.shape[-1])

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


def _plain(base: nn.Module) -> bool:
    """Whether calling ``base`` means no more than its linear map: no hooks, no own forward."""
    return (
        type(base).forward in (nn.Linear.forward, getattr(_conv1d_type(base), "forward", None))
        and not base._forward_hooks
        and not base._forward_pre_hooks
        and not base._backward_hooks
        and not base._backward_pre_hooks
    )


def _conv1d_type(base: nn.Module) -> type | None:
    return type(base) if type(base).__name__ == "Conv1D" else None


def apply(
    base: nn.Module,
    spec: Site,
    A: Tensor,
    B: Tensor,
    s: float,
    dropout: float,
    training: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    r"""Output of ``base`` with its weight matrix W replaced by W + s B A.

    .. math:: y = x W^\top + b + s\,\mathrm{drop}(x) A^\top B^\top

    Args:
        base: the frozen layer.
        spec: its description; the matrix is (m, n).
        A: (r, n) right factor.
        B: (m, r) left factor.
        s: scale of the product.
        dropout: probability of dropping an input of the low-rank branch.
        training: whether dropout is active.
        args, kwargs: what the layer was called with.
    """
    drop = dropout if training else 0.0
    if spec.kind == "attention":
        if drop:
            raise ValueError(
                f"dropout={dropout} cannot act on attention layer {spec.name!r}, whose weight is "
                "read as a whole; set dropout=0 or leave the layer out of targets"
            )
        return functional_call(base, merged(base, spec, A, B, s), args, kwargs)
    if kwargs or len(args) != 1:
        raise TypeError(f"layer {spec.name!r} takes one positional input")
    x = args[0]
    if spec.kind == "embedding":
        rows = F.embedding(x, A.T, padding_idx=base.padding_idx)
        y = base(x)
        return y + s * F.linear(F.dropout(rows, drop), B).to(y.dtype)

    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if not autocast and A.dtype != x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    if spec.kind == "conv":
        return base(x) + s * _conv_branch(base, spec, F.dropout(x, drop), A, B)

    weight = base.weight if spec.kind == "linear" else base.weight.T
    fused = not (
        drop
        or autocast
        or weight.requires_grad
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not _plain(base)
    )
    if fused:
        return _LowRankLinear.apply(x, weight, base.bias, A, B, s)
    return base(x) + s * F.linear(F.linear(F.dropout(x, drop), A), B)


def _conv_branch(base: nn.Module, spec: Site, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A as a convolution with the layer's kernel, B as one of size 1; A is shared by all groups."""
    r, g = A.shape[0], spec.groups
    kernel = A.view(r, *spec.shape[1:])
    if g > 1:
        kernel = kernel.repeat(g, *([1] * (kernel.dim() - 1)))
    u = base._conv_forward(x, kernel, None)
    point = B.view(spec.rows, r, *([1] * (len(spec.shape) - 2)))
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(spec.shape)]
    return convolve(u, point, groups=g)


def merged(base: nn.Module, spec: Site, A: Tensor, B: Tensor, s: float) -> dict[str, Tensor]:
    """The weight W + s B A in the layer's own layout and dtype, computed in the factors' dtype."""
    weight = getattr(base, spec.parameter)
    delta = spec.to_weight(s * (B @ A))
    return {spec.parameter: (weight.to(delta.dtype) + delta).to(weight.dtype)}
