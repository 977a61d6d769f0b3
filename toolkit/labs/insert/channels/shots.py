"""MNIST with few labels: a small vision transformer that read upright digits meets changed ones.

The network has half the width and half the depth of the shared bed's, so that a run costs a second.
It is trained once in every process, from fixed draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.insert.ssf import SSF, Pair, interpolated, pairs, places, put_pairs
from toolkit.labs.beds import arms, images
from toolkit.lowrank.lora import LoRA

FEW = 16
"""Images per class where all arms are compared."""
NOISE = 0.02
"""Spread of the official code's start."""


@dataclass(frozen=True)
class Size:
    """Numbers of one scale."""

    width: int
    depth: int
    pretraining: int
    steps: int
    batch: int
    validation: int


SIZES = {"ci": Size(16, 2, 30, 3, 8, 50), "cpu": Size(32, 2, 1500, 100, 16, 1000)}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES[arms.sizes_of(scale)]


@functools.lru_cache(maxsize=2)
def _base(scale: str) -> nn.Module:
    this, (x, y) = size(scale), images.load(scale).pool
    draws = generator(0, "base")
    model = nets.digits_transformer(this.width, this.depth, 4, 10, 7, 28, generator=draws)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(this.pretraining):
            rows = torch.randint(len(y), (64,), generator=draws)
            yield images.moved(x[rows], 2, draws), y[rows]

    fit(
        model, None, 3e-3, 0, stream(), F.cross_entropy, steps=this.pretraining,
        decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    return model.eval()


def network(scale: str) -> Any:
    """A fresh copy of the base."""
    return arms.fresh(_base(scale))


def drawn(seed: int, shots: int, shift: str, scale: str) -> tuple[Tensor, Tensor]:
    """So many changed images of every class. A seed's few are among its many.

    Raises:
        ValueError: a class has fewer.
    """
    x, y = images.load(scale).pool
    order = torch.randperm(len(y), generator=generator(seed, "examples"))
    rows = []
    for label in range(10):
        own = order[y[order] == label]
        if len(own) < shots:
            raise ValueError(f"shots={shots}: class {label} has {len(own)} images; take fewer")
        rows.append(own[:shots])
    chosen = torch.cat(rows)
    return images.shifted(x[chosen], shift), y[chosen]


def learn(
    arm: str,
    rate: float,
    seed: int,
    shots: int,
    shift: str,
    scale: str,
    head_rate: float | None = None,
) -> tuple[Any, Any, int]:
    """Adapt the base by one arm; the head trains in every one but "nothing".

    Args:
        arm: its name.
        rate: of everything that trains, at the start.
        seed: of images, their order and the method's start.
        shots: images per class.
        shift: of the images.
        scale: the scale's name.
        head_rate: of the head alone, where it has one of its own.

    Returns:
        The network, the handle or None, and how many numbers train.
    """
    torch.set_num_threads(1)
    this, model = size(scale), network(scale)
    if arm == "nothing":
        return model.eval(), None, 0
    x, y = drawn(seed, shots, shift, scale)
    batch = min(this.batch, len(y))

    def draw() -> Iterator[tuple[Tensor, Tensor]]:
        order, left = generator(seed, "order"), torch.empty(0, dtype=torch.int64)
        for _ in range(this.steps):
            if len(left) < batch:
                left = torch.cat([left, torch.randperm(len(y), generator=order)])
            rows, left = left[:batch], left[batch:]
            yield x[rows], y[rows]

    method, targets, train = dressed(arm, model)
    adapted, _ = fit(
        model, method, rate, seed, draw(), F.cross_entropy, steps=this.steps,
        decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
        targets=targets, train=train,
        step=None if head_rate is None else functools.partial(_apart, model, head_rate / rate),
    )  # fmt: skip
    moving = model.parameters() if adapted is None else adapted.parameters()
    return model, adapted, sum(p.numel() for p in moving if p.requires_grad)


def _apart(
    model: Any, ratio: float, closure: Callable[[], Tensor], optimizer: Any, adapted: Any
) -> Tensor:
    """One step in which the head's rate is so many times that of all else."""
    if len(optimizer.param_groups) == 1:
        (every,) = optimizer.param_groups
        own = {id(p) for p in model.head.parameters()}
        head = [p for p in every["params"] if id(p) in own]
        every["params"] = [p for p in every["params"] if id(p) not in own]
        optimizer.add_param_group({"params": head, "lr": every["lr"]})
    optimizer.param_groups[1]["lr"] *= ratio
    optimizer.zero_grad()
    value = closure()
    value.backward()
    optimizer.step()
    return value


def dressed(arm: str, model: nn.Module) -> tuple[Any, Any, tuple[str, ...]]:
    """Method, targets and what trains beside, of an arm."""
    sites = places(model)
    if arm in ("head", "full"):
        return None, None, ("head",) if arm == "head" else ()
    if arm == "lora":
        return rank_one(model), None, ("head.*",)
    if arm == "norms":
        return SSF(), [n for n in sites if "norm" in n], ("head.*",)
    method = {
        "ssf": SSF(), "scale": SSF(learn="scale"), "shift": SSF(learn="shift"),
        "noisy": SSF(noise=NOISE),
    }[arm]  # fmt: skip
    return method, sites, ("head.*",)


def rank_one(model: nn.Module) -> dict[str, LoRA]:
    """LoRA with as many numbers as SSF on two blocks, 48 d.

    Rank 1 on every layer of the blocks is 36 d, rank 2 on the last layer of both 10 d more, and on
    the first query 2 d more.
    """
    once, twice = LoRA(rank=1, alpha=2.0), LoRA(rank=2, alpha=4.0)
    layers = [f"blocks.{n}" for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]
    wide = [n for n in layers if n.endswith("down")] + [n for n in layers if "query" in n][:1]
    return {n: twice if n in wide else once for n in layers}


def judged(model: nn.Module, shift: str, scale: str, part: str, count: int) -> dict[str, float]:
    """Accuracy in percent and log-loss in nats on the first images of a part, at most so many."""
    count = min(count, size(scale).validation) if part == "validation" else count
    x, y = (tensor[:count] for tensor in getattr(images.load(scale), part))
    return arms.judged(arms.scores(model, images.shifted(x, shift), 500), y)


GROUPS = {
    "all": ("",),
    "patches": ("embed",),
    "norms": ("norm",),
    "attention": ("query", "key", "value", "output"),
    "feed-forward": ("up", "down"),
}
"""Kinds of sites -> what their names contain."""


def among(names: Any, group: str) -> list[str]:
    """The sites of a group."""
    return [name for name in names if any(word in name for word in GROUPS[group])]


def partly(adapted: Any, group: str, t: float) -> Any:
    """The pairs of one group a share t of the way from (1, 0), the others as they were learned."""
    found = pairs(adapted)
    return found | {name: found[name].at(t) for name in among(found, group)}


def kept_sizes(adapted: Any) -> dict[str, list[Any]]:
    r"""Mean of :math:`|\gamma-1|` and of :math:`|\beta|` at every site."""
    found = pairs(adapted)
    return {
        "sites": list(found),
        "scales": [(p.gamma - 1).abs().mean().item() for p in found.values()],
        "shifts": [p.beta.abs().mean().item() for p in found.values()],
    }


@torch.no_grad()
def upright_again(model: nn.Module) -> Pair:
    """The pair after the projection of patches that undoes inverted grey.

    It sees W(1 - x) + b and shall give Wx + b: scale -1, shift W1 + 2b.
    """
    layer = model.embed
    shift = layer.weight.sum(1) + 2 * layer.bias
    return Pair(-torch.ones_like(shift), shift)


def towards(scale: str, shares: list[float], count: int) -> list[float]:
    """Accuracy on inverted digits on the way from (1, 0) to the pair that undoes it, untrained."""
    model = network(scale)
    pair, adapted = upright_again(model), adapt(model, SSF(), ["embed"])
    put_pairs(adapted, {"embed": pair})
    found = []
    for t in shares:
        with interpolated(adapted, t):
            found.append(judged(model, "inverted", scale, "test", count)["accuracy"])
    return found
