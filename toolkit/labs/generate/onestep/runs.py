"""Training one arm for one step, and judging its images."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.put import adapt
from toolkit.core.sample.metrics import frechet
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.generate.hipa import HiPA, one_step, plugged, terms
from toolkit.labs.beds import denoiser
from toolkit.labs.generate.onestep.world import bed, pairs, reader, size, top

TARGETS = ["*first", "*second", "*attention*"]
"""The 3 x 3 convolutions of all blocks, and the attention."""
CUTOFF = 0.25


class OneStep(nn.Module):
    """A denoiser as a function of noise and labels alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """States at the highest level (n, 1, h, w) and labels (n,) to images."""
        start, labels = batch
        return one_step(self.network, start, top(), labels)


def trained(
    world: str, rank: int, loss: str, weight: float, rate: float, seed: int, scale: str
) -> tuple[OneStep, Any]:
    """A denoiser that was trained for one step, and its handle (None for full training).

    Each seed draws its own pairs from the pool, their order and the start. Adam; the rate falls
    along half a cosine.

    Args:
        world: "digits" or "handwriting".
        rank: of the adaptors; 0 trains every weight of the network instead.
        loss: terms, as :class:`~toolkit.generate.hipa.HiPA` takes them.
        weight: of the terms of high frequencies.
        rate: learning rate at its highest.
        seed: of the run.
        scale: of the sizes.
    """
    this, every = size(world, scale), pairs(world, scale, "train")
    method = HiPA(rank=rank or 1, alpha=float(rank or 1), terms=loss, high_weight=weight,
                  cutoff=CUTOFF)  # fmt: skip
    layers = reader(world, scale, "loss").layers if "spatial" in method.chosen else None
    model = OneStep(denoiser.network(bed(world, scale)))
    chosen = torch.randperm(this.pool, generator=generator(seed, "onestep pairs"))[: this.pairs]

    def batches() -> Iterator[Any]:
        order, left = generator(seed, "onestep order"), chosen[:0]
        for _ in range(this.steps):
            if len(left) < this.batch:
                left = torch.cat([left, chosen[torch.randperm(len(chosen), generator=order)]])
            rows, left = left[: this.batch], left[this.batch :]
            part = every.rows(rows)
            yield (part.start, part.labels), part.wanted

    adapted, losses = fit(
        model, method if rank else None, rate, seed, batches(),
        lambda made, wanted: method.loss(made, wanted, layers),
        steps=this.steps, decay=rates.cosine, targets=TARGETS if rank else None,
    )  # fmt: skip
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"the loss is not finite at rate {rate:g}")
    return model, adapted


def dressed(world: str, scale: str, rank: int) -> tuple[OneStep, Any]:
    """A denoiser with adaptors that have not learned yet, and its handle."""
    model = frozen(world, scale)
    return model, adapt(model, HiPA(rank=rank), TARGETS, generator=generator(0, "init"))


def counted(adapted: Any) -> int:
    """Trained numbers by the formula r (m + n)."""
    return sum(placed.method.count(placed.site) for placed in adapted.sites.values())


@torch.no_grad()
def made(model: OneStep, world: str, scale: str, part: str, count: int | None = None) -> Tensor:
    """Images of one step from the noise of a part."""
    noise = pairs(world, scale, part)
    start, labels = noise.start[:count], noise.labels[:count]
    return torch.cat(
        [model((s, y)) for s, y in zip(start.split(250), labels.split(250), strict=True)]
    )


def judged(images: Tensor, world: str, scale: str, part: str) -> dict[str, float]:
    """How good images from the noise of a part are.

    Returns:
        ``frechet``: distance to the teacher's images of other noise, in the features of the judge;
        ``pixels``: the same of the pixels themselves. ``energy``: above a quarter of a cycle per
        pixel, as a share of the teacher's of the same noise, in percent. ``psnr`` to the teacher's
        image, dB, the mean over images. ``read``: share read as its label, in percent.
    """
    wanted = pairs(world, scale, part)
    other = pairs(world, scale, "other").wanted[: len(images)]
    seen, scores = _seen(images, world, scale)
    error = terms.mse(images, wanted.wanted).clamp(min=1e-6)
    energy = [float(terms.high_energy(x, CUTOFF).mean()) for x in (images, wanted.wanted)]
    return {
        "frechet": frechet(seen, _seen_other(world, scale, len(images))),
        "pixels": frechet(images, other),
        "energy": 100 * energy[0] / energy[1],
        "psnr": float((10 * (4 / error).log10()).mean()),
        "read": 100 * float((scores.argmax(1) == wanted.labels).double().mean()),
    }


def _seen(images: Tensor, world: str, scale: str) -> tuple[Tensor, Tensor]:
    """Features and scores of the judge."""
    if bed(world, scale) == "cpu":
        return denoiser.features(images, "cpu")
    judge = reader(world, scale, "judge")
    with torch.no_grad():
        seen = judge.seen(images)
        return seen, judge.network.head(seen)


@functools.lru_cache(maxsize=4)
def _seen_other(world: str, scale: str, count: int) -> Tensor:
    return _seen(pairs(world, scale, "other").wanted[:count], world, scale)[0]


def frozen(world: str, scale: str) -> OneStep:
    """The frozen denoiser in one step."""
    return OneStep(denoiser.network(bed(world, scale)))


def film(
    model: OneStep, adapted: Any, world: str, scale: str, strengths: tuple[float, ...], count: int
) -> list[Tensor]:
    """The first test images at several strengths of the adaptors."""
    shown = []
    for strength in strengths:
        with plugged(adapted, strength):
            shown.append(made(model, world, scale, "test", count))
    return shown
