"""Handwritten digits to be edited towards another digit: images, masks, and how paths are judged.

Confidence is that of the images bed's CNN, a network of its own that had no part in the training
of the denoiser. It learned from the same 55,000 images; what is edited are others. Whose
handwriting an image is, is judged by features of the bed's ViT.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.seeds import generator
from toolkit.labs.beds import denoiser, images

PAIRS = ((4, 9), (3, 8), (1, 7), (5, 6))
"""From which digit to which."""
SHARE = 0.25
"""Of the pixels that a mask takes."""
GALLERY = 200
"""Originals of a digit among which an image must find its own."""


class Task(NamedTuple):
    """What a seed edits: ``x`` (n, 1, side, side) from -1 to 1, its ``source`` and ``target``
    labels (n,), and ``mask`` (n, 1, side, side), 1 where the two digits differ most."""

    x: Tensor
    source: Tensor
    target: Tensor
    mask: Tensor


@functools.lru_cache(maxsize=16)
def roi(a: int, b: int, scale: str) -> Tensor:
    """The mask (1, side, side) of a pair: the quarter of the pixels in which the mean images of the
    two digits differ most, blurred over 3 x 3 pixels. Only training images are looked at."""
    x, y = denoiser.load(scale).pool
    gap = (x[y == b].mean(0) - x[y == a].mean(0)).abs()
    gap = F.avg_pool2d(gap[None], 3, 1, 1, count_include_pad=False)[0]
    count = round(SHARE * gap.numel())
    chosen = gap.flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(gap.numel()).index_fill(0, chosen, 1.0).view(gap.shape)


@functools.lru_cache(maxsize=4)
def _all(scale: str, tuning: bool) -> tuple[Tensor, Tensor]:
    """Images that are edited: test images; for trials the last 5,000 of the training set, which
    neither the denoiser nor the judges learned from. At ``ci`` there are test images only."""
    if not tuning or scale == "ci":
        return denoiser.load(scale).test
    x, y = images.load(scale).validation
    return x[:, None] * 2 - 1, y


def task(seed: int, each: int, scale: str) -> Task:
    """``each`` images of every pair. Seeds 0 to 7 and 400 to 407 share no image where there are
    enough; seeds from 900 on get images that no report uses."""
    x, y = _all(scale, seed >= 900)
    slot = seed % 100 + (50 if seed >= 400 else 0) if seed < 900 else seed - 900
    rows, source, target, masks = [], [], [], []
    for a, b in PAIRS:
        known = (y == a).nonzero()[:, 0]
        known = known[torch.randperm(len(known), generator=generator(0, "order", a))]
        block = slot if slot < 50 else slot - 50 + 8  # two blocks of eight lie side by side
        at = (block * each + torch.arange(each)) % len(known)
        rows.append(known[at])
        source.append(torch.full((each,), a))
        target.append(torch.full((each,), b))
        masks.append(roi(a, b, scale).expand(each, -1, -1, -1))
    chosen = torch.cat(rows)
    return Task(x[chosen], torch.cat(source), torch.cat(target), torch.cat(masks))


def noise(like: Tensor, rounds: int, seed: int, name: str) -> Tensor:
    """Normal numbers (rounds, n, 1, side, side) for the images of a seed; the same for all arms."""
    draws = generator(seed, "severity", name)
    return torch.randn(rounds, *like.shape, generator=draws)


def log_odds(x: Tensor, target: Tensor, scale: str) -> Tensor:
    """Log-odds (n,) that the CNN gives the target, in nats."""
    scores = denoiser.features(x, scale)[1].double().log_softmax(1)
    told = scores.gather(1, target[:, None])[:, 0]
    other = scores.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    return told - other


@functools.lru_cache(maxsize=16)
def mean(digit: int, scale: str) -> Tensor:
    """The mean training image (1, side, side) of a digit."""
    x, y = denoiser.load(scale).pool
    return x[y == digit].mean(0)


@functools.lru_cache(maxsize=2)
def real(count: int, seed: int, scale: str) -> dict[int, Tensor]:
    """Target -> the CNN's features of real test images of it; ``count`` images in all."""
    x, y = denoiser.load(scale).test
    draws, found = generator(seed, "severity", "real"), {}
    for _, b in PAIRS:
        known = (y == b).nonzero()[:, 0]
        order = torch.randperm(len(known), generator=draws)[: count // len(PAIRS)]
        found[b] = denoiser.features(x[known[order]], scale)[0]
    return found


@functools.lru_cache(maxsize=2)
def gallery(seed: int, scale: str) -> dict[int, Tensor]:
    """Digit -> the ViT's features of training images of it, among which an original is sought."""
    x, y = denoiser.load(scale).pool
    draws, found = generator(seed, "severity", "gallery"), {}
    for a, _ in PAIRS:
        known = (y == a).nonzero()[:, 0]
        order = torch.randperm(len(known), generator=draws)[: GALLERY - 1]
        found[a] = traits(x[known[order]], scale)
    return found


def recognised(one: Tensor, own: Tensor, source: Tensor, known: dict[int, Tensor]) -> float:
    """Share of images, in percent, that are nearer to their own original than to any of a gallery
    of its digit, by cosine.

    Args:
        one, own: the ViT's features (n, width) of the images and of their originals.
        source: digits (n,) of the originals.
        known: as :func:`gallery` gives it.
    """
    one, own = F.normalize(one, dim=1), F.normalize(own, dim=1)
    found = []
    for digit, others in known.items():
        rows = source == digit
        nearest = (one[rows] @ F.normalize(others, dim=1).T).amax(1)
        found.append((one[rows] * own[rows]).sum(1) > nearest)
    return 100 * float(torch.cat(found).double().mean())


def traits(x: Tensor, scale: str) -> Tensor:
    """Features (n, width) of the ViT after its last norm, the mean over patches."""
    grey = ((x.float() + 1) / 2).clamp(0, 1)
    if grey.shape[-1] != 28:
        grey = F.interpolate(grey, size=(28, 28), mode="bilinear")
    seen: list[Tensor] = []
    reader = images.network("vit", scale)
    hook = reader.norm.register_forward_hook(lambda m, i, out: seen.append(out))
    try:
        with torch.no_grad():
            for part in grey.split(250):
                reader(part[:, 0])
    finally:
        hook.remove()
    found = torch.cat(seen)
    return found.mean(1) if found.dim() == 3 else found


def rms(gap: Tensor, where: Tensor | None = None) -> Tensor:
    """Root mean square (n,) of images (n, ...), over the pixels where a mask is 1."""
    square = gap.double().square()
    if where is None:
        return square.flatten(1).mean(1).sqrt()
    where = where.double().expand_as(square)
    return ((square * where).flatten(1).sum(1) / where.flatten(1).sum(1)).sqrt()
