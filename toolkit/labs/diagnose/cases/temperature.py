"""Case study 1: which way to turn the temperature of the dense training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from toolkit.diagnose.three_regime.rule import TINY, depth
from toolkit.diagnose.three_regime.tables import checked

MOVES = ("rule", "cold", "hot", "opposite", "random", "stay", "oracle")


def walk(connected: np.ndarray, start: int, step: int) -> tuple[int, int]:
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
                    end, measured = walk(connected, start, step)
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
