r"""What dropping does to one neuron, exactly, and the paper's bound.

A row of weights changed by :math:`\Delta` sees inputs x. With :math:`c_j = \Delta_j x_j`,
:math:`S = \sum c_j`, :math:`Q = \sum c_j^2`, its output changes by
:math:`H = \sum c_j (1 - M_j/q)`:

.. math::
    \mathbb E H = \Big(1 - \frac{1-p}{q}\Big) S, \qquad
    \mathrm{Var}\,H = \frac{p(1-p)}{q^2}\, Q.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Of an output's change: mean, variance, and mean square."""

    mean: Tensor
    variance: Tensor
    square: Tensor


def moments(c: Tensor, drop: float, q: float | None = None) -> Moments:
    """Mean, variance and mean square of H over all masks.

    Args:
        c: (..., n) contributions of the n inputs.
        drop: probability p.
        q: divisor; None for 1 - p.

    Raises:
        ValueError: a probability or a divisor out of range.
    """
    q = divisor(drop, q)
    total, energy = c.sum(dim=-1), c.square().sum(dim=-1)
    mean = (1 - (1 - drop) / q) * total
    variance = drop * (1 - drop) / q**2 * energy
    return Moments(mean, variance, mean.square() + variance)


def phi(drop: float) -> float:
    r""":math:`\Phi(p) = (1-2p)/\log\frac{1-p}{p}`, the sub-Gaussian factor of a Bernoulli variable.

    It is 1/2 at p = 1/2 and 0 at both ends.

    Raises:
        ValueError: a probability outside [0, 1].
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop={drop}: a probability lies in [0, 1]")
    if drop in (0, 1):
        return 0.0
    if abs(drop - 0.5) < 1e-8:  # 0 / 0; flat there
        return 0.5
    return (1 - 2 * drop) / math.log((1 - drop) / drop)


def bound(c: Tensor, drop: float, gamma: float = 0.05) -> Tensor:
    r"""The paper's bound on \|H\| of DARE, which holds with probability :math:`1 - \gamma` or more.

    .. math:: |H| \le \frac{\sqrt{\Phi(p)}}{1-p}\, \sqrt{Q}\, \sqrt{\log(2/\gamma)}

    This is the form of the paper's appendix, eq. 8; the main text misses a square root.

    Args:
        c: (..., n).
        drop: probability p, below 1.
        gamma: probability of more.

    Raises:
        ValueError: a probability out of range.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma={gamma}: a probability lies in (0, 1)")
    factor = math.sqrt(phi(drop) * math.log(2 / gamma)) / divisor(drop, None)
    return factor * c.square().sum(dim=-1).sqrt()


def q_star(coherent: float, energy: float, drop: float) -> float:
    r"""The q with the smallest mean square change: :math:`(1-p) + p \sum Q / \sum S^2`.

    Derived here, not in the paper. It never lies below 1 - p, is 1 - p where contributions add up
    (S^2 far above Q), and above 1 where they cancel.

    Args:
        coherent: sum of S^2 over the rows, its mean over samples.
        energy: sum of Q, its mean over samples.
        drop: probability p.

    Returns:
        Infinity where S is 0 everywhere and Q is not: then nothing is worth keeping.

    Raises:
        ValueError: numbers that are no sums of squares, or no probability.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop={drop}: a probability lies in [0, 1]")
    if not (coherent >= 0 and energy >= 0):
        raise ValueError(f"coherent={coherent}, energy={energy}: sums of squares are not negative")
    if energy == 0 or drop == 0:
        return 1 - drop
    return math.inf if coherent == 0 else (1 - drop) + drop * energy / coherent


def divisor(drop: float, q: float | None) -> float:
    """q, or 1 - p where it is None.

    Raises:
        ValueError: a probability outside [0, 1], or a divisor that is not positive.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop={drop}: a probability lies in [0, 1]")
    found = 1 - drop if q is None else q
    if not found > 0:
        raise ValueError(f"q={found}: a divisor is positive; with drop=1 nothing is kept")
    return found
