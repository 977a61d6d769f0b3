"""The training loop for hundreds of small networks at once."""

from toolkit.core.lanes.lane import Lane, labels_with_noise
from toolkit.core.lanes.loop import Trained, train
from toolkit.core.lanes.losses import lane_loss
from toolkit.core.lanes.nets import LaneNet, initial, stack, take

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
