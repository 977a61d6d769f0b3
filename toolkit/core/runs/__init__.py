"""Seeds, independent random streams, and one fair way to tune a learning rate."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


def seeds(n: int, base: int = 0) -> list[int]:
    """Return the seeds ``base, base + 1, ..., base + n - 1``.

    Consecutive seeds are safe because :func:`generator` hashes them before use.

    Args:
        n: How many repeats, at least 1.
        base: The first seed, not negative.

    Raises:
        ValueError: If ``n`` is below 1 or ``base`` is negative.
    """
    if n < 1:
        raise ValueError(f"n = {n}: at least one seed is needed.")
    if base < 0:
        raise ValueError(f"base = {base}: seeds are not negative.")
    return list(range(base, base + n))


def generator(seed: int, *stream: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator for one purpose of one repeat.

    Two calls with the same arguments give the same draws; any other argument gives an independent
    stream. So ``generator(seed, "data")`` and ``generator(seed, "init")`` can change separately.

    Args:
        seed: The repeat's seed, not negative.
        stream: Names or numbers that say what the draws are for.
        device: Where the generator draws.

    Raises:
        ValueError: If ``seed`` is negative.
        TypeError: If a part of ``stream`` is neither a string nor an integer.
    """
    if seed < 0:
        raise ValueError(f"seed = {seed}: seeds are not negative.")
    for part in stream:
        if not isinstance(part, (str, int)):
            raise TypeError(f"stream part {part!r} must be a string or an integer.")
    text = repr((int(seed), *stream)).encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    return torch.Generator(device=device).manual_seed(word)


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` found.

    Args:
        rate: The chosen rate.
        score: Its mean validation score.
        scores: Mean score for every rate tried; ``inf`` or ``-inf`` where the run diverged.
        on_edge: Whether the best rate is the smallest or largest tried.
    """

    rate: float
    score: float
    scores: dict[float, float]
    on_edge: bool


def tune(
    run: Callable[[float], float | Sequence[float]], rates: Sequence[float], better: str = "min"
) -> Tuned:
    """Choose a learning rate on validation data, the same way for each arm.

    Args:
        run: Takes a rate and returns a validation score, or several (one per seed).
        rates: The grid. Give every arm the same one.
        better: ``"min"`` for a loss, ``"max"`` for an accuracy.

    Returns:
        The best rate with all scores. A diverged run (score not finite) counts as worst.

    Raises:
        ValueError: If the grid is empty, repeats itself or holds a rate that is not positive and
            finite, ``better`` is unknown, or every rate diverged.

    Warns:
        UserWarning: If the best rate lies on the edge of the grid, so a better one may lie outside.
    """
    if better not in ("min", "max"):
        raise ValueError(f'better = {better!r}: choose "min" or "max".')
    grid = sorted(float(rate) for rate in rates)
    if not grid or len(set(grid)) != len(grid):
        raise ValueError("rates must hold at least one rate and none twice.")
    if any(not (math.isfinite(rate) and rate > 0) for rate in grid):
        raise ValueError(f"rates = {grid}: every rate must be positive and finite.")
    worst = math.inf if better == "min" else -math.inf
    scores = {}
    for rate in grid:
        score = float(np.mean(np.asarray(run(rate), dtype=float)))
        scores[rate] = score if math.isfinite(score) else worst
    best = (min if better == "min" else max)(grid, key=scores.__getitem__)
    if not math.isfinite(scores[best]):
        raise ValueError(f"every rate in {grid} diverged: extend the grid downwards.")
    on_edge = best in (grid[0], grid[-1])
    if on_edge:
        warnings.warn(
            f"the best rate {best:g} lies on the edge of the grid {[f'{r:g}' for r in grid]}: "
            "extend the grid on that side for every arm.",
            stacklevel=2,
        )
    return Tuned(best, scores[best], scores, on_edge)
