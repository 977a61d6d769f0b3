"""The training loop for hundreds of small networks at once."""

from toolkit.core.lanes.lane import Lane, labels_with_noise
from toolkit.core.lanes.loop import Trained, train
from toolkit.core.lanes.nets import LaneNet, initial, stack, take
from toolkit.core.lanes.steps import lane_loss

__all__ = [
    "Lane",
    "LaneNet",
    "Trained",
    "initial",
    "labels_with_noise",
    "lane_loss",
    "stack",
    "take",
    "train",
]
