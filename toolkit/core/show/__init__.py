"""What chapters show: the house style, figures with descriptions, live controls, explorers.

>>> from toolkit.core import show
>>> show.label("full")
'full training'
"""

from toolkit.core.show.card import card
from toolkit.core.show.curves import curves, dots
from toolkit.core.show.explorers import Explorer, explorer
from toolkit.core.show.figures import (
    BASELINES,
    CYCLE,
    Html,
    colour,
    figure,
    figure_html,
    label,
    look,
    style,
)
from toolkit.core.show.live import Controls, controls
from toolkit.core.show.words import answer, costs, table

__all__ = [
    "BASELINES",
    "CYCLE",
    "Controls",
    "Explorer",
    "Html",
    "answer",
    "card",
    "colour",
    "controls",
    "costs",
    "curves",
    "dots",
    "explorer",
    "figure",
    "figure_html",
    "label",
    "look",
    "style",
    "table",
]
