"""What is said of pages that are kept although their numbers are stale.

The words go to ``_build/engine/marks.json``, from where the book's Sphinx extension puts them under
the page's title. The recorded page itself stays as it is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

from book.engine import beds
from book.engine.plan import Task, assess, mark
from book.engine.project import Project, write
from toolkit.core.runs.code import Tracer


def note(project: Project) -> list[Task]:
    """Write the marks of all chapters and beds; returns the tasks of chapters that have one."""
    tasks, _ = assess(project, project.select([]))  # what is broken is told where it is run
    marks = {task.chapter.page: mark(task) for task in tasks}
    names = {
        page.relative_to(project.root).with_suffix("").as_posix(): words
        for page, words in marks.items()
        if words
    }
    tracer = functools.cache(functools.partial(Tracer, project.root))
    stale = [bed for bed in beds.every(project) if beds.stale_reasons(bed, tracer)]
    if words := beds.mark(stale):
        names[beds.PAGE] = words
    file = project.root / "_build" / "engine" / "marks.json"
    write(file, json.dumps(names, indent=1, sort_keys=True) + "\n")
    return [task for task in tasks if mark(task)]


def tell(tasks: list[Task], say: Callable[[str], None]) -> None:
    """Name the kept pages, and how to measure their numbers again."""
    if not tasks:
        return
    say(f"\n{len(tasks)} page{'s' if len(tasks) > 1 else ''} kept with stale numbers, marked so:")
    for task in tasks:
        say(f"  {task.chapter.name}: {'; '.join(task.numbers)}")
    say("  `make record NAME=<slug>` measures again, `make verify BASE=<commit>` compares at ci")
