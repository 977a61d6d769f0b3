"""The effect of a condition: in the claimed direction, on the claim's working scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from toolkit.core.evidence.claims import Claim
from toolkit.core.evidence.intervals import LEVEL, Working, working


@dataclass(frozen=True)
class Effect:
    """Effects of several seeds.

    Args:
        values: One effect per seed (n,), in the unit of the claim.
        estimate: Their mean; at scale ``"log"`` from the mean of the logarithms.
        working: Mean and spread on the working scale, with the way back to effects.
    """

    values: np.ndarray
    estimate: float
    working: Working

    @property
    def still(self) -> bool:
        """Whether all seeds gave the same number."""
        return bool(np.ptp(self.values) == 0)

    @property
    def sd(self) -> float:
        """Standard deviation of one effect, in the unit of the claim."""
        return 0.0 if self.still else float(self.values.std(ddof=1))

    def ends(self, n: int | None = None) -> tuple[float, float]:
        """Return both ends of the interval, for n repeats with this mean and spread.

        Args:
            n: Number of repeats; ``None`` for as many as there are.
        """
        ends = self.working.ends(len(self.values) if n is None else n, LEVEL)
        low, high = sorted(float(end) for end in ends)
        # rounding on the way to the scale and back must not put the estimate outside
        return min(low, self.estimate), max(high, self.estimate)


def effect(
    claim: Claim | _Direction, pairs: Sequence[tuple[float, float | None]], support=None
) -> Effect:
    """Return the effect that pairs of results show.

    Args:
        claim: Says direction, starting point and scale.
        pairs: Results of both arms, one pair per seed, at least two; ``None`` for the second where
            nothing is compared.
        support: Smallest and largest possible effect, for scale ``"bounded"``.

    Raises:
        ValueError: If a result does not suit the scale.
    """
    sign = 1.0 if claim.better == "more" else -1.0
    ours = np.array([a for a, _ in pairs], dtype=float)
    compared = pairs[0][1] is not None
    theirs = np.array([b if compared else 0.0 for _, b in pairs], dtype=float)
    if claim.scale != "log":
        values = sign * (ours - theirs - claim.than)
        bounds = support if claim.scale == "bounded" else None
        mean = values[0] if np.ptp(values) == 0 else values.mean()  # equal values, to the bit
        return Effect(values, float(mean), working(values, claim.scale, bounds))
    if not compared:
        found, factor, start = working(ours, "log"), sign, sign * claim.than
        values = sign * (ours - claim.than)
    else:
        if min(ours.min(), theirs.min()) <= 0:
            raise ValueError('scale = "log" needs positive results in both arms.')
        if claim.unit != "%":
            raise ValueError(f'unit is {claim.unit!r}: at scale "log" a difference is in "%".')
        ratio = ours / theirs if claim.better == "more" else theirs / ours
        found, factor, start = working(ratio, "log"), 100.0, 100.0 + claim.than
        values = factor * ratio - start
    moved = replace(found, back=lambda y: factor * found.back(y) - start)
    return Effect(values, float(moved.back(moved.centre)), moved)


def over_nothing(claim: Claim, pairs: Sequence[tuple[float, float]], compared: bool) -> Effect:
    """Return by how much a positive control beats doing nothing, in the claim's direction and unit.

    Args:
        claim: Says direction and scale.
        pairs: Results of control and of doing nothing, one pair per seed, at least two.
        compared: Whether the claim itself compares two arms; at scale ``"log"`` its unit is per
            cent only then.
    """
    scale = "log" if claim.scale == "log" and compared else "identity"
    plain = _Direction(scale, claim.better, claim.unit)
    return effect(plain, pairs)


@dataclass(frozen=True)
class _Direction:
    """What :func:`effect` reads of a claim, without its starting point."""

    scale: str
    better: str
    unit: str
    than: float = 0.0
