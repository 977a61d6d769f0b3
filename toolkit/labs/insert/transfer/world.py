"""Source and target: digits 0 to 4 with labels, and few images of each of 5 to 9.

The backbone has filled in hidden patches and never seen a label. Stage 1 trains modules on the
source; :func:`learn` then teaches the target from few images. Draws, heads and orders of a seed are
the same for every arm.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.adapt.model import Adapted
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.insert.pvp import PVP, Modules, downstream, few_shot, fresh_head, pretrain
from toolkit.labs.beds import arms, images, masked
from toolkit.lowrank.lora import LoRA

CLASSES = 5
"""Digits of the source, 0 to 4; as many are the target's."""
PROMPTS = PVP(tokens=8, patch=masked.PATCH, channels=1)
FACTORS = LoRA(rank=2, alpha=4.0)
"""On query and value of every block: as many numbers as the prompts."""
PLACES = {"prompts": "blocks.*", "factors": ["query", "value"]}


@dataclass(frozen=True)
class Size:
    """Numbers of one scale."""

    source_steps: int
    source_batch: int
    steps: int
    batch: int
    judged: int


SIZES = {"ci": Size(12, 32, 6, 10, 100), "cpu": Size(250, 64, 30, 20, 1000)}
"""Steps and images a step of stage 1 and of a task; images that a search is judged on."""
SOURCE_RATE = {"prompts": 2e-2, "factors": 1e-2, "all": 1e-3}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES[arms.sizes_of(scale)]


def of(kind: str) -> tuple[Any, Any]:
    """Method and targets of a kind of module, "prompts" or "factors"."""
    return {"prompts": PROMPTS, "factors": FACTORS}[kind], PLACES[kind]


@functools.lru_cache(maxsize=4)
def part(name: str, scale: str, target: bool) -> tuple[Tensor, Tensor]:
    """Images and labels, from 0 on, of the source's or the target's digits in one part."""
    x, y = getattr(images.load(scale), name)
    kept = (y >= CLASSES) == target
    return x[kept], y[kept] - CLASSES * target


def ended(adapted: Adapted | None, model: Any, steps: int, rate: float, head_rate: float,
          batches: Iterator[tuple[Tensor, Tensor]]) -> None:  # fmt: skip
    """Adam on the modules and, at a rate of its own, on the head; both fall along half a cosine."""
    head = [p for p in model.head.parameters() if p.requires_grad]
    held = {id(p) for p in head}
    every = model.parameters() if adapted is None else adapted.parameters()
    rest = [p for p in every if p.requires_grad and id(p) not in held]
    groups = [{"params": head, "lr": head_rate, "most": head_rate}]
    if rest and rate:
        groups.append({"params": rest, "lr": rate, "most": rate})
    optimizer = torch.optim.Adam(groups, fused=True)
    model.train()
    for step, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * arms.warm(step, steps) * rates.cosine(step, steps)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()


def _source(seed: int, scale: str, shuffled: bool) -> Iterator[tuple[Tensor, Tensor]]:
    this, draws = size(scale), generator(seed, "source")
    x, y = part("pool", scale, False)
    if shuffled:
        y = y[torch.randperm(len(y), generator=draws)]
    for _ in range(this.source_steps):
        rows = torch.randint(len(y), (this.source_batch,), generator=draws)
        yield x[rows], y[rows]


@functools.lru_cache(maxsize=16)
def stage_one(kind: str, shuffled: bool, seed: int, scale: str) -> tuple[Modules, float]:
    """Modules trained on the source, and their accuracy (%) on its test images.

    Args:
        kind: "prompts" or "factors".
        shuffled: labels drawn anew, which say nothing of an image.
        seed: of the start and the order.
        scale: of the sizes.
    """
    model, (method, places) = masked.network(scale), of(kind)
    reached: list[float] = []

    def loop(adapted: Adapted) -> None:
        batches = _source(seed, scale, shuffled)
        rate = SOURCE_RATE[kind]
        ended(adapted, model, size(scale).source_steps, rate, rate, batches)
        x, y = part("test", scale, False)
        reached.append(arms.judged(arms.scores(model, x[:1000]), y[:1000])["accuracy"])

    draws = generator(seed, "stage one")
    found = pretrain(model, method, places, classes=CLASSES, loop=loop, generator=draws)
    return found, reached[0]


@functools.lru_cache(maxsize=8)
def seen(seed: int, scale: str) -> tuple[Any, float]:
    """The whole backbone trained on the source as long as modules are, and its accuracy (%)."""
    model, rate = masked.network(scale), SOURCE_RATE["all"]
    fresh_head(model, CLASSES, generator=generator(seed, "stage one"))
    ended(None, model, size(scale).source_steps, rate, rate, _source(seed, scale, False))
    x, y = part("test", scale, False)
    return model, arms.judged(arms.scores(model, x[:1000]), y[:1000])["accuracy"]


