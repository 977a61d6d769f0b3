"""Case study 3: which SAM radius for each density."""

from __future__ import annotations

import numpy as np
import pandas as pd

from toolkit.diagnose.three_regime.rule import TINY, depth
from toolkit.diagnose.three_regime.tables import checked
from toolkit.labs.diagnose.cases.temperature import walk


def radius_per_density(
    cells: pd.DataFrame,
    dense: pd.DataFrame,
    epsilon: float = 0.05,
    in_noise_units: bool = False,
    pairs: pd.DataFrame | None = None,
    start: float | None = None,
) -> pd.DataFrame:
    """Case study 3: SAM's radius rho chosen for each density by the walk of case study 1.

    Policies: ``rule``, the walk from ``start``; ``dense``, the rho with the lowest
    dense_valid_error, or dense_test_error where there is no such column; ``fixed``, the rho with
    the lowest mean test error over the densities, known in hindsight only; ``oracle``, the best
    rho of each density. Ties go to the smallest rho.

    Args:
        cells: Table of cells with rho in the place of temperature, lmc and test_error.
        dense: One row per seed and rho with the dense model's error.
        epsilon, in_noise_units, pairs: The depth of Regime I.
        start: Where the walk starts; the middle of the grid by default (the lower of two).

    Returns:
        One row per seed, density and policy: rho, test_error, regret, measured.

    Raises:
        ValueError: If a table is malformed, the radii differ, or ``start`` is not among them.
    """
    table = checked(cells, ["lmc", "test_error"], "rho", 2)
    held_out = "dense_valid_error" in getattr(dense, "columns", ())
    score = "dense_valid_error" if held_out else "dense_test_error"
    if isinstance(dense, pd.DataFrame):  # a table of cells repeats the dense error per density
        same = [column for column in ("seed", "rho", score) if column in dense]
        dense = dense.drop_duplicates(same).assign(density=1.0)
    models = checked(dense, [score], "rho", 2, "dense")
    radii = np.sort(table["rho"].unique())
    if set(radii) != set(models["rho"]) or set(table["seed"]) != set(models["seed"]):
        raise ValueError(
            f"cells has rho {radii.tolist()} for seeds {sorted(set(table['seed']))}, but dense has "
            f"{sorted(set(models['rho']))} for {sorted(set(models['seed']))}: give the same ones."
        )
    if start is not None and start not in radii:
        raise ValueError(f"start = {start}: choose one of the radii {radii.tolist()}.")
    first = (len(radii) - 1) // 2 if start is None else int(np.flatnonzero(radii == start)[0])
    plain = table[["seed", "rho", "density", "lmc"]].rename(columns={"rho": "temperature"})
    if pairs is not None:
        pairs = pairs.rename(columns={"rho": "temperature"})
    table["connected"] = table["lmc"] >= -depth(plain, epsilon, in_noise_units, pairs) - TINY
    rows = []
    for seed, block in table.groupby("seed"):
        error = block.pivot(index="rho", columns="density", values="test_error")
        connected = block.pivot(index="rho", columns="density", values="connected")
        flat = models[models["seed"] == seed].sort_values("rho")[score].to_numpy().argmin()
        fixed = error.mean(axis=1).to_numpy().argmin()
        for density in error:
            now, ok = error[density].to_numpy(), connected[density].to_numpy()
            end, measured = walk(ok, first, -1 if ok[first] else 1)
            picks = {"rule": end, "dense": flat, "fixed": fixed, "oracle": now.argmin()}
            for policy, at in picks.items():
                cost = measured if policy == "rule" else 0
                rows.append((seed, density, policy, radii[at], now[at], now[at] - now.min(), cost))
    names = ["seed", "density", "policy", "rho", "test_error", "regret", "measured"]
    return pd.DataFrame(rows, columns=names)
