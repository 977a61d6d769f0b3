"""A grid of jobs over joblib: kept as they end, gone on with after a kill, the same table anywhere.

Jobs run in local processes unless joblib is told otherwise. On a Dask cluster, with a ``Client``
open::

    with joblib.parallel_config(backend="dask"):
        table = sweep(function, jobs, folder)

On Ray, call ``ray.util.joblib.register_ray()`` and say ``backend="ray"``. A cluster's workers need
the same code as the caller, and a folder that all of them see. joblib gives each local process its
share of the cores in OpenMP threads; threads a job starts by other means are the job's business.

A store is a folder with ``store.json``, which names the function and the code, and one
``job-<key>.json`` for each job that ended. The key is a hash of the function's name and the job.
Files are JSON as Python writes it: a loss may be ``NaN`` or ``Infinity``.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import time
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
from joblib.parallel import get_active_backend
from tqdm import tqdm

import toolkit

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
OWN = ("status", "error", "seconds")
# How loky, Dask and Ray say that a worker is gone; by name, so that none has to be installed.
LOST = {"TerminatedWorkerError", "KilledWorker", "RayActorError", "WorkerCrashedError"}


def grid(**axes: Any) -> list[dict[str, Any]]:
    """Every combination of the axes' values; the last axis changes fastest.

    Args:
        axes: A list of values each. Text, a dict or a number counts as one value; a value that is
            itself a list goes into another list.

    Raises:
        ValueError: If an axis has no value.
    """
    values = []
    for name, axis in axes.items():
        one = isinstance(axis, (str, Mapping)) or not isinstance(axis, Iterable)
        values.append([axis] if one else list(axis.tolist() if hasattr(axis, "tolist") else axis))
        if not values[-1]:
            raise ValueError(f"axis {name} is empty, so there is no job: give it a value.")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*values)]


def sweep(
    function: Callable[..., Any],
    jobs: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str] | None = None,
    *,
    version: str | None = None,
    n_jobs: int | None = None,
    retry: bool = True,
    accept_other_code: bool = False,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Call ``function(**job)`` for each job, in parallel, and return one table.

    A job that raises is recorded as failed and the rest goes on. So is a job whose process dies: it
    is tried again, at last alone, so that it takes no other job down with it. With ``n_jobs=1`` jobs
    run in this process, which then dies with them.

    Args:
        function: Returns a dict of plain values, or a list of dicts for several rows. It seeds
            itself from its arguments; nothing is seeded here.
        jobs: Its arguments, as from :func:`grid`: text, numbers, bools, ``None`` and lists of these.
        folder: The store. Jobs done there are not run again. ``None`` keeps results in memory only.
        version: Names the code version; without it, files are compared (:func:`code_version`).
        n_jobs: Jobs at once; by default what ``joblib.parallel_config`` says, else all there are.
        retry: Whether jobs that failed in an earlier sweep are run again.
        accept_other_code: Keep the results of a store whose code has changed since.
        progress: Show a bar on stderr; by default only on a terminal.

    Returns:
        One row per job or more, in the order of ``jobs``: its arguments, its results, and
        ``status`` ("done" or "failed"), ``error`` (text or ``None``), ``seconds``.

    Raises:
        TypeError: If a job is no dict, or holds a value that is not plain.
        ValueError: If there are no jobs or one is there twice, if the store is of other code, or if
            the code's version cannot be found.
    """
    name = _name(function)
    keyed = _keyed(name, jobs)
    paths: dict[str, Path | None] = dict.fromkeys(keyed)
    records: dict[str, dict[str, Any]] = {}
    if folder is not None:
        store = Path(folder).resolve()  # a cluster's workers run in other folders
        files = {} if version is not None else _files(function)
        version = _digest(json.dumps(files)) if version is None else version
        code = {"function": name, "version": version, "files": files}
        _open(store, code, list(keyed), accept_other_code)
        paths = {key: store / f"job-{key}.json" for key in keyed}
        for key, path in paths.items():
            record = _read(path)
            if record and (record["status"] == "done" or not retry):
                records[key] = record
    hidden = None if progress is None else not progress  # None hides it where there is no terminal
    with tqdm(total=len(keyed), initial=len(records), desc=name, disable=hidden) as bar:
        for key, record in _run_all(function, keyed, paths, version, n_jobs, set(records)):
            records[key] = record
            bar.update()
    ended = [records[key] for key in keyed]
    if failed := [record for record in ended if record["status"] == "failed"]:
        warnings.warn(
            f"{len(failed)} of {len(ended)} jobs failed, the first is {failed[0]['job']}: "
            f"{failed[0]['error'].splitlines()[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
    return _table(ended)


def collect(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The table of all jobs that ended in a store, without running any.

    Raises:
        FileNotFoundError: If the folder holds no store.
    """
    store = _read(Path(folder) / "store.json", "jobs")
    if store is None:
        raise FileNotFoundError(f"{folder} holds no store.json: name the folder given to sweep().")
    there = {path.stem[4:]: path for path in sorted(Path(folder).glob("job-*.json"))}
    order = [key for key in dict.fromkeys([*store["jobs"], *there]) if key in there]
    return _table([record for key in order if (record := _read(there[key]))])


def code_version(function: Callable[..., Any]) -> str:
    """A hash over all files of the toolkit and the file that defines ``function``.

    Where there is no such file, as in a notebook, the function's own text counts. Other modules that
    it imports do not: name them by ``version=`` in :func:`sweep` if they change.

    Raises:
        ValueError: If the source cannot be found, or the function is a lambda or was made inside
            another one, and may carry values that its source does not show.
    """
    return _digest(json.dumps(_files(function)))


def _name(function: Callable[..., Any]) -> str:
    if not hasattr(function, "__qualname__"):
        raise TypeError(f"{function!r} has no name to keep results under: wrap it in a function.")
    return f"{function.__module__}.{function.__qualname__}"


def _digest(text: str | bytes) -> str:
    # Line endings do not count: git may write them either way.
    data = text.encode() if isinstance(text, str) else text.replace(b"\r\n", b"\n")
    return hashlib.sha256(data).hexdigest()[:16]


def _files(function: Callable[..., Any]) -> dict[str, str]:
    if "<" in function.__qualname__:
        raise ValueError(
            f"{_name(function)} may carry values that its source does not show: define it with def "
            "at the top of a module, or name its version, as in version='1'."
        )
    root = Path(toolkit.__file__).resolve().parent
    found = {path: path.relative_to(root.parent).as_posix() for path in root.rglob("*.py")}
    try:
        inner = inspect.unwrap(function)
        source = Path(inspect.getsourcefile(inner) or "").resolve()
        text = "" if source.is_file() else inspect.getsource(inner)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the source of {_name(function)} cannot be found ({error}): name its version, as in "
            "version='1'."
        ) from error
    if text:
        own = {function.__qualname__: _digest(text)}
    else:
        module = function.__module__.replace(".", "/") + ".py"
        found.setdefault(source, source.name if function.__module__ == "__main__" else module)
        own = {}
    return {name: _digest(path.read_bytes()) for path, name in sorted(found.items())} | own


def _keyed(name: str, jobs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    keyed: dict[str, dict[str, Any]] = {}
    for i, job in enumerate(jobs):
        if not isinstance(job, Mapping) or not all(isinstance(key, str) for key in job):
            raise TypeError(f"jobs[{i}] is {job!r}, not a dict of arguments by name.")
        for key, value in job.items():
            if key in OWN:
                raise ValueError(f"jobs[{i}] has an argument {key!r}, a column of the table.")
            if not _plain(value):
                raise TypeError(
                    f"jobs[{i}][{key!r}] is a {type(value).__name__}: arguments are text, numbers, "
                    "bools, None or lists of these. Build other things inside the function."
                )
        digest = _digest(f"{name} {json.dumps(job, sort_keys=True)}")
        if digest in keyed:
            raise ValueError(f"jobs[{i}] is there twice: {dict(job)}. Tell repeats by a seed.")
        keyed[digest] = dict(job)
    if not keyed:
        raise ValueError("jobs is empty: give at least one, as in grid(seed=[0]).")
    return keyed


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _open(store: Path, code: dict[str, Any], keys: list[str], accept: bool) -> None:
    old = _read(store / "store.json", "jobs")
    if old is None and any(store.glob("job-*.json")):
        old = {"function": code["function"], "version": None, "files": {}, "jobs": []}
    differs = []
    if old is not None and old["function"] != code["function"]:
        raise ValueError(
            f"{store} holds results of {old['function']}, not of {code['function']}: name another "
            "folder."
        )
    if old is not None and old["version"] != code["version"]:
        before, now = old["files"], code["files"]
        if before and now:
            differs += [f"{name} changed" for name in now if before.get(name, now[name]) != now[name]]
            differs += [f"{name} is new" for name in now if name not in before]
            differs += [f"{name} is gone" for name in before if name not in now]
        else:
            differs += [f"version {old['version']!r}, now {code['version']!r}"]
    if differs and not accept:
        rest = f" and {len(differs) - 5} more" if len(differs) > 5 else ""
        raise ValueError(
            f"{store} holds results of other code ({', '.join(differs[:5])}{rest}): name another "
            "folder, or keep its results with accept_other_code=True."
        )
    store.mkdir(parents=True, exist_ok=True)
    known = [] if old is None else old["jobs"]
    _write(store / "store.json", {"schema": SCHEMA, **code, "jobs": [*dict.fromkeys(known + keys)]})


def _run_all(
    function: Callable[..., Any],
    keyed: Mapping[str, Mapping[str, Any]],
    paths: Mapping[str, Path | None],
    version: str | None,
    n_jobs: int | None,
    ended: set[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each job as it ends. A pool that breaks is made anew, and goes on with the rest."""
    backend, context = get_active_backend()
    if n_jobs is None:
        n_jobs = -1 if context is None else context  # Ray's own default is 1, which is no Ray at all
    # Ray's backend cannot hand results over one by one.
    ordered = not getattr(backend, "supports_return_generator", False)
    pool = joblib.Parallel(
        n_jobs, batch_size=1, return_as="list" if ordered else "generator_unordered"
    )
    broken: Counter[str] = Counter()
    while pending := [key for key in keyed if key not in ended]:
        suspect = next((key for key in pending if broken[key] > 1), None)
        sent: list[str] = []

        def tasks(batch: list[str], sent: list[str] = sent) -> Iterator[Any]:
            for key in batch:
                sent.append(key)
                yield joblib.delayed(_run)(function, key, keyed[key], paths[key], version)

        try:
            for key, record in pool(tasks(pending if suspect is None else [suspect])):
                ended.add(key)
                yield key, record
        except Exception as error:
            if not LOST.intersection(kind.__name__ for kind in type(error).__mro__):
                raise
            lost = [key for key in sent if key not in ended]
            broken.update(lost)
            for key in lost:
                record = _read(paths[key])
                if suspect is not None and record is None:
                    text = "WorkerDied: the process ended without an exception, at last with this job alone"
                    record = _ended(keyed[key], version, error=text)
                    _write(paths[key], record)
                if record is not None:
                    ended.add(key)
                    yield key, record


def _run(
    function: Callable[..., Any],
    key: str,
    job: Mapping[str, Any],
    path: Path | None,
    version: str | None,
) -> tuple[str, dict[str, Any]]:
    """One job, in its worker: the record is in the store before the caller hears of it."""
    start = time.perf_counter()
    try:
        rows = _rows(function(**job), job)
        record = _ended(job, version, rows, seconds=time.perf_counter() - start)
    except (Exception, SystemExit) as caught:  # sys.exit() would otherwise end the caller too
        tail = traceback.format_tb(caught.__traceback__.tb_next, limit=-3)
        text = f"{type(caught).__name__}: {caught}\n{''.join(tail)}"
        record = _ended(job, version, error=text, seconds=time.perf_counter() - start)
    _write(path, record)
    return key, record
