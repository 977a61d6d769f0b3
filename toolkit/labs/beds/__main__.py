"""Measure the reference arms of a bed: ``python -m toolkit.labs.beds characters --scale cpu``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from toolkit.core import io
from toolkit.core.program import run_program
from toolkit.labs.beds import reference


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: the tables, or with ``--tune`` the rates; both are stored as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m toolkit.labs.beds")
    parser.add_argument("bed", choices=list(reference.BEDS))
    parser.add_argument("--scale", default="cpu", choices=("ci", "cpu", "gpu"))
    parser.add_argument("--seeds", type=int, default=8, help="how many; 8 unless said")
    parser.add_argument("--tune", action="store_true", help="search the learning rates instead")
    parser.add_argument("--jobs", type=int, help="runs at once; one per core unless said")
    parser.add_argument("--to", type=Path, default=Path("book/results"), help="folder of results")
    chosen = parser.parse_args(arguments)
    if chosen.seeds < 2:
        parser.error(f"--seeds: a spread needs at least 2, got {chosen.seeds}")
    torch.set_num_threads(1)
    if chosen.tune:
        tuned = reference.tune(chosen.bed, chosen.scale)
        path = chosen.to / "beds" / f"{chosen.bed}.{chosen.scale}.tuning.json"
        io.write_text(path, json.dumps(tuned, indent=1) + "\n")
        for arm, found in tuned.items():
            tried = ", ".join(f"{r}: {v:.4f}" for r, v in found["scores"].items())
            print(f"{arm}: {found['rate']:g}{' (edge)' if found['edge'] else ''}   {tried}")
        return
    found, seconds = reference.measure(
        chosen.bed, chosen.scale, range(chosen.seeds), chosen.to, chosen.jobs
    )
    print(reference.table(found, seconds).to_string(index=False))
    print()
    print(reference.differences(found).to_string(index=False))


if __name__ == "__main__":
    sys.exit(run_program(main))
