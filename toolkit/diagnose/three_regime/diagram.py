"""The phase diagram: maps of a grid of pruned models with its regimes, and figures around it.

The maps follow figure 1 of Zhou et al., arXiv 2305.18383: density across, temperature up, hot at
the top. Boundaries come from the rule, along the edges of the cells; the paper draws them by eye.
Arrows, tints and words are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from toolkit.core.show import figures
from toolkit.diagnose.three_regime.rule import (
    KEYS,
    REGIMES,
    TINY,
    checked,
    depth,
    normalised,
    regimes,
)

MEANING = {
    "I": "not connected",
    "II-A": "connected, outputs differ",
    "II-B": "connected, outputs alike",
}
TINTS = {"I": "#EBB08A", "II-A": "#DDF0FB", "II-B": "#80B9D9"}  # vermillion, sky blue, blue
MAPS = {
    "test_error": ("test error", "cividis_r"),
    "normalised": ("error above the best", "cividis_r"),
    "lmc": ("LMC", "RdBu"),
    "cka": ("CKA", "viridis"),
}
SMALL = 10  # points; a phone shows them at 10 pixels


def _percent(density: float) -> str:
    return f"{100 * density:g} %"


class PhaseDiagram:
    """A grid of pruned models over temperature and density, with its regimes.

    Args:
        cells: One row per dense seed, temperature and density, with test_error, lmc and cka.
        paths: Errors along the line between two copies: seed, temperature, density, pair, t,
            train_error. Only :meth:`path` needs it.
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
        self.regimes = self._grid("regime").sort_index(ascending=False)
        if labels is not None and not isinstance(labels, Mapping):
            labels = dict(zip(self.temperatures, labels, strict=False))
        unnamed = [t for t in self.temperatures if labels is not None and t not in labels]
        if unnamed:
            raise ValueError(f"labels has no word for temperature {unnamed}: name every one.")
        self.labels = {t: f"{t:g}" if labels is None else str(labels[t]) for t in self.temperatures}

    def _grid(self, column: str) -> pd.DataFrame:
        """One column of the means as a grid, the coldest row first."""
        if column not in self._grids:
            grid = self.means.pivot(index="temperature", columns="density", values=column)
            self._grids[column] = grid
        return self._grids[column]

    def _place(self, row: Mapping[str, Any]) -> str:
        return f"density {_percent(row['density'])}, {self._warmth(row['temperature'])}"

    def _warmth(self, temperature: float) -> str:
        return f"{self.temperature_label} {self.labels[temperature]}"

    # ---- advice

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
        at, kinds = self.temperatures.index(temperature), self._grid("regime")[density].to_list()
        lmc = self._grid("lmc").loc[temperature, density]
        why = f"Regime {kinds[at]} ({MEANING[kinds[at]]}; LMC {lmc:.2g})"
        if kinds[at] == "I":
            edge = ", beyond the hottest one measured" if at + 1 == len(kinds) else ""
            return "hotter", f"{why}: train the dense model at a higher temperature{edge}."
        if at == 0:
            return "stay", f"{why}: it is the coldest temperature measured, and still connected."
        if kinds[at - 1] == "I":
            return "stay", f"{why}: one notch colder, the copies are no longer connected."
        return "colder", f"{why}: one notch colder is connected too, so cool down."

    # ---- maps

    def maps(self) -> Any:
        """Return the four heat maps: test error, the same above its best, LMC and CKA.

        A solid line bounds Regime I, a dashed one parts II-A from II-B. Regime I is hatched and
        the regimes are named where they have room; in a small grid every cell carries its number
        and its regime instead.
        """
        rows, columns = len(self.temperatures), len(self.densities)
        panel, numbers = min(max(0.22 * rows, 1.7), 2.6), columns <= 4 and rows <= 5
        with figures.house():
            fig, axes = figures.subplots(2 * panel + 2.9, 2, 2)
            for k, (ax, column) in enumerate(zip(axes.flat, MAPS, strict=True)):
                mesh, inks = self._map(ax, column, hatch=not numbers)
                self._ticks(ax, 2.1, panel, across=k > 1, up=k % 2 == 0)
                ax.set_title(MAPS[column][0], fontsize=12)
                bar = fig.colorbar(mesh, ax=ax, location="bottom", aspect=25, pad=0.03)
                bar.ax.tick_params(labelsize=SMALL)
                bar.ax.locator_params(nbins=4)
                bar.outline.set_visible(False)
                if numbers:
                    self._numbers(ax, column, inks)
                else:
                    self._names(ax, 2.1)
                if k > 1:
                    ax.set_xlabel("density (%)")
            fig.supylabel(self._upward(), fontsize=12)
            fig.get_layout_engine().set(wspace=0.06)
            self._key(fig, hatch=not numbers)
        return fig

    def regime_map(self) -> Any:
        """Return one map with the three regimes as tints, and their names in the cells."""
        kinds = self._grid("regime").to_numpy()
        height = min(max(0.3 * len(kinds), 2.2), 5.0)
        with figures.house():
            from matplotlib.colors import ListedColormap
            from matplotlib.patches import Patch

            fig, ax = figures.subplots(height + 1.7)
            number = np.vectorize(REGIMES.index)(kinds)
            tints = ListedColormap([TINTS[kind] for kind in REGIMES])
            _mesh(ax, number, cmap=tints, vmin=-0.5, vmax=2.5)
            _outline(ax, kinds)
            for i, j in np.ndindex(kinds.shape):
                if kinds.shape[1] <= 10 or (i, j) in _spots(kinds):
                    ax.text(j, i, kinds[i, j], ha="center", va="center", fontsize=SMALL)
            self._ticks(ax, 4.6, height)
            ax.set_xlabel("density (% of weights kept)")
            fig.supylabel(self._upward(), fontsize=12)
            handles = [
                Patch(facecolor=TINTS[k], edgecolor="black", label=f"{k}: {MEANING[k]}")
                for k in REGIMES
            ]
            fig.legend(handles=handles, loc="outside lower center", ncols=1, handlelength=1.2)
        return fig

    def arrows(self) -> Any:
        """Return the advice of case study 1 as arrows over the error above the best.

        Up is hotter, down is colder, a dot is stay. Black: the mean test error falls with that
        move; white: it does not, or the move leaves the grid.
        """
        height = min(max(0.3 * len(self.temperatures), 2.4), 5.0)
        with figures.house():
            from matplotlib.lines import Line2D

            fig, ax = figures.subplots(height + 2.2)
            mesh, _ = self._map(ax, "normalised", hatch=False)
            bar = fig.colorbar(mesh, ax=ax, location="bottom", aspect=40, pad=0.03)
            bar.set_label("test error above the best at that density", fontsize=11)
            bar.ax.tick_params(labelsize=SMALL)
            bar.ax.locator_params(nbins=6)
            bar.outline.set_visible(False)
            looks = {True: ("black", "white"), False: ("white", "black")}  # face and edge
            for (i, j), (word, better) in self._moves().items():
                face, edge = looks[better]
                if word == "stay":
                    ax.plot(j, i, "o", ms=6, color="black", markeredgecolor="white")
                    continue
                way = 0.64 if word == "hotter" else -0.64
                body = {"width": 0.045, "headwidth": 4, "headlength": 3.5, "headaxislength": 3.5}
                ax.quiver(
                    j, i, 0, way, pivot="mid", angles="xy", scale_units="xy", scale=1,
                    units="inches", color=face, edgecolor=edge, linewidth=0.8, **body,
                )  # fmt: skip
            self._ticks(ax, 4.6, height)
            ax.set_xlabel("density (% of weights kept)")
            fig.supylabel(self._upward(), fontsize=12)
            handles = [
                Line2D(
                    [], [], ls="", marker="^", ms=8, color=face, markeredgecolor="black", label=w
                )
                for face, w in (("black", "error falls"), ("white", "it does not"))
            ]
            handles.append(Line2D([], [], ls="", marker="o", color="black", label="stay"))
            fig.legend(handles=handles, loc="outside lower center", ncols=3, handletextpad=0.3)
        return fig

    def _moves(self) -> dict[tuple[int, int], tuple[str, bool]]:
        """For every cell (row from cold, column) the advice, and whether it lowers the error."""
        error, found = self._grid("test_error").to_numpy(), {}
        for i, j in np.ndindex(error.shape):
            word, _ = self.advice(self.temperatures[i], self.densities[j])
            to = i + {"hotter": 1, "colder": -1, "stay": 0}[word]
            found[i, j] = word, to < len(error) and bool(error[to, j] < error[i, j] - TINY)
        return found

    # ---- error along the path

    def path(self, cells: Sequence[tuple[float, float]] | None = None) -> Any:
        """Return training error along the line between two copies, t from 0 to 1.

        The line is the mean over dense seeds and pairs; the band spans the lowest and the highest
        of them.

        Args:
            cells: Pairs of (temperature, density); by default one of each regime: the deepest
                barrier of I, the least alike of II-A and the most alike of II-B.

        Raises:
            ValueError: If there is no table of paths, or it lacks a cell.
        """
        with figures.house():
            fig, ax = figures.subplots(4.4)
            for k, (label, curve) in enumerate(self._curves(cells).items()):
                colour, dash = figures.CYCLE[k % 7], ("-", "--", "-.", ":")[k % 4]
                ax.plot(curve.index, curve["mean"], dash, color=colour, label=label)
                ax.fill_between(
                    curve.index, curve["min"], curve["max"], color=colour, alpha=0.18, lw=0
                )
            ax.set(xlabel="place t on the straight line", ylabel="training error (share)")
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
            fig.legend(loc="outside lower center", ncols=1)
        return fig

    def _curves(self, cells: Sequence[tuple[float, float]] | None) -> dict[str, pd.DataFrame]:
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
            kind = self._grid("regime").loc[temperature, density]
            label = f"Regime {kind}: density {_percent(density)}, {self._warmth(temperature)}"
            curves[label] = self.paths[at].groupby("t")["train_error"].agg(["mean", "min", "max"])
        if not curves:
            raise ValueError("cells is empty: give at least one (temperature, density).")
        return curves

    # ---- words for those who do not see the figures

    def _extent(self) -> str:
        low, high = _percent(self.densities[0]), _percent(self.densities[-1])
        warm = f"{self._warmth(self.temperatures[0])} (coldest) to "
        warm += f"{self.labels[self.temperatures[-1]]} (hottest)"
        return (
            f"{len(self.densities)} densities, {low} to {high}, by "
            f"{len(self.temperatures)} temperatures, {warm}"
        )

    def _counts(self) -> str:
        count = self.means["regime"].value_counts()
        parts = [f"{kind} ({MEANING[kind]}) {count.get(kind, 0)}" for kind in REGIMES]
        return f"Of {len(self.means)} cells Regime {', '.join(parts)}."

    def maps_alt(self) -> str:
        """Return in words what :meth:`maps` shows."""
        parts = []
        for column, (name, _) in MAPS.items():
            low, high = (
                self.means.loc[getattr(self.means[column], f)()] for f in ("idxmin", "idxmax")
            )
            first = f"{low[column]:.3g}" + (
                "" if column == "normalised" else f" ({self._place(low)})"
            )
            parts.append(f"{name} from {first} to {high[column]:.3g} ({self._place(high)})")
        error = self._grid("test_error")
        sparse, full = (
            self.labels[error[d].idxmin()] for d in (self.densities[0], self.densities[-1])
        )
        return (
            f"Four heat maps over {self._extent()}: {'; '.join(parts)}. {self._counts()} "
            f"Test error is lowest at {self.temperature_label} {sparse} at the lowest density and "
            f"at {full} at the highest."
        )

    def regime_map_alt(self) -> str:
        """Return in words what :meth:`regime_map` shows, row by row from hot to cold."""
        rows = []
        for temperature, row in self.regimes.iterrows():
            runs = []
            for kind, part in groupby(row.items(), key=lambda item: item[1]):
                within = [100 * density for density, _ in part]
                ends = f"{within[0]:g}" + (f" to {within[-1]:g}" if len(within) > 1 else "")
                runs.append(f"{kind} at {ends} %")
            rows.append(f"{self.labels[temperature]}: {', '.join(runs)}")
        return (
            f"Map of the regimes over {self._extent()}. {self._counts()} From hot to cold: "
            f"{'; '.join(rows)}."
        )

    def arrows_alt(self) -> str:
        """Return in words what :meth:`arrows` shows."""
        moves = list(self._moves().values())
        parts = []
        for word in ("hotter", "colder"):
            right = [better for advice, better in moves if advice == word]
            parts.append(f"{word} in {len(right)} cells, where the error falls in {sum(right)}")
        stay = sum(word == "stay" for word, _ in moves)
        return (
            f"Heat map of the test error above the best at that density, over {self._extent()}, "
            f"with the advice of each cell as an arrow: {'; '.join(parts)}; stay in {stay}."
        )

    def path_alt(self, cells: Sequence[tuple[float, float]] | None = None) -> str:
        """Return in words what :meth:`path` shows for the same ``cells``."""
        parts = []
        for label, curve in self._curves(cells).items():
            mean, top = curve["mean"], curve["mean"].idxmax()
            ends = f"from {mean.iloc[0]:.3g} at t = {mean.index[0]:g} to {mean.iloc[-1]:.3g}"
            parts.append(
                f"{label}: {ends} at t = {mean.index[-1]:g}, highest {mean[top]:.3g} at {top:g}"
            )
        return f"Training error along the line between two retrained copies. {'; '.join(parts)}."

    # ---- drawing

    def _map(self, ax: Any, column: str, hatch: bool = True) -> tuple[Any, list[list[str]]]:
        """Draw one column as colours with the regimes over it; return mesh and ink per cell."""
        from matplotlib import colormaps
        from matplotlib.colors import Normalize
        from matplotlib.patches import Rectangle

        values, kinds = self._grid(column).to_numpy(), self._grid("regime").to_numpy()
        low, high = float(values.min()), float(values.max())
        if column == "lmc":  # centred at 0; noise within the depth of Regime I stays pale
            high = max(-low, high, self.depth, TINY)
            low = -high
        elif high - low < TINY:
            low, high = low - 0.01 * (column != "normalised"), high + 0.01
        colours, norm = colormaps[MAPS[column][1]], Normalize(low, high)
        mesh = _mesh(ax, values, cmap=colours, norm=norm)
        light = np.array([0.299, 0.587, 0.114])
        inks = [
            ["black" if colours(norm(v))[:3] @ light > 0.5 else "white" for v in row]
            for row in values
        ]
        for i, j in np.argwhere(kinds == "I") if hatch else ():
            box = Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", linewidth=0)
            box.set_edgecolor(inks[i][j])
            ax.add_patch(box)
        _outline(ax, kinds)
        return mesh, inks

    def _numbers(self, ax: Any, column: str, inks: list[list[str]]) -> None:
        values, kinds = self._grid(column).to_numpy(), self._grid("regime").to_numpy()
        for i, j in np.ndindex(values.shape):
            words = f"{values[i, j]:.3f}\n{kinds[i, j]}"
            ax.text(j, i, words, color=inks[i][j], ha="center", va="center", fontsize=SMALL)

    def _ticks(
        self, ax: Any, wide: float, high: float, across: bool = True, up: bool = True
    ) -> None:
        """Put as many labels on the axes as an extent of ``wide`` by ``high`` inches has room."""
        percent = [f"{100 * density:g}" for density in self.densities]
        warmth = [self.labels[temperature] for temperature in self.temperatures]
        each = max(map(len, percent)) * 0.65 * SMALL + 4
        for axis, words, need, room, shown in (
            (ax.xaxis, percent, each, wide, across),
            (ax.yaxis, warmth, 1.3 * SMALL, high, up),
        ):
            at = range(0, len(words), max(1, math.ceil(need * len(words) / (72 * room))))
            axis.set_ticks(at, [words[k] if shown else "" for k in at], fontsize=SMALL)
        ax.set(xlim=(-0.5, len(percent) - 0.5), ylim=(-0.5, len(warmth) - 0.5))
        ax.tick_params(length=2)
        ax.grid(False)

    def _upward(self) -> str:
        return f"{self.temperature_label}, hotter →"  # rotated, the arrow points up

    def _names(self, ax: Any, wide: float) -> None:
        """Name each regime where it is widest, unless the names would meet."""
        kinds = self._grid("regime").to_numpy()
        put: list[Any] = []
        apart = math.ceil(0.5 * kinds.shape[1] / wide)
        for i, j in _spots(kinds):
            if all(abs(i - a) > 1 or abs(j - b) >= apart for a, b in put):
                put.append((i, j))
                box = {"facecolor": "white", "edgecolor": "none", "pad": 2.5}
                looks = {"ha": "center", "va": "center", "fontsize": SMALL, "bbox": box}
                ax.text(j, i, kinds[i, j], **looks)

    def _key(self, fig: Any, hatch: bool) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        handles = [
            Patch(facecolor="white", edgecolor="black", hatch="///", linewidth=0.5, label="I"),
            Line2D([], [], color="black", label="edge of I"),
            Line2D([], [], color="black", linestyle=(0, (2, 1)), label="II-A | II-B"),
        ]
        fig.legend(handles=handles[not hatch :], loc="outside lower center", ncols=3)


