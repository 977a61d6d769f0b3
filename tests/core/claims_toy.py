"""Claims and runs to test with."""

from __future__ import annotations

import numpy as np

from toolkit.core.evidence import Claim, Condition, Measured

DIGITS = Condition("digits", n=20, spread=1.0, support=(-100, 100))


def claim(**changes) -> Claim:
    """A sound claim of the paper, with changes."""
    given = {
        "id": "rank",
        "text": "Accuracy rises with rank.",
        "whose": "paper",
        "where": "section 4.2, table 3",
        "figure": "88.3 on GLUE",
        "quantity": "test accuracy, rank 8 minus rank 1",
        "unit": "points",
        "margin": 1.0,
        "reason": "two pages of the book differ by less",
        "conditions": (DIGITS,),
    }
    return Claim(**(given | changes))


def conditions(*names: str, **changes) -> tuple[Condition, ...]:
    """Several sound conditions."""
    given = {"n": 20, "spread": 1.0, "support": (-100, 100)}
    return tuple(Condition(name, **(given | changes)) for name in names)


def values(mean: float, sd: float = 0.5, n: int = 20, seed: int = 0) -> np.ndarray:
    """n values with exactly this mean and standard deviation."""
    drawn = np.random.default_rng(seed).normal(size=n)
    return mean + sd * (drawn - drawn.mean()) / drawn.std(ddof=1)


def arms(mean: float, sd: float = 0.5, n: int = 20, seed: int = 0, start: int = 0, **more):
    """Measured: ours minus theirs has exactly this mean and standard deviation."""
    base = np.random.default_rng(seed + 1000).normal(50, 3, size=n)
    ours = base + values(mean, sd, n, seed)
    keys = range(start, start + n)
    return Measured(
        ours=dict(zip(keys, ours.tolist(), strict=True)),
        theirs=dict(zip(keys, base.tolist(), strict=True)),
        **more,
    )
