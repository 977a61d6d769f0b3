r"""DAREx: drop most of what fine-tuning changed, and divide the rest by q instead of 1 - p.

.. math:: W' = W_P + \frac1q\, M \odot (W_F - W_P), \qquad M_{ij} \sim \mathrm{Bernoulli}(1-p)

With :math:`q = 1-p`, which is DARE, every pre-activation keeps its mean; its variance grows like
:math:`p/(1-p)`. A larger q takes a bias for a smaller variance. It is found on labels or on outputs
(:mod:`.search`), per layer (:mod:`.analytic`), or in closed form (:func:`.theory.q_star`); and
:class:`.adamr.AdamR` keeps the differences small while they are trained.

Source: Deng et al., *DARE the Extreme*, arXiv 2410.09344; official code ``vengdeng/DAREx``. Its
tables were not read; the closed form is derived here.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.fields import Range, Share
from toolkit.core.declare.info import Info
from toolkit.core.states.merging import Source, merge
from toolkit.core.states.rules import Piece, Pieces, Rule
from toolkit.core.states.vectors import random_mask


@dataclass(frozen=True)
class DAREx(Rule):
    """Random dropping, with a divisor for all tensors or one for each.

    ``merge(base, [tuned], rule, heads=1)`` prunes; several models are added up after it. What is
    not pruned is the fine-tuned model's.

    Args:
        drop: probability p to drop a number. Source: arXiv 2410.09344, 0.99; the official code's
            argument ``p`` is 1 - p.
        q: what the kept numbers are divided by; None for 1 - p, which is DARE. Source: arXiv
            2410.09344, searched between 1 - p and 1.
        prune: which tensors lose numbers, matrices and larger ones or all. Source: official code
            prunes all but the classifier in encoders, attention and MLP in decoders.
    """

    drop: Share = 0.99
    q: Annotated[float, Range(0.0, 1000.0, open_low=True)] | None = None
    prune: Literal["matrices", "all"] = "matrices"

    layers: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """Weight name -> its own q; see :meth:`with_layers`."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Name patterns of what is not pruned; see :meth:`keeping`."""
    given: ClassVar[tuple[Mapping[str, Tensor], ...]] = ()
    """Masks by name, one mapping per model; see :meth:`with_masks`."""

    info: ClassVar[Info] = Info(
        slug="darex",
        part="merge",
        title="DAREx",
        arxiv="2410.09344",
        year=2024,
        code="vengdeng/DAREx",
        equation=r"W' = W_P + \frac1q\, M \odot (W_F - W_P)",
        acts_on="a random part of what fine-tuning changed",
        count="0",
        inference="none",
        colour="#7A3B9A",
    )

    def with_q(self, q: float | None) -> DAREx:
        """The same with one divisor for all tensors."""
        return self._changed(q=q, layers=MappingProxyType({}))

    def with_layers(self, layers: Mapping[str, float]) -> DAREx:
        """The same with a divisor for each weight.

        Biases take that of their weight, all other tensors the mean of those given.

        Raises:
            ValueError: no layer, or a divisor that is not positive and finite.
        """
        found = {name: float(q) for name, q in layers.items()}
        wrong = {name: q for name, q in found.items() if not (math.isfinite(q) and q > 0)}
        if not found or wrong:
            raise ValueError(
                f"layers={wrong}: give a positive, finite q for each weight, at least for one"
            )
        return self._changed(layers=MappingProxyType(found))

    def keeping(self, *patterns: str) -> DAREx:
        """The same with tensors that are not pruned, by name patterns such as ``*classifier*``."""
        return self._changed(kept=tuple(patterns))

    def with_masks(self, *masks: Mapping[str, Tensor]) -> DAREx:
        """The same with masks that were drawn elsewhere, true where a number is kept.

        Args:
            *masks: name -> bool tensor of the tensor's shape, for every model a mapping.

        Raises:
            TypeError: a mask that is no tensor of bools.
        """
        for model in masks:
            for name, mask in model.items():
                if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                    raise TypeError(f"masks[{name!r}] must be a tensor of bools, true where kept")
        return self._changed(given=masks)

    def _changed(self, **values: Any) -> DAREx:
        new = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(new, name, value)
        new.__post_init__()
        return new

    def settings(self) -> dict[str, Any]:
        """Also the divisors of layers and the patterns; masks cannot be noted."""
        more = {"layers": dict(self.layers), "kept": list(self.kept)}
        found = super().settings() | {name: value for name, value in more.items() if value}
        return found | ({"masks": "given"} if self.given else {})

    @classmethod
    def restored(cls, settings: Mapping[str, Any]) -> DAREx:
        """The rule that :meth:`settings` noted.

        Raises:
            ValueError: its masks were given, and are not in the recipe.
        """
        plain = dict(settings)
        layers, kept = plain.pop("layers", {}), plain.pop("kept", ())
        if plain.pop("masks", None):
            raise ValueError("masks were given by hand and are not noted: pass them to with_masks")
        rule = cls(**plain).keeping(*kept)
        return rule.with_layers(layers) if layers else rule

    def survey(self, pieces: Pieces) -> dict[str, Any]:
        """Nothing; refuses divisors of another model."""
        if self.layers and not self.layers.keys() & set(pieces.names):
            raise ValueError(f"layers names no tensor of the model: {sorted(self.layers)[:4]}")
        return {}

    def divisor(self, name: str) -> float:
        """q of a tensor."""
        if self.layers:
            place, dot, last = name.rpartition(".")
            weight = place + dot + last.replace("bias", "weight")
            found = self.layers.get(name, self.layers.get(weight))
            return statistics.fmean(self.layers.values()) if found is None else found
        return 1 - self.drop if self.q is None else self.q

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is not pruned."""
        small = self.prune == "matrices" and len(shape) < 2
        return small or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.kept)

    def masks(self, piece: Piece) -> list[Tensor]:
        """Which numbers of a piece each model keeps, (k,) of bools; draws where none are given.

        Raises:
            ValueError: given masks that do not fit.
        """
        if not self.given:
            return [random_mask(len(piece), self.drop, draws) for draws in piece.generators]
        found = [model.get(piece.name) for model in self.given]
        if len(found) != len(piece.models) or any(
            mask is None or tuple(mask.shape) != piece.shape for mask in found
        ):
            raise ValueError(
                f"masks of {piece.name!r} do not fit: with_masks needs one of shape "
                f"{piece.shape} for each of {len(piece.models)} models"
            )
        end = piece.start + len(piece)
        return [mask.reshape(-1)[piece.start : end].cpu() for mask in found]

    def merged(self, piece: Piece) -> Tensor:
        if self.whole(piece.name, piece.shape):
            if len(piece.models) == 1 and piece.weights == (1.0,):
                return piece.models[0]  # base + (model - base) may differ in the last bit
            return _added(piece)
        return self.rescaled(piece, self.masks(piece))

    def rescaled(self, piece: Piece, masks: list[Tensor]) -> Tensor:
        """Numbers (k,) of a piece with what the masks keep, divided by q."""
        q = self.divisor(piece.name)
        if q == 1 and len(piece.models) == 1 and piece.weights == (1.0,):
            return torch.where(masks[0], piece.models[0], piece.base)
        for vector, mask in zip(piece.vectors, masks, strict=True):
            vector.mul_(mask)
            if q > 0:  # 1 - p is 0 where nothing is kept
                vector.div_(q)
        return _added(piece)


def _added(piece: Piece) -> Tensor:
    assert piece.base is not None
    found = piece.base.clone()
    for vector, weight in zip(piece.vectors, piece.weights, strict=True):
        found.add_(vector, alpha=weight)
    return found


def prune(base: Source, tuned: Source, rule: Rule, *, seed: int = 0, **options: Any) -> Any:
    """One fine-tuned model pruned towards its base; heads and statistics are the fine-tuned ones.

    Args:
        base, tuned: state dicts, modules or paths.
        rule: :class:`DAREx`, :class:`~toolkit.merge.darex.importance.Wanda` or another rule.
        seed: of the masks.
        **options: of :func:`toolkit.core.states.merging.merge`.
    """
    return merge(base, [tuned], rule, seed=seed, **{"heads": 1, "buffers": 1, **options})
