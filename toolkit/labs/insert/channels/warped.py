"""Digits through a network that was warped on purpose: by channel, or by mixing channels.

By channel, each output of both hidden layers is scaled and shifted, so the inverse pair is known
and undoes it. Mixed, the outputs are turned two by two by 45 degrees and shifted, which no pair
undoes.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.adapt.put import adapt
from toolkit.core.seeds import generator
from toolkit.insert.ssf import SSF, Pair
from toolkit.lowrank.lora import LoRA

WIDTH, SITES, HEAD = 64, ["0", "2"], "4"
WARPS = ("channels", "mixed")
PER_CLASS = 10
FACTOR, OFFSET, ANGLE = 0.8, 1.0, math.pi / 4
"""Spread of log scales, of shifts in standard deviations of the channel, and the turn of a pair."""


class Task(NamedTuple):
    """What one seed has: the network before and after warping, the pairs that warped it (none when
    mixed), and pairs of images (n, 64) and labels."""

    base: nn.Sequential
    warped: nn.Sequential
    pairs: dict[str, Pair]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=64)
def task(warp: str, seed: int, pretraining: int) -> Task:
    """A network that reads digits, warped; ten images per class to repair it with.

    Raises:
        ValueError: an unknown warp.
    """
    if warp not in WARPS:
        raise ValueError(f"warp: choose one of {', '.join(WARPS)}, got {warp!r}")
    images = data.digits(seed=seed)
    x, test = (torch.from_numpy(p).flatten(1) for p in (images.x_train, images.x_test))
    y = torch.from_numpy(images.y_train)
    base = nets.mlp([64, WIDTH, WIDTH, 10], generator=generator(seed, "base"))
    descend(base, base.parameters(), (x, y), pretraining, 3e-3, seed)
    base.requires_grad_(False)
    draws = generator(seed, "warp")
    model, given = copy.deepcopy(base), {}
    hidden = x
    for name in SITES:
        layer = model[int(name)]
        spread = layer(hidden).std(0)
        moved = OFFSET * torch.randn(WIDTH, generator=draws) * spread
        scale = (FACTOR * torch.randn(WIDTH, generator=draws)).exp()
        order = torch.randperm(WIDTH, generator=draws)
        if warp == "channels":
            given[name] = Pair(scale, moved * scale)
            layer.weight *= scale[:, None]
            layer.bias.copy_(layer.bias * scale + moved * scale)
        else:
            turn = _turn(order)
            layer.weight.copy_(turn @ layer.weight)
            layer.bias.copy_(turn @ layer.bias + moved)
        hidden = base[int(name)](hidden).relu()  # shifts are sized by what the base gives
    few = torch.cat([(y[:-360] == c).nonzero()[:PER_CLASS, 0] for c in range(10)])
    labels = torch.from_numpy(images.y_test)
    return Task(base, model, given, (x[few], y[few]), (x[-360:], y[-360:]), (test, labels))


def _turn(order: Tensor) -> Tensor:
    """The matrix that turns channels two by two."""
    turn = torch.zeros(WIDTH, WIDTH)
    one, other = order[: WIDTH // 2], order[WIDTH // 2 :]
    turn[one, one] = turn[other, other] = math.cos(ANGLE)
    turn[one, other], turn[other, one] = -math.sin(ANGLE), math.sin(ANGLE)
    return turn


def descend(
    model: nn.Module, parameters: Any, part: tuple[Tensor, Tensor], steps: int, rate: float,
    seed: int,
) -> None:  # fmt: skip
    """Adam on batches of 32, the rate falling linearly to 0; no weight decay."""
    x, y = part
    rows = torch.randint(len(x), (steps, 32), generator=generator(seed, "batches"))
    optimizer = torch.optim.Adam(list(parameters), lr=rate, fused=True)
    for step, batch in enumerate(rows):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of right answers, in percent."""
    return 100 * (model(part[0]).argmax(1) == part[1]).double().mean().item()


def repaired(found: Task, arm: str, rate: float, seed: int, steps: int) -> tuple[Any, Any, int]:
    """The warped network after an arm: network, handle or None, numbers trained."""
    model, adapted = copy.deepcopy(found.warped), None
    if arm == "nothing":
        return model, None, 0
    if arm in ("head", "full"):
        part = model[int(HEAD)] if arm == "head" else model
        parameters = list(part.requires_grad_(True).parameters())
    else:
        methods: dict[str, Any] = {
            "ssf": SSF(), "scale": SSF(learn="scale"), "shift": SSF(learn="shift"),
            "lora": LoRA(rank=1, alpha=2.0),
        }  # fmt: skip
        draw = generator(seed, "init")
        adapted = adapt(model, methods[arm], SITES, generator=draw)
        parameters = adapted.parameters()
    descend(model, parameters, found.train, steps, rate, seed)
    return model, adapted, sum(p.numel() for p in parameters)


@torch.no_grad()
def channels(model: nn.Module, x: Tensor, site: str) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel after a layer (of an adapted or plain model)."""
    given = model[: int(site) + 1](x)
    return {"mean": given.mean(0).tolist(), "spread": given.std(0).tolist()}
