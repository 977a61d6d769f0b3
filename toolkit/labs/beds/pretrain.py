"""Make the pretrained bases: ``python -m toolkit.labs.beds.pretrain characters``.

Deterministic on one machine: one thread, all draws from one generator. Other processors round
differently, so a base made elsewhere has another checksum and nearly the same result.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.core.program import run_program
from toolkit.labs.beds import bases

MAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "characters": ("characters", {}),
    "images_vit": ("images", {"net": "vit"}),
    "images_cnn": ("images", {"net": "cnn"}),
    "images_vit_known": ("new_classes", {}),
    "images_vit_masked": ("masked", {}),
    "speech_0": ("speech", {"split": 0}),
    "speech_1": ("speech", {"split": 1}),
    "speech_2": ("speech", {"split": 2}),
    "denoiser": ("denoiser", {}),
    "denoiser_digits": ("denoiser", {"scale": "ci"}),
    "denoiser_half": ("denoiser_half", {}),
}
"""Base -> the module with its ``pretrain`` and the arguments that say which."""
SOURCES = {
    "characters": ("tiny Shakespeare, first 90 %", "public domain"),
    "images": (
        "MNIST, the first 55,000 training images as `data.load` orders them",
        "CC BY-SA 3.0",
    ),
    "new_classes": ("MNIST, the digits 0 to 4 of the first 55,000 training images", "CC BY-SA 3.0"),
    "masked": (
        "MNIST, the first 55,000 training images as `data.load` orders them, without labels",
        "CC BY-SA 3.0",
    ),
    "denoiser": (
        "MNIST, the first 55,000 training images as `data.load` orders them",
        "CC BY-SA 3.0",
    ),
    "denoiser_digits": (
        "Optical Recognition of Handwritten Digits as scikit-learn has them, the first 1,437",
        "CC BY 4.0",
    ),
    "denoiser_half": (
        "MNIST, the first 55,000 training images as `data.load` orders them, at half the size",
        "CC BY-SA 3.0",
    ),
    "speech": ("Free Spoken Digit Dataset, four of six speakers", "CC BY-SA 4.0"),
}


def make(name: str, where: Path | None = None) -> str:
    """Pretrain and store one base; a sentence about it.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MAKERS:
        raise ValueError(f"name: choose one of {', '.join(MAKERS)}, got {name!r}")
    torch.set_num_threads(1)
    module, options = MAKERS[name]
    begun = time.perf_counter()
    model, facts = importlib.import_module(f"toolkit.labs.beds.{module}").pretrain(**options)
    minutes = (time.perf_counter() - begun) / 60
    source, licence = SOURCES[name if name in SOURCES else module]
    path = bases.store(
        name,
        model,
        {
            "learned_from": source,
            "licence": licence,
            "command": f"python -m toolkit.labs.beds.pretrain {name}",
            "numbers": sum(p.numel() for p in model.parameters()),
            **facts,
        },
        where,
    )
    return (
        f"{name}: {facts['quantity']} {facts['reached']:.4f}, {path.stat().st_size:,} bytes, "
        f"{minutes:.1f} min"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: names of bases, or none for all."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m toolkit.labs.beds.pretrain"
    )
    parser.add_argument("name", nargs="*", help=f"of {', '.join(MAKERS)}; none makes all")
    for name in parser.parse_args(arguments).name or MAKERS:
        print(make(name), flush=True)


if __name__ == "__main__":
    sys.exit(run_program(main))
