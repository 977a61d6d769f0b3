"""The phase diagram: maps of a grid of pruned models with its regimes, and figures around it.

The maps follow figure 1 of Zhou et al., arXiv 2305.18383: density across, temperature up, hot at
the top. Boundaries come from the rule, along the edges of the cells; the paper draws them by eye.
Arrows, tints and words are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.diagnose.three_regime import alt_texts, figures
from toolkit.diagnose.three_regime.phases import PhaseGrid


class PhaseDiagram(PhaseGrid):
    """Figures of a :class:`PhaseGrid`, each with its words; the arguments are the same."""

    def maps(self) -> Any:
        """Return the four heat maps: test error, the same above its best, LMC and CKA.

        A solid line bounds Regime I, a dashed one parts II-A from II-B. Regime I is hatched and
        the regimes are named where they have room; in a small grid every cell carries its number
        and its regime instead.
        """
        return figures.maps(self)

    def maps_alt(self) -> str:
        """Return in words what :meth:`maps` shows."""
        return alt_texts.maps(self)

    def regime_map(self) -> Any:
        """Return one map with the three regimes as tints, and their names in the cells."""
        return figures.regime_map(self)

    def regime_map_alt(self) -> str:
        """Return in words what :meth:`regime_map` shows, row by row from hot to cold."""
        return alt_texts.regime_map(self)

    def arrows(self) -> Any:
        """Return the advice of case study 1 as arrows over the error above the best.

        Up is hotter, down is colder, a dot is stay. Black: the mean test error falls with that
        move; white: it does not, or the move leaves the grid.
        """
        return figures.arrows(self)

    def arrows_alt(self) -> str:
        """Return in words what :meth:`arrows` shows."""
        return alt_texts.arrows(self)

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
        return figures.path(self, cells)

    def path_alt(self, cells: Sequence[tuple[float, float]] | None = None) -> str:
        """Return in words what :meth:`path` shows for the same ``cells``."""
        return alt_texts.path(self, cells)
