"""A chapter's lab, which measures without a notebook, and the results file it writes.

The engine starts the lab as ``python -m toolkit lab <slug> --scale <scale>`` in the project's
folder and reads the file; it runs none of the lab's code in its own process.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from book.engine import family
from book.engine.project import Chapter, EngineError, Project, write
from toolkit.core.runs import code
from toolkit.core.runs.results import SCHEMA, digests_by_function, text
from toolkit.core.runs.results import file_sha256 as sha256

__all__ = [
    "Ended",
    "emptied",
    "environment",
    "load",
    "measure",
    "run_to_end",
    "same_code",
    "sha256",
    "stale_reasons",
]

STALE_SECONDS = 300
KEPT_LINES = 40
LEASH = str(Path(__file__).with_name("leash.py"))


class Ended(Exception):
    """The lab was ended, or ended by itself without being complete."""

    def __init__(self, message: str, words: str = "") -> None:
        super().__init__(message)
        self.words = words


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        EngineError: it is not there or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise EngineError(f"{path.name} holds no results: it must be a JSON object")
    return found


def same_code(results: Mapping[str, Any], tracer: code.Tracer) -> bool:
    """Whether every job was run, and every claim judged, by the code that is there now."""
    if results.get("schema") != SCHEMA:
        return False  # recorded inside a page, before labs
    for function, digests in digests_by_function(results).items():
        try:
            now = code.digest(tracer.of_name(function))
        except ValueError:
            return False
        if digests != {now}:
            return False
    return True


def emptied(chapter: Chapter, scale: str, folder: Path) -> Path:
    """A folder with the results without their runs: a lab measures all of them there.

    What was declared before stays, so that measuring again hides no late claim.
    """
    folder.mkdir(parents=True)
    file = chapter.results(scale)
    document = load(file) if file.is_file() else {}
    if document.get("schema") == SCHEMA:
        for experiment in document["experiments"].values():
            experiment["jobs"] = []
        write(folder / file.name, text(document))
    return folder


def command(slugs: Sequence[str], scale: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "toolkit", "lab", *slugs, "--scale", scale, *more]


def environment(project: Project, results: Path, home: Path | None = None) -> dict[str, str]:
    """The variables a lab runs with.

    Args:
        project: whose toolkit it imports.
        results: folder that takes the results file.
        home: a folder to put before all others that Python imports from.
    """
    paths = [str(home or ""), str(project.root), os.environ.get("PYTHONPATH", "")]
    return {
        **{k: v for k, v in os.environ.items() if k not in ("TOOLKIT_SCALE", "TOOLKIT_TELL")},
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in paths if p)),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TOOLKIT_RESULTS": str(results),
    }


def stale_reasons(
    project: Project, chapters: Sequence[Chapter], scale: str
) -> dict[Chapter, list[str] | EngineError]:
    """What labs themselves say is out of date in their results; nothing is measured.

    One process answers for all of them, since most of its time goes into imports. A lab that
    cannot say has the error as its answer.
    """
    if not chapters:
        return {}
    try:
        done = subprocess.run(
            command([chapter.slug for chapter in chapters], scale, "--stale"),
            capture_output=True,
            text=True,
            cwd=project.root,
            env=environment(project, chapters[0].results(scale).parent),
            timeout=STALE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        slow = EngineError(f"its lab did not say within {STALE_SECONDS} s what is stale")
        return dict.fromkeys(chapters, slow)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return dict.fromkeys(chapters, EngineError(f"its lab cannot say what is stale: {last}"))
    try:
        said = json.loads(done.stdout.splitlines()[-1])
        return {chapter: _reasons(said[chapter.slug]) for chapter in chapters}
    except (IndexError, KeyError, TypeError, ValueError):
        wanted = "its lab must print a JSON object of reasons for --stale, by lab"
        return dict.fromkeys(chapters, EngineError(wanted))


def _reasons(said: list[str] | str) -> list[str] | EngineError:
    if isinstance(said, str):
        return EngineError(f"its lab cannot say what is stale: {said}")
    return list(dict.fromkeys(str(reason) for reason in said))


def measure(
    project: Project,
    chapter: Chapter,
    scale: str,
    results: Path,
    stop: threading.Event,
    *,
    seconds: float,
    home: Path | None = None,
    show: bool = False,
) -> None:
    """Run the lab to its end. What it measured before it was ended stays in its store.

    Args:
        project: where.
        chapter: whose lab.
        scale: ``ci``, ``cpu`` or ``gpu``.
        results: folder that takes the results file.
        stop: when set, the lab is ended and KeyboardInterrupt raised.
        seconds: the longest it may run.
        home: see :func:`environment`.
        show: whether its error stream, its progress, goes to the terminal, if there is one.

    Raises:
        Ended: it failed or took too long; ``words`` holds the end of what it said.
    """
    said = run_to_end(
        project,
        command([chapter.slug], scale),
        results,
        stop,
        seconds=seconds,
        home=home,
        show=show,
    )
    if not (results / chapter.results(scale).name).is_file():
        raise Ended(f"its lab wrote no {chapter.results(scale).name}", said)


def run_to_end(
    project: Project,
    words: Sequence[str],
    results: Path,
    stop: threading.Event,
    *,
    seconds: float,
    home: Path | None = None,
    show: bool = False,
) -> str:
    """Run a command that measures; returns the end of what it said.

    Args:
        project: where.
        words: the command.
        results: folder that takes what it writes.
        stop: when set, it is ended and KeyboardInterrupt raised.
        seconds: the longest it may run.
        home: see :func:`environment`.
        show: see :func:`measure`.

    Raises:
        Ended: it failed or took too long; ``words`` holds the end of what it said.
    """
    results.mkdir(parents=True, exist_ok=True)
    said: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
    process = subprocess.Popen(
        [sys.executable, "-P", LEASH, str(os.getpid()), *words],
        cwd=project.root,
        env=environment(project, results, home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if show and sys.stderr.isatty() else subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    listener = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
    listener.start()
    end = time.monotonic() + seconds
    members: dict[int, family.Process] = {}
    try:
        while process.poll() is None:
            members.update(family.of(process.pid))
            if stop.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > end:
                late = f"ended: its lab ran longer than {seconds:.0f} s; what it measured is kept"
                raise Ended(late, "".join(said))
            time.sleep(0.1)
    finally:
        family.end(members.values())
        process.wait()
        listener.join(timeout=5)
    if process.returncode:
        last = said[-1].strip() if said else f"exit code {process.returncode}"
        raise Ended(f"its lab is not complete: {last}", "".join(said))
    return "".join(said)
