"""Parts of the maps: coloured cells, the regimes' outlines and names, labels that have room."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from toolkit.diagnose.three_regime.phases import PhaseGrid
from toolkit.diagnose.three_regime.rule import REGIMES, TINY

MAPS = {
    "test_error": ("test error", "cividis_r"),
    "normalised": ("error above the best", "cividis_r"),
    "lmc": ("LMC", "RdBu"),
    "cka": ("CKA", "viridis"),
}
SMALL = 10  # points; a phone shows them at 10 pixels


def coloured(
    ax: Any, phases: PhaseGrid, column: str, hatch: bool = True
) -> tuple[Any, list[list[str]]]:
    """Draw one column as colours with the regimes over it; return mesh and ink per cell."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    values, kinds = phases.grid(column).to_numpy(), phases.grid("regime").to_numpy()
    low, high = float(values.min()), float(values.max())
    if column == "lmc":  # centred at 0; noise within the depth of Regime I stays pale
        high = max(-low, high, phases.depth, TINY)
        low = -high
    elif high - low < TINY:
        low, high = low - 0.01 * (column != "normalised"), high + 0.01
    colours, norm = colormaps[MAPS[column][1]], Normalize(low, high)
    drawn = mesh(ax, values, cmap=colours, norm=norm)
    light = np.array([0.299, 0.587, 0.114])
    inks = [
        ["black" if colours(norm(v))[:3] @ light > 0.5 else "white" for v in row] for row in values
    ]
    for i, j in np.argwhere(kinds == "I") if hatch else ():
        box = Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", linewidth=0)
        box.set_edgecolor(inks[i][j])
        ax.add_patch(box)
    outline(ax, kinds)
    return drawn, inks


def mesh(ax: Any, values: np.ndarray, **looks: Any) -> Any:
    """Draw one coloured square per cell, centred on whole numbers; return the mesh."""
    edges = (np.arange(n + 1) - 0.5 for n in reversed(values.shape))
    return ax.pcolormesh(*edges, values, edgecolors="face", linewidth=0.1, **looks)


def outline(ax: Any, kinds: np.ndarray) -> None:
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


def widest_cells(kinds: np.ndarray) -> list[tuple[int, int]]:
    """The cell of each regime that lies farthest from all others and from the rim."""
    around = np.pad(kinds, 1, constant_values="")
    cells = []
    for kind in [kind for kind in REGIMES if (kinds == kind).any()]:
        own, others = np.argwhere(kinds == kind), np.argwhere(around != kind) - 1
        room = [np.hypot(*(others - cell).T).min() for cell in own]
        centred = -np.hypot(*(own - own.mean(axis=0)).T)
        cells.append(tuple(own[np.lexsort((centred, room))[-1]].tolist()))
    return cells


def names(ax: Any, phases: PhaseGrid, wide: float) -> None:
    """Name each regime where it is widest, unless the names would meet."""
    kinds = phases.grid("regime").to_numpy()
    put: list[tuple[int, int]] = []
    apart = math.ceil(0.5 * kinds.shape[1] / wide)
    for i, j in widest_cells(kinds):
        if all(abs(i - a) > 1 or abs(j - b) >= apart for a, b in put):
            put.append((i, j))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 2.5}
            looks = {"ha": "center", "va": "center", "fontsize": SMALL, "bbox": box}
            ax.text(j, i, kinds[i, j], **looks)


def numbers(ax: Any, phases: PhaseGrid, column: str, inks: list[list[str]]) -> None:
    """Write its number and its regime into every cell."""
    values, kinds = phases.grid(column).to_numpy(), phases.grid("regime").to_numpy()
    for i, j in np.ndindex(values.shape):
        words = f"{values[i, j]:.3f}\n{kinds[i, j]}"
        ax.text(j, i, words, color=inks[i][j], ha="center", va="center", fontsize=SMALL)


def ticks(
    ax: Any, phases: PhaseGrid, wide: float, high: float, across: bool = True, up: bool = True
) -> None:
    """Put as many labels on the axes as an extent of ``wide`` by ``high`` inches has room."""
    shares = [f"{100 * density:g}" for density in phases.densities]
    warmth = [phases.labels[temperature] for temperature in phases.temperatures]
    each = max(map(len, shares)) * 0.65 * SMALL + 4
    for axis, words, need, room, shown in (
        (ax.xaxis, shares, each, wide, across),
        (ax.yaxis, warmth, 1.3 * SMALL, high, up),
    ):
        at = range(0, len(words), max(1, math.ceil(need * len(words) / (72 * room))))
        axis.set_ticks(at, [words[k] if shown else "" for k in at], fontsize=SMALL)
    ax.set(xlim=(-0.5, len(shares) - 0.5), ylim=(-0.5, len(warmth) - 0.5))
    ax.tick_params(length=2)
    ax.grid(False)


def colour_bar(fig: Any, ax: Any, mesh: Any, aspect: int, bins: int) -> Any:
    """Put a bar of the mesh's colours below a map, with at most ``bins`` steps; return it."""
    bar = fig.colorbar(mesh, ax=ax, location="bottom", aspect=aspect, pad=0.03)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.locator_params(nbins=bins)
    bar.outline.set_visible(False)
    return bar


def upward(phases: PhaseGrid) -> str:
    """The label of the vertical axis."""
    return f"{phases.temperature_label}, hotter →"  # rotated, the arrow points up


def key(fig: Any, hatch: bool) -> None:
    """Put a legend of the lines, and of the hatch if there is one, below the maps."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="white", edgecolor="black", hatch="///", linewidth=0.5, label="I"),
        Line2D([], [], color="black", label="edge of I"),
        Line2D([], [], color="black", linestyle=(0, (2, 1)), label="II-A | II-B"),
    ]
    fig.legend(handles=handles[not hatch :], loc="outside lower center", ncols=3)
