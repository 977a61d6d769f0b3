"""Lines that others lie upon are drawn wider, so that both are seen."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

NEAR = 0.02
"""Part of the axis within which two points cover each other."""
WIDTH, WIDER = 2.2, 3.2
"""Width of a line in pixels, and how much each line upon it adds."""


def widths(settings: Sequence[Mapping[Any, Mapping[Any, float]]]) -> dict[Any, float]:
    """Return the width of each line: the more later ones lie upon it, the wider.

    A line lies upon an earlier one if at three of four common places, or more, they are nearer
    than :data:`NEAR` of the axis.

    Args:
        settings: For each position of the controls, name of a line -> place -> value, in the
            order of drawing.
    """
    values = [y for lines in settings for line in lines.values() for y in line.values()]
    near = NEAR * (max(values) - min(values)) if values else 0.0
    above: dict[Any, set[Any]] = {name: set() for lines in settings for name in lines}
    for lines in settings:
        for (name, one), (later, two) in itertools.combinations(lines.items(), 2):
            common = one.keys() & two.keys()
            close = sum(abs(one[x] - two[x]) < near for x in common)
            if common and close >= 0.75 * len(common):
                above[name].add(later)
    return {name: WIDTH + WIDER * len(upon) for name, upon in above.items()}
