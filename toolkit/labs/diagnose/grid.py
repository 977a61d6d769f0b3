"""The experiment behind a phase diagram: dense networks, pruned copies, what lies between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from toolkit.core.lanes import Lane, labels_with_noise, train
from toolkit.core.lanes.nets import LaneNet, Make, States, take
from toolkit.core.seeds import generator
from toolkit.diagnose.three_regime.landscape import (
    barrier,
    errors,
    linear_cka,
    lmc,
    losses,
    path_errors,
)
from toolkit.diagnose.three_regime.pruning import magnitude_masks, prunable

HOTTER = {"checkpoint": -1, "schedule": -1, "batch": -1, "lr": 1, "rho": 1}
"""Axes of temperature, and whether a larger value is hotter (1) or colder (-1)."""
IMAGES = 6464  # 101 batches of 64: what the official code compares


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


def measure(
    make: Make,
    copies: States,
    frame: pd.DataFrame,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    images: int = IMAGES,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Errors, connectivity and similarity of every cell.

    Args:
        make: builds a network.
        copies, frame: what :func:`retrained_copies` returned.
        train_set: inputs and labels as they were trained on.
        test_set: inputs and labels for the test error.
        images: training inputs, from the first on, whose softmax outputs CKA compares.

    Returns:
        Two tables. Cells, one row per seed, temperature and density: ``test_error``,
        ``train_error`` (shares, means over copies), ``lmc``, ``barrier`` (shares, means over
        pairs), ``cka`` (mean over pairs; NaN where a network gives one answer to everything).
        Paths, one row per pair and point: ``t``, ``train_error``. Cells with a copy that diverged
        have NaN in place of numbers.
    """
    net = LaneNet(make(generator(0, "template")).to(train_set[0].device))
    x, y = train_set
    frame = frame.assign(
        test_error=errors(net, copies, *test_set).cpu().numpy(),
        train_error=errors(net, copies, x, y).cpu().numpy(),
    )
    keys = ["seed", "temperature", "value", "density"]
    cells, pairs = [], []
    for key, members in frame.groupby(keys, sort=False):
        broken = bool(members.diverged.any())
        facts = dict(zip(keys, key, strict=True))
        numbers = members[["test_error", "train_error"]].mean()
        cells.append(
            facts | {"diverged": broken} | (numbers * (float("nan") if broken else 1)).to_dict()
        )
        if not broken:
            pairs += [(len(cells) - 1, i, j) for i, j in combinations(members.index, 2)]
    cells, per_pair, paths = pd.DataFrame(cells), [], []
    size = max(1, 4096 // max(1, len(x) // 256))
    for begin in range(0, len(pairs), size):
        part = pairs[begin : begin + size]
        a, b = take(copies, [p[1] for p in part]), take(copies, [p[2] for p in part])
        along = path_errors(net, a, b, x, y)
        one, other = (torch.softmax(net.predict(s, x[:images]), -1) for s in (a, b))
        numbers = torch.stack(
            [lmc(along), barrier(along), linear_cka(one, other, undefined="nan")], 1
        ).cpu()
        for (cell, i, j), row, line in zip(
            part, numbers.tolist(), along.cpu().tolist(), strict=True
        ):
            per_pair.append(
                {"cell": cell, **dict(zip(("lmc", "barrier", "cka"), row, strict=True))}
            )
            pair = f"{frame.loc[i, 'copy']}-{frame.loc[j, 'copy']}"
            paths += [
                {"cell": cell, "pair": pair, "t": k / (len(line) - 1), "train_error": e}
                for k, e in enumerate(line)
            ]
    means = pd.DataFrame(per_pair).groupby("cell").mean()
    paths = pd.DataFrame(paths).join(cells[keys], on="cell").drop(columns="cell")
    return cells.join(means), paths


def phase_grid(
    make: Make,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    *,
    axis: str,
    values: Sequence[float],
    densities: Sequence[float],
    seeds: Sequence[int],
    copies: int,
    dense: Lane,
    retrain: Lane | None = None,
    scope: str = "uniform",
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The whole experiment: train, prune, retrain, measure.

    Args:
        make: builds a network from a generator.
        train_set, test_set: inputs and clean labels; ``dense.noise`` replaces training labels.
        axis, values, seeds: temperature; see :func:`dense_networks`.
        densities, copies, scope: see :func:`retrained_copies`.
        dense: settings of the dense runs.
        retrain: of the retraining; those of ``dense`` when left out, as in the paper. Label noise
            is that of ``dense``: both train on one training set.
        options: of ``toolkit.core.lanes.train``.

    Returns:
        Cells and paths, as :func:`measure` returns them. Cells also hold ``dense_test_error``,
        ``dense_train_error`` and ``dense_train_loss`` of the network before pruning.
    """
    x, y = train_set
    noisy = labels_with_noise(y, int(y.max()) + 1, dense.noise, dense.noise_seed)
    again = dataclasses.replace(retrain or dense, noise=dense.noise, noise_seed=dense.noise_seed)
    states, table = dense_networks(make, x, y, axis, values, seeds, dense, **options)
    net = LaneNet(make(generator(0, "template")).to(x.device))
    table_dense = table[["seed", "temperature"]].assign(
        dense_test_error=errors(net, states, *test_set).cpu().numpy(),
        dense_train_error=errors(net, states, x, noisy).cpu().numpy(),
        dense_train_loss=losses(net, states, x, noisy).cpu().numpy(),
    )
    copies_, frame = retrained_copies(
        make, states, table, x, y, densities, copies, again, scope, **options
    )
    cells, paths = measure(make, copies_, frame, (x, noisy), test_set)
    return cells.merge(table_dense, on=["seed", "temperature"]), paths
