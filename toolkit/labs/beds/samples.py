"""How good samples of the denoisers are: ``python -m toolkit.labs.beds.samples --scale cpu``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from toolkit.core.program import run_program
from toolkit.core.sample.loop import generate
from toolkit.core.sample.plans import Heun, Plan, UniPC
from toolkit.core.sample.schedule import Schedule
from toolkit.labs.beds import denoiser

SOLVERS: dict[str, tuple[Plan, int]] = {"Heun": (Heun(), 18), "UniPC": (UniPC(), 10)}
"""Solver -> plan and steps, each on EDM's levels from 80 to 0.002."""


def table(scale: str = "cpu", count: int | None = None) -> Any:
    """One row per solver: calls, Fréchet distance to test images, share read as its class.

    The first row has as many training images instead of samples. Classes follow one another, and
    seeds of the noise are 0 to ``count - 1``.

    Args:
        scale: "ci" or "cpu".
        count: samples; left out, as many as the scale judges errors of denoising on.

    Raises:
        ValueError: an unknown scale, or more samples than test images.
    """
    import pandas as pd

    size = denoiser.size(scale)
    count = size.judged if count is None else count
    parts = denoiser.load(scale)
    x, y = (part[:count] for part in parts.pool)
    rows: list[dict[str, Any]] = [{"images": "of training", "calls": 0}]
    rows[0] |= denoiser.quality(x, y, scale)
    labels = torch.arange(count) % denoiser.CLASSES
    network = denoiser.network(scale)
    for name, (plan, steps) in SOLVERS.items():
        made = generate(
            network, Schedule.edm(steps), plan, (1, size.side, size.side), range(count),
            labels=labels, batch=250,
        )  # fmt: skip
        rows.append(
            {"images": name, "calls": made.calls, **denoiser.quality(made.x, labels, scale)}
        )
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m toolkit.labs.beds.samples"
    )
    parser.add_argument("--scale", default="cpu", choices=("ci", "cpu"))
    parser.add_argument("--count", type=int, help="samples; as many as the scale judges on")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(table(chosen.scale, chosen.count).round(2).to_string(index=False))


if __name__ == "__main__":
    sys.exit(run_program(main))
