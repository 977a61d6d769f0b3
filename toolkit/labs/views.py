"""Tables over a lab's runs that several chapters show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from toolkit.core.adapt.put import adapt
from toolkit.core.evidence.intervals import Interval, interval


def gain_share(runs: Any, judged: str, of: float) -> Any:
    """How much of full training's gain each arm gets, seed by seed.

    .. math:: 100\\,(x_{nothing} - x_{arm}) / (x_{nothing} - x_{full})

    Args:
        runs: Runs as a DataFrame with ``arm``, ``seed``, ``trained`` and what is judged; the arms
            ``nothing`` and ``full`` among them.
        judged: Column that is judged.
        of: How many numbers full training trains.

    Returns:
        One row for each arm but ``nothing``: ``arm``, ``trained`` and ``part`` of the numbers in
        per cent, ``share`` of the gain in per cent with the ends ``low`` and ``high`` of its
        interval.
    """
    import pandas as pd

    by_arm = runs.pivot(index="seed", columns="arm", values=judged)
    whole = by_arm["nothing"] - by_arm["full"]
    rows = []
    for arm in by_arm.columns.drop("nothing"):
        share = 100 * (by_arm["nothing"] - by_arm[arm]) / whole
        known = share.nunique() > 1
        end = interval(share) if known else None
        trained = runs.loc[runs.arm == arm, "trained"].iloc[0]
        rows.append({
            "arm": arm, "trained": trained, "part": 100 * trained / of, "share": share.mean(),
            "low": end.low if known else share.mean(), "high": end.high if known else share.mean(),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("trained", ignore_index=True)


def paired(runs: Any, judged: str, ours: str, theirs: str) -> Interval:
    """One arm minus another, seed by seed, with its 95 % interval."""
    by_arm = runs.pivot(index="seed", columns="arm", values=judged)
    return interval((by_arm[ours] - by_arm[theirs]).dropna())


def bracketed(end: Interval, digits: int, sign: str = "+") -> str:
    """A difference with its interval as text: ``+0.035 [+0.031, +0.040]``.

    Args:
        end: As :func:`paired` gives it.
        digits: Decimals.
        sign: ``"+"`` to show both signs, ``""`` for minus only.
    """
    low, middle, high = (round(v, digits) + 0.0 for v in (end.low, end.estimate, end.high))
    return f"{middle:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def compared(end: Interval, better: str, margin: float) -> str:
    """What a difference says, in words that follow its interval and not its mean.

    Args:
        end: Our arm minus the other.
        better: ``"less"`` or ``"more"``: which is good.
        margin: The smallest difference that matters.

    Returns:
        "better than" or "worse than" if all of the interval lies beyond the margin, "perhaps only
        slightly" so if it lies beyond 0, "as good as" within the margins, else "not told apart
        from".
    """
    low, high = (-end.high, -end.low) if better == "less" else (end.low, end.high)
    if -margin < low and high < margin:
        return "as good as"
    if low <= 0 <= high:
        return "not told apart from"
    word = "better than" if low > 0 else "worse than"
    return word if min(abs(low), abs(high)) > margin else f"perhaps only slightly {word}"


def means(runs: Any, judged: str, arms: Sequence[str]) -> dict[str, float]:
    """Mean of what is judged, by arm."""
    return {arm: float(runs.loc[runs.arm == arm, judged].mean()) for arm in arms}


def four_costs(
    network: Callable[[], Any], targets: Any, methods: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """The four costs of adapting a network by each method, beside full training with Adam.

    What a method keeps beside gradients and moments, such as averages of scores, is in them.

    Args:
        network: Makes a fresh copy of the network.
        targets: Layers that are adapted.
        methods: Name of the arm -> method.

    Returns:
        Name -> the costs as ``adapted.costs()`` gives them; full training last, which keeps a
        gradient and two moments for every number.
    """
    found: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        adapted = adapt(network(), method, targets=targets)
        adapted.attach(torch.optim.Adam(adapted.parameters()), total_steps=10_000)
        found[name] = dict(adapted.costs())
    parameters = list(network().parameters())
    size, nbytes = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    found["full training"] = {
        "trained": size, "changed": size, "stored_bytes": nbytes, "training_bytes": 3 * nbytes,
    }  # fmt: skip
    return found
