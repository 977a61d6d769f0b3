"""The experiment behind a phase diagram: dense networks, pruned copies, what lies between them."""

from toolkit.labs.diagnose.grid.measures import IMAGES, measure
from toolkit.labs.diagnose.grid.phases import phase_grid
from toolkit.labs.diagnose.grid.training import HOTTER, dense_networks, retrained_copies

__all__ = ["HOTTER", "IMAGES", "dense_networks", "measure", "phase_grid", "retrained_copies"]
