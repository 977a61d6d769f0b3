"""One pool for many jobs: over joblib, so here or on Dask or Ray, whoever dies on the way."""

from __future__ import annotations

import os
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
from joblib.parallel import get_active_backend

from toolkit.core.runs import store
from toolkit.core.runs.around import job_in_process, words_of
from toolkit.core.runs.jobs import record_of, rows_of
from toolkit.core.runs.limits import JobTimeout, time_limit

TRIES = 3
DIED = "WorkerDied: the process that ran this job died each time"
PROCESS = uuid.uuid4().hex  # tells this process from a worker whose number is the same elsewhere
# How loky, Dask and Ray say that a worker is gone; by name, so that none has to be installed.
GONE = {"TerminatedWorkerError", "KilledWorker", "RayActorError", "WorkerCrashedError"}


@dataclass(frozen=True)
class Task:
    """One job on its way to a worker.

    Args:
        function: called with the job's arguments.
        job: arguments by name.
        path: where its record goes; None keeps it in memory only.
        version: names the code in the record.
        limit: seconds it may take; None for no limit.
        threads: PyTorch threads while it runs; None leaves them as they are.
        caller: who started it, so that callers of one store count their tries apart.
        home: the caller's process, which must not be ended for a job's sake.
        plain: whether arguments and results are made plain data, as a file takes it; without, they
            stay the objects they are, in memory only.
    """

    function: Callable[..., Any]
    job: Mapping[str, Any]
    path: Path | None = None
    version: str | None = None
    limit: float | None = None
    threads: int | None = None
    caller: str = ""
    home: str = PROCESS
    plain: bool = True

    @property
    def tries(self) -> Path | None:
        """The file that counts how often this caller has started the job."""
        return None if self.path is None else self.path.with_suffix(f".{self.caller}.tries")


def run_all(
    tasks: Mapping[str, Task], n_jobs: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield key and record of each task as it ends. Where a pool breaks, a new one goes on.

    A job that raises, or ends by its time limit, has a record that says so. So has a job whose
    process dies: it is tried again, the last time alone, to tell it from jobs beside it.

    Args:
        tasks: by key.
        n_jobs: at once; None takes what ``joblib.parallel_config`` says, else all cores.
    """
    backend, context = get_active_backend()
    if n_jobs is None:
        # unset would mean one job at a time in this process, also under Ray
        n_jobs = -1 if context is None else context
    # Ray's backend cannot hand results over one by one
    one_by_one = getattr(backend, "supports_return_generator", False)
    order = "generator_unordered" if one_by_one else "list"
    left = dict(tasks)
    breaks: Counter[str] = Counter()
    while left:
        # the last try is made alone, to tell a killer from the jobs that ran beside it
        alone = [key for key in left if breaks[key] == TRIES - 1][:1]
        sent: list[str] = []
        batch = (
            sent.append(key) or joblib.delayed(run)(key, left[key])  # type: ignore[func-returns-value]
            for key in alone or [*left]
        )
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
                task = left[key]
                record = store.record(task.path)  # it may have ended without being heard of
                if record is None and alone:
                    record = record_of(task.job, task.version, error=DIED)
                    store.write(task.path, record)
                if record is not None:
                    del left[key]
                    yield key, record
    for task in tasks.values():
        if task.tries is not None:
            task.tries.unlink(missing_ok=True)


def run(key: str, task: Task) -> tuple[str, dict[str, Any]]:
    """One job, in its worker: its record is in the store before the caller hears of it."""
    there = store.record(task.path)
    if there is not None and (there["status"] == "done" or there.get("caller") == task.caller):
        return key, there  # another caller of this store has been quicker
    if task.tries is not None:  # counted here, since Dask tries a job again without a word
        with task.tries.open("ab") as file:
            file.write(b".")
            count = file.tell()
        if count > TRIES:
            record = record_of(task.job, task.version, error=DIED)
            store.write(task.path, record)
            return key, record
    start, kept = time.perf_counter(), True

    def failed(error: str) -> dict[str, Any]:
        seconds = time.perf_counter() - start
        job = task.job if task.plain else {}
        return record_of(job, task.version, error=error, seconds=seconds)

    def last_words() -> None:
        error = failed(f"JobTimeout: its process was ended, past its limit of {task.limit:g} s")
        store.write(task.path, error | {"caller": task.caller})

    try:
        if task.threads is not None:
            _set_threads(task.threads)
        alone = task.home != PROCESS
        with job_in_process(), time_limit(task.limit, last_words if alone else None):
            result = task.function(**task.job)
        seconds = time.perf_counter() - start
        rows = rows_of(result, task.job) if task.plain else [result]
        if task.plain:
            record = record_of(task.job, task.version, rows=rows, seconds=seconds)
        else:
            record = {"status": "done", "error": None, "rows": rows, "seconds": seconds}
    except JobTimeout as caught:
        record = failed(f"JobTimeout: {caught}")
    except KeyboardInterrupt as caught:
        if task.home == PROCESS:
            raise  # the caller's own
        # a signal, which says nothing about the job: no file, so that it runs again next time
        record, kept = failed(words_of(caught)), False
    except BaseException as caught:  # sys.exit() or a cancelled task would end the caller too
        inner = caught.__traceback__.tb_next
        tail = "".join(traceback.format_tb(inner, limit=-3))
        record = failed(f"{words_of(caught)}\n{tail}".rstrip())
    if kept:
        store.write(task.path, record)
    if task.tries is not None:
        task.tries.unlink(missing_ok=True)
    return key, record


def _set_threads(count: int) -> None:
    """Threads of PyTorch in this process, now or where a job is the first to import it.

    Importing it here would take seconds in each worker, also for jobs that do without.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    else:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)


def new_caller() -> str:
    """A name for one call, unlike any other on any machine."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
