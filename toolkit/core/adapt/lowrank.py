"""The output of a layer whose weight matrix is W + s B A, without ever forming B A.

This is the factored route that all low-rank methods share; ``merged`` is the materialised route.
Tests hold the two equal.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core.adapt.sites import Site, with_padding
from toolkit.core.declare.fields import Declared


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
    site: Site,
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
        site: its description; the matrix is (m, n).
        A: (r, n) right factor.
        B: (m, r) left factor.
        s: scale of the product.
        dropout: probability of dropping an input of the low-rank branch.
        training: whether dropout is active.
        args, kwargs: what the layer was called with.
    """
    drop = dropout if training else 0.0
    if site.kind == "attention":
        if drop:
            raise ValueError(
                f"dropout={dropout} cannot act on attention layer {site.name!r}, whose weight is "
                "read as a whole; set dropout=0 or leave the layer out of targets"
            )
        return functional_call(base, merged(base, site, A, B, s), args, kwargs)
    if kwargs or len(args) != 1:
        raise TypeError(f"layer {site.name!r} takes one positional input")
    x = args[0]
    if site.kind == "embedding":
        rows = F.embedding(x, A.T, padding_idx=base.padding_idx)
        if base.padding_idx is not None:
            rows = rows.masked_fill((x == base.padding_idx)[..., None], 0.0)
        y = base(x)
        return y + s * F.linear(F.dropout(rows, drop), B).to(y.dtype)

    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if not autocast and A.dtype != x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    if site.kind == "conv":
        return base(x) + s * _conv_branch(base, site, F.dropout(x, drop), A, B)

    weight = base.weight if site.kind == "linear" else base.weight.T
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


def _conv_branch(base: nn.Module, site: Site, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A as a convolution with the layer's kernel, B as one of size 1; A is shared by all groups."""
    r, g = A.shape[0], site.groups
    kernel = A.view(r, *site.shape[1:])
    if g > 1:
        kernel = kernel.repeat(g, *([1] * (kernel.dim() - 1)))
    u = base._conv_forward(x, kernel, None)
    point = B.view(site.rows, r, *([1] * (len(site.shape) - 2)))
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(site.shape)]
    return convolve(u, point, groups=g)


def merged(base: nn.Module, site: Site, A: Tensor, B: Tensor, s: float) -> dict[str, Tensor]:
    """The weight W + s B A in the layer's own layout and dtype, computed in the factors' dtype."""
    weight = getattr(base, site.parameter)
    delta = site.to_weight(s * (B @ A))
    new = (weight.to(delta.dtype) + delta).to(weight.dtype)
    return {site.parameter: with_padding(base, site, new)}


def warn_above(rank: int, site: Site) -> None:
    """Warn of a rank that a layer's matrix cannot have; published adapters exist with such."""
    most = min(site.rows, site.cols)
    if rank > most:
        warnings.warn(
            f"rank {rank} is more than layer {site.name!r} can use: its matrix is {site.rows} x "
            f"{site.cols}, so at most {most}. It is taken as given",
            stacklevel=4,
        )


class LowRankMethod(Declared):
    """Base of methods whose difference of an (m, n) matrix is a product of two factors.

    A subclass is a frozen dataclass with the class attribute ``info``, a field ``dropout``, and
    :meth:`layer`.
    """

    def layer(self, site: Site, generator: torch.Generator | None) -> LowRankLayer:
        """The adapter of one layer."""
        raise NotImplementedError

    @property
    def start(self) -> int:
        """Rank of a layer at the start."""
        return self.rank  # type: ignore[attr-defined]

    def build(self, site: Site, generator: torch.Generator | None = None) -> LowRankLayer:
        """:meth:`layer`, with a warning for a rank above what the matrix can have."""
        warn_above(self.start, site)
        return self.layer(site, generator)

    def count(self, site: Site) -> int:
        """r (m + n) numbers for a layer of shape (m, n)."""
        rank = self.rank  # type: ignore[attr-defined]
        return rank * (site.rows + site.cols)


class LowRankLayer(nn.Module):
    """Base of adapters of one layer whose difference is s L R, L (m, r) and R (r, n).

    A subclass gives :meth:`factors` and ``scale``, and sets up its parameters.
    """

    scale: float

    def __init__(self, method: Any, site: Site):
        super().__init__()
        self.site, self.dropout = site, method.dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """L (m, r) and R (r, n), as they are now."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Columns of L that count."""
        return self.factors()[0].shape[1]

    def delta(self) -> Tensor:
        """s L R, shape (m, n)."""
        left, right = self.factors()
        return self.scale * (left @ right)

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        left, right = self.factors()
        return merged(base, self.site, right, left, self.scale)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        left, right = self.factors()
        return apply(
            base, self.site, right, left, self.scale, self.dropout, self.training, args, kwargs
        )

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"
