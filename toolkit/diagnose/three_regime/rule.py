r"""The regime of a pruned network, from how two retrained copies of it compare.

With the LMC value of a cell (0 or more: the copies are joined by a straight line of low error) and
the CKA of their outputs (1: alike), for depth :math:`\epsilon` and cut :math:`c`:

.. math::
    \text{I: } \mathrm{LMC} < -\epsilon, \qquad
    \text{II-B: } \mathrm{LMC} \ge -\epsilon,\ \mathrm{CKA} \ge c, \qquad
    \text{II-A: otherwise.}

Source: Zhou et al., *A Three-regime Model of Network Pruning*, arXiv 2305.18383. The paper draws
the boundaries by eye and its code has no thresholds: the rule and its numbers are inferred.

A table of cells has one row per dense seed, temperature and density. Errors are shares in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

KEYS = ["temperature", "density"]
REGIMES = ("I", "II-A", "II-B")
TINY = 1e-12
"""Rounding that must not decide on which side of a threshold a cell lies."""
_SLACK = 1e-4  # single precision may put a CKA just above 1
_ERRORS = ("test_error", "train_error", "dense_test_error", "dense_valid_error")
_LIMITS = {
    "lmc": (-1.0, 1.0, "LMC is a difference of error shares, in [-1, 1]"),
    "cka": (0.0, 1.0, "CKA lies in [0, 1]"),
    **dict.fromkeys(_ERRORS, (0.0, 1.0, "errors are shares: divide a percentage by 100")),
}


def checked(
    cells: pd.DataFrame,
    columns: Sequence[str],
    axis: str = "temperature",
    least: int = 1,
    name: str = "cells",
) -> pd.DataFrame:
    """Return a copy of a table after checking that it is a whole grid of finite numbers.

    Args:
        cells: One row per seed, ``axis`` and density; without a column ``seed`` all are seed 0.
        columns: The measured columns that are needed.
        axis: The other axis of the grid: ``"temperature"``, ``"rho"`` or ``"model"``.
        least: How many values of ``axis`` are needed.
        name: What the caller calls the table, for the messages.

    Raises:
        TypeError: If ``cells`` is no DataFrame.
        ValueError: If the table is empty, a column or a cell is missing, a cell stands twice, or a
            number is not finite or outside its range. The message names it and the remedy.
    """
    if not isinstance(cells, pd.DataFrame):
        raise TypeError(f"{name} is a {type(cells).__name__}: give a pandas DataFrame.")
    if cells.empty:
        raise ValueError(f"{name} is empty: give one row per seed, {axis} and density.")
    missing = [column for column in (axis, "density", *columns) if column not in cells]
    if missing:
        raise ValueError(
            f"{name} lacks the columns {missing}: measure them, or rename yours. "
            f"It has {list(cells.columns)}."
        )
    table = cells.copy() if "seed" in cells else cells.assign(seed=0)
    keys = ["seed", axis, "density"]
    for column in [*(() if axis == "model" else (axis,)), "density", *columns]:
        numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
        low, high, why = _LIMITS.get(column, (-math.inf, math.inf, ""))
        wrong = ~np.isfinite(numbers) | (numbers < low - _SLACK) | (numbers > high + _SLACK)
        if column == "density":
            wrong |= (numbers <= 0) | (numbers > 1)
            why = "a density is the share of weights kept, in (0, 1]"
        if wrong.any():
            at = int(wrong.to_numpy().argmax())
            where = ", ".join(f"{key} {table[key].iloc[at]}" for key in keys if key != column)
            if not np.isfinite(numbers.iloc[at]):
                why = "give a finite number, or leave out the run that diverged in every cell"
            raise ValueError(f"{name} has {column} = {table[column].iloc[at]} at {where}: {why}.")
        table[column] = numbers
    have = pd.MultiIndex.from_frame(table[keys])
    if have.has_duplicates:
        raise ValueError(
            f"{name} has two rows for {_place(keys, have[have.duplicated()][0])}: average the "
            "retrained copies, and number the dense models in a column seed."
        )
    absent = pd.MultiIndex.from_product([table[key].unique() for key in keys]).difference(have)
    if len(absent):
        raise ValueError(
            f"{name} lacks {len(absent)} of the grid's cells, such as {_place(keys, absent[0])}: "
            "run it, or leave out that row or column of the grid."
        )
    if table[axis].nunique() < least:
        raise ValueError(
            f"{name} has {table[axis].nunique()} value of {axis}: a choice needs at least {least}."
        )
    return table


def _place(keys: Sequence[str], values: Sequence) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))


def noise(cells: pd.DataFrame, pairs: pd.DataFrame | None = None) -> float:
    r"""Return the seed noise of LMC: its standard deviation within a cell, pooled over the cells.

    .. math:: \sqrt{\textstyle\sum_{c,s} (x_{cs} - \bar x_c)^2 / \sum_c (S_c - 1)}

    Args:
        cells: Table of cells; the spread is between the dense seeds of a cell.
        pairs: For tables with one row per cell: temperature, density, lmc (and seed), one row per
            pair of retrained copies. The spread is then between pairs. Pairs that share a copy are
            not independent, and one pair is noisier than a mean over pairs: a coarse stand-in.

    Raises:
        ValueError: If nothing is repeated, or a table is malformed.
    """
    values, keys = checked(cells, ["lmc"]), KEYS
    if values.groupby(keys).size().max() == 1 and pairs is not None:
        values, keys = pairs, [*(["seed"] if "seed" in pairs else []), *KEYS]
        missing = [column for column in (*KEYS, "lmc") if column not in pairs]
        if missing:
            raise ValueError(f"pairs lacks the columns {missing}: give one row per pair of copies.")
        if not np.isfinite(values["lmc"].astype(float)).all():
            raise ValueError("pairs has an lmc that is not finite: leave out the failed pair.")
    groups = values.groupby(keys)["lmc"]
    freedom = groups.size() - 1
    if not freedom.sum():
        raise ValueError(
            "the seed noise of LMC is unknown, because no cell is repeated: train more dense "
            "seeds, give pairs with the LMC of each pair of copies, or use in_noise_units=False."
        )
    return math.sqrt((groups.var(ddof=1) * freedom).sum() / freedom.sum())


def depth(
    cells: pd.DataFrame,
    epsilon: float = 0.05,
    in_noise_units: bool = False,
    pairs: pd.DataFrame | None = None,
) -> float:
    """Return how far below 0 LMC must lie for Regime I, as a share.

    Args:
        cells, pairs: As for :func:`noise`; used only when ``in_noise_units``.
        epsilon: The depth itself, or a multiple of the seed noise (the inferred value is 5).
        in_noise_units: Whether ``epsilon`` counts seed noises.

    Raises:
        ValueError: If ``epsilon`` is negative, or below 1 in noise units: then noise alone decides.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon = {epsilon}: give a finite depth of 0 or more, such as 0.05.")
    if not in_noise_units:
        return float(epsilon)
    if epsilon < 1:
        raise ValueError(
            f"epsilon = {epsilon} with in_noise_units: a depth within the noise says nothing. "
            "Give a multiple such as 5."
        )
    return epsilon * noise(cells, pairs)


