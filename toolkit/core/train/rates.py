"""Learning-rate schedules as shares of the rate at the start."""

from __future__ import annotations

import math


def linear(step: int, steps: int) -> float:
    """Share of the learning rate at a step, falling linearly from 1 to 0."""
    return 1 - step / steps


def cosine(step: int, steps: int) -> float:
    """Share of the learning rate at a step, falling along half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
