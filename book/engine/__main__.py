"""The engine's command line: ``python -m book.engine --help``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import joblib
import psutil

from book.engine import beds, course, marks, notebooks, practice, site, trial, verify
from book.engine.options import chapter_options, limit_options, run_options
from book.engine.plan import RULES, Failure, Task, assess, cuda_available, without_gpu
from book.engine.progress import report
from book.engine.project import Chapter, EngineError, Project, no_room
from book.engine.schedule import Budget, run_tasks, stopping
from book.engine.serve import server
from toolkit.core.program import run_program
from toolkit.core.runs.code import Tracer

ROOT = Path(__file__).resolve().parents[2]
NAMES = "chapters (slugs) and beds (beds/NAME); default all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    project = Project(options.root.resolve())
    try:
        return options.command(project, options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if not (words := no_room(project, error)):
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished chapters are kept, run again to go on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m book.engine", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Callable, words: str, epilog: str = "", former: str = ""):
        new = commands.add_parser(
            name,
            aliases=[former] if former else [],
            help=words,
            description=words,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        new.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
        new.set_defaults(command=function)
        return new

    words = "measure what is stale and tell its pages"
    recording = command("record", record, words, RULES, former="run")
    chapter_options(recording)
    run_options(recording)
    building = command("build", build, "tell what needs no measuring, render to _build/html", RULES)
    run_options(building)
    building.add_argument("--all", action="store_true", help="render every page anew")
    trying = command("try", attempt, "run chapters in a scratch folder and change nothing")
    chapter_options(trying, force=False)
    limit_options(trying)
    checking = command("verify", check, "compare a commit's chapters with today's, exactly, at ci")
    checking.add_argument("names", nargs="*", metavar="NAME", help=NAMES)
    checking.add_argument("--base", required=True, metavar="COMMIT", help="commit to compare with")
    limit_options(checking)
    listing = command("list", show, "show what is stale, numbers and pages, and why", RULES)
    listing.add_argument("names", nargs="*", metavar="NAME", help=NAMES)
    command("notebooks", rehearsal, "write today's chapters to _build/ci, to be run by nbval")
    rendering = command("render", render, "render the recorded pages to _build/html")
    rendering.add_argument("--all", action="store_true", help="render every page anew")
    command("course", make_course, "write student and instructor notebooks to _build/course")
    serving = command("serve", serve, "show the rendered site on a local port")
    serving.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    return top


def record(project: Project, options: argparse.Namespace) -> int:
    """``record``: measure what is stale; 1 when a chapter failed."""
    chapters = project.select(options.names)
    if options.scale == "gpu" and not cuda_available():
        raise EngineError("--scale gpu needs a GPU that PyTorch sees; use --scale cpu here")
    if options.tell and not options.names:
        raise EngineError("--tell needs the names of the chapters to tell")
    chosen = {"scale": options.scale, "force": options.force, "measure": True, "tell": options.tell}
    failures = _execute(project, options, *assess(project, chapters, **chosen))
    report(failures, print)
    return 1 if failures else 0


def build(project: Project, options: argparse.Namespace) -> int:
    """``build``: tell what needs no measuring and render, also when a chapter failed."""
    practice.write_all(project, print)  # first, as pages link to them
    failures = _execute(project, options, *assess(project, project.select([])))
    try:
        render(project, options)
    finally:
        report(failures, print)
    return 1 if failures else 0


def _execute(
    project: Project, options: argparse.Namespace, tasks: list[Task], failures: list[Failure]
) -> list[Failure]:
    on_gpu = any(t.scale == "gpu" and t.action == "record" for t in tasks)
    gpu_memory = options.gpu_memory or 0.0
    if on_gpu and not cuda_available():
        without_gpu(tasks)
    elif on_gpu and not options.gpu_memory:
        import torch

        gpu_memory = 0.9 * torch.cuda.mem_get_info()[0] / 2**30
    for task in tasks:
        if task.note:
            print(f"{task.chapter.name}: {task.note}")
    budget = Budget(
        jobs=options.jobs,
        memory=options.memory or 0.9 * psutil.virtual_memory().available / 2**30,
        gpu_memory=gpu_memory,
        cores=joblib.cpu_count(),
        cell_timeout=options.cell_timeout,
        timeout=options.timeout,
        grace=options.grace,
    )
    if not any(t.action != "keep" for t in tasks):
        print(f"{len(tasks)} chapters looked at, nothing to run")
    return failures + run_tasks(tasks, project, budget, print, getattr(options, "force", False))


def attempt(project: Project, options: argparse.Namespace) -> int:
    """``try``: run in scratch folders, say what would differ; 1 when a chapter failed."""
    if options.scale == "gpu" and not cuda_available():
        raise EngineError("--scale gpu needs a GPU that PyTorch sees; use --scale cpu here")
    tasks, failures = assess(project, project.select(options.names))
    with stopping() as stop:
        failures += trial.run(project, tasks, options.scale, _alone(options), stop, print)
    report(failures, print)
    return 1 if failures else 0


def check(project: Project, options: argparse.Namespace) -> int:
    """``verify``: 1 when anything differed or failed."""
    with stopping() as stop:
        chosen = _chosen(project, options.names)
        rows = verify.run(project, *chosen, options.base, _alone(options), stop, print)
    print(verify.table(rows))
    return 1 if any(row.bad for row in rows) else 0


def _alone(options: argparse.Namespace) -> Budget:
    """The whole machine for one chapter at a time."""
    return Budget(
        jobs=1,
        memory=0.0,
        gpu_memory=0.0,
        cores=joblib.cpu_count(),
        cell_timeout=options.cell_timeout,
        timeout=options.timeout,
        grace=options.grace,
    )


def show(project: Project, options: argparse.Namespace) -> int:
    """``list``: each chapter and bed, its scale, and why its numbers or its page are stale."""
    chapters, of_beds = _chosen(project, options.names)
    tasks, failures = assess(project, chapters)
    names = [c.name for c in project.chapters.values()] + [bed.slug for bed in of_beds]
    width = max(map(len, names), default=0)
    for task in tasks:
        print(f"{task.chapter.name:{width}}  {_state(task)}")
    tracer = functools.cache(functools.partial(Tracer, project.root))
    for bed in of_beds:
        reasons = beds.stale_reasons(bed, tracer)
        words = f"stale ({'; '.join(reasons)})" if reasons else "fresh"
        print(f"{bed.slug:{width}}  {bed.scale}: numbers {words}")
    for failure in failures:
        print(f"{failure.chapter:{width}}  broken: {failure.message}")
    for page in project.orphans():
        print(f"{page.relative_to(project.root)}: its source is gone, remove it")
    return 1 if failures else 0


def _chosen(project: Project, names: list[str]) -> tuple[list[Chapter], list[beds.Bed]]:
    """The chapters and the beds of these names; all of both for no names."""
    of_beds = [name for name in names if name.startswith("beds/")]
    others = [name for name in names if name not in of_beds]
    chapters = project.select(others) if others or not names else []
    return chapters, beds.select(project, of_beds) if names else beds.every(project)


def _state(task: Task) -> str:
    if task.recorded is None and not task.page:
        return f"no page: {'; '.join(task.numbers)}"
    scale = task.recorded["scale"] if task.recorded else f"no page, {task.scale}"
    verified = (task.recorded or {}).get("verified")
    words = [
        f"{what} {'stale (' + '; '.join(reasons) + ')' if reasons else 'fresh'}"
        for what, reasons in (("numbers", task.numbers), ("page", task.page))
    ]
    return f"{scale}: {', '.join(words)}" + (f"; verified on {verified}" if verified else "")


def rehearsal(project: Project, options: argparse.Namespace) -> int:
    """``notebooks``: write ``_build/ci``."""
    notebooks.write_all(project, print)
    return 0


def render(project: Project, options: argparse.Namespace) -> int:
    """``render``: the site from the pages as they are."""
    kept = marks.note(project)
    first = site.render(project, print, everything=options.all)
    print(f"open {first.as_uri()}\n  or run `python -m book.engine serve`")
    marks.tell(kept, print)
    return 0


def make_course(project: Project, options: argparse.Namespace) -> int:
    """``course``: student and instructor notebooks."""
    sys.path.insert(0, str(project.root))  # the checks import the project's toolkit
    course.build(project, print)
    return 0


def serve(project: Project, options: argparse.Namespace) -> int:
    """``serve``: until Ctrl-C."""
    with server(project, options.port) as running:
        print(f"http://127.0.0.1:{running.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
