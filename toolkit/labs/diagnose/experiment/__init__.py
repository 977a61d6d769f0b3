"""The whole experiment of the chapter in the world of digit pairs, many seeds at once.

For each seed: M foundation models whose pre-training sets have class orders of their own
(``different``), M - 1 more with the order of the first (``same``), one downstream set with an
independent order, and students of all kinds. The controls that the paper lacks are among them.
"""

from toolkit.labs.diagnose.experiment.arms import ENSEMBLES, experiment
from toolkit.labs.diagnose.experiment.imbalances import grid
from toolkit.labs.diagnose.experiment.menu import MENU, loss_of, rates_tried
from toolkit.labs.diagnose.experiment.pretraining import (
    Outcome,
    Plan,
    downstream,
    foundations,
    order_of,
    start,
)

__all__ = [
    "ENSEMBLES",
    "MENU",
    "Outcome",
    "Plan",
    "downstream",
    "experiment",
    "foundations",
    "grid",
    "loss_of",
    "order_of",
    "rates_tried",
    "start",
]
