"""Refuses, by name, what lanes cannot be trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from toolkit.core.lanes.lane import Lane
from toolkit.core.lanes.nets import LaneNet, States
from toolkit.core.lanes.optimizers import OPTIMIZERS


def check(
    net: LaneNet,
    lanes: list[Lane],
    x: Tensor,
    y: Tensor,
    start: States,
    masks: Mapping[str, Tensor] | None,
    optimizer: str,
    snapshots: Sequence[int],
    rows: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of :func:`toolkit.core.lanes.train` fit together."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f'optimizer={optimizer!r}: choose "sgd" or "adamw".')
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} examples and y {len(y)} labels: give one label each.")
    if rows is not None and (rows.dim() != 2 or len(rows) != len(lanes) or rows.numel() == 0):
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}: give (lanes, examples of each), here "
            f"({len(lanes)}, n)."
        )
    if rows is not None and (rows.is_floating_point() or rows.min() < 0 or rows.max() >= len(x)):
        raise ValueError(f"rows must hold whole numbers from 0 to {len(x) - 1}, places in x.")
    largest, size = max(lane.batch for lane in lanes), len(x) if rows is None else rows.shape[1]
    if largest > size:
        raise ValueError(f"Lane(batch={largest}) is larger than the {size} training examples.")
    own = net.template.state_dict()
    for name, tensor in own.items():
        want = (len(lanes), *tensor.shape)
        got = tuple(start[name].shape) if name in start else None
        if got != want:
            raise ValueError(
                f"states[{name!r}] has shape {got}, but {len(lanes)} lanes need {want}."
            )
    for name, mask in (masks or {}).items():
        if name not in net.parameters or mask.shape != (len(lanes), *own[name].shape):
            raise ValueError(
                f"masks[{name!r}] has shape {tuple(mask.shape)}: a mask must name a parameter and "
                f"have its shape after the lane axis; parameters are {net.parameters[:6]}."
            )
    late = [s for s in snapshots if not 0 <= s <= max(lane.steps for lane in lanes)]
    if late:
        raise ValueError(f"snapshots={late}: no lane has that step.")
