"""What low-rank methods share: the base of the method, of its layer, and the new weight W + s B A.

The output without that weight is formed in :mod:`toolkit.core.adapt.factored`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.factored import apply
from toolkit.core.adapt.forwards import call_with, frozen, has_own_forward, is_hooked
from toolkit.core.adapt.sites import Site, with_padding
from toolkit.core.declare.fields import Declared


def merged(base: nn.Module, site: Site, A: Tensor, B: Tensor, s: float) -> dict[str, Tensor]:
    """The weight W + s B A in the layer's own layout and dtype, computed in the factors' dtype.

    Raises:
        RuntimeError: the layer no longer holds a weight of the shape it was adapted with.
    """
    weight = frozen(base, site.parameter, site.name)
    if weight.shape != site.shape:
        raise RuntimeError(
            f"layer {site.name!r} was adapted with a weight of shape {site.shape}, which is "
            f"{tuple(weight.shape)} now (resized, perhaps through a tied embedding); resize before "
            "adapting"
        )
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

    def passed(self, base: nn.Module, x: Tensor, y: Tensor) -> None:
        """Told of each input x and output y of the plain map, hooks aside; here, nothing."""

    def reads_whole(self, base: nn.Module) -> bool:
        """Whether a call needs the new weight itself: attention, or a forward of its own."""
        return (
            self.site.kind == "attention"
            or has_own_forward(base)
            or (self.site.kind == "embedding" and base.scale_grad_by_freq)
            # hooks cannot be added while compiling
            or (torch.compiler.is_compiling() and is_hooked(base))
        )

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        drop = self.dropout if self.training else 0.0
        if not self.reads_whole(base):
            left, right = self.factors()
            s, passed = self.scale, self.passed
            try:
                return apply(base, self.site, right, left, s, drop, args, kwargs, passed)
            except (IndexError, RuntimeError):
                weight = base._parameters.get(self.site.parameter)
                if weight is None or weight.shape != self.site.shape:
                    self.merged(base)  # whose message names the layer
                raise
        if drop:
            raise ValueError(
                f"dropout={drop} cannot act on {self.site.kind} layer {self.site.name!r} "
                f"({type(base).__name__}), whose weight is read as a whole; set dropout=0 or leave "
                "the layer out of targets"
            )
        return call_with(base, self.merged(base), self.site.name, args, kwargs)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"
