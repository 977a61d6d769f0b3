"""Pictures that the shared denoisers make: what ``python -m toolkit sample`` writes."""

from __future__ import annotations

import io as streams
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.core import io
from toolkit.core.sample.draws import Draws, check_memory
from toolkit.core.sample.loop import Sampled, generate
from toolkit.core.sample.plans import DPMpp2M, Plan
from toolkit.core.sample.schedule import EDM, Network, Schedule
from toolkit.generate.dc_solver import DCSolver, reference_states

BASES = {"mnist": "cpu", "digits": "ci"}
"""Base -> scale of the bed of denoisers. Digits are those of scikit-learn, 8 x 8 pixels."""
SEARCHED, REFERENCE = 10, 60
"""Noises of a search for ratios, and the steps that its reference takes at least."""


def pictures(
    base: str,
    plan: Plan,
    steps: int,
    *,
    labels: Sequence[int] = tuple(range(10)),
    rows: int = 4,
    guidance: float = 1.0,
    seed: int = 0,
    low: float = 0.002,
    high: float = 80.0,
    say: Callable[[str], object] = lambda words: None,
) -> Sampled:
    """Samples of a base, row after row, one per label in each; every sample has its own seed.

    Args:
        base: one of :data:`BASES`.
        plan: the solver.
        steps: down the levels of EDM and to no noise.
        labels: 0 to 9, or 10 for a class that is not told.
        rows: how many of each label.
        guidance: weight; 1 is none.
        seed: of the first sample; the others follow.
        low, high: the ends of the noise.
        say: is told what is searched first, for a solver that must be fitted to the base.

    Raises:
        ValueError: an unknown base, numbers outside, or more pictures than memory holds.
        toolkit.core.data.DataError: the base is missing or damaged.
    """
    from toolkit.labs.beds import denoiser

    if base not in BASES:
        raise ValueError(f"base: choose one of {', '.join(BASES)}, got {base!r}")
    if rows < 1:
        raise ValueError(f"rows: at least 1, got {rows}")
    if not labels or not all(0 <= label <= denoiser.UNTOLD for label in labels):
        raise ValueError(f"labels: digits 0 to 9, or {denoiser.UNTOLD} for any, got {list(labels)}")
    scale = BASES[base]
    side, schedule = denoiser.size(scale).side, Schedule.edm(steps, low, high)
    bare = plan if isinstance(plan, DCSolver) and not plan.ratios else None
    (bare.given([1.0]) if bare else plan).steps(schedule)  # before a network is read
    count = rows * len(labels)
    check_memory((count, 1, side, side), 4)
    network, told = denoiser.network(scale), torch.tensor(list(labels))
    asked: dict[str, Any] = {"guidance": guidance, "untold": denoiser.UNTOLD}
    if bare:
        plan = fitted(bare, network, schedule, (1, side, side), told, say, **asked)
    return generate(
        network, schedule, plan, (1, side, side), range(seed, seed + count),
        labels=told.repeat(rows), **asked,
    )  # fmt: skip


def fitted(
    plan: DCSolver, network: Network, schedule: Schedule, shape: tuple[int, ...], labels: Tensor,
    say: Callable[[str], object], **asked: Any,
) -> DCSolver:  # fmt: skip
    """A solver with ratios searched on ten noises of their own, which no picture starts from.

    Args:
        plan: without ratios.
        network: the denoiser; it is not trained.
        schedule: levels of the EDM view.
        shape: of one sample.
        labels: (n,) classes to sample, which the noises take in turn.
        say: is told that it takes a while, and the ratios.
        asked: guidance and untold.

    Raises:
        FloatingPointError: the search diverged.
    """
    say(f"ratios for {schedule.steps} steps: searched on {SEARCHED} noises of their own")
    told = labels.repeat(-(-SEARCHED // len(labels)))[:SEARCHED]
    start = Draws(range(SEARCHED), "search").normal(shape) * schedule.levels[0].std
    parts = max(4, -(-REFERENCE // schedule.steps))
    goal = reference_states(
        network, schedule, start, EDM(), parts, DPMpp2M(), labels=told, **asked
    )  # fmt: skip
    found = plan.search(network, schedule, start, goal, labels=told, **asked)
    plan = plan.given([round(ratio, 3) for ratio in found.ratios.tolist()])
    say(f"found; to use them again: --set ratios={plan.ratios}")
    return plan


def grid(images: Tensor, columns: int, gap: int = 1, enlarge: int = 1) -> Tensor:
    """Images (n, 1, side, side) from -1 to 1 in rows, as one picture (height, width) of bytes.

    Args:
        images: all but the last row are full.
        columns: images in a row.
        gap: pixels of middle grey between images.
        enlarge: sides of a square that stands for one pixel.

    Raises:
        ValueError: no column, or images of another shape.
    """
    if columns < 1 or images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(f"images: (n, 1, height, width), got {tuple(images.shape)}")
    count, _, high, wide = images.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * (high + gap) - gap, columns * (wide + gap) - gap), 0.5)
    for number, image in enumerate(((images[:, 0].float() + 1) / 2).clamp(0, 1)):
        top, left = (number // columns) * (high + gap), (number % columns) * (wide + gap)
        canvas[top : top + high, left : left + wide] = image
    picture = (canvas * 255).round().to(torch.uint8)
    return picture.repeat_interleave(enlarge, 0).repeat_interleave(enlarge, 1)


def write_png(picture: Tensor, path: str | Path) -> Path:
    """Write grey bytes (height, width) as a PNG file, whole or not at all.

    Raises:
        ValueError: the name does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"out: a name that ends in .png, got {str(path)!r}")
    from matplotlib import image

    stream = streams.BytesIO()
    options: Any = {"cmap": "gray", "vmin": 0, "vmax": 255, "format": "png", "metadata": {}}
    image.imsave(stream, picture.numpy(), **options)
    return io.write_bytes(path, stream.getvalue())
