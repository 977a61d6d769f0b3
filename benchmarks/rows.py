"""Rows of a benchmark: printed and kept as they come; one that fails leaves the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Kept(dict):
    """Values by name. Asking for one that failed raises RuntimeError with its name and cause."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, Exception] = {}

    def fail(self, name: str, error: Exception) -> None:
        """Note that there is no value of this name, and why."""
        self.pop(name, None)
        self.failed[name] = error

    def __missing__(self, name: str) -> Any:
        if name not in self.failed:
            raise KeyError(name)
        error = self.failed[name]
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error


def each(makers: Mapping[str, Callable[[], Any]]) -> Kept:
    """What every maker returns; one that raises leaves the others."""
    kept = Kept()
    for name, make in makers.items():
        try:
            kept[name] = make()
        except Exception as error:
            kept.fail(name, error)
    return kept


class Log:
    """Where rows go, and what failed.

    Attributes:
        path: a file to which every row is added as a line of JSON, or None.
        failures: a line for each row that failed, with its cause.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.failures: list[str] = []

    def start(self, path: Path | None) -> None:
        """Forget earlier failures, and begin the file anew."""
        self.path, self.failures = path, []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def emit(self, row: dict) -> None:
        """Print a row and keep it, before anything later can fail."""
        line = json.dumps(row)
        print(line, flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(line + "\n")

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Go on after an exception, which is noted as the failure of this row."""
        try:
            yield
        except BrokenPipeError:  # nobody reads the rows any more
            raise
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")

    def finish(self) -> int:
        """Name the failures on standard error; the exit status, 1 if there are any."""
        for line in self.failures:
            print(f"failed: {line}", file=sys.stderr, flush=True)
        return int(bool(self.failures))


log = Log()
