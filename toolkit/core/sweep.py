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
with ``torch.set_num_threads``, is its own business.

A store is a folder with ``store.json``, which names the function and the code, and one
``job-<key>.json`` for each job that ended, beside ``job-<key>.tries`` while it runs. The key is a
hash of the function's name and the job.
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

OWN = ("status", "error", "seconds")
TRIES = 3
DIED = "WorkerDied: the process that ran this job died each time"
# How loky, Dask and Ray say that a worker is gone; by name, so that none has to be installed.
GONE = {"TerminatedWorkerError", "KilledWorker", "RayActorError", "WorkerCrashedError"}


def grid(**axes: Any) -> list[dict[str, Any]]:
    """Every combination of the axes' values; the last axis changes fastest.

    Args:
        axes: A list of values each. A text or number alone counts as one value. A value that is
            itself a list goes into another list.

    Raises:
        ValueError: If an axis has no value.
    """
    values = []
    for name, axis in axes.items():
        many = isinstance(axis, Iterable) and not isinstance(axis, (str, Mapping))
        values.append(list(axis.tolist() if hasattr(axis, "tolist") else axis) if many else [axis])
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
    is tried again, the last time alone, to tell it from jobs that only ran beside it. With
    ``n_jobs=1`` jobs run in this process, which then dies with them.

    Args:
        function: Returns a dict of plain values, or a list of dicts for several rows. It seeds
            itself from its arguments; nothing is seeded here.
        jobs: Its arguments, as from :func:`grid`: text, numbers, bools, ``None``, lists of these.
        folder: The store. Jobs done there are not run again. ``None`` keeps results in memory only.
        version: Names the code version. Without it, files are compared (:func:`code_version`).
        n_jobs: Jobs at once; by default what ``joblib.parallel_config`` says, else all cores.
        retry: Whether jobs that failed in an earlier sweep are run again.
        accept_other_code: Keep the results of a store although the code has changed since.
        progress: Show a bar on stderr; by default only on a terminal.

    Returns:
        One row per job or more, in the order of ``jobs``: its arguments, its results, and
        ``status`` ("done" or "failed"), ``error`` (text or ``None``), ``seconds``.

    Raises:
        TypeError: If a job is no dict of plain values, or the function has no name.
        ValueError: If there are no jobs or one is there twice, if the store is of other code, or if
            the code's version cannot be found.
    """
    if not hasattr(function, "__qualname__"):
        raise TypeError(f"{function!r} has no name to keep results under: wrap it in a function.")
    name = f"{function.__module__}.{function.__qualname__}"
    keyed = _keyed(name, jobs)
    paths: dict[str, Path | None] = dict.fromkeys(keyed)
    records: dict[str, dict[str, Any]] = {}
    if folder is not None:
        store = Path(folder).resolve()  # workers of a cluster run in other folders
        files = {} if version is not None else _files(function)
        version = _digest(json.dumps(files)) if version is None else version
        code = {"function": name, "version": version, "files": files}
        _open(store, code, list(keyed), accept_other_code)
        for key in keyed:
            paths[key] = store / f"job-{key}.json"
            record = _read(paths[key], "status")
            if record and (record["status"] == "done" or not retry):
                records[key] = record
            else:  # an old failure must not pass for the end of a job whose worker dies now
                paths[key].unlink(missing_ok=True)
                paths[key].with_suffix(".tries").unlink(missing_ok=True)
    tasks = {
        key: joblib.delayed(_run)(function, key, job, paths[key], version)
        for key, job in keyed.items()
        if key not in records
    }
    hidden = None if progress is None else not progress  # None: hidden where there is no terminal
    with tqdm(total=len(keyed), initial=len(records), desc=name, disable=hidden) as bar:
        for key, record in _run_all(tasks, n_jobs):
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
        raise FileNotFoundError(f"{folder} holds no readable store.json: name a folder of sweep().")
    there = {path.stem.removeprefix("job-"): path for path in Path(folder).glob("job-*.json")}
    order = dict.fromkeys([*store["jobs"], *sorted(there)])
    found = (_read(there[key], "status") for key in order if key in there)
    return _table([record for record in found if record])


def code_version(function: Callable[..., Any]) -> str:
    """A hash over all files of the toolkit and the file that defines ``function``.

    Where there is no such file, as in a notebook, the function's own text counts. Other modules
    that it imports do not: where they change, give :func:`sweep` a ``version``.

    Raises:
        ValueError: If the source cannot be found, or the function is a lambda or was made inside
            another one, and so may carry values that its source does not show.
    """
    return _digest(json.dumps(_files(function)))


def _files(function: Callable[..., Any]) -> dict[str, str]:
    """The hash of each file that counts, by a name without the place of the project."""
    name, remedy = function.__qualname__, "name its version, as in version='1'."
    if "<" in name:
        raise ValueError(f"{name} may carry values that its source does not show: {remedy}")
    root = Path(toolkit.__file__).resolve().parent
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
    files = {label: _digest(path.read_bytes()) for path, label in sorted(paths.items())}
    return files | {name: _digest(text)} if text else files


def _digest(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    # line endings do not count: git may write them either way
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()[:16]


def _keyed(name: str, jobs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The jobs by key, in order, or what is wrong with one of them."""
    keyed: dict[str, dict[str, Any]] = {}
    for i, job in enumerate(jobs):
        if not isinstance(job, Mapping) or not all(isinstance(key, str) for key in job):
            raise TypeError(f"jobs[{i}] is {job!r}, not a dict of arguments by name.")
        for argument, value in job.items():
            if argument in OWN:
                raise ValueError(f"jobs[{i}] has {argument!r}, a column of the table: rename it.")
            if not _plain(value):
                raise TypeError(
                    f"jobs[{i}][{argument!r}] is a {type(value).__name__}, or holds what is not "
                    "plain: give text, numbers, bools, None or lists, and build the rest inside."
                )
        key = _digest(f"{name} {json.dumps(dict(job), sort_keys=True)}")
        if key in keyed:
            raise ValueError(f"jobs[{i}] is there twice ({dict(job)}): tell repeats by a seed.")
        keyed[key] = dict(job)
    if not keyed:
        raise ValueError("jobs is empty: give at least one, as in grid(seed=[0]).")
    return keyed


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _open(store: Path, code: dict[str, Any], keys: list[str], accept: bool) -> None:
    """Write ``store.json``, unless the folder holds results that are not this code's."""
    old = _read(store / "store.json", "jobs") or {**code, "jobs": []}
    if not old["jobs"] and any(store.glob("job-*.json")):
        old["version"], old["files"] = "unknown", {}
    if old["function"] != code["function"]:
        raise ValueError(
            f"{store} holds results of {old['function']}, not of {code['function']}: name another "
            "folder."
        )
    if old["version"] != code["version"] and not accept:
        before, now = old["files"], code["files"]
        words = [f"{name} changed" for name in now if before.get(name, now[name]) != now[name]]
        words += [f"{name} is new" for name in now if name not in before]
        words += [f"{name} is gone" for name in before if name not in now]
        if not before or not now:
            words = [f"version {old['version']!r}, now {code['version']!r}"]
        more = f" and {len(words) - 5} more" if len(words) > 5 else ""
        raise ValueError(
            f"{store} holds results of other code ({', '.join(words[:5])}{more}): name another "
            "folder, or keep its results with accept_other_code=True."
        )
    store.mkdir(parents=True, exist_ok=True)
    _write(store / "store.json", {**code, "jobs": list(dict.fromkeys(old["jobs"] + keys))})


