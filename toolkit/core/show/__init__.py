"""What chapters show: the house style, figures with descriptions, live controls, explorers.

>>> from toolkit.core import show
>>> show.label("full")
'full fine-tuning'
"""

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
