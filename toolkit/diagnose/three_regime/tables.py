"""Tables of cells, checked: whole grids of finite numbers in their ranges.

A table of cells has one row per dense seed, temperature and density. Errors are shares in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

KEYS = ["temperature", "density"]
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
