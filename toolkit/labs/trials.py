"""Runs of many arms as rows of one table, for what the beds state of themselves.

What runs is :mod:`toolkit.core.runs`; labs measure through :mod:`toolkit.core.runs.measure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from toolkit.core.runs.tuning import Tuned, search


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

    Raises:
        RuntimeError: a job failed otherwise; nothing of the others is returned.
    """
    import pandas as pd

    from toolkit.core.runs.pool import Task, run_all

    tasks = {str(i): Task(function, job, threads=1, plain=False) for i, job in enumerate(jobs)}
    records = dict(run_all(tasks, processes))
    if labels is None:
        labels = [{k: v for k, v in j.items() if isinstance(v, int | float | str)} for j in jobs]
    rows = [dict(label) | _result(records[key]) for key, label in zip(tasks, labels, strict=True)]
    return pd.DataFrame(rows)


def _result(record: Mapping[str, Any]) -> dict[str, Any]:
    if record["status"] == "done":
        return dict(record["rows"][0])
    if record["error"].startswith("FloatingPointError"):
        return {"validation": math.nan, "test": math.nan}
    raise RuntimeError(f"a job failed: {record['error']}")


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
    """Find a learning rate for every arm by :func:`toolkit.core.runs.tuning.search`.

    Args:
        function: called with the arm's arguments, ``rate`` and ``seed``; only the ``validation``
            entry of its record decides.
        arms: name -> arguments.
        start: middle of the first rates, one for all arms or one for each.
        seeds: to average over.
        processes: at once.
        factor, width, extensions, better: of the search; it does not refine.

    Returns:
        Arm -> :class:`~toolkit.core.runs.tuning.Tuned`, and every run as a DataFrame with columns
        arm, rate, seed and the record's entries.
    """
    import pandas as pd

    tables: list[Any] = []

    def evaluate(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
        keys = [(arm, rate, seed) for arm, rate in pairs for seed in seeds]
        jobs = [dict(arms[arm]) | {"rate": rate, "seed": seed} for arm, rate, seed in keys]
        labels = [{"arm": arm, "rate": rate, "seed": seed} for arm, rate, seed in keys]
        new = run_all(function, jobs, processes, labels)
        tables.append(new)
        grouped = new.groupby(["arm", "rate"]).validation
        return grouped.apply(lambda scores: float(np.mean(scores.to_numpy()))).to_dict()

    starts = {a: start if isinstance(start, int | float) else start[a] for a in arms}
    found = search(
        evaluate,
        starts,
        better=better,
        factor=factor,
        width=width,
        extensions=extensions,
        near=None,
    )
    return found, pd.concat(tables, ignore_index=True)
