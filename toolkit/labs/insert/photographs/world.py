"""Photographs of 32 x 32 pixels that are hazy or have their colours exchanged, and a network that
reads clear ones.

The network learns from the first part of CIFAR-10's training images; a seed's few are drawn from
images that it has not seen. At ``ci`` the photographs are scikit-learn's digits, tinted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.nets.transformer import Block, Position
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.insert.pvp import few_shot
from toolkit.labs.beds import arms

SIDE, CLASSES, TOKENS = 32, 10, 16
SHIFTS = ("hazy", "exchanged")
"""A haze of each photograph's own depth; or red seen as green, green as blue, blue as red."""
HAZE, LEFT = 0.6, 0.4
"""Grey of the deepest haze, and what it leaves of the contrast."""


@dataclass(frozen=True)
class Size:
    """Numbers of one scale.

    Args:
        channels: of the two convolutions; width, depth: of the transformer after them.
        pretraining: steps of 64.
        held: images kept from the network: for draws of few, and for validation.
        steps, batch: of a run; asked: steps of a run by queries.
        components: features that BlackVIP's encoder gives.
    """

    channels: tuple[int, int]
    width: int
    depth: int
    pretraining: int
    held: tuple[int, int]
    steps: int
    batch: int
    asked: int
    components: int


SIZES = {
    "ci": Size((4, 8), 16, 1, 20, (300, 100), 3, 8, 4, 20),
    "cpu": Size((24, 48), 64, 2, 1500, (2000, 1000), 50, 16, 150, 100),
}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES[arms.sizes_of(scale)]


class Parts(NamedTuple):
    """Pairs of images (n, 3, 32, 32) in [0, 1] and labels (n,): ``base`` (what the network learns
    from), ``few`` (what a seed draws from), ``validation``, ``test``."""

    base: tuple[Tensor, Tensor]
    few: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=2)
def load(scale: str) -> Parts:
    """CIFAR-10, or at ``ci`` digits, each of a colour of its own.

    Raises:
        ValueError: an unknown scale.
        toolkit.core.data.DataError: CIFAR-10 is nowhere to be found.
    """
    few, validation = size(scale).held
    small = scale == "ci"
    found = data.load("digits" if small else "cifar10")
    x, last = (torch.from_numpy(part) for part in (found.x_train, found.x_test))
    if small:
        draws = generator(0, "tints")
        x, last = (
            F.interpolate(part[:, None], size=(SIDE, SIDE), mode="bilinear")
            * (0.3 + 0.7 * torch.rand(len(part), 3, 1, 1, generator=draws))
            for part in (x, last)
        )
    else:
        x, last = (part.permute(0, 3, 1, 2).float() / 255 for part in (x, last))
    y, y_last = (torch.from_numpy(part).long() for part in (found.y_train, found.y_test))
    ends = (len(y) - few - validation, len(y) - validation)
    own = [(x[a:b], y[a:b]) for a, b in ((0, ends[0]), ends, (ends[1], len(y)))]
    return Parts(own[0], own[1], own[2], (last, y_last))


def shifted(x: Tensor, shift: str, seed: int, stream: str) -> Tensor:
    """Photographs (n, 3, 32, 32) after the shift; the haze of each is drawn.

    Raises:
        ValueError: an unknown shift.
    """
    if shift not in SHIFTS:
        raise ValueError(f"shift: choose one of {', '.join(SHIFTS)}, got {shift!r}")
    if shift == "exchanged":
        return x[:, [2, 0, 1]]
    depth = torch.rand(len(x), 1, 1, 1, generator=generator(seed, "haze", stream))
    return HAZE * depth + LEFT * x


class Reader(nn.Module):
    """Two convolutions, patches of what they see, and a transformer; the last layer is ``head``."""

    def __init__(self, this: Size) -> None:
        super().__init__()
        first, second = this.channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(second, this.width, 3, stride=2, padding=1),
        )  # fmt: skip
        self.position = Position(TOKENS, this.width)
        self.blocks = nn.ModuleList(Block(this.width, 4, 4 * this.width) for _ in range(this.depth))
        self.norm, self.head = nn.LayerNorm(this.width), nn.Linear(this.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 32, 32) in [0, 1] to scores (batch, 10)."""
        x = self.position(self.stem(2 * images - 1).flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def clear(scale: str, count: int, draws: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches of 64 clear photographs, each perhaps mirrored and moved by up to 3
    pixels."""
    x, y = load(scale).base
    pad = F.pad(x, (3,) * 4)
    for _ in range(count):
        rows = torch.randint(len(y), (64,), generator=draws)
        down, right = torch.randint(7, (2,), generator=draws).tolist()
        made = pad[rows, :, down : down + SIDE, right : right + SIDE]
        turn = torch.rand(64, 1, 1, 1, generator=draws) < 0.5
        yield torch.where(turn, made.flip(3), made), y[rows]


@functools.lru_cache(maxsize=2)
def base(scale: str) -> nn.Module:
    """The network that reads clear photographs, trained once in every process, from fixed draws."""
    torch.set_num_threads(1)
    this, draws = size(scale), generator(0, "photographs")
    model, steps = nets.initialise(Reader(this), draws), this.pretraining
    with torch.enable_grad():
        fit(
            model, None, 2e-3, 0, clear(scale, steps, draws), F.cross_entropy, steps=steps,
            decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
        )  # fmt: skip
    return model.eval()


def network(scale: str) -> Any:
    """A fresh copy of the base."""
    return arms.fresh(base(scale))


def few(seed: int, shots: int, shift: str, scale: str) -> tuple[Tensor, Tensor]:
    """So many changed photographs of every class; a seed's few are among its many.

    Raises:
        ValueError: a class has fewer.
    """
    x, y = load(scale).few
    x = shifted(x, shift, seed, "few")
    rows = few_shot(y, shots, generator(seed, "shots"))
    return x[rows], y[rows]


def judges(seed: int, shift: str, scale: str, part: str) -> tuple[Tensor, Tensor]:
    """The changed photographs of a part, and their labels."""
    x, y = getattr(load(scale), part)
    return shifted(x, shift, seed, part), y
