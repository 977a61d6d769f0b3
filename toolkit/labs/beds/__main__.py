"""Measure the reference arms of a bed: ``python -m toolkit.labs.beds characters --scale cpu``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.labs.beds import reference


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: the tables, or with ``--tune`` the rates; both are stored as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m toolkit.labs.beds")
    parser.add_argument("bed", choices=list(reference.BEDS))
    parser.add_argument("--scale", default="cpu", choices=("ci", "cpu", "gpu"))
    parser.add_argument("--seeds", type=int, default=8, help="how many; 8 unless said")
    parser.add_argument("--tune", action="store_true", help="search the learning rates instead")
    parser.add_argument("--again", action="store_true", help="run what is in the results file too")
    parser.add_argument("--to", type=Path, default=Path("book/results/beds"), help="folder")
    chosen = parser.parse_args(arguments)
    if chosen.seeds < 2:
        parser.error(f"--seeds: a spread needs at least 2, got {chosen.seeds}")
    torch.set_num_threads(1)
    stem = f"{chosen.bed}.{chosen.scale}"
    if chosen.tune:
        tuned = reference.tune(chosen.bed, chosen.scale)
        reference.write(chosen.to / f"{stem}.tuning.json", tuned)
        for arm, found in tuned.items():
            tried = ", ".join(f"{r}: {v:.4f}" for r, v in found["scores"].items())
            print(f"{arm}: {found['rate']:g}{' (edge)' if found['edge'] else ''}   {tried}")
        return

    def save(found: dict[str, Any], seconds: dict[str, float]) -> None:
        reference.write(chosen.to / f"{stem}.json", found)
        reference.write(chosen.to / "times" / f"{stem}.json", seconds)

    # a job with the same arguments is kept: after a change of the code say --again
    kept, path = [], chosen.to / f"{stem}.json"
    if path.is_file() and not chosen.again:
        (experiment,) = json.loads(path.read_text(encoding="utf-8"))["experiments"].values()
        kept = experiment["jobs"]
    seeds = range(chosen.seeds)
    found, seconds = reference.measure(chosen.bed, chosen.scale, seeds, save, kept)
    print(reference.table(found, seconds).to_string(index=False))
    print()
    print(reference.differences(found).to_string(index=False))


if __name__ == "__main__":
    main()
