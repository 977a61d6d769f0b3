"""Figures of a diagnosis: bars by group and a map of the nine cells, with their words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from toolkit.core.show import figures
from toolkit.diagnose.longtail_bias.tails import GROUPS
from toolkit.diagnose.longtail_bias.wording import Diagnosed, classes_of, percent

TINTS = {"data": "#56B4E9", "parameter": "#E69F00"}  # black numbers are legible on both
AXES = {"data": "by training count", "parameter": "by model's prior"}


def _kinds(d: Diagnosed) -> list[str]:
    return ["data"] if d.parameter is None else ["data", "parameter"]


def _whisker(row: pd.Series) -> tuple[float, float] | None:
    """Ends of the interval in percent, within what an accuracy can be."""
    if math.isnan(row["low"]):
        return None
    return 100 * max(row["low"], 0.0), 100 * min(row["high"], 1.0)


def bars(d: Diagnosed) -> Any:
    """One panel per cut, a bar per group with its number at the foot."""
    kinds = _kinds(d)
    with figures.house():
        fig, axes = figures.subplots(3.6, 1, len(kinds))
        for ax, kind in zip([axes] if len(kinds) == 1 else axes, kinds, strict=True):
            table = getattr(d, kind)
            for x, (_, row) in enumerate(table.iterrows()):
                if row["classes"]:
                    height = 100 * row["accuracy"]
                    ax.bar(x, height, width=0.72, color=TINTS[kind], edgecolor="black", lw=0.8)
                    # above the whisker, which may reach down to the foot of the bar
                    box = {"facecolor": TINTS[kind] if height > 8 else "white", "lw": 0, "pad": 1}
                    looks = {"ha": "center", "va": "bottom", "fontsize": 12, "zorder": 5}
                    ax.text(x, 2, f"{height:.0f}", bbox=box, **looks)
                ends = _whisker(row)
                if ends:
                    middle = sum(ends) / 2
                    ax.errorbar(x, middle, middle - ends[0], color="black", capsize=4, lw=1.4)
            ticks = [f"{g}\n({n})" for g, n in table["classes"].items()]
            ax.set_xticks(range(3), ticks)
            ax.set_xlabel(f"{AXES[kind]}\n(number of classes)", fontsize=12)
            ax.set(xlim=(-0.55, 2.55), ylim=(0, 103))
            ax.set_yticks(range(0, 101, 20))
            ax.tick_params(labelsize=12)
            ax.tick_params(axis="x", length=0)
            ax.grid(axis="x", visible=False)
            if kind == kinds[0]:
                ax.set_ylabel("accuracy (%)", fontsize=12)
            else:
                ax.set_yticklabels([])
    return fig


def bars_alt(d: Diagnosed) -> str:
    """The same numbers in words."""
    parts = []
    for kind in _kinds(d):
        bits = []
        for group, row in getattr(d, kind).iterrows():
            ends, n = _whisker(row), classes_of(int(row["classes"]))
            span = f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else ""
            bits.append(f"{group} {percent(row['accuracy'])}{span} ({n})")
        parts.append(f"{AXES[kind]} {', '.join(bits)}")
    inside = "Bars of accuracy: "
    if d.level is not None:
        inside = f"Bars of accuracy with {100 * d.level:g} % intervals over classes: "
    return f"{inside}{'; '.join(parts)}."


def _cells(d: Diagnosed, column: str) -> pd.DataFrame:
    if d.cells is None:
        raise ValueError("cells need a prior: pass prior= or zero_shot= to Diagnosis.")
    grid = d.cells.pivot(index="data", columns="parameter", values=column)
    return grid.loc[list(GROUPS), list(GROUPS)]


def heat(d: Diagnosed) -> Any:
    """Rows by training count, columns by prior, both from Many to Few; colours from 0 to 100 %."""
    grid, classes = 100 * _cells(d, "accuracy"), _cells(d, "classes")
    with figures.house():
        from matplotlib import colormaps

        colours = colormaps["cividis"]
        fig, ax = figures.subplots(4.0)
        ax.set_facecolor("white")
        mesh = ax.pcolormesh(
            grid.to_numpy(), cmap=colours, vmin=0, vmax=100, edgecolors="white", linewidth=1.5
        )
        for i, j in ((i, j) for i in range(3) for j in range(3)):
            value, n = grid.iloc[i, j], int(classes.iloc[i, j])
            words, ink = "no class", "black"
            if n:
                words = f"{value:.0f} %\n{classes_of(n)}"
                ink = _ink(colours(value / 100))
            ax.text(j + 0.5, i + 0.5, words, color=ink, ha="center", va="center", fontsize=12)
        ax.set_xticks([0.5, 1.5, 2.5], GROUPS, fontsize=12)
        ax.set_yticks([0.5, 1.5, 2.5], GROUPS, fontsize=12)
        ax.set_xlabel(AXES["parameter"], fontsize=12)
        ax.set_ylabel(AXES["data"], fontsize=12)
        ax.invert_yaxis()  # Many at the top, as in a table
        ax.tick_params(length=0)
        ax.grid(False)
        bar = fig.colorbar(mesh, ax=ax)
        bar.set_label("accuracy (%)", fontsize=12)
        bar.ax.tick_params(labelsize=12)
        bar.outline.set_visible(False)
    return fig


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast (WCAG) on a colour."""
    weights = (0.2126, 0.7152, 0.0722)
    luminance = sum(w * c**2.2 for w, c in zip(weights, colour[:3], strict=True))
    return "black" if luminance > 0.179 else "white"


def heat_alt(d: Diagnosed) -> str:
    """The nine numbers in words, row by row."""
    grid, classes = _cells(d, "accuracy"), _cells(d, "classes")
    rows = []
    for data in GROUPS:
        bits = [f"{p} {percent(grid.loc[data, p])} ({classes.loc[data, p]})" for p in GROUPS]
        rows.append(f"{data} by data: {', '.join(bits)}")
    return (
        "Heat map of accuracy (number of classes). Columns are groups by the model's prior. "
        f"{'; '.join(rows)}."
    )
