r"""What an adapter computes: bottleneck, ConvPass, or the convolution module of a Conformer.

Each maps tokens (..., M, d) to as many, through b = round(d / RR) hidden numbers. A convolution
runs along the row of tokens, those that are no patches included.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site, normal, uniform

STARTS = ("identity", "zero", "redrawn")
STD = 0.02
"""Standard deviation with which a loader of transformers draws linear layers anew."""


def width(method: Any, site: Site) -> int:
    """b = round(d / RR), halves to the even number, as Python rounds.

    Raises:
        ValueError: nothing would be left.
    """
    found = round(site.rows / method.reduction)
    if found < 1:
        raise ValueError(
            f"{type(method).__name__}(reduction={method.reduction}): a width of {site.rows} "
            f"divided by that rounds to 0; choose at most {2 * site.rows - 1}"
        )
    return found


def count(method: Any, site: Site) -> int:
    """Numbers of one adapter."""
    d, b = site.rows, width(method, site)
    if method.inner == "conformer":
        return 2 * d * b + 2 * b + method.kernel * b + b + 2 * b + b * d + d + 2 * d
    return 2 * d * b + b + d + (3 * b * b + b if method.inner == "convpass" else 0)


def build(method: Any, site: Site, generator: torch.Generator | None) -> nn.Module:
    """One adapter, drawn from the generator alone."""
    return INNER[method.inner](method, site, generator)


def start_of(method: Any) -> str:
    """Where the weights start: as asked, else as ``like`` says."""
    return method.start or ("redrawn" if method.like == "code" else "identity")


class Inner(nn.Module):
    """Down and up, with something between; computes in the precision of its own numbers.

    ``down`` (b, d) and ``up`` (d, b), each with a bias. Where the start is the identity ``up`` is
    0 and ``down`` is not, so that a gradient arrives; the other starts are those of the code.
    """

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__()
        self.code = method.like == "code"
        d, b = site.rows, width(method, site)
        where = {"dtype": site.dtype, "device": site.device}
        start = start_of(method)
        first = self.first(b, d, site, generator, start)
        if start == "redrawn":
            last = normal((d, b), STD, site, generator)
        else:
            last = torch.zeros(d, b, **where)
        self.down, self.down_bias = nn.Parameter(first), nn.Parameter(torch.zeros(b, **where))
        self.up, self.up_bias = nn.Parameter(last), nn.Parameter(torch.zeros(d, **where))

    def first(self, b: int, d: int, site: Site, generator: Any, start: str) -> Tensor:
        """The start of ``down``."""
        if start == "zero":
            return torch.zeros(b, d, dtype=site.dtype, device=site.device)
        if start == "redrawn":
            return normal((b, d), STD, site, generator)
        return uniform((b, d), 1 / math.sqrt(d), site, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., M, d) to the same shape and dtype."""
        hidden = self.hidden(F.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return F.linear(hidden, self.up, self.up_bias).to(x.dtype)

    def hidden(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Bottleneck(Inner):
    """``U gelu(D x)``: 2 d b + b + d numbers."""

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__(method, site, generator)

    def hidden(self, z: Tensor) -> Tensor:
        return F.gelu(z)


class ConvPass(Inner):
    """``U q(conv3(q(D x)))`` with QuickGELU q; the code computes the convolution and drops it."""

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__(method, site, generator)
        b = len(self.down)
        self.conv = nn.Parameter(uniform((b, b, 3), math.sqrt(1 / b), site, generator))
        self.conv_bias = nn.Parameter(torch.zeros(b, dtype=site.dtype, device=site.device))
        self.dropout = method.dropout

    def first(self, b: int, d: int, site: Site, generator: Any, start: str) -> Tensor:
        if start == "identity":
            return uniform((b, d), math.sqrt(6 / (d + b)), site, generator)
        return super().first(b, d, site, generator, start)

    def hidden(self, z: Tensor) -> Tensor:
        z = z * torch.sigmoid(1.702 * z)
        if not self.code:
            z = _along(z, self.conv, self.conv_bias, 1)
        return F.dropout(z * torch.sigmoid(1.702 * z), self.dropout, self.training)


class Conformer(nn.Module):
    """Norm, pointwise d to 2 b, gate, depthwise along tokens, batch norm, SiLU, pointwise b to d.

    The code computes the norm and goes on from the raw input; there ``norm`` gets no gradient.
    Statistics of the batch norm are measured in training mode, also where the trunk is in
    evaluation mode: see :func:`toolkit.insert.petl_ast.learning`.
    """

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__()
        self.code, self.dropout = method.like == "code", method.dropout
        d, b, k = site.rows, width(method, site), method.kernel
        where = {"dtype": site.dtype, "device": site.device}
        start = start_of(method)
        self.norm = nn.LayerNorm(d, **where)
        self.point1, self.point1_bias = _drawn((2 * b, d), d, site, generator)
        self.depth, self.depth_bias = _drawn((b, 1, k), k, site, generator)
        self.batch_norm = nn.BatchNorm1d(b, **where)
        self.point2, self.point2_bias = _drawn((d, b), b, site, generator)
        with torch.no_grad():
            for tensor in (self.point2, self.point2_bias):
                tensor.mul_(start == "redrawn")
            for tensor in (self.point1, self.point1_bias):
                tensor.mul_(start != "zero")
        self.name, self.measured, self.told = site.name, False, False

    def forward(self, x: Tensor) -> Tensor:
        """(..., M, d) to the same shape and dtype."""
        z = x.to(self.point1.dtype)
        if not self.code:
            z = self.norm(z)
        z = F.glu(F.linear(z, self.point1, self.point1_bias), -1)
        z = _along(z, self.depth, self.depth_bias, len(self.depth))
        shape = z.shape
        z = F.silu(self.batch_norm(z.reshape(-1, shape[-1]))).view(shape)
        z = F.linear(z, self.point2, self.point2_bias)
        self.measured |= self.training
        if not (self.measured or self.told or torch.compiler.is_compiling()) and z.requires_grad:
            z.register_hook(self._tell)
        return F.dropout(z, self.dropout, self.training).to(x.dtype)

    def _tell(self, _: Tensor) -> None:
        """Say once that training goes on with statistics that nobody measured."""
        if not self.told:
            self.told = True
            warnings.warn(
                f"the batch norm of the adapter in {self.name!r} is in evaluation mode and has "
                "seen no batch, yet it trains; call petl_ast.learning(adapted) after model.eval()",
                stacklevel=2,
            )


INNER = {"bottleneck": Bottleneck, "conformer": Conformer, "convpass": ConvPass}


def _drawn(
    shape: tuple[int, ...], reads: int, site: Site, generator: torch.Generator | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """A weight and a bias as PyTorch draws a layer that reads so many numbers."""
    bound = 1 / math.sqrt(reads)
    weight = uniform(shape, bound, site, generator)
    return nn.Parameter(weight), nn.Parameter(uniform(shape[:1], bound, site, generator))


def _along(z: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """A convolution along the tokens of (..., M, b), zeros beyond both ends."""
    flat = z.reshape(-1, *z.shape[-2:]).transpose(1, 2)
    left = (weight.shape[-1] - 1) // 2
    flat = F.pad(flat, (left, weight.shape[-1] - 1 - left))
    made = F.conv1d(flat, weight, bias, groups=groups)
    return made.transpose(1, 2).reshape(z.shape)
