"""A grid of pruned models with its regimes: means over the seeds, advice, errors along paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from toolkit.diagnose.three_regime.rule import REGIMES, TINY, depth, normalised, regimes
from toolkit.diagnose.three_regime.tables import KEYS, checked

MEANING = {
    "I": "not connected",
    "II-A": "connected, outputs differ",
    "II-B": "connected, outputs alike",
}


def percent(density: float) -> str:
    """A share of weights in words: 0.05 is 5 %."""
    return f"{100 * density:g} %"


class PhaseGrid:
    """A grid of pruned models over temperature and density, with its regimes.

    Args:
        cells: One row per dense seed, temperature and density, with test_error, lmc and cka.
        paths: Errors along the line between two copies: seed, temperature, density, pair, t,
            train_error. Only :meth:`curves` needs it.
        epsilon, in_noise_units, cka, pairs: The rule, as for ``regimes``.
        temperature_label: What the temperature is, for the vertical axis.
        labels: Words for the temperatures: a mapping, or a sequence from cold to hot.

    Attributes:
        means: One row per cell: means over the seeds, ``regime``, and ``normalised`` (of the mean
            error, so that every density has a 0).
        regimes: The regimes as a grid, the hottest row first, densities across.
        depth: How far below 0 LMC lies in Regime I.

    Raises:
        TypeError, ValueError: If a table is malformed or ``labels`` leaves out a temperature.
    """

    def __init__(
        self,
        cells: pd.DataFrame,
        paths: pd.DataFrame | None = None,
        epsilon: float = 0.05,
        in_noise_units: bool = False,
        cka: float | None = None,
        temperature_label: str = "temperature",
        labels: Mapping[float, str] | Sequence[str] | None = None,
        pairs: pd.DataFrame | None = None,
    ) -> None:
        table = checked(cells, ["test_error", "lmc", "cka"], least=2)
        means = table.groupby(KEYS).mean(numeric_only=True).drop(columns="seed", errors="ignore")
        means["regime"] = regimes(table, epsilon, in_noise_units, cka, pairs)
        self.means = means.reset_index()
        self.means["normalised"] = normalised(self.means)
        self._grids: dict[str, pd.DataFrame] = {}
        self.depth = depth(table, epsilon, in_noise_units, pairs)
        self.paths, self.temperature_label = paths, temperature_label
        self.temperatures = sorted(self.means["temperature"].unique().tolist())
        self.densities = sorted(self.means["density"].unique().tolist())
        self.regimes = self.grid("regime").sort_index(ascending=False)
        if labels is not None and not isinstance(labels, Mapping):
            labels = dict(zip(self.temperatures, labels, strict=False))
        unnamed = [t for t in self.temperatures if labels is not None and t not in labels]
        if unnamed:
            raise ValueError(f"labels has no word for temperature {unnamed}: name every one.")
        self.labels = {t: f"{t:g}" if labels is None else str(labels[t]) for t in self.temperatures}

    def grid(self, column: str) -> pd.DataFrame:
        """One column of the means as a grid, the coldest row first."""
        if column not in self._grids:
            grid = self.means.pivot(index="temperature", columns="density", values=column)
            self._grids[column] = grid
        return self._grids[column]

    def place(self, row: Mapping[str, Any]) -> str:
        """A row of the means in words: its density and its temperature."""
        return f"density {percent(row['density'])}, {self.warmth(row['temperature'])}"

    def warmth(self, temperature: float) -> str:
        """A temperature in words."""
        return f"{self.temperature_label} {self.labels[temperature]}"

    def advice(self, temperature: float, density: float) -> tuple[str, str]:
        """Return ``"hotter"``, ``"colder"`` or ``"stay"`` for one cell, and a sentence why.

        Regime I: hotter. Connected: colder while the next colder cell is connected too, else
        stay, which is where the walk of case study 1 ends. So II-B may still cool down; the
        paper's table says stay there.

        Raises:
            ValueError: If there is no such cell.
        """
        if temperature not in self.temperatures or density not in self.densities:
            raise ValueError(
                f"there is no cell at temperature {temperature}, density {density}: choose from "
                f"{self.temperatures} and {self.densities}."
            )
        at, kinds = self.temperatures.index(temperature), self.grid("regime")[density].to_list()
        lmc = self.grid("lmc").loc[temperature, density]
        why = f"Regime {kinds[at]} ({MEANING[kinds[at]]}; LMC {lmc:.2g})"
        if kinds[at] == "I":
            edge = ", beyond the hottest one measured" if at + 1 == len(kinds) else ""
            return "hotter", f"{why}: train the dense model at a higher temperature{edge}."
        if at == 0:
            return "stay", f"{why}: it is the coldest temperature measured, and still connected."
        if kinds[at - 1] == "I":
            return "stay", f"{why}: one notch colder, the copies are no longer connected."
        return "colder", f"{why}: one notch colder is connected too, so cool down."

    def moves(self) -> dict[tuple[int, int], tuple[str, bool]]:
        """For every cell (row from cold, column) the advice, and whether it lowers the error."""
        error, found = self.grid("test_error").to_numpy(), {}
        for i, j in np.ndindex(error.shape):
            word, _ = self.advice(self.temperatures[i], self.densities[j])
            to = i + {"hotter": 1, "colder": -1, "stay": 0}[word]
            found[i, j] = word, to < len(error) and bool(error[to, j] < error[i, j] - TINY)
        return found

    def curves(self, cells: Sequence[tuple[float, float]] | None = None) -> dict[str, pd.DataFrame]:
        """Training error along the line between two copies, by the words for each cell.

        Args:
            cells: Pairs of (temperature, density); by default one of each regime: the deepest
                barrier of I, the least alike of II-A and the most alike of II-B.

        Returns:
            Tables over t, with mean, min and max over dense seeds and pairs of copies (shares).

        Raises:
            ValueError: If there is no table of paths, or it lacks a cell.
        """
        need = ["seed", "temperature", "density", "pair", "t", "train_error"]
        lacking = [c for c in need if c not in getattr(self.paths, "columns", ())]
        if lacking:
            raise ValueError(
                f"paths lacks the columns {lacking}: give PhaseDiagram(cells, paths=...) one row "
                "per seed, temperature, density, pair of copies and t."
            )
        if cells is None:
            best = {"I": ("lmc", "idxmin"), "II-A": ("cka", "idxmin"), "II-B": ("cka", "idxmax")}
            have = self.means.merge(self.paths[KEYS].drop_duplicates(), on=KEYS)
            found = [(have[have["regime"] == kind], *best[kind]) for kind in REGIMES]
            rows = [have.loc[getattr(part[by], pick)()] for part, by, pick in found if len(part)]
            cells = [(row["temperature"], row["density"]) for row in rows]
        curves = {}
        for temperature, density in cells:
            self.advice(temperature, density)  # complains about a cell outside the grid
            at = (self.paths["temperature"] == temperature) & (self.paths["density"] == density)
            if not at.any():
                raise ValueError(
                    f"paths has no rows for temperature {temperature}, density {density}: record "
                    "that cell, or choose another."
                )
            kind = self.grid("regime").loc[temperature, density]
            label = f"Regime {kind}: density {percent(density)}, {self.warmth(temperature)}"
            curves[label] = self.paths[at].groupby("t")["train_error"].agg(["mean", "min", "max"])
        if not curves:
            raise ValueError("cells is empty: give at least one (temperature, density).")
        return curves
