"""The whole experiment behind a phase diagram."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from toolkit.core.lanes import Lane, labels_with_noise
from toolkit.core.lanes.nets import LaneNet, Make
from toolkit.core.seeds import generator
from toolkit.diagnose.three_regime.evaluation import errors, losses
from toolkit.labs.diagnose.grid.measures import measure
from toolkit.labs.diagnose.grid.training import dense_networks, retrained_copies


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
