"""Learning rates of the reference arms, found by ``python -m toolkit.labs.beds <bed> --tune``.

Each arm was searched alike: three rates a factor of 2 apart around a start, one more on the side of
the best while that lies at the end (at most four times), three tuning seeds (1000 to 1002), judged
by log-loss on the validation part. The tables stand in ``book/results/beds/<bed>.cpu.tuning.json``.
"""

from __future__ import annotations

RATES: dict[str, dict[str, float]] = {
    "characters": {"head": 8e-2, "lora": 1.6e-2, "full": 4e-3, "full_twice": 4e-3},
    "speech": {"head": 0.128, "lora": 8e-3, "full": 4e-3, "full_twice": 4e-3},
    "images_vit_rotated": {"head": 0.12, "lora": 8e-3, "full": 4e-3, "full_twice": 4e-3},
    "images_vit_inverted": {"head": 0.48, "lora": 0.008, "full": 0.002, "full_twice": 0.002},
    "images_cnn_rotated": {"head": 0.16, "lora": 0.016, "full": 0.032, "full_twice": 0.032},
    "texts": {"head": 0.016, "lora": 0.004, "full": 0.0005, "full_twice": 0.000125},
}
"""Bed -> arm -> rate, for scales ``cpu`` and ``gpu``."""