def regimes(
    cells: pd.DataFrame,
    epsilon: float = 0.05,
    in_noise_units: bool = False,
    cka: float | None = None,
    pairs: pd.DataFrame | None = None,
) -> pd.Series:
    """Return ``"I"``, ``"II-A"`` or ``"II-B"`` for every cell, from its means over the seeds.

    Without ``cka`` the cut of a density is the midpoint between the smallest and the largest CKA
    of its connected cells. It is relative: however little CKA varies in a column, it is split. A
    column with one connected cell, or with equal CKA throughout, is II-B (inferred, like the rule).

    Args:
        cells: Table of cells with columns lmc and cka.
        epsilon, in_noise_units, pairs: The depth of Regime I, as for :func:`depth`.
        cka: One cut c for all densities, in [0, 1].

    Returns:
        A Series over (temperature, density), sorted.

    Raises:
        ValueError: If the table is malformed or an argument is out of its range.
    """
    table = checked(cells, ["lmc", "cka"])
    if cka is not None and not 0 <= cka <= 1:
        raise ValueError(
            f"cka = {cka}: the cut lies in [0, 1], or None for each column's midpoint."
        )
    mean = table.groupby(KEYS)[["lmc", "cka"]].mean()
    poor = mean["lmc"] < -depth(table, epsilon, in_noise_units, pairs) - TINY
    column = mean["cka"].where(~poor).groupby(level="density")
    cut = (column.transform("min") + column.transform("max")) / 2 if cka is None else cka
    alike = mean["cka"] >= cut - TINY
    names = np.select([poor, alike], [REGIMES[0], REGIMES[2]], REGIMES[1])
    return pd.Series(names, index=mean.index, name="regime")


def normalised(cells: pd.DataFrame) -> pd.Series:
    r"""Return the normalised test error: what a cell loses against its density's best temperature.

    .. math:: \tilde e(T, d) = e(T, d) - \min_{T'} e(T', d)

    Args:
        cells: Table of cells with column test_error; with several seeds, each has its own minimum.

    Returns:
        A Series aligned with the rows of ``cells``; its minimum is 0 in every column.
    """
    table = checked(cells, ["test_error"])
    best = table.groupby(["seed", "density"])["test_error"].transform("min")
    return (table["test_error"] - best).rename("normalised")
