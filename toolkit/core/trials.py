"""Runs of many arms, as rows of one table, and the same search for a learning rate for each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from toolkit.core.runs import Tuned, tune


def run_all(
    function: Callable[..., Mapping[str, Any]],
    jobs: Sequence[Mapping[str, Any]],
    processes: int = 1,
    labels: Sequence[Mapping[str, Any]] | None = None,
) -> Any:
    """Run a list of argument dicts, as many at once as there are processes.

    Args:
        function: called with each job's arguments; returns a record.
        jobs: argument dicts.
        processes: at once, one thread each.
        labels: a dict per job to put into its row; left out, the job's numbers and strings.

    Returns:
        A DataFrame with one row per job, in order. A run that raised ``FloatingPointError``
        diverged: its ``validation`` and ``test`` are not a number.
    """
    import joblib
    import pandas as pd

    with warnings.catch_warnings():
        # joblib replaces a worker whose memory has grown; the job runs again in the new one
        warnings.filterwarnings("ignore", message="A worker stopped")
        parallel = joblib.Parallel(n_jobs=processes)
        records = parallel(joblib.delayed(_alone)(function, job) for job in jobs)
    if labels is None:
        labels = [{k: v for k, v in j.items() if isinstance(v, int | float | str)} for j in jobs]
    return pd.DataFrame([dict(a) | dict(b) for a, b in zip(labels, records, strict=True)])


def _alone(function: Callable[..., Mapping[str, Any]], job: Mapping[str, Any]) -> Mapping[str, Any]:
    torch.set_num_threads(1)
    try:
        return function(**job)
    except FloatingPointError:  # a method refused a gradient that is not finite: the run diverged
        return {"validation": math.nan, "test": math.nan}


def tune_all(
    function: Callable[..., Mapping[str, Any]],
    arms: Mapping[str, Mapping[str, Any]],
    start: float | Mapping[str, float],
    seeds: Sequence[int],
    *,
    processes: int = 1,
    factor: float = math.sqrt(10),
    width: int = 3,
    extensions: int = 2,
    better: str = "min",
) -> tuple[dict[str, Tuned], Any]:
    """Find a learning rate for every arm, each in the same way.

    Each arm runs with ``width`` rates around its start, a factor apart, on every seed. While the
    best of an arm lies on the edge of what it has tried, one more rate is tried on that side, at
    most ``extensions`` times. Only the ``validation`` entry of the records decides.

    Args:
        function: called with the arm's arguments, ``rate`` and ``seed``.
        arms: name -> arguments.
        start: middle of the first rates, one for all arms or one for each.
        seeds: to average over.
        processes: at once.
        factor: between neighbouring rates.
        width: how many rates at first; 1 tries the start alone.
        extensions: how often an arm may look further.
        better: "min" for an error, "max" for an accuracy.

    Returns:
        Arm -> :class:`~toolkit.core.runs.Tuned`, and every run as a DataFrame with columns arm,
        rate, seed and the record's entries.
    """
    import pandas as pd

    def middle(arm: str) -> float:
        return start if isinstance(start, int | float) else start[arm]

    powers = {arm: [k - width // 2 for k in range(width)] for arm in arms}
    new = {arm: list(tried) for arm, tried in powers.items()}
    tables: list[Any] = []
    found: dict[str, Tuned] = {}
    for turn in range(extensions + 1):
        keys = [(a, middle(a) * factor**k, s) for a, ks in new.items() for k in ks for s in seeds]
        jobs = [dict(arms[arm]) | {"rate": rate, "seed": seed} for arm, rate, seed in keys]
        labels = [{"arm": arm, "rate": rate, "seed": seed} for arm, rate, seed in keys]
        tables.append(run_all(function, jobs, processes, labels))
        every = pd.concat(tables, ignore_index=True)
        for arm in new:
            rates = [middle(arm) * factor**k for k in powers[arm]]
            mine = every[every.arm == arm]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the caller's table says which lie on the edge
                found[arm] = tune(
                    lambda r, mine=mine: mine[np.isclose(mine.rate, r)].validation, rates, better
                )
        if turn == extensions or width < 2:
            break
        new = {}
        for arm, tuned in found.items():
            if tuned.on_edge:
                low = np.isclose(tuned.rate, min(tuned.scores))
                k = min(powers[arm]) - 1 if low else max(powers[arm]) + 1
                powers[arm].append(k)
                new[arm] = [k]
        if not new:
            break
    return found, every


def taken(every: Any, found: Mapping[str, Tuned]) -> Any:
    """The rows of :func:`tune_all`'s table that ran with the rate found for their arm."""
    rates = every.arm.map({arm: tuned.rate for arm, tuned in found.items()})
    return every[np.isclose(every.rate, rates)].reset_index(drop=True)


def rate_table(found: Mapping[str, Tuned], form: str = ".3g") -> Any:
    """One row per arm: rates tried, the mean validation result of each, and the rate taken."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "arm": arm,
                "rate: validation result": ", ".join(
                    f"{r:.2g}: {v:{form}}" for r, v in sorted(t.scores.items())
                ),
                "taken": f"{t.rate:.2g}" + (" (edge)" if t.on_edge and len(t.scores) > 1 else ""),
            }
            for arm, t in found.items()
        ]
    )
