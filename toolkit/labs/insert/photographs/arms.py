"""What learns to read changed photographs from few labels, inside the network or from outside.

The head stays as it was in every arm but "head" and "full", so an insertion shows what it gains by
itself. All arms of a seed get the same photographs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import dress, fit, optimise, set_rate
from toolkit.insert.blackvip import BlackBox, BlackVIP, Coordinator
from toolkit.insert.pvp import PVP, Modules, start_from
from toolkit.insert.ssf import SSF, places
from toolkit.labs.beds import arms
from toolkit.labs.insert.kinds import outside
from toolkit.labs.insert.photographs import world

INSIDE = ("head", "full", "ssf", "prompts", "pvp")
OUTSIDE = ("map", "blackvip")
PROMPTS = PVP(tokens=8, patch=8)
BATCH, DIRECTIONS, BETA = 10, 2, 0.9
"""Photographs and directions of a step by queries, and its momentum."""
STAGE = {"ci": 5, "cpu": 300}
"""Steps of PVP's first stage."""


def run(
    arm: str, rate: float, seed: int, shots: int, shift: str, scale: str, part: str
) -> dict[str, Any]:
    """One arm with so many labelled photographs of a class.

    Returns:
        ``accuracy`` (%), ``loss`` (nats), ``trained`` numbers, and ``asked``: photographs that an
        arm outside has sent to the network.
    """
    torch.set_num_threads(1)
    if arm == "blackvip":
        return _queried(rate, seed, shots, shift, scale, part)
    x, y = world.few(seed, shots, shift, scale)
    judged, labels = world.judges(seed, shift, scale, part)
    if arm == "map":
        answers = [arms.scores(world.base(scale), z).log_softmax(1) for z in (x, judged)]
        mapped, trained = outside.fitted("map", answers[0], y, rate)
        with torch.no_grad():
            found = arms.judged(mapped(answers[1]), labels)
        return found | {"trained": trained, "asked": len(x)}
    model = world.network(scale)
    trained = 0 if arm == "nothing" else _learn(arm, model, rate, seed, x, y, scale)
    return arms.judged(arms.scores(model, judged), labels) | {"trained": trained, "asked": 0}


def _learn(arm: str, model: Any, rate: float, seed: int, x: Tensor, y: Tensor, scale: str) -> int:
    """Train what an arm trains inside the network; how many numbers that are."""
    this = world.size(scale)
    batch, steps, order = min(this.batch, len(y)), this.steps, generator(seed, "order")
    method, targets = _method(arm, model)
    adapted, parameters = dress(model, method, seed, targets, ("head",) if arm == "head" else ())
    if arm == "pvp":
        start_from(adapted, stage_one(_stage(seed, scale), scale))
    optimizer, left = optimise(parameters, rate), torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(left) < batch:
            left = torch.cat([left, torch.randperm(len(y), generator=order)])
        rows, left = left[:batch], left[batch:]
        set_rate(optimizer, rate * arms.warm(step, steps) * rates.cosine(step, steps))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return sum(p.numel() for p in parameters)


def _method(arm: str, model: Any) -> tuple[Any, Any]:
    if arm == "ssf":
        return SSF(), places(model)
    return (PROMPTS, "blocks.?") if arm in ("prompts", "pvp") else (None, None)


def _stage(seed: int, scale: str) -> int:
    """Which run of the first stage a seed starts from: one for each block, and for searches."""
    return 0 if scale == "ci" else 2 if 900 <= seed < 1000 else int(seed >= 400)


@functools.lru_cache(maxsize=3)
def stage_one(stage: int, scale: str) -> Modules:
    """PVP's prompts, trained on clear photographs with all their labels under the head as it is."""
    model, steps = world.network(scale), STAGE[arms.sizes_of(scale)]
    adapted, _ = fit(
        model, PROMPTS, 2e-2, stage, world.clear(scale, steps, generator(stage, "stage one")),
        F.cross_entropy, steps=steps, targets="blocks.?",
        decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    return Modules.of(adapted)


@functools.lru_cache(maxsize=2)
def _components(scale: str) -> tuple[Tensor, Tensor]:
    x = world.load(scale).base[0][:5000].flatten(1)
    mean = x.mean(0)
    _, values, axes = torch.svd_lowrank((x - mean).double(), world.size(scale).components, niter=4)
    return mean, (axes / (values / len(x) ** 0.5)).T.float()


def encode(x: Tensor, scale: str) -> Tensor:
    """Principal components of clear photographs, each of spread 1 there: (n, components)."""
    mean, axes = _components(scale)
    return (x.flatten(1) - mean) @ axes.T


def _queried(
    rate: float, seed: int, shots: int, shift: str, scale: str, part: str
) -> dict[str, Any]:
    """BlackVIP; ``rate`` is the effective step a / (1 - beta), and the prompt starts as none."""
    this = world.size(scale)
    x, y = world.few(seed, shots, shift, scale)
    judged, labels = world.judges(seed, shift, scale, part)
    net = Coordinator(
        this.components, world.SIDE, src_dim=128, start=4, widths=(8, 8), channels=3,
        generator=generator(seed, "coordinator"),
    )  # fmt: skip
    with torch.no_grad():
        net.body[-1].get_parameter("weight").zero_()
    model = world.base(scale)
    box = BlackBox(lambda images: model(images).softmax(1))
    method = BlackVIP(a=rate * (1 - BETA), beta=BETA, c=0.02, directions=DIRECTIONS)
    tuner = method.start(net, lambda images: encode(images, scale),
                         generator=generator(seed, "directions"))  # fmt: skip
    z, draws = encode(x, scale), generator(seed, "batches")
    with torch.no_grad():
        for _ in range(this.asked):
            rows = torch.randint(len(y), (BATCH,), generator=draws)
            tuner.step(box, x[rows], y[rows], z=z[rows])
        said = torch.cat([
            model(tuner.prompted(part_)).log_softmax(1) for part_ in judged.split(500)
        ])  # fmt: skip
    return arms.judged(said, labels) | {"trained": net.count, "asked": box.images}
