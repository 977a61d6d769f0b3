"""A grid of jobs over joblib: kept as they end, gone on with after a kill, the same table anywhere.

Jobs run in local processes unless joblib is told otherwise. On a Dask cluster, with a ``Client``
open::

    with joblib.parallel_config(backend="dask"):
        table = sweep(function, jobs, folder)

On Ray, call ``ray.util.joblib.register_ray()`` and say ``backend="ray"``. A cluster's workers need
the same code as the caller, and a folder that all of them see. joblib waits forever for a task that
Dask has given up, so set ``distributed.scheduler.allowed-failures`` to 100, say, before you make
the cluster. With a folder, a job whose workers keep dying then fails after ``TRIES``.

joblib gives each local process its share of the cores in OpenMP threads; what a job itself sets, as
with ``torch.set_num_threads``, is its own business. :mod:`toolkit.core.runs.store` says what a
folder of results holds.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from toolkit.core.runs import store
from toolkit.core.runs.jobs import digest, function_name, grid, keyed, table
from toolkit.core.runs.pool import Task, new_caller, run_all

TOOLKIT = Path(__file__).resolve().parents[2]  # whose every file belongs to the version

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["code_version", "collect", "grid", "sweep"]


def sweep(
    function: Callable[..., Any],
    jobs: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str] | None = None,
    *,
    version: str | None = None,
    n_jobs: int | None = None,
    retry: bool = True,
    accept_other_code: bool = False,
    limit: float | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Call ``function(**job)`` for each job, in parallel, and return one table.

    A job that raises is recorded as failed and the rest goes on. So is a job whose process dies: it
    is tried again, the last time alone, to tell it from jobs that only ran beside it. With
    ``n_jobs=1`` jobs run in this process, which then dies with them.

    Several callers may share a folder: a job that one of them has done is not run by the others.

    Args:
        function: Returns a dict of plain values, or a list of dicts for several rows. It seeds
            itself from its arguments; nothing is seeded here.
        jobs: Its arguments, as from :func:`grid`: text, numbers, bools, ``None``, lists of these.
        folder: The store. Jobs done there are not run again. ``None`` keeps results in memory only.
        version: Names the code version. Without it, files are compared (:func:`code_version`).
        n_jobs: Jobs at once; by default what ``joblib.parallel_config`` says, else all cores.
        retry: Whether jobs that failed in an earlier sweep are run again.
        accept_other_code: Keep the results of a store although the code has changed since.
        limit: Seconds one job may take; it fails then. ``None`` for no limit.
        progress: Show a bar on stderr; by default only on a terminal.

    Returns:
        One row per job or more, in the order of ``jobs``: its arguments, its results, and
        ``status`` ("done" or "failed"), ``error`` (text or ``None``), ``seconds``.

    Raises:
        TypeError: If a job is no dict of plain values, or the function has no name.
        ValueError: If there are no jobs or one is there twice, if the store is of other code, if
            the code's version cannot be found, or if ``limit`` is not above 0.
    """
    if limit is not None and not limit > 0:
        raise ValueError(f"limit = {limit}: give the seconds that one job may take, or None.")
    name = function_name(function)
    every = keyed(name, jobs)
    paths: dict[str, Path | None] = dict.fromkeys(every)
    records: dict[str, dict[str, Any]] = {}
    if folder is not None:
        place = Path(folder).resolve()  # workers of a cluster run in other folders
        files = {} if version is not None else _files(function)
        version = digest(json.dumps(files)) if version is None else version
        code = {"function": name, "version": version, "files": files}
        store.open_store(place, code, list(every), accept_other_code)
        for key in every:
            paths[key] = store.job_path(place, key)
            record = store.record(paths[key])
            if record and (record["status"] == "done" or not retry):
                records[key] = record
            else:  # an old failure must not pass for the end of a job whose worker dies now
                paths[key].unlink(missing_ok=True)
    caller = new_caller()
    tasks = {
        key: Task(function, job, paths[key], version, limit, caller=caller)
        for key, job in every.items()
        if key not in records
    }
    hidden = None if progress is None else not progress  # None: hidden where there is no terminal
    with tqdm(total=len(every), initial=len(records), desc=name, disable=hidden) as bar:
        for key, record in run_all(tasks, n_jobs):
            records[key] = record
            bar.update()
    ended = [records[key] for key in every]
    if failed := [record for record in ended if record["status"] == "failed"]:
        warnings.warn(
            f"{len(failed)} of {len(ended)} jobs failed, the first is {failed[0]['job']}: "
            f"{failed[0]['error'].splitlines()[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
    return table(ended)


def collect(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The table of all jobs that ended in a store, without running any.

    Raises:
        FileNotFoundError: If the folder holds no store.
    """
    index = store.read(Path(folder) / "store.json", "jobs")
    if index is None:
        raise FileNotFoundError(f"{folder} holds no readable store.json: name a folder of sweep().")
    there = {path.stem.removeprefix("job-"): path for path in Path(folder).glob("job-*.json")}
    order = dict.fromkeys([*index["jobs"], *sorted(there)])
    found = (store.record(there[key]) for key in order if key in there)
    return table([record for record in found if record])


def code_version(function: Callable[..., Any]) -> str:
    """A hash over all files of the toolkit and the file that defines ``function``.

    Where there is no such file, as in a notebook, the function's own text counts. Other modules
    that it imports do not: where they change, give :func:`sweep` a ``version``.

    Raises:
        ValueError: If the source cannot be found, or the function is a lambda or was made inside
            another one, and so may carry values that its source does not show.
    """
    return digest(json.dumps(_files(function)))


def _files(function: Callable[..., Any]) -> dict[str, str]:
    """The hash of each file that counts, by a name without the place of the project."""
    name, remedy = function.__qualname__, "name its version, as in version='1'."
    if "<" in name:
        raise ValueError(f"{name} may carry values that its source does not show: {remedy}")
    root = TOOLKIT
    paths = {path: path.relative_to(root.parent).as_posix() for path in root.rglob("*.py")}
    inner = inspect.unwrap(function)
    try:
        source = Path(inspect.getsourcefile(inner) or "").resolve()
        text = "" if source.is_file() else inspect.getsource(inner)
    except (OSError, TypeError) as error:
        raise ValueError(f"the source of {name} cannot be found ({error}): {remedy}") from error
    if not text:
        script = inner.__module__ == "__main__"
        module = source.name if script else f"{inner.__module__.replace('.', '/')}.py"
        paths.setdefault(source, module)
    files = {label: digest(path.read_bytes()) for path, label in sorted(paths.items())}
    return files | {name: digest(text)} if text else files
