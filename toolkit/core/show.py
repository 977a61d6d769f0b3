"""What chapters show: the house style, figures with descriptions, live controls, explorers.

>>> from toolkit.core import show
>>> show.label("full")
'full fine-tuning'
"""

from toolkit.core.controls import Controls, controls
from toolkit.core.explorer import Explorer, explorer
from toolkit.core.figures import (
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

__all__ = [
    "BASELINES",
    "CYCLE",
    "Controls",
    "Explorer",
    "Html",
    "colour",
    "controls",
    "explorer",
    "figure",
    "figure_html",
    "label",
    "look",
    "style",
]
