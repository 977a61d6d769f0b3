"""Figures of a phase diagram: four maps, the regimes, arrows of advice, error along the path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from toolkit.core.show import figures
from toolkit.diagnose.three_regime import heatmap
from toolkit.diagnose.three_regime.heatmap import MAPS, SMALL
from toolkit.diagnose.three_regime.phases import MEANING, PhaseGrid
from toolkit.diagnose.three_regime.rule import REGIMES

TINTS = {"I": "#EBB08A", "II-A": "#DDF0FB", "II-B": "#80B9D9"}  # vermillion, sky blue, blue


def maps(phases: PhaseGrid) -> Any:
    """The four heat maps: test error, the same above its best, LMC and CKA."""
    rows, columns = len(phases.temperatures), len(phases.densities)
    panel, numbers = min(max(0.22 * rows, 1.7), 2.6), columns <= 4 and rows <= 5
    with figures.house():
        fig, axes = figures.subplots(2 * panel + 2.9, 2, 2)
        for k, (ax, column) in enumerate(zip(axes.flat, MAPS, strict=True)):
            mesh, inks = heatmap.coloured(ax, phases, column, hatch=not numbers)
            heatmap.ticks(ax, phases, 2.1, panel, across=k > 1, up=k % 2 == 0)
            ax.set_title(MAPS[column][0], fontsize=12)
            heatmap.colour_bar(fig, ax, mesh, aspect=25, bins=4)
            if numbers:
                heatmap.numbers(ax, phases, column, inks)
            else:
                heatmap.names(ax, phases, 2.1)
            if k > 1:
                ax.set_xlabel("density (%)")
        fig.supylabel(heatmap.upward(phases), fontsize=12)
        fig.get_layout_engine().set(wspace=0.06)
        heatmap.key(fig, hatch=not numbers)
    return fig


def regime_map(phases: PhaseGrid) -> Any:
    """One map with the three regimes as tints, and their names in the cells."""
    kinds = phases.grid("regime").to_numpy()
    height = min(max(0.3 * len(kinds), 2.2), 5.0)
    with figures.house():
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        fig, ax = figures.subplots(height + 1.7)
        number = np.vectorize(REGIMES.index)(kinds)
        tints = ListedColormap([TINTS[kind] for kind in REGIMES])
        heatmap.mesh(ax, number, cmap=tints, vmin=-0.5, vmax=2.5)
        heatmap.outline(ax, kinds)
        cells = np.ndindex(kinds.shape) if kinds.shape[1] <= 10 else heatmap.widest_cells(kinds)
        for i, j in cells:
            ax.text(j, i, kinds[i, j], ha="center", va="center", fontsize=SMALL)
        heatmap.ticks(ax, phases, 4.6, height)
        ax.set_xlabel("density (% of weights kept)")
        fig.supylabel(heatmap.upward(phases), fontsize=12)
        handles = [
            Patch(facecolor=TINTS[k], edgecolor="black", label=f"{k}: {MEANING[k]}")
            for k in REGIMES
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=1, handlelength=1.2)
    return fig


def arrows(phases: PhaseGrid) -> Any:
    """The advice of case study 1 as arrows over the error above the best."""
    height = min(max(0.3 * len(phases.temperatures), 2.4), 5.0)
    with figures.house():
        from matplotlib.lines import Line2D

        fig, ax = figures.subplots(height + 2.2)
        mesh, _ = heatmap.coloured(ax, phases, "normalised", hatch=False)
        bar = heatmap.colour_bar(fig, ax, mesh, aspect=40, bins=6)
        bar.set_label("test error above the best at that density", fontsize=11)
        looks = {True: ("black", "white"), False: ("white", "black")}  # face and edge
        for (i, j), (word, better) in phases.moves().items():
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
        heatmap.ticks(ax, phases, 4.6, height)
        ax.set_xlabel("density (% of weights kept)")
        fig.supylabel(heatmap.upward(phases), fontsize=12)
        handles = [
            Line2D([], [], ls="", marker="^", ms=8, color=face, markeredgecolor="black", label=w)
            for face, w in (("black", "error falls"), ("white", "it does not"))
        ]
        handles.append(Line2D([], [], ls="", marker="o", color="black", label="stay"))
        fig.legend(handles=handles, loc="outside lower center", ncols=3, handletextpad=0.3)
    return fig


def path(phases: PhaseGrid, cells: Sequence[tuple[float, float]] | None = None) -> Any:
    """Training error along the line between two copies, t from 0 to 1."""
    with figures.house():
        fig, ax = figures.subplots(4.4)
        for k, (label, curve) in enumerate(phases.curves(cells).items()):
            colour, dash = figures.CYCLE[k % 7], ("-", "--", "-.", ":")[k % 4]
            ax.plot(curve.index, curve["mean"], dash, color=colour, label=label)
            ax.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.18, lw=0)
        ax.set(xlabel="place t on the straight line", ylabel="training error (share)")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        fig.legend(loc="outside lower center", ncols=1)
    return fig
