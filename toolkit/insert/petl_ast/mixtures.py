r"""Mixtures of adapters, in parallel to a sub-layer: soft (through slots) and dense (by a router).

.. math:: D=\mathrm{softmax}_{\text{tokens}} X\Phi, \quad C=\mathrm{softmax}_{\text{slots}} X\Phi,
    \quad Y = C\,A(D^\top X)

Source: Cappellazzo, Falavigna, Brutti, *Efficient Fine-tuning of Audio Spectrogram Transformers
via Soft Mixture of Adapters*, arXiv 2402.00828, of which the abstract was read; formulas are those
of the official code, ``src/MoA.py``.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site, normal
from toolkit.core.declare.fields import BelowOne, Declared, Like, Range
from toolkit.core.declare.info import Info
from toolkit.insert.petl_ast import inner as inners
from toolkit.insert.petl_ast.around import AroundBlock, InBlocks
from toolkit.insert.petl_ast.places import acting, asked


@dataclass(frozen=True)
class Mixture(InBlocks, Declared):
    """What both mixtures declare.

    Args:
        adapters: n. Source: official code.
        inner: what each computes. Source: official code.
        reduction: rate RR of each. Source: official code.
        place: at the feed-forward, the attention, or both. Source: official code.
        dropout: inside ConvPass. Source: official code, where it never acts.
        like: follow the formulas or the released code. Source: ours.
        start: as in :class:`~toolkit.insert.petl_ast.ASTAdapter`. Source: ours.
    """

    adapters: Annotated[int, Range(1, 256, log=True)] = 7
    inner: Literal["bottleneck", "convpass"] = "bottleneck"
    reduction: Annotated[int, Range(1, 4096, log=True)] = 128
    place: Literal["ffn", "mhsa", "both"] = "ffn"
    dropout: BelowOne = 0.0
    like: Like = "paper"
    start: Literal["identity", "zero", "redrawn"] | None = None

    order: ClassVar[str] = "parallel"
    own: ClassVar[bool] = False
    tiny: ClassVar[dict[str, Any]] = {"reduction": 4, "adapters": 2}


@dataclass(frozen=True)
class SoftMoA(Mixture):
    """Each of n adapters maps p slots, which are mixtures of all tokens.

    Args:
        slots: p of each adapter. Source: official code.
        normalise: compare directions of tokens and slots, with a learned scale. Source: official
            code, off.
    """

    slots: Annotated[int, Range(1, 256, log=True)] = 1
    normalise: bool = False

    # the catalogue lists methods by their package; this one shares its chapter
    info: ClassVar[Info] = Info(
        slug="petl_ast",
        part="insert",
        title="Soft-MoA",
        arxiv="2402.00828",
        year=2024,
        code="umbertocappellazzo/PETL_AST",
        equation=r"Y = C\,A(D^\top X)",
        acts_on="what leaves attention or feed-forward, in each block",
        count=r"n(2bm + b + m) + nmp",
        inference="n small networks in each block",
        colour="#AA4499",
        mergeable=False,
        kinds=("module",),
    )

    def build(self, site: Site, generator: torch.Generator | None = None) -> MixtureLayer:
        return MixtureLayer(self, site, generator)

    def count(self, site: Site) -> int:
        """n adapters and n p vectors of slots, and a scale if normalised, at each place."""
        each = self.adapters * (inners.count(self, site) + site.rows * self.slots)
        return len(asked(self)) * (each + self.normalise)


@dataclass(frozen=True)
class DenseMoA(Mixture):
    """All n adapters map every token; a router weighs what they give."""

    info: ClassVar[Info] = Info(
        slug="petl_ast",
        part="insert",
        title="Dense-MoA",
        arxiv="2402.00828",
        year=2024,
        code="umbertocappellazzo/PETL_AST",
        equation=r"Y = \sum_i \mathrm{softmax}_i(RX)\,A_i(X)",
        acts_on="what leaves attention or feed-forward, in each block",
        count=r"n(2bm + b + m) + nm + n",
        inference="n small networks in each block",
        colour="#999933",
        mergeable=False,
        kinds=("module",),
    )

    def build(self, site: Site, generator: torch.Generator | None = None) -> MixtureLayer:
        return MixtureLayer(self, site, generator)

    def count(self, site: Site) -> int:
        """n adapters and a router with its bias, at each place."""
        each = self.adapters * (inners.count(self, site) + site.rows + 1)
        return len(asked(self)) * each


class MixtureLayer(AroundBlock):
    """A mixture for each place of a block."""

    def made(self, method: Any, site: Site, generator: torch.Generator | None) -> nn.Module:
        return (Soft if isinstance(method, SoftMoA) else Dense)(method, site, generator)

    def enter(self, base: nn.Module, place: str, stack: contextlib.ExitStack) -> None:
        if self.method.like != "code" or self.method.place != "mhsa":
            super().enter(base, place, stack)
            return
        given: dict[str, Tensor] = {}
        network, known, name = self.at[place], self._known, self.site.name

        def read(n: Tensor) -> None:
            given["n"] = n

        def write(y: Tensor) -> Tensor:
            given["y"] = network(given.pop("n"))
            return y + given["y"]

        stack.enter_context(acting(base, known[place], name, read, write))
        if "ffn" in known:  # the code adds it again, one line too far to the left
            again = acting(base, known["ffn"], name, lambda _: None, lambda y: y + given.pop("y"))
            stack.enter_context(again)


class Soft(nn.Module):
    """``slots`` (d, n, p), n adapters, and ``scale`` if normalised."""

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__()
        n, p = method.adapters, method.slots
        # the fans of a tensor (d, n, p), as PyTorch counts them
        std = math.sqrt(2 / (n * p + site.rows * p))
        self.slots = nn.Parameter(normal((site.rows, n, p), std, site, generator))
        self.adapters = nn.ModuleList(inners.build(method, site, generator) for _ in range(n))
        one = torch.ones((), dtype=site.dtype, device=site.device)
        self.scale = nn.Parameter(one) if method.normalise else None
        self.over = 1 if method.like == "code" else 0

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dispatch D and combine C, both (batch, M, n, p): columns of D sum to 1 over the tokens,
        rows of C over all slots."""
        slots = self.slots
        if self.scale is not None:
            slots = self.scale * _unit(slots, self.over)
        logits = torch.einsum("bmd,dnp->bmnp", x, slots)
        return logits.softmax(1), logits.flatten(2).softmax(-1).view(logits.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, M, d) to the same shape and dtype."""
        z = x.to(self.slots.dtype)
        if self.scale is not None:
            z = _unit(z, -1)
        dispatch, combine = self.weights(z)
        read = torch.einsum("bmd,bmnp->nbpd", z, dispatch)
        made = [adapter(part) for adapter, part in zip(self.adapters, read, strict=True)]
        return torch.einsum("nbpd,bmnp->bmd", torch.stack(made), combine).to(x.dtype)


class Dense(nn.Module):
    """``router`` (n, d) with a bias, and n adapters."""

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__()
        n = method.adapters
        self.router = nn.Parameter(normal((n, site.rows), inners.STD, site, generator))
        self.bias = nn.Parameter(torch.zeros(n, dtype=site.dtype, device=site.device))
        self.adapters = nn.ModuleList(inners.build(method, site, generator) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, M, d) to the same shape and dtype."""
        z = x.to(self.router.dtype)
        shares = F.linear(z, self.router, self.bias).softmax(-1)
        made = torch.stack([adapter(z) for adapter in self.adapters], -1)
        return (made * shares[..., None, :]).sum(-1).to(x.dtype)


def _unit(x: Tensor, axis: int) -> Tensor:
    """Along one axis of length 1, but for a small number in the divisor."""
    return x / (x.square().sum(axis, keepdim=True).sqrt() + 1e-6)
