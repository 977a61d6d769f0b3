"""Words for those who do not see the figures of a phase diagram."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from toolkit.diagnose.three_regime.heatmap import MAPS
from toolkit.diagnose.three_regime.phases import MEANING, PhaseGrid, percent
from toolkit.diagnose.three_regime.rule import REGIMES


def maps(phases: PhaseGrid) -> str:
    """The extremes of the four maps, and how many cells each regime has."""
    parts = []
    for column, (name, _) in MAPS.items():
        low, high = (
            phases.means.loc[getattr(phases.means[column], f)()] for f in ("idxmin", "idxmax")
        )
        first = f"{low[column]:.3g}" + ("" if column == "normalised" else f" ({phases.place(low)})")
        parts.append(f"{name} from {first} to {high[column]:.3g} ({phases.place(high)})")
    error = phases.grid("test_error")
    sparse, full = (
        phases.labels[error[d].idxmin()] for d in (phases.densities[0], phases.densities[-1])
    )
    return (
        f"Four heat maps over {_extent(phases)}: {'; '.join(parts)}. {_counts(phases)} "
        f"Test error is lowest at {phases.temperature_label} {sparse} at the lowest density and "
        f"at {full} at the highest."
    )


def regime_map(phases: PhaseGrid) -> str:
    """The regimes row by row, from hot to cold."""
    rows = []
    for temperature, row in phases.regimes.iterrows():
        runs = []
        for kind, part in groupby(row.items(), key=lambda item: item[1]):
            within = [100 * density for density, _ in part]
            ends = f"{within[0]:g}" + (f" to {within[-1]:g}" if len(within) > 1 else "")
            runs.append(f"{kind} at {ends} %")
        rows.append(f"{phases.labels[temperature]}: {', '.join(runs)}")
    return (
        f"Map of the regimes over {_extent(phases)}. {_counts(phases)} From hot to cold: "
        f"{'; '.join(rows)}."
    )


def arrows(phases: PhaseGrid) -> str:
    """How often each advice is given, and how often the error falls with it."""
    moves = list(phases.moves().values())
    parts = []
    for word in ("hotter", "colder"):
        right = [better for advice, better in moves if advice == word]
        parts.append(f"{word} in {len(right)} cells, where the error falls in {sum(right)}")
    stay = sum(word == "stay" for word, _ in moves)
    return (
        f"Heat map of the test error above the best at that density, over {_extent(phases)}, "
        f"with the advice of each cell as an arrow: {'; '.join(parts)}; stay in {stay}."
    )


def path(phases: PhaseGrid, cells: Sequence[tuple[float, float]] | None = None) -> str:
    """Ends and highest point of every curve."""
    parts = []
    for label, curve in phases.curves(cells).items():
        mean, top = curve["mean"], curve["mean"].idxmax()
        ends = f"from {mean.iloc[0]:.3g} at t = {mean.index[0]:g} to {mean.iloc[-1]:.3g}"
        parts.append(
            f"{label}: {ends} at t = {mean.index[-1]:g}, highest {mean[top]:.3g} at {top:g}"
        )
    return f"Training error along the line between two retrained copies. {'; '.join(parts)}."


def _extent(phases: PhaseGrid) -> str:
    low, high = percent(phases.densities[0]), percent(phases.densities[-1])
    warm = f"{phases.warmth(phases.temperatures[0])} (coldest) to "
    warm += f"{phases.labels[phases.temperatures[-1]]} (hottest)"
    return (
        f"{len(phases.densities)} densities, {low} to {high}, by "
        f"{len(phases.temperatures)} temperatures, {warm}"
    )


def _counts(phases: PhaseGrid) -> str:
    count = phases.means["regime"].value_counts()
    parts = [f"{kind} ({MEANING[kind]}) {count.get(kind, 0)}" for kind in REGIMES]
    return f"Of {len(phases.means)} cells Regime {', '.join(parts)}."
