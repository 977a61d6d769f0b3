r"""The regime of a pruned network, from how two retrained copies of it compare.

With the LMC value of a cell (0 or more: the copies are joined by a straight line of low error) and
the CKA of their outputs (1: alike), for depth :math:`\epsilon` and cut :math:`c`:

.. math::
    \text{I: } \mathrm{LMC} < -\epsilon, \qquad
    \text{II-B: } \mathrm{LMC} \ge -\epsilon,\ \mathrm{CKA} \ge c, \qquad
    \text{II-A: otherwise.}

Source: Zhou et al., *A Three-regime Model of Network Pruning*, arXiv 2305.18383. The paper draws
the boundaries by eye and its code has no thresholds: the rule and its numbers are inferred.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from toolkit.diagnose.three_regime.tables import KEYS, checked

REGIMES = ("I", "II-A", "II-B")
TINY = 1e-12
"""Rounding that must not decide on which side of a threshold a cell lies."""


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
