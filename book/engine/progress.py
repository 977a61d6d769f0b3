"""What a run tells: one bar while it goes, all failures at its end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from tqdm import tqdm

from book.engine.plan import Failure, Task


class Progress:
    """One bar for the whole run: the chapters running, their cells, time gone and to come.

    Args:
        tasks: what will run.
        say: prints a line above the bar.
    """

    def __init__(self, tasks: list[Task], say: Callable[[str], None]) -> None:
        self.say = say
        self._cells = {t.chapter.name: len(t.source.code) for t in tasks}
        self._at: dict[str, int] = {}
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=sum(self._cells.values()),
            unit="cell",
            disable=None,  # no bar where nobody watches: in a file or a log
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} cells [{elapsed}<{remaining}]",
        )

    def cell(self, name: str, number: int) -> None:
        """Cell ``number`` of a chapter starts: those before it are done."""
        with self._lock:
            self._bar.update(number - 1 - self._at.get(name, 0))
            self._at[name] = number - 1
            self._describe()

    def done(self, name: str) -> None:
        with self._lock:
            self._bar.update(self._cells[name] - self._at.pop(name, 0))
            self._describe()

    def line(self, text: str) -> None:
        with self._lock:
            self._bar.clear()
            self.say(text)

    def close(self) -> None:
        self._bar.close()

    def _describe(self) -> None:
        running = [f"{n} {k + 1}/{self._cells[n]}" for n, k in self._at.items()]
        self._bar.set_description_str(", ".join(running))


def report(failures: list[Failure], say: Callable[[str], None]) -> None:
    """All failures together: chapter, cell, message and traceback."""
    if not failures:
        return
    say(f"\n{len(failures)} chapter{'s' if len(failures) > 1 else ''} failed:")
    for place, failure in enumerate(failures, 1):
        say(f"\n{place}. {failure.where}: {failure.message}")
        for line in failure.traceback.splitlines():
            say(f"   {line}")
        say("   The last good page is kept." if failure.kept else "   It has no page yet.")
    sys.stdout.flush()
