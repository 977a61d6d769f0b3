"""``python -m benchmarks adapters`` prints one JSON line per comparison with a peer.

The lines are also kept in a file as they come. A comparison that fails leaves the others; the
failures are named at the end on standard error, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import benchmarks
from benchmarks.rows import log
from toolkit.core.program import run_program


def suites() -> list[str]:
    """Modules of this package that have a ``main``; found, not listed."""
    found = []
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name not in ("__main__", "populations", "rows", "timing"):
            found.append(module.name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites that are named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[*suites(), []], help="all when none is named")
    parser.add_argument("--rounds", type=int, default=15, help="alternations per comparison")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--rows", type=Path, default=Path("_build/benchmarks.jsonl"), help="file of the rows"
    )
    args = parser.parse_args(arguments)
    log.start(args.rows)
    for name in args.suite or suites():
        with log.attempt(name):
            importlib.import_module(f"benchmarks.{name}").main(args.rounds, args.threads)
    return log.finish()


if __name__ == "__main__":
    raise SystemExit(run_program(main))
