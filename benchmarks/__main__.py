"""``python -m benchmarks adapters`` prints one JSON line per comparison with a peer."""

from __future__ import annotations

import argparse
import importlib
import pkgutil

import benchmarks


def suites() -> list[str]:
    """Modules of this package that have a ``main``; found, not listed."""
    found = []
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name not in ("__main__", "timing"):
            found.append(module.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[*suites(), []], help="all when none is named")
    parser.add_argument("--rounds", type=int, default=15, help="alternations per comparison")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    for name in args.suite or suites():
        importlib.import_module(f"benchmarks.{name}").main(args.rounds, args.threads)


if __name__ == "__main__":
    main()