def _run_all(
    tasks: Mapping[str, tuple[Any, ...]], n_jobs: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each job as it ends. Where a pool breaks, a new one goes on with the rest."""
    backend, context = get_active_backend()
    if n_jobs is None:
        # unset would mean one job at a time in this process, also under Ray
        n_jobs = -1 if context is None else context
    # Ray's backend cannot hand results over one by one
    one_by_one = getattr(backend, "supports_return_generator", False)
    order = "generator_unordered" if one_by_one else "list"
    left, breaks = dict(tasks), Counter()
    while left:
        # the last try is made alone, to tell a killer from the jobs that ran beside it
        alone = [key for key in left if breaks[key] == TRIES - 1][:1]
        sent: list[str] = []
        batch = (sent.append(key) or left[key] for key in alone or list(left))
        try:
            pool = joblib.Parallel(n_jobs, batch_size=1, return_as=order)
            for key, record in pool(batch):
                del left[key]
                yield key, record
        except Exception as caught:
            if GONE.isdisjoint(kind.__name__ for kind in type(caught).__mro__):
                raise
            for key in left.keys() & set(sent):
                breaks[key] += 1
                _, _, job, path, version = left[key][1]
                record = _read(path, "status")  # it may have ended without being heard of
                if record is None and alone:
                    record = _record(job, version, error=DIED)
                    _write(path, record)
                if record is not None:
                    del left[key]
                    yield key, record


def _run(
    function: Callable[..., Any],
    key: str,
    job: Mapping[str, Any],
    path: Path | None,
    version: str | None,
) -> tuple[str, dict[str, Any]]:
    """One job, in its worker: its record is in the store before the caller hears of it."""
    tries = None if path is None else path.with_suffix(".tries")
    if tries is not None:  # counted here, since Dask tries a job again without a word
        with tries.open("ab") as file:
            file.write(b".")
            count = file.tell()
        if count > TRIES:
            record = _record(job, version, error=DIED)
            _write(path, record)
            return key, record
    start = time.perf_counter()
    try:
        result = function(**job)
        seconds = time.perf_counter() - start
        record = _record(job, version, rows=_rows(result, job), seconds=seconds)
    except (Exception, SystemExit) as caught:  # sys.exit() in a job would end the caller too
        tail = "".join(traceback.format_tb(caught.__traceback__.tb_next, limit=-3))
        error = f"{type(caught).__name__}: {caught}\n{tail}".rstrip()
        record = _record(job, version, error=error, seconds=time.perf_counter() - start)
    _write(path, record)
    if tries is not None:
        tries.unlink(missing_ok=True)
    return key, record


def _rows(result: Any, job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = [result] if isinstance(result, Mapping) else result
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"a job returns a dict or a list of dicts, not {result!r}")
    if taken := {name for row in rows for name in row} & {*job, *OWN}:
        raise ValueError(f"results named {sorted(taken)} are columns already: rename them")
    return rows


def _record(
    job: Mapping[str, Any],
    version: str | None,
    rows: Sequence[Mapping[str, Any]] = (),
    error: str | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    record = {"job": job, "version": version, "status": "failed" if error else "done"}
    record |= {"error": error, "seconds": seconds, "rows": rows}
    # to text and back, so that a table in memory is the one that a store gives
    return json.loads(json.dumps(record, default=_number))


def _number(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy's and torch's numbers and arrays
        return value.tolist()
    raise TypeError(f"a result is a {type(value).__name__}: return numbers, text, bools and lists")


def _read(path: Path | None, field: str) -> dict[str, Any] | None:
    """The record in a file, or ``None`` where there is none or only half of one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and field in record else None


def _write(path: Path | None, record: Mapping[str, Any]) -> None:
    if path is None:
        return
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process ids repeat in a cluster
    try:
        beside.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd  # here, so that workers need not load it

    rows = [
        {**record["job"], **row, **{name: record[name] for name in OWN}}
        for record in records
        for row in record["rows"] or [{}]
    ]
    arguments = dict.fromkeys(name for record in records for name in record["job"])
    results = dict.fromkeys(name for row in rows for name in row if name not in OWN)
    columns = {}
    for name in [*arguments, *(n for n in results if n not in arguments), *OWN]:
        values = [row.get(name) for row in rows]
        # an argument of None stays None, and the whole numbers beside it stay whole
        keep = (name in arguments or name == "error") and None in values
        columns[name] = pd.Series(values, dtype=object if keep else None)
    return pd.DataFrame(columns)
