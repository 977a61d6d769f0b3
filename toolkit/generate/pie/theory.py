r"""What the rounds of PIE do where the class is one round Gaussian :math:`N(\mu, s^2 I)`.

There the flow from a level :math:`(\alpha, \sigma)` to no noise is
:math:`z \mapsto \mu + c\,(z - \alpha\mu)` with :math:`c = s/\sqrt{\alpha^2s^2 + \sigma^2}`, so

.. math:: \mathrm{edit}(x) - \mu = \kappa\,(x - \mu) + c\,\sigma\,\varepsilon_a,
    \qquad \kappa = \alpha c < 1

and the mean over noises goes to a fixed point at the rate :math:`\beta\kappa`. That is gradient
descent on :math:`\tfrac12\|x-\mu\|^2` with step :math:`1-\kappa`, in the mean only: the noise of
each round stays, and without a mask its sum spreads as wide as the class.

These formulas are ours; the paper's own propositions were not read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toolkit.core.sample.plans import DDIM
from toolkit.core.sample.schedule import Level, Schedule


def flow_factor(level: Level, spread: float) -> float:
    r""":math:`c`: what the exact flow from a level to no noise leaves of a distance.

    Args:
        level: where the flow starts.
        spread: s, the standard deviation of the class, 0 or more.

    Raises:
        ValueError: a spread that is negative or not finite.
    """
    _check(spread)
    return spread / math.hypot(level.alpha * spread, level.std)


def kappa(level: Level, spread: float) -> float:
    r""":math:`\kappa = \alpha c`: what one round leaves of the distance to the class's mean."""
    return level.alpha * flow_factor(level, spread)


def ddim_factor(schedule: Schedule, spread: float) -> float:
    """What :func:`flow_factor` is for DDIM with these steps: a product of one factor per step.

    A last level with noise leaves the state scaled as that level has it.
    """
    _check(spread)
    factor = 1.0
    for step, level in zip(DDIM().steps(schedule), schedule.levels[:-1], strict=True):
        kept = level.alpha * spread**2 / (level.alpha**2 * spread**2 + level.std**2)
        factor *= step.predict.keep + step.predict.weights[0] * kept
    return factor


def fixed_point(x: Tensor, mean: Tensor, kappa: float, beta: float = 1.0) -> Tensor:
    r"""Where the mean goes: :math:`x^* = \mu + \frac{1-\beta}{1-\beta\kappa}(x^{(0)} - \mu)`.

    Args:
        x: original images (batch, ...).
        mean: mu, the mean of the class.
        kappa: what a round leaves of the distance, below 1.
        beta: how much of an edit is kept, 0 to 1.

    Raises:
        ValueError: a kappa outside 0 to below 1, or a beta outside 0 to 1.
    """
    _check_pair(kappa, beta)
    return mean + (1 - beta) / (1 - beta * kappa) * (x - mean)


def expected_path(
    x: Tensor, mean: Tensor, kappa: float, beta: float = 1.0, rounds: int = 10
) -> Tensor:
    r"""The mean over noises after each round, (rounds + 1, batch, ...), the original first.

    .. math:: \mathbb{E}\,x^{(k)} = x^* + (\beta\kappa)^k\,(x^{(0)} - x^*)

    Arguments and errors as for :func:`fixed_point`; ``rounds``: how many, 1 or more.
    """
    if rounds < 1:
        raise ValueError(f"rounds: at least 1, got {rounds}")
    rest = fixed_point(x, mean, kappa, beta)
    return torch.stack([rest + (beta * kappa) ** k * (x - rest) for k in range(rounds + 1)])


def path_variance(level: Level, spread: float, beta: float = 1.0, rounds: int = 10) -> list[float]:
    r"""Variance per number that the noises make, after each round from 0 on.

    .. math:: v_k = \beta^2c^2\sigma^2\,\frac{1 - (\beta\kappa)^{2k}}{1 - (\beta\kappa)^2}

    Without a mask, where :math:`\beta = 1`, it grows to :math:`s^2`: the class itself.
    """
    rate = beta * kappa(level, spread)
    step = (beta * flow_factor(level, spread) * level.std) ** 2
    return [step * (1 - rate ** (2 * k)) / (1 - rate**2) for k in range(rounds + 1)]


def _check(spread: float) -> None:
    if not 0 <= spread < math.inf:
        raise ValueError(f"spread: a standard deviation, 0 or more, got {spread}")


def _check_pair(kappa: float, beta: float) -> None:
    if not 0 <= kappa < 1:
        raise ValueError(f"kappa: from 0 to below 1, got {kappa}; a round must have some noise")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: from 0 to 1, got {beta}")
