"""What the policies of a case study lose on average."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd


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
