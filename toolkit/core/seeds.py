"""Seeds and independent random streams."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # evidence needs `seeds` alone, and PyTorch takes two seconds to import
    import torch


def seeds(n: int, base: int = 0) -> list[int]:
    """Return the seeds ``base, base + 1, ..., base + n - 1``.

    Consecutive seeds are safe because :func:`generator` hashes them before use.

    Args:
        n: How many repeats, at least 1.
        base: The first seed, not negative.

    Raises:
        ValueError: If ``n`` is below 1 or ``base`` is negative.
    """
    if n < 1:
        raise ValueError(f"n = {n}: at least one seed is needed.")
    if base < 0:
        raise ValueError(f"base = {base}: seeds are not negative.")
    return list(range(base, base + n))


def generator(seed: int, *stream: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator for one purpose of one repeat.

    Two calls with the same arguments give the same draws; any other argument gives an independent
    stream. So ``generator(seed, "data")`` and ``generator(seed, "init")`` can change separately.

    Args:
        seed: The repeat's seed, not negative.
        stream: Names or numbers that say what the draws are for.
        device: Where the generator draws.

    Raises:
        ValueError: If ``seed`` is negative.
        TypeError: If a part of ``stream`` is neither a string nor an integer.
    """
    import torch

    if seed < 0:
        raise ValueError(f"seed = {seed}: seeds are not negative.")
    for part in stream:
        if not isinstance(part, (str, int)):
            raise TypeError(f"stream part {part!r} must be a string or an integer.")
    text = repr((int(seed), *stream)).encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    return torch.Generator(device=device).manual_seed(word)
