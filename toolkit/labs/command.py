"""``python -m toolkit lab``: measure a lab without a notebook, or say why its numbers are stale."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("slug", help="the chapter's name, such as lora")
    parser.add_argument("--scale", choices=("ci", "cpu", "gpu"), default="ci", help="default ci")
    parser.add_argument(
        "--results", type=Path, metavar="DIR",
        help="folder of results; default TOOLKIT_RESULTS, else book/results of this checkout",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at once, one thread each; default one per core"
    )
    parser.add_argument(
        "--stale", action="store_true", help="run nothing; print as JSON why numbers are stale"
    )
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
    from toolkit.core.runs.measure import JobsFailed, Missing
    from toolkit.labs import lab as labs

    # joblib replaces a worker whose memory has grown; its job runs again in the new one
    warnings.filterwarnings("ignore", message="A worker stopped")
    found = labs.lab(arguments.slug)
    folder = arguments.results or labs.results_folder()
    if folder is None:
        raise ValueError("--results: name a folder to keep the results in")
    if arguments.stale:
        print(json.dumps(labs.stale(found, arguments.scale, folder)))
        return 0
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
        f"{arguments.slug} at {arguments.scale}: {runs} runs, {done.ran} of them run now, "
        f"{done.seconds:.0f} s; {folder / f'{arguments.slug}.{arguments.scale}.json'}"
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