def _mesh(ax: Any, values: np.ndarray, **looks: Any) -> Any:
    edges = (np.arange(n + 1) - 0.5 for n in reversed(values.shape))
    return ax.pcolormesh(*edges, values, edgecolors="face", linewidth=0.1, **looks)


def _outline(ax: Any, kinds: np.ndarray) -> None:
    """Draw the edges between cells: solid around Regime I, dashed between II-A and II-B."""
    from matplotlib.collections import LineCollection

    hard: list[Any] = []
    soft: list[Any] = []
    for turn, grid in ((False, kinds), (True, kinds.T)):
        rows, columns = grid.shape
        for j in range(columns - 1):  # the line between columns j and j + 1, in runs
            for i in range(rows):
                pair = {grid[i, j], grid[i, j + 1]}
                if len(pair) == 1:
                    continue
                lines = hard if "I" in pair else soft
                line = [(j + 0.5, i - 0.5), (j + 0.5, i + 0.5)]
                line = [point[::-1] for point in line] if turn else line
                if lines and lines[-1][-1] == line[0] and lines[-1][0][turn] == line[1][turn]:
                    lines[-1][-1] = line[1]
                else:
                    lines.append(line)
    for lines, dash, cap in ((soft, (0, (2.5, 1.5)), "butt"), (hard, "-", "projecting")):
        ax.add_collection(LineCollection(lines, colors="white", linewidths=3.6, capstyle=cap))
        ax.add_collection(
            LineCollection(lines, colors="black", linewidths=1.8, linestyles=[dash], capstyle=cap)
        )


def _spots(kinds: np.ndarray) -> list[tuple[int, int]]:
    """The cell of each regime that lies farthest from all others and from the rim."""
    around = np.pad(kinds, 1, constant_values="")
    spots = []
    for kind in [kind for kind in REGIMES if (kinds == kind).any()]:
        own, others = np.argwhere(kinds == kind), np.argwhere(around != kind) - 1
        room = [np.hypot(*(others - cell).T).min() for cell in own]
        centred = -np.hypot(*(own - own.mean(axis=0)).T)
        spots.append(tuple(own[np.lexsort((centred, room))[-1]].tolist()))
    return spots
