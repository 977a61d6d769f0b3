"""A small made-up results file, with a search, crashed runs and two blocks of seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.book import ledger_toy
from toolkit.core.runs import results

ARMS = ("full", "lora_pro")
SEEDS = ((0, 1), (400, 401))
RATES = (0.1, 0.2, 0.4)
SOURCE = {
    "commit": "c0ffee1234567890", "dirty": False, "versions": {"python": "3.99", "torch": "9.8"},
    "constraints": "feedbeef12345678", "device": "cpu", "processor": "A fine processor",
    "threads": 1,
}  # fmt: skip


def job(record: dict[str, Any] | None, error: str | None = None, **arguments: Any) -> dict:
    """A run as results hold it."""
    made = {"args": arguments, "record": record, "error": error, "code": "k", "from": 0}
    return made | {"check": results.check(made)}


def _search(arm: str) -> dict[str, Any]:
    return {"rate": 0.2, "scores": {"0.1": 1.5, "0.2": 1.25, "0.4": None}, "seeds": [900, 901],
            "judged": "validation_loss", "better": "min", "nothing": 2.5,
            "edge": arm == "full"}  # fmt: skip


def document(slug: str = "lora") -> dict[str, Any]:
    """The results of one lab.

    Each search tried three rates on two seeds, the last of which diverged. In the experiment one
    run of four crashed for the second arm, and its curve is a list.
    """
    tried: list[dict] = []
    told: list[dict] = []
    for place, arm in enumerate(ARMS):
        for rate, score in zip(RATES, (1.5, 1.25, None), strict=True):
            for seed in (900, 901):
                found = {"validation_loss": score and score + (seed - 900.5) / 100}
                lost = None if score else "FloatingPointError: the loss is nan"
                tried.append(job(None if lost else found, lost, arm=arm, rate=rate, seed=seed))
        for seed in (seed for block in SEEDS for seed in block):
            found = {"test": 10.0 * (place + 1) + seed % 100, "trained": 1234, "curve": [1.0, 2.0]}
            lost = "FloatingPointError: overflow" if place and seed == 401 else None
            told.append(job(None if lost else found, lost, arm=arm, seed=seed, steps=300))
    claims = ledger_toy.record(slug, 0)
    for claim in claims["claims"]:
        claim["late"] = False
    ids = [claim["id"] for claim in claims["claims"]]
    return claims | {
        "provenance": [SOURCE],
        "codes": {"k": {}},
        "experiments": {
            "digits, tuning": {"functions": {"*": "m.f"}, "jobs": tried},
            "digits": {"functions": {"*": "m.f"}, "jobs": told},
        },
        "tuning": {"digits": {arm: _search(arm) for arm in ARMS}},
        "seeds": {"digits": [list(block) for block in SEEDS]},
        "declaration": {
            "hash": "abad1dea99", "commit": "decade7777", "dropped": ["gave-up"], "note": "",
            "claims": {name: {"hash": f"ha{name}", "commit": "5eed", "late": False}
                       for name in ids},
        },
    }  # fmt: skip


def times(found: dict[str, Any]) -> dict[str, Any]:
    """Dates, and two seconds for each run."""
    every: Sequence[dict] = [j for e in found["experiments"].values() for j in e["jobs"]]
    return {"recorded": "2031-05-06", "verified": "2031-07-08", "seconds": 95.0,
            "jobs": {j["check"]: 2.0 for j in every}}  # fmt: skip


def write(root: Path, slug: str = "lora") -> Path:
    """Write results and times below a project's folder; returns the results' path."""
    folder = root / "book" / "results"
    (folder / "times").mkdir(parents=True, exist_ok=True)
    found = document(slug)
    results.write_times(folder, slug, "cpu", times(found))
    path = folder / f"{slug}.cpu.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path
