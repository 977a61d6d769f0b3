r"""HiPA: small adaptors, trained to make an image in one step of what a model makes in many.

The model is frozen. Beside chosen weights :math:`W_0` (m, n) train factors of rank r, for the one
step from pure noise only:

.. math:: W = W_0 + \frac{a}{r}\,BA, \qquad
    L = L_{spatial}(\hat I, I) + \lambda\,\big(L_F(\hat I, I) + L_E(\hat I, I)\big)

:math:`\hat I` is the image after one step, :math:`I` what the frozen model makes of the same noise
in many. :math:`L_F` and :math:`L_E` ask for high frequencies. Unplugged, the model is as before.

Source: Zhang and Hooi, *HiPA: Enabling One-Step Text-to-Image Diffusion Models via
High-Frequency-Promoting Adaptation*, arXiv 2311.18158. Only the abstract and public summaries were
read, and no official code was found. Read there: a frozen model, low-rank adaptors of 3.3 million
numbers, a spatial perceptual loss and one that promotes high frequencies, by Fourier components
and edges. Inferred: pairs of one noise, rank 16 on attention (which gives that count for Stable
Diffusion 2.1), the exact form of each term (the Sobel form as in GarDiff, which uses the same
names), every weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.lowrank import LowRankLayer, LowRankMethod
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import Site, uniform
from toolkit.core.declare.fields import Alpha, BelowOne, Range, Rank, Weight, validate
from toolkit.core.declare.info import Info
from toolkit.generate.hipa import terms as distances
from toolkit.generate.hipa.onestep import Pairs, from_eps, from_v, make_pairs, one_step
from toolkit.generate.hipa.terms import Features

__all__ = [
    "HiPA",
    "Pairs",
    "from_eps",
    "from_v",
    "make_pairs",
    "one_step",
    "plugged",
    "unplugged",
]

SPATIAL = ("spatial", "mse")
HIGH = ("fourier", "edge", "power")
"""Terms that the weight of high frequencies multiplies; the last is ours."""


@dataclass(frozen=True)
class HiPA(LowRankMethod):
    r"""The adaptors of one step, and the loss that trains them.

    At the start :math:`B = 0` and :math:`A` is drawn from :math:`U(-1/\sqrt n, 1/\sqrt n)`.

    Args:
        rank: rank r of a layer's difference. Source: inferred from the abstract's 3.3 million.
        alpha: numerator a of the scale a / r. Source: ours, the default rank.
        dropout: on the input of the low-rank branch. Source: ours, none.
        terms: of the loss, joined by "+": spatial, mse, fourier, edge, and power, which is ours.
            Source: public summaries, which name a spatial, a Fourier and an edge part.
        high_weight: weight lambda of fourier, edge and power. Source: ours; unknown.
        cutoff: frequency kappa in cycles per pixel above which fourier and power look. Source:
            ours, half the highest along an axis.
        floor: power that is added before the logarithm of power. Source: ours.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range, or unknown terms.
    """

    rank: Rank = 16
    alpha: Alpha = 16.0
    dropout: BelowOne = 0.0
    terms: str = "spatial+fourier+edge"
    high_weight: Weight = 1.0
    cutoff: Annotated[float, Range(0.0, 0.707, open_low=True, open_high=True)] = 0.25
    floor: Annotated[float, Range(0.0, 10.0, log=True, open_low=True)] = 1e-3

    info: ClassVar[Info] = Info(
        slug="hipa",
        part="generate",
        title="HiPA",
        arxiv="2311.18158",
        year=2023,
        equation=r"L = L_{spatial} + \lambda\,(L_F + L_E)",
        acts_on="low-rank differences of weights, for one step from pure noise",
        count=r"r\,(m+n)",
        inference="one call instead of many; none beside once merged",
        colour="#8E4585",
        kinds=("linear", "conv"),
    )

    def __post_init__(self) -> None:
        validate(self)
        unknown = [name for name in self.chosen if name not in (*SPATIAL, *HIGH)]
        if unknown or len(set(self.chosen)) < len(self.chosen):
            raise ValueError(
                f"HiPA(terms={self.terms!r}): join some of {', '.join((*SPATIAL, *HIGH))} by '+', "
                "each once"
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The terms of the loss."""
        return tuple(self.terms.split("+"))

    @property
    def scale(self) -> float:
        """a / r, the factor of BA."""
        return self.alpha / self.rank

    def loss_terms(
        self, made: Tensor, wanted: Tensor, features: Features | None = None
    ) -> dict[str, Tensor]:
        """Each term before its weight, (batch,) by name.

        Args:
            made: images (batch, channels, height, width) after one step.
            wanted: those of many steps, from the same noise.
            features: layers of a frozen network, for the spatial term.

        Raises:
            ValueError: shapes that differ, or a spatial term without ``features``.
        """
        if "spatial" in self.chosen and features is None:
            raise ValueError(
                "features: the spatial term compares layers of a frozen network; give a function "
                "of images that returns them, or leave 'spatial' out of terms"
            )
        forms = {
            "spatial": lambda: distances.dists(made, wanted, features),
            "mse": lambda: distances.mse(made, wanted),
            "fourier": lambda: distances.fourier(made, wanted, self.cutoff),
            "edge": lambda: distances.edge(made, wanted),
            "power": lambda: distances.log_power(made, wanted, self.cutoff, self.floor),
        }
        return {name: forms[name]() for name in self.chosen}

    def loss(self, made: Tensor, wanted: Tensor, features: Features | None = None) -> Tensor:
        """The whole loss, one number; arguments and errors as :meth:`loss_terms`."""
        found = self.loss_terms(made, wanted, features)
        weights = [1.0 if name in SPATIAL else self.high_weight for name in found]
        return sum(w * x.mean() for w, x in zip(weights, found.values(), strict=True))

    def build(self, site: Site, generator: torch.Generator | None = None) -> LowRankLayer:
        """The adaptor of one layer.

        Raises:
            ValueError: a rank that the layer's matrix cannot have.
        """
        most = min(site.rows, site.cols)
        if self.rank > most:
            raise ValueError(
                f"rank: {self.rank} is more than layer {site.name!r} can have, whose matrix is "
                f"{site.rows} x {site.cols}; take {most} or less, or leave the layer out of targets"
            )
        return self.layer(site, generator)

    def layer(self, site: Site, generator: torch.Generator | None) -> Adaptor:
        """The adaptor of one layer."""
        return Adaptor(self, site, generator)


