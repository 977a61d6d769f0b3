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
from toolkit.core.train.fit import fit
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
    stages: int


SIZES = {"ci": Size(12, 32, 6, 16, 200, 1), "cpu": Size(400, 64, 40, 32, 1000, 4)}
"""Steps and images of stage 1; of a task; images of a search; how often stage 1 is run."""
SOURCE_RATE = {"prompts": 2e-2, "factors": 1e-2, "all": 1e-3}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES[arms.sizes_of(scale)]


def of(kind: str, tokens: int | None = None) -> tuple[Any, Any]:
    """Method and targets of a kind of module, "prompts" or "factors".

    Raises:
        KeyError: an unknown kind.
    """
    method: Any = {"prompts": PROMPTS, "factors": FACTORS}[kind]
    if tokens is not None:
        method = PVP(tokens=tokens, patch=masked.PATCH, channels=1)
    return method, PLACES[kind]


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


@functools.lru_cache(maxsize=64)
def stage_one(
    kind: str, shuffled: bool, seed: int, scale: str, tokens: int | None = None
) -> tuple[Modules, float]:
    """Modules trained on the source, and their accuracy (%) on its test images.

    Args:
        kind: "prompts" or "factors".
        shuffled: labels drawn anew, which say nothing of an image.
        seed: of the start and the order.
        scale: of the sizes.
        tokens: p, instead of the usual.
    """
    model, (method, places) = masked.network(scale), of(kind, tokens)
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
    "random": ("prompts", None),
    "pvp": ("prompts", "true"),
    "shuffled": ("prompts", "shuffled"),
    "lora": ("factors", None),
    "lora pvp": ("factors", "true"),
}
"""Arm -> kind of module, and what stage 1 taught it."""


def prepared(arm: str, seed: int, scale: str, t: float = 1.0, tokens: int | None = None) -> Any:
    """A network as a task starts: model and handle (None for the head alone)."""
    kind, taught = ARMS[arm]
    stage, draws = seed % size(scale).stages, generator(seed, "start")
    if kind is None:
        model = arms.fresh(seen(stage, scale)[0]) if taught else masked.network(scale)
        fresh_head(model, CLASSES, generator=draws, zeros=True)
        model.requires_grad_(False).head.requires_grad_(True)
        return model, None
    model, (method, places) = masked.network(scale), of(kind, tokens)
    source = None
    if taught is not None:
        source = stage_one(kind, taught == "shuffled", stage, scale, tokens)[0]
    adapted = downstream(model, method, places, source, classes=CLASSES, t=t, generator=draws)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    return model, adapted


def shots(seed: int, count: int, scale: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a task: ``count`` of each class."""
    x, y = part("pool", scale, True)
    rows = few_shot(y, count, generator(seed, "shots"))
    return x[rows], y[rows]


def learn(
    arm: str, count: int, rate: float, head_rate: float, seed: int, scale: str, judged: str,
    t: float = 1.0, tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Teach the target from few images; accuracy (%) and log-loss (nats) on a part."""
    torch.set_num_threads(1)
    this = size(scale)
    model, adapted = prepared(arm, seed, scale, t, tokens)
    x, y = shots(seed, count, scale)
    order = generator(seed, "order")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(this.steps):
            rows = torch.randperm(len(y), generator=order)[: this.batch]
            yield x[rows], y[rows]

    ended(adapted, model, this.steps, rate, head_rate, batches())
    images_, labels = part(judged, scale, True)
    if judged == "validation":
        images_, labels = images_[: this.judged], labels[: this.judged]
    found = arms.judged(arms.scores(model, images_), labels)
    return {"accuracy": found["accuracy"], "loss": found["loss"]}