ARMS = {
    "head": (None, None),
    "seen": (None, "all"),
    "disturbed": ("prompts", None),
    "frozen": ("prompts", "true"),
    "random": ("prompts", None),
    "pvp": ("prompts", "true"),
    "shuffled": ("prompts", "shuffled"),
    "lora": ("factors", None),
    "lora pvp": ("factors", "true"),
}
"""Arm -> kind of module, and what stage 1 taught it. Of the first four the head alone trains."""
HEAD_ALONE = ("head", "seen", "disturbed", "frozen")


def stage_of(seed: int, scale: str) -> int:
    """Which run of stage 1 a seed starts from: one for each block, and one for searches."""
    return 0 if scale == "ci" else 2 if 900 <= seed < 1000 else int(seed >= 400)


def prepared(arm: str, seed: int, scale: str, t: float = 1.0) -> tuple[Any, Adapted | None]:
    """A network as a task starts, with a head of zeros, and its handle if modules are on it."""
    kind, taught = ARMS[arm]
    stage, draws = stage_of(seed, scale), generator(seed, "start")
    if kind is None:
        model, adapted = masked.network(scale), None
        if taught is not None:
            model = arms.fresh(seen(stage, scale)[0])
        model.requires_grad_(False)
        fresh_head(model, CLASSES, zeros=True)
    else:
        model, (method, places) = masked.network(scale), of(kind)
        source = None
        if taught is not None:
            source = stage_one(kind, taught == "shuffled", stage, scale)[0]
        adapted = downstream(model, method, places, source, classes=CLASSES, t=t, generator=draws)
        for parameter in model.head.parameters():
            torch.nn.init.zeros_(parameter)
    return model, adapted


def shots(seed: int, count: int, scale: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a task: ``count`` of each class."""
    x, y = part("pool", scale, True)
    rows = few_shot(y, count, generator(seed, "shots"))
    return x[rows], y[rows]


def judges(seed: int, scale: str) -> tuple[Tensor, Tensor]:
    """Images and labels that a seed is judged on: each block has its own half of the test images
    of the target, a search the first validation images."""
    if 900 <= seed < 1000:
        x, y = part("validation", scale, True)
        return x[: size(scale).judged], y[: size(scale).judged]
    x, y = part("test", scale, True)
    half = int(seed >= 400)
    return x[half::2], y[half::2]


def _batches(seed: int, x: Tensor, y: Tensor, scale: str) -> Iterator[tuple[Tensor, Tensor]]:
    this, order = size(scale), generator(seed, "order")
    for _ in range(this.steps):
        rows = torch.randperm(len(y), generator=order)[: this.batch]
        yield x[rows], y[rows]


def learn(
    arm: str, shots_: int, rate: float, head_rate: float, seed: int, scale: str, t: float = 1.0
) -> dict[str, float]:
    """Teach the target from few images: accuracy in per cent and log-loss in nats."""
    model, adapted = prepared(arm, seed, scale, t)
    x, y = shots(seed, shots_, scale)
    ended(adapted, model, size(scale).steps, rate, head_rate, _batches(seed, x, y, scale))
    images_, labels = judges(seed, scale)
    return arms.judged(arms.scores(model, images_), labels)


@functools.lru_cache(maxsize=6)
def _judged_features(arm: str, start: int, seed: int, scale: str) -> Tensor:
    return features(prepared(arm, start, scale)[0], judges(seed, scale)[0])


@torch.no_grad()
def features(model: Any, images_: Tensor) -> Tensor:
    """What the head reads (n, width)."""
    head, model.head = model.head, torch.nn.Identity()
    try:
        return arms.scores(model, images_)
    finally:
        model.head = head


def learn_head(arm: str, shots_: int, head_rate: float, seed: int, scale: str) -> dict[str, float]:
    """The same with the head alone; what it reads is computed once."""
    model, _ = prepared(arm, seed, scale)
    x, y = shots(seed, shots_, scale)
    read, head = features(model, x), model.head.requires_grad_(True)
    alone = torch.nn.ModuleDict({"head": head})
    alone.forward = head.forward
    ended(None, alone, size(scale).steps, 0.0, head_rate, _batches(seed, read, y, scale))
    # without random modules, all seeds of a block read the same
    block = 900 if 900 <= seed < 1000 else 400 * int(seed >= 400)
    same = seed if arm == "disturbed" else block
    with torch.no_grad():
        outputs = head(_judged_features(arm, same, block, scale))
    return arms.judged(outputs, judges(seed, scale)[1])