class Adaptor(LowRankLayer):
    """The factors of one layer, ``A`` (r, n) and ``B`` (m, r), and how far they are plugged in.

    Attributes:
        strength: 1 plugged in, 0 unplugged; not part of the state dict.
    """

    def __init__(self, method: HiPA, site: Site, generator: torch.Generator | None):
        super().__init__(method, site)
        self.whole, self.strength = method.scale, 1.0
        r, m, n = method.rank, site.rows, site.cols
        A = uniform((r, n), 1 / math.sqrt(n), site, generator)
        self.A = nn.Parameter(A.to(site.device, site.dtype))
        self.B = nn.Parameter(torch.zeros(m, r, device=site.device, dtype=site.dtype))

    @property
    def scale(self) -> float:  # type: ignore[override]
        """a / r times the strength."""
        return self.whole * self.strength

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.strength == 0:  # not plus zero: the very call of the frozen layer
            return base(*args, **kwargs)
        return super().forward(base, *args, **kwargs)


@contextlib.contextmanager
def plugged(adapted: Adapted, strength: float = 1.0) -> Iterator[Adapted]:
    """For a block of code, the adaptors at a strength: 0 the frozen model, 1 as trained.

    Args:
        adapted: a model with HiPA on it.
        strength: multiple of every difference.

    Raises:
        TypeError: the model has no adaptors of HiPA.
        ValueError: a strength that is not finite.
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength: a finite number, got {strength}")
    adaptors = [a for a in adapted.adapters.values() if isinstance(a, Adaptor)]
    if not adaptors:
        raise TypeError("adapted: it has no adaptor of HiPA; make it by adapt(model, HiPA(...))")
    before = [adaptor.strength for adaptor in adaptors]
    try:
        for adaptor in adaptors:
            adaptor.strength = strength
        yield adapted
    finally:
        for adaptor, old in zip(adaptors, before, strict=True):
            adaptor.strength = old


def unplugged(adapted: Adapted) -> contextlib.AbstractContextManager[Adapted]:
    """For a block of code, the frozen model itself, as for sampling in many steps.

    Raises:
        TypeError: as :func:`plugged`.
    """
    return plugged(adapted, 0.0)
