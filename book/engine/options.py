"""Options that several commands of the engine's command line share."""

from __future__ import annotations

import argparse

import joblib

from book.engine.project import EngineError, check_scale


def chapter_options(new: argparse.ArgumentParser, *, force: bool = True) -> None:
    new.add_argument("names", nargs="*", metavar="NAME", help="chapters (slugs); default all")
    new.add_argument("--scale", type=_scale, metavar="SCALE", help="ci, cpu or gpu")
    if force:
        new.add_argument("--force", action="store_true", help="run fresh chapters too")
        new.add_argument(
            "--tell",
            action="store_true",
            help="measure nothing: tell the named labs' pages, also where their numbers are stale",
        )


def run_options(new: argparse.ArgumentParser) -> None:
    cores = joblib.cpu_count()
    new.add_argument(
        "--jobs",
        type=_positive,
        default=max(1, cores // 2),
        help="chapters at once; the cores are shared out as threads",
    )
    new.add_argument(
        "--memory",
        type=_amount,
        metavar="GIB",
        help="memory for all chapters at once; default 90%% of what is free",
    )
    new.add_argument(
        "--gpu-memory",
        type=_amount,
        metavar="GIB",
        help="GPU memory for all at once; default 90%% of what is free",
    )
    limit_options(new)


def limit_options(new: argparse.ArgumentParser) -> None:
    new.add_argument(
        "--cell-timeout", type=_positive, metavar="S", help="default 300 at ci, 1800 at cpu and gpu"
    )
    new.add_argument(
        "--timeout",
        type=_positive,
        metavar="S",
        help="for one chapter; default 900 at ci, 7200 at cpu and gpu",
    )
    new.add_argument(
        "--grace",
        type=_amount,
        default=20.0,
        metavar="S",
        help="time beyond the cell timeout before a cell is ended by force",
    )


def _scale(word: str) -> str:
    try:
        return check_scale(word)
    except EngineError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def _amount(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is not a number above 0")
    return value
