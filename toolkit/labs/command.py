"""``python -m toolkit lab``: measure a lab without a notebook, or say why its numbers are stale."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.labs.lab import Lab


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("slugs", nargs="+", metavar="slug", help="a chapter's name, such as lora")
    parser.add_argument("--scale", choices=("ci", "cpu", "gpu"), default="ci", help="default ci")
    parser.add_argument(
        "--results", type=Path, metavar="DIR",
        help="folder of results; default TOOLKIT_RESULTS, else book/results of this checkout",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at once, one thread each; default one per core"
    )
    parser.add_argument(
        "--stale", action="store_true",
        help="run nothing; print as JSON, by lab, why numbers are stale",
    )  # fmt: skip
    parser.add_argument(
        "--judge", action="store_true", help="run nothing; judge the claims anew from the runs"
    )
    parser.add_argument(
        "--missing", action="store_true",
        help="run only what has no record; runs of earlier code are kept, and stay stale",
    )  # fmt: skip
    parser.add_argument(
        "--cluster", metavar="ADDRESS",
        help="run on a Dask cluster at this address, or on Ray with the word ray",
    )  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """Run the command; 0 only if the results are complete.

    Raises:
        KeyError: no such lab.
        ValueError: no folder for the results.
    """
    from toolkit.labs import lab as labs

    # joblib replaces a worker whose memory has grown; its job runs again in the new one
    warnings.filterwarnings("ignore", message="A worker stopped")
    folder = arguments.results or labs.results_folder()
    if folder is None:
        raise ValueError("--results: name a folder to keep the results in")
    if arguments.stale:
        scale = arguments.scale
        print(json.dumps({slug: _reasons(slug, scale, folder) for slug in arguments.slugs}))
        return 0
    found = [labs.lab(slug) for slug in arguments.slugs]  # a wrong name costs no run
    return max(_measure(lab, folder, arguments) for lab in found)


def _reasons(slug: str, scale: str, folder: Path) -> list[str] | str:
    """Why the numbers of a lab are stale; in one string why it cannot say, so that others can."""
    from toolkit.labs import lab as labs

    try:
        return labs.stale(labs.lab(slug), scale, folder)
    except Exception as error:  # whatever its code raises while it is imported or asked
        return f"{type(error).__name__}: {error}"


def _measure(found: Lab, folder: Path, arguments: argparse.Namespace) -> int:
    """Measure or judge one lab, and say what came of it."""
    from toolkit.core.runs.measure import JobsFailed, Missing
    from toolkit.labs import lab as labs

    # all workers of a cluster, unless told otherwise
    jobs = arguments.jobs or (-1 if arguments.cluster else None)
    try:
        with _cluster(arguments.cluster):
            done = labs.measure(
                found, arguments.scale, folder=folder, n_jobs=jobs,
                look_only=arguments.judge, keep_stale=arguments.missing,
            )  # fmt: skip
    except Missing as missing:
        print(f"not measured: {missing}", file=sys.stderr)
        return 1
    except JobsFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    runs = sum(len(e["jobs"]) for e in done.document["experiments"].values())
    print(
        f"{found.slug} at {arguments.scale}: {runs} runs, {done.ran} of them run now, "
        f"{done.seconds:.0f} s; {folder / f'{found.slug}.{arguments.scale}.json'}"
    )
    for claim in done.document["claims"]:
        print(f"  {claim['verdict']}: {claim['text']}")
    return 0


def _cluster(address: str | None):
    """joblib's settings for a cluster, or none."""
    import contextlib

    import joblib

    if address is None:
        return contextlib.nullcontext()
    if address == "ray":
        import ray
        from ray.util.joblib import register_ray

        ray.init(ignore_reinit_error=True)
        register_ray()
        return joblib.parallel_config(backend="ray")
    from distributed import Client

    Client(address)
    return joblib.parallel_config(backend="dask")
