"""Dense networks along an axis of temperature, and the retrained copies of their pruned forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from toolkit.core.lanes import Lane, train
from toolkit.core.lanes.nets import Make, States, take
from toolkit.core.seeds import generator
from toolkit.diagnose.three_regime.pruning import magnitude_masks, prunable

HOTTER = {"checkpoint": -1, "schedule": -1, "batch": -1, "lr": 1, "rho": 1}
"""Axes of temperature, and whether a larger value is hotter (1) or colder (-1)."""


def dense_networks(
    make: Make,
    x: Tensor,
    y: Tensor,
    axis: str,
    values: Sequence[float],
    seeds: Sequence[int],
    base: Lane,
    **options: Any,
) -> tuple[States, pd.DataFrame]:
    """Train the dense networks of a temperature axis.

    Args:
        make: builds a network from a generator.
        x, y: training set.
        axis: ``checkpoint`` (values are steps of one long run, the official form), ``schedule``
            (values are lengths of runs with schedules of their own: the ablation), ``batch`` (at a
            fixed number of steps), ``lr`` or ``rho``.
        values: positions on the axis, at least two.
        seeds: one dense network per seed and value; a seed sets weights and data order.
        base: all other settings.
        options: of ``toolkit.core.lanes.train``.

    Returns:
        States of all networks, and one row for each: ``seed``, ``temperature`` (0 is the coldest,
        one notch per value), ``value``, ``diverged``.

    Raises:
        ValueError: an unknown axis, or fewer than two different values.
    """
    if axis not in HOTTER:
        raise ValueError(f"axis={axis!r}: choose one of {list(HOTTER)}.")
    if len(set(values)) != len(values) or len(values) < 2:
        raise ValueError(f"values={list(values)}: a temperature axis needs two or more, each once.")
    ordered = sorted(values, reverse=HOTTER[axis] < 0)  # from cold to hot
    rows = [
        {"seed": seed, "temperature": notch, "value": value}
        for seed in seeds
        for notch, value in enumerate(ordered)
    ]
    replace = dataclasses.replace
    if axis == "checkpoint":
        steps = [int(v) for v in ordered]
        lanes = [replace(base, seed=s, order=s, steps=max(base.steps, *steps)) for s in seeds]
        done = train(make, lanes, x, y, snapshots=steps, **options)
        parts = [take(done.snapshots[s], list(range(len(seeds)))) for s in steps]
        joined = {n: torch.stack([p[n] for p in parts], 1).flatten(0, 1) for n in parts[0]}
        diverged = (done.diverged >= 0).repeat_interleave(len(steps))
    else:
        field = {"schedule": "steps"}.get(axis, axis)
        kind = float if axis in ("lr", "rho") else int
        lanes = [
            replace(base, seed=row["seed"], order=row["seed"], **{field: kind(row["value"])})
            for row in rows
        ]
        done = train(make, lanes, x, y, **options)
        joined, diverged = done.states, done.diverged >= 0
    return joined, pd.DataFrame(rows).assign(diverged=diverged.cpu().numpy())


def retrained_copies(
    make: Make,
    dense: States,
    table: pd.DataFrame,
    x: Tensor,
    y: Tensor,
    densities: Sequence[float],
    copies: int,
    retrain: Lane,
    scope: str = "uniform",
    **options: Any,
) -> tuple[States, pd.DataFrame]:
    """Prune every dense network to every density and retrain copies that differ in order alone.

    Args:
        make, x, y: as in :func:`dense_networks`.
        dense, table: what it returned.
        densities: shares of weights kept.
        copies: retrained copies of each pruned network, at least two.
        retrain: schedule of the retraining. Its ``order`` counts up from copy to copy; weights and
            mask are those of the pruned network.
        scope: ``uniform`` or ``global``.
        options: of ``toolkit.core.lanes.train``.

    Returns:
        States of all copies, and one row for each: the columns of ``table``, ``density``, ``copy``,
        ``source`` (row of ``table``) and ``diverged``.

    Raises:
        ValueError: fewer than two copies, or a density outside (0, 1].
    """
    if copies < 2:
        raise ValueError(f"copies={copies}: connectivity needs at least two retrained copies.")
    rows = [
        {**row._asdict(), "density": d, "copy": c, "source": i}
        for i, row in enumerate(table.drop(columns="diverged").itertuples(index=False))
        for d in densities
        for c in range(copies)
    ]
    frame = pd.DataFrame(rows)
    template = make(generator(0, "template"))
    start = take(dense, frame["source"].tolist())
    masks = magnitude_masks(start, frame["density"].tolist(), prunable(template), scope)
    for name, mask in masks.items():
        start[name] = start[name] * mask
    lanes = [dataclasses.replace(retrain, order=retrain.order + c) for c in frame["copy"]]
    done = train(make, lanes, x, y, states=start, masks=masks, **options)
    return done.states, frame.assign(diverged=(done.diverged >= 0).cpu().numpy())
