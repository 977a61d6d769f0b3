"""Refuses, by name, what lanes cannot be trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toolkit.core.lanes.lane import Lane
from toolkit.core.lanes.losses import LaneLoss
from toolkit.core.lanes.nets import LaneNet, States
from toolkit.core.lanes.optimizers import OPTIMIZERS
from toolkit.core.train.labels import IGNORED, class_numbers, refuse_outside


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
    loss: LaneLoss | None,
) -> Tensor:
    """Raise ValueError unless the arguments of :func:`toolkit.core.lanes.train` fit together.

    Returns:
        The labels (N,) as they are trained with.
    """
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
    if not net.parameters:
        raise ValueError("the network has no parameter that requires a gradient: nothing to train.")
    own = net.template.state_dict()
    for name, tensor in own.items():
        want = (len(lanes), *tensor.shape)
        got = tuple(start[name].shape) if name in start else None
        if got != want:
            raise ValueError(
                f"states[{name!r}] has shape {got}, but {len(lanes)} lanes need {want}."
            )
    for name, first in net.tied.items():
        if not torch.equal(start[name], start[first]):
            raise ValueError(
                f"states[{name!r}] and states[{first!r}] differ, but the network ties them: give "
                "equal ones."
            )
    if net.tied and any(lane.width < 1 for lane in lanes):
        raise ValueError(
            f"Lane(width=...): {next(iter(net.tied))!r} is tied, so its layers cannot be narrowed "
            "apart; build narrower networks."
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
    noisy = any(lane.noise > 0 for lane in lanes)
    if loss is None or noisy:
        y = class_numbers(y, len(x), "y").to(x.device)
    elif y.shape != (len(x),):
        raise ValueError(
            f"y has shape {tuple(y.shape)}: give one number per example, such as its row in a "
            "table of targets that the loss looks up."
        )
    if noisy and int(y.min()) < 0:
        raise ValueError(f"Lane(noise=...) with labels of {int(y.min())}: noise is for classes.")
    out = _called(net, start, x[: lanes[0].batch])
    if loss is None:
        if not out.is_floating_point():
            raise ValueError(
                f"the network returns {out.dtype}: cross-entropy takes logits, of floating point."
            )
        if out.dim() != 3 or out.shape[1] != min(len(x), lanes[0].batch):
            raise ValueError(
                f"the network returns shape {tuple(out.shape[1:])} for {lanes[0].batch} examples: "
                "cross-entropy takes logits (examples, classes); return these or give a loss."
            )
        refuse_outside(y.cpu(), out.shape[2], "y")
        if bool((y == IGNORED).all()):
            raise ValueError(f"y holds {IGNORED} alone: no example counts.")
    return y


def _called(net: LaneNet, start: States, x: Tensor) -> Tensor:
    """Outputs (1, b, ...) of the first lane in training.

    Raises:
        ValueError: the network cannot be called, or not for many lanes at once.
    """
    one = {name: t[:1].detach().clone() for name, t in start.items()}
    try:
        with torch.no_grad():
            return net(one, x[None], train=True)
    except RuntimeError as error:
        said = str(error)
        if "randomness" in said:
            why = (
                "it draws random numbers when called (dropout by function, in attention or in a "
                "recurrent layer), and lanes take every draw as an argument; set its share to 0"
            )
        elif "vmap" in said or "functorch" in said:
            why = "it looks at what it computes, or writes where lanes cannot; rewrite that step"
        else:
            why = f"calling it with x, {x.dtype} of shape {tuple(x.shape)}, fails"
        raise ValueError(f"the network cannot be trained in lanes: {why} ({said}).") from error
