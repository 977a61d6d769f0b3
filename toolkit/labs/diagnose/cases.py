r"""Three uses of the regimes: which way to turn the temperature, which model, which SAM radius.

Source: Zhou et al., arXiv 2305.18383, case studies 1 to 3. Their procedures, grids and baselines
are inferred: the paper's body was not at hand.

**No leak.** The rule sees LMC and CKA, which come from training data. Test error only judges the
choice afterwards. The policies that do see test error are the oracles, the best fixed radius in
hindsight, and the choice by dense test error, which is thereby given an advantage.

Regret is the test error of a choice minus the lowest test error that could have been chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from toolkit.diagnose.three_regime.rule import TINY, depth
from toolkit.diagnose.three_regime.tables import checked

MOVES = ("rule", "cold", "hot", "opposite", "random", "stay", "oracle")


def _walk(connected: np.ndarray, start: int, step: int) -> tuple[int, int]:
    """Return where a walk ends and how many cells it measured.

    It goes on while connectivity is as at the start, and ends in the last connected cell it saw;
    if it saw none, in the last cell it reached.
    """
    seen = [start]
    while 0 <= seen[-1] + step < len(connected) and connected[seen[-1]] == connected[start]:
        seen.append(seen[-1] + step)
    good = [at for at in seen if connected[at]]
    return (good or seen)[-1], len(seen)


def up_or_down(
    cells: pd.DataFrame,
    epsilon: float = 0.05,
    in_noise_units: bool = False,
    pairs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    r"""Case study 1: hotter or colder, from every start of the grid, for seven policies.

    The sign of the advice is :math:`s(T) = +1` (hotter) if :math:`\mathrm{LMC} < -\epsilon`, else
    :math:`-1`. One notch succeeds when it lowers test error (a tie does not). The walk is

    ``T = T0; s = sign(T); while in grid and sign(T) == s: T += s; return last connected T``

    and returns the hottest temperature when none on the way was connected.

    Policies: ``rule``; ``opposite``, the same walk with the sign turned; ``cold`` and ``hot``,
    always that way, to the end of the grid; ``random``, the expectation of a fair coin between
    those two; ``stay``; ``oracle``, the better neighbour, and the best temperature as the end.

    Args:
        cells: Table of cells with columns lmc and test_error; larger temperature = hotter.
        epsilon, in_noise_units, pairs: The depth of Regime I.

    Returns:
        One row per seed, density, start and policy: ``move``, the temperature one notch on (NaN if
        off the grid, or random); ``weight``, the share of the move within the grid (random may
        have 1/2); ``interior``, whether both neighbours exist; ``success`` and ``gain``, the fall
        of test error (NaN without a move); ``end``, ``end_error`` and ``regret`` of the walk;
        ``measured``, the cells it pruned and retrained.

    Raises:
        ValueError: If the table is malformed or has fewer than two temperatures.
    """
    table = checked(cells, ["lmc", "test_error"], least=2)
    table["connected"] = table["lmc"] >= -depth(cells, epsilon, in_noise_units, pairs) - TINY
    rows = []
    for (seed, density), column in table.sort_values("temperature").groupby(["seed", "density"]):
        heat, error = column["temperature"].to_numpy(), column["test_error"].to_numpy()
        connected, hottest = column["connected"].to_numpy(), len(column) - 1
        for start in range(len(heat)):
            near = [at for at in (start - 1, start + 1) if 0 <= at <= hottest]
            sign = -1 if connected[start] else 1
            for policy in MOVES:
                step, measured, coin = 0, 0, [start]
                if policy in ("rule", "opposite"):
                    step = sign if policy == "rule" else -sign
                    end, measured = _walk(connected, start, step)
                    coin = [end]
                elif policy in ("cold", "hot"):
                    step, coin = (-1, [0]) if policy == "cold" else (1, [hottest])
                elif policy == "random":
                    coin = [0, hottest]
                elif policy == "oracle":
                    step, coin = min(near, key=lambda at: error[at]) - start, [error.argmin()]
                to = near if policy == "random" else [at for at in near if at == start + step]
                gains = error[start] - error[to]
                rows.append(
                    {
                        "seed": seed,
                        "density": density,
                        "start": heat[start],
                        "policy": policy,
                        "move": heat[to[0]] if len(to) == 1 and policy != "random" else np.nan,
                        "weight": len(to) / (2 if policy == "random" else 1),
                        "interior": len(near) == 2,
                        "success": (gains > TINY).mean() if to else np.nan,
                        "gain": gains.mean() if to else np.nan,
                        "end": heat[coin[0]] if len(coin) == 1 else np.nan,
                        "end_error": error[coin].mean(),
                        "regret": error[coin].mean() - error.min(),
                        "measured": measured,
                    }
                )
    return pd.DataFrame(rows)


def best_of_family(models: pd.DataFrame, epsilon: float = 0.05) -> pd.DataFrame:
    """Case study 2: which of several trained models to prune, without knowing their training.

    The rule drops the models in Regime I (LMC < -epsilon) and takes the highest CKA; if all are in
    Regime I it takes the highest LMC. Ties go to the first in the table's order. Baselines take
    the lowest dense test error, dense loss, sharpness (top Hessian eigenvalue) or trace, if there;
    ``random`` is the mean over the family; ``oracle`` has the lowest test error after pruning.

    Args:
        models: One row per seed, model and density, with columns lmc, cka, dense_test_error,
            dense_train_loss, sharpness, test_error, and perhaps trace.
        epsilon: Depth of Regime I, as a share.

    Returns:
        One row per seed, density and policy: model (None for ``random``), test_error, regret, and
        ``all_poor``, whether the whole family was in Regime I.

    Raises:
        ValueError: If the table is malformed or a family has one model.
    """
    baselines = {
        "dense_error": "dense_test_error",
        "dense_loss": "dense_train_loss",
        "sharpness": "sharpness",
        **({"trace": "trace"} if "trace" in getattr(models, "columns", ()) else {}),
        "oracle": "test_error",
    }
    table = checked(models, ["lmc", "cka", *baselines.values()], "model", 2, "models")
    table = table.reset_index(drop=True)
    limit, rows = -depth(table, epsilon) - TINY, []
    for (seed, density), family in table.groupby(["seed", "density"]):
        good = family[family["lmc"] >= limit]
        picks = {"rule": family["lmc"].idxmax() if good.empty else good["cka"].idxmax()}
        picks |= {policy: family[column].idxmin() for policy, column in baselines.items()}
        chosen = {p: (family["model"][at], family["test_error"][at]) for p, at in picks.items()}
        chosen["random"] = (None, family["test_error"].mean())
        for policy, (model, error) in chosen.items():
            regret = error - family["test_error"].min()
            rows.append((seed, density, policy, model, error, regret, good.empty))
    names = ["seed", "density", "policy", "model", "test_error", "regret", "all_poor"]
    return pd.DataFrame(rows, columns=names)


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
            end, measured = _walk(ok, first, -1 if ok[first] else 1)
            picks = {"rule": end, "dense": flat, "fixed": fixed, "oracle": now.argmin()}
            for policy, at in picks.items():
                cost = measured if policy == "rule" else 0
                rows.append((seed, density, policy, radii[at], now[at], now[at] - now.min(), cost))
    names = ["seed", "density", "policy", "rho", "test_error", "regret", "measured"]
    return pd.DataFrame(rows, columns=names)


def summary(
    frame: pd.DataFrame, by: Sequence[str] = ("policy", "seed"), interior: bool = False
) -> pd.DataFrame:
    """Return success rate and mean regret of a case study per policy, seed or density.

    ``evidence.paired(table.loc["rule", "regret"], table.loc["cold", "regret"])`` is then the
    difference between two policies over the seeds.

    Args:
        frame: What one of the three case studies returned.
        by: Columns to group by.
        interior: Case study 1 only: count only starts with both neighbours. Otherwise a policy is
            judged on the moves that stay in the grid, which differ between policies.

    Returns:
        Mean ``regret`` per group; for case study 1 also ``moves`` within the grid, ``off_grid``,
        and the mean ``success`` and ``gain`` of the moves (NaN where there is none).

    Raises:
        ValueError: If a column of ``by`` is missing, or ``interior`` meets another case study.
    """
    missing = [column for column in (*by, "regret") if column not in frame]
    if missing or (interior and "interior" not in frame):
        missing = missing or ["interior"]
        raise ValueError(f"frame lacks the columns {missing}: give the table of a case study.")
    if interior:
        frame = frame[frame["interior"]]
    if frame.empty:
        raise ValueError("frame has no rows: with interior=True the grid needs 3 temperatures.")
    groups, table = frame.groupby(list(by)), pd.DataFrame()
    if "success" in frame:
        table["moves"] = groups["weight"].sum()
        table["off_grid"] = groups.size() - table["moves"]
        for column in ("success", "gain"):
            weighted = (frame[column] * frame["weight"]).groupby([frame[key] for key in by])
            table[column] = weighted.sum() / table["moves"].where(table["moves"] > 0)
    table["regret"] = groups["regret"].mean()
    return table
