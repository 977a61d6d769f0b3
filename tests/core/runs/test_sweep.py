"""Sweeps: one table, kept as jobs end, whatever dies on the way and wherever they run."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

from tests.core.runs import sweep_job
from toolkit.core import io
from toolkit.core.runs import pool
from toolkit.core.runs import sweep as module
from toolkit.core.runs.sweep import code_version, collect, grid, sweep

ROOT = Path(__file__).resolve().parents[3]


def same(left, right):
    """Equal but for the time it took."""
    pd.testing.assert_frame_equal(left.drop(columns="seconds"), right.drop(columns="seconds"))


def wait(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def calls(marks, x="*"):
    """How often a job began."""
    return len([path for path in marks.glob(f"{x}.*") if path.suffix != ".end"])


@pytest.fixture
def marks(tmp_path):
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


# --- grids and tables -----------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_order():
    made = grid(name="a", rate=[0.1, 0.2], seed=range(2), size=np.arange(1, 2), kept=[[1, 2]])
    pairs = [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    assert made == [
        {"name": "a", "rate": r, "seed": s, "size": 1, "kept": [1, 2]} for r, s in pairs
    ]
    assert type(made[0]["size"]) is int
    assert grid(rank=None) == [{"rank": None}]
    with pytest.raises(ValueError, match="axis rate is empty"):
        grid(seed=[0], rate=[])


@pytest.mark.timeout(60)
def test_rows_are_in_the_order_of_the_jobs_whatever_order_they_end_in(marks):
    jobs = [{"x": x, "marks": str(marks), "after": after} for x, after in ((3, 2), (1, 0), (2, 1))]
    table = sweep(sweep_job.ordered, jobs, n_jobs=2)  # the first ends last
    assert table.columns.tolist() == [
        "x",
        "marks",
        "after",
        "value",
        "turn",
        "status",
        "error",
        "seconds",
    ]
    assert table["x"].tolist() == [3, 1, 2]
    assert table["value"].tolist() == [1.0, 1 / 3, 2 / 3]
    assert table["seconds"].between(0, 50).all()


def test_seconds_are_those_of_the_job(marks):
    table = sweep(sweep_job.marked, grid(x=[1], marks=str(marks), nap=[0.0, 0.2]), n_jobs=1)
    assert table["seconds"][0] < 0.2 <= table["seconds"][1] < 10


def test_a_job_may_give_several_rows_and_numbers_of_numpy_and_torch(store):
    def curve(rank, steps):
        rows = [{"step": np.int64(i), "loss": torch.tensor(i / 2)} for i in range(steps)]
        return rows if steps > 1 else {**rows[0], "loss": float("inf"), "note": None}

    table = sweep(curve, [{"rank": None, "steps": 2}, {"rank": 4, "steps": 1}], n_jobs=1)
    assert table["step"].tolist() == [0, 1, 0]
    assert table["loss"].tolist() == [0.0, 0.5, float("inf")]
    assert table["rank"].tolist() == [None, None, 4]
    assert table["error"].tolist() == [None] * 3
    kept = sweep(curve, grid(rank=[None, 4], steps=[2, 1]), store, n_jobs=1, version="1")
    same(collect(store), kept)


def test_memory_and_store_give_the_same_table(store):
    jobs = grid(x=[3, 1, 2], scale=[0.1, 1e300 * 1e10])
    table = sweep(sweep_job.square, jobs, n_jobs=1)
    same(table, sweep(sweep_job.square, jobs, store, n_jobs=1))
    same(table, sweep(sweep_job.square, jobs, store, n_jobs=1))
    same(table, collect(store))


# --- the store ------------------------------------------------------------------------------------


def test_done_jobs_are_not_run_again_and_a_grid_may_grow(store, marks):
    jobs = grid(x=[2, 1], marks=str(marks))
    first = sweep(sweep_job.marked, jobs, store, n_jobs=1)
    again = sweep(sweep_job.marked, jobs, store, n_jobs=1)
    pd.testing.assert_frame_equal(first, again)  # seconds too: they are those of the first time
    assert calls(marks) == 2
    swapped = [dict(reversed(job.items())) for job in jobs]  # order of arguments is no difference
    sweep(sweep_job.marked, swapped, store, n_jobs=1)
    assert calls(marks) == 2
    grown = sweep(sweep_job.marked, grid(x=[0, 1], marks=str(marks)), store, n_jobs=1)
    assert grown["x"].tolist() == [0, 1]
    assert calls(marks) == 3
    assert collect(store)["x"].tolist() == [2, 1, 0]


def test_arguments_of_another_type_are_another_job(store):
    table = sweep(sweep_job.square, [{"x": 1}, {"x": 1.0}, {"x": True}], store, n_jobs=1)
    assert len(list(store.glob("job-*.json"))) == len(table) == 3


def test_a_job_file_says_what_it_is(store):
    sweep(sweep_job.square, [{"x": 3}], store, n_jobs=1)
    (path,) = set(store.iterdir()) - {store / "store.json"}
    record = json.loads(path.read_text())
    assert record["job"] == {"x": 3}
    assert record["rows"] == [{"value": 9.0, "even": False}]
    assert record["version"] == code_version(sweep_job.square)
    assert str(ROOT) not in (store / "store.json").read_text()


def test_a_half_written_file_counts_as_not_done(store, marks):
    jobs = grid(x=[0, 1, 2], marks=str(marks))
    table = sweep(sweep_job.marked, jobs, store, n_jobs=1)
    paths = sorted(store.glob("job-*.json"))
    whole = paths[0].read_text()
    paths[0].write_text(whole[: len(whole) // 2])
    paths[1].write_text("[]")
    assert len(collect(store)) == 1
    same(sweep(sweep_job.marked, jobs, store, n_jobs=1), table)
    assert calls(marks) == 5
    same(collect(store), table)


def test_a_write_that_fails_ends_the_sweep_and_leaves_no_half_file(store, monkeypatch):
    def full(beside, path):
        raise OSError("no space left on device")

    sweep(sweep_job.square, [{"x": 1}], store, n_jobs=1)
    before = sorted(path.name for path in store.glob("*.json*"))
    monkeypatch.setattr(io.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        sweep(sweep_job.square, [{"x": 1}, {"x": 2}], store, n_jobs=1)
    names = {path.name for path in store.iterdir() if path.suffix != ".tries"}
    assert sorted(names) == before


def test_a_relative_folder_is_where_the_sweep_began(tmp_path, marks, monkeypatch):
    def stray(x):
        os.chdir(marks)
        return {"value": x}

    monkeypatch.chdir(tmp_path)
    table = sweep(stray, grid(x=[1, 2]), "store", n_jobs=1, version="1")
    same(collect(tmp_path / "store"), table)


def test_no_store_is_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no readable store\.json"):
        collect(tmp_path)


# --- code -----------------------------------------------------------------------------------------


def load(path, text):
    """A module from a file, as if it had just been edited and imported anew."""
    path.write_bytes(text.encode())
    spec = importlib.util.spec_from_file_location("edited", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_a_store_of_other_code_is_refused_and_the_file_named(store, tmp_path, monkeypatch):
    path = tmp_path / "edited.py"
    text = "def job(x):\n    return {'value': x}\n"
    sweep(load(path, text).job, [{"x": 1}], store, n_jobs=1)
    windows = load(path, text.replace("\n", "\r\n")).job
    sweep(windows, [{"x": 1}], store, n_jobs=1)  # line endings are no change

    before = {file.name: file.read_bytes() for file in store.iterdir()}
    changed = load(path, text.replace("'value': x", "'value': x + 1")).job
    with pytest.raises(ValueError, match=r"other code \(edited\.py changed\).*another folder.*acc"):
        sweep(changed, [{"x": 1}, {"x": 2}], store, n_jobs=1)
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before

    table = sweep(changed, [{"x": 1}, {"x": 2}], store, n_jobs=1, accept_other_code=True)
    assert table["value"].tolist() == [1, 3]  # the old result, as asked, and a new one
    versions = {json.loads(p.read_text())["version"] for p in store.glob("job-*.json")}
    assert len(versions) == 2


def test_a_change_of_the_toolkit_is_named_and_counted(store, tmp_path, monkeypatch):
    fake = tmp_path / "toolkit"
    fake.mkdir()
    for i in range(8):
        (fake / f"part{i}.py").write_text(f"{i}")
    monkeypatch.setattr(module, "TOOLKIT", fake)
    sweep(sweep_job.square, [{"x": 1}], store, n_jobs=1)
    (fake / "part3.py").write_text("3 # a word")
    (fake / "part4.py").unlink()
    (fake / "part9.py").write_text("9")
    words = r"toolkit/part3\.py changed, toolkit/part9\.py is new, toolkit/part4\.py is gone\)"
    with pytest.raises(ValueError, match=words):
        sweep(sweep_job.square, [{"x": 1}], store, n_jobs=1)
    for i in range(8):
        (fake / f"part{i}.py").write_text("all")
    with pytest.raises(ValueError, match=r"part4\.py changed and 4 more\)"):
        sweep(sweep_job.square, [{"x": 1}], store, n_jobs=1)


def test_the_real_version_covers_the_toolkit_and_the_functions_own_file():
    files = module._files(sweep_job.square)
    assert {
        "toolkit/__init__.py",
        "toolkit/core/runs/sweep.py",
        "tests/core/runs/sweep_job.py",
    } <= set(files)
    assert code_version(sweep_job.square) == code_version(sweep_job.marked)
    assert code_version(sweep_job.square) != code_version(grid)


def test_a_decorated_function_is_known_by_its_own_file(tmp_path):
    decorator = "import functools\ndef wrap(f):\n    return functools.wraps(f)(lambda x: f(x))\n"
    wrap = load(tmp_path / "decorator.py", decorator).wrap
    path = tmp_path / "edited.py"
    versions = {
        code_version(wrap(load(path, f"def job(x):\n    return {{'value': {i}}}\n").job))
        for i in range(2)
    }
    assert len(versions) == 2


def test_another_function_is_refused_even_where_other_code_is_accepted(store):
    sweep(sweep_job.square, [{"x": 1}], store, n_jobs=1)
    with pytest.raises(ValueError, match=r"sweep_job\.square, not of .*sweep_job\.marked"):
        sweep(sweep_job.marked, [{"x": 1}], store, n_jobs=1, accept_other_code=True)


def test_a_version_by_name_takes_the_place_of_files(store, marks):
    def local(x):
        (marks / f"{x}.{time.monotonic_ns()}").touch()
        return {"value": x}

    for function in (local, lambda x: {"value": x}):
        with pytest.raises(ValueError, match=r"may carry values.*version='1'"):
            sweep(function, [{"x": 1}], store, n_jobs=1)
    assert not store.exists()
    for _ in range(2):
        sweep(local, [{"x": 1}], store, n_jobs=1, version="1")
    assert calls(marks) == 1
    with pytest.raises(ValueError, match="version '1', now '2'"):
        sweep(local, [{"x": 1}], store, n_jobs=1, version="2")


def test_source_that_cannot_be_found(store):
    space = {"__name__": "nowhere"}
    exec("def job(x):\n    return {'value': x}", space)
    with pytest.raises(ValueError, match=r"source of job cannot be found.*version='1'"):
        sweep(space["job"], [{"x": 1}], store, n_jobs=1)
    assert sweep(space["job"], [{"x": 1}], n_jobs=1)["value"].tolist() == [1]  # nothing is kept


def test_a_function_of_a_notebook_is_known_by_its_own_text(monkeypatch):
    space = {"__name__": "__main__"}
    exec("def job(x):\n    return {'value': x}", space)
    versions = set()
    for text in ("one", "two"):
        monkeypatch.setattr(inspect, "getsource", lambda function, text=text: text)
        monkeypatch.setattr(inspect, "getsourcefile", lambda function: "/no/such/cell.py")
        versions.add(code_version(space["job"]))
    assert len(versions) == 2


def test_results_without_their_store_file_are_refused(store):
    sweep(sweep_job.square, [{"x": 1}], store, n_jobs=1)
    (store / "store.json").write_text("{")
    with pytest.raises(ValueError, match="version 'unknown'"):
        sweep(sweep_job.square, [{"x": 1}], store, n_jobs=1)
    sweep(sweep_job.square, [{"x": 1}], store, n_jobs=1, accept_other_code=True)
    assert len(collect(store)) == 1


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "kind", "words"),
    [
        ([], ValueError, "jobs is empty"),
        ([{"x": 1}, [("x", 1)]], TypeError, r"jobs\[1\].*not a dict"),
        ([{1: 2}], TypeError, r"jobs\[0\].*by name"),
        ([{"x": 1}, {"x": np.int64(1)}], TypeError, r"jobs\[1\]\['x'\] is a int64"),
        ([{"x": [1, (2, {3})]}], TypeError, r"jobs\[0\]\['x'\] is a list, or holds"),
        ([{"x": {"a": 1}}], TypeError, r"jobs\[0\]\['x'\] is a dict"),
        ([{"x": 1, "seconds": 1}], ValueError, r"jobs\[0\] has 'seconds'"),
        ([{"x": 1, "y": 2}, {"y": 2, "x": 1}], ValueError, r"jobs\[1\] is there twice"),
        ([{"x": (1, 2)}, {"x": [1, 2]}], ValueError, r"jobs\[1\] is there twice"),
    ],
)
def test_bad_jobs_are_refused_before_anything_is_written(store, jobs, kind, words):
    with pytest.raises(kind, match=words):
        sweep(sweep_job.square, jobs, store, n_jobs=1)
    assert not store.exists()


def test_a_function_without_a_name_is_refused():
    from functools import partial

    with pytest.raises(TypeError, match="no name"):
        sweep(partial(sweep_job.square, scale=2), [{"x": 1}], n_jobs=1)


# --- failures -------------------------------------------------------------------------------------


def test_failures_are_recorded_and_the_rest_goes_on(store, marks):
    jobs = grid(x=[0, 1, 2], marks=str(marks), bad=1)
    with pytest.warns(RuntimeWarning, match=r"1 of 3 jobs failed.*'x': 1.*ArithmeticError: no ans"):
        table = sweep(sweep_job.marked, jobs, store, n_jobs=2)
    assert table["status"].tolist() == ["done", "failed", "done"]
    assert table["error"][0] is None
    error = table["error"][1]
    assert error.startswith("ArithmeticError: no answer for 1\n")
    assert "raise ArithmeticError" in error
    assert "sweep.py" not in error  # the job's own lines only
    assert np.isnan(table["value"][1])
    assert table["value"].dtype == float

    with pytest.warns(RuntimeWarning):
        sweep(sweep_job.marked, jobs, store, n_jobs=1)
    assert [calls(marks, x) for x in range(3)] == [1, 2, 1]  # only the failed one again
    with pytest.warns(RuntimeWarning):
        same(sweep(sweep_job.marked, jobs, store, n_jobs=1, retry=False), table)
    assert calls(marks) == 4


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (1.0, "TypeError: a job returns a dict or a list of dicts, not 1.0"),
        ([1], "TypeError: a job returns"),
        ({"value": object()}, "TypeError: a result is a object"),
        ({"x": 2}, r"ValueError: results named \['x'\]"),
        ([{}, {"status": 2}], r"ValueError: results named \['status'\]"),
    ],
)
def test_a_result_that_fits_no_table_is_a_failure(result, words):
    with pytest.warns(RuntimeWarning, match=words):
        table = sweep(lambda x: result, [{"x": 1}], n_jobs=1)
    assert table["status"].tolist() == ["failed"]


def test_half_a_character_in_a_result_or_an_argument_costs_no_table(store):
    table = sweep(lambda x: {"name": "\ud800é"}, [{"x": "\udcff"}], store, version="1", n_jobs=1)
    assert table["name"].tolist() == ["?é"]
    same(collect(store), table)


def test_a_job_that_exits_is_a_failure_but_an_interrupt_goes_through(store):
    def leave(x):
        sys.exit("usage: ...")

    with pytest.warns(RuntimeWarning, match="SystemExit: usage"):
        sweep(leave, [{"x": 1}], n_jobs=1)

    def stop(x):
        if x:
            raise KeyboardInterrupt
        return {"value": x}

    with pytest.raises(KeyboardInterrupt):
        sweep(stop, grid(x=[0, 1, 2]), store, n_jobs=1, version="1")
    assert collect(store)["x"].tolist() == [0]


def test_the_bar_is_on_stderr_and_only_when_asked_for(capfd):
    sweep(sweep_job.square, grid(x=[1, 2]), n_jobs=1)
    assert capfd.readouterr() == ("", "")
    sweep(sweep_job.square, grid(x=[1, 2]), n_jobs=1, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err


def test_joblibs_own_settings_hold(marks):
    jobs = grid(x=[1, 2, 3, 4], marks=str(marks), nap=0.1)

    def workers():
        found = {path.name.split(".")[1] for path in marks.iterdir()}
        for path in marks.iterdir():
            path.unlink()
        return found

    with joblib.parallel_config(backend="threading", n_jobs=2):
        sweep(sweep_job.marked, jobs)
    assert workers() == {str(os.getpid())}
    with joblib.parallel_config(backend="loky", n_jobs=1):
        sweep(sweep_job.marked, jobs)
    assert workers() == {str(os.getpid())}
    with joblib.parallel_config(backend="loky", n_jobs=2):
        sweep(sweep_job.marked, jobs)
    found = workers()
    assert found
    assert str(os.getpid()) not in found


def test_by_default_there_is_a_process_per_core(monkeypatch):
    asked = []

    class Spy(joblib.Parallel):
        def __init__(self, n_jobs, **rest):
            asked.append((n_jobs, rest["return_as"]))
            super().__init__(1, **rest)

    monkeypatch.setattr(pool.joblib, "Parallel", Spy)
    sweep(sweep_job.square, [{"x": 1}])
    assert asked == [(-1, "generator_unordered")]


# --- deaths ---------------------------------------------------------------------------------------


def test_a_sweep_goes_on_after_kill_9(store, marks):
    jobs = grid(x=list(range(12)), marks=str(marks), nap=0.3)
    program = (
        "import sys, json; from tests.core.runs import sweep_job; "
        "from toolkit.core.runs.sweep import sweep; "
        "sweep(sweep_job.marked, json.loads(sys.argv[1]), sys.argv[2], n_jobs=2)"
    )
    command = [sys.executable, "-c", program, json.dumps(jobs), str(store)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        wait(lambda: len(list(store.glob("job-*.json"))) >= 3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.1)
    done = {json.loads(path.read_text())["job"]["x"] for path in store.glob("job-*.json")}
    assert 3 <= len(done) < 12  # killed in the middle
    before = {x: calls(marks, x) for x in range(12)}

    table = sweep(sweep_job.marked, jobs, store, n_jobs=2)
    assert table["status"].eq("done").all()
    assert table["x"].tolist() == list(range(12))
    for x in range(12):
        assert calls(marks, x) == before[x] + (x not in done), x
    for path in marks.iterdir():
        path.unlink()
    same(table, sweep(sweep_job.marked, jobs, n_jobs=2))


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "store"])
def test_a_job_that_kills_its_process_fails_and_no_other(store, marks, kept):
    jobs = grid(x=list(range(8)), marks=str(marks), killer=5)
    with pytest.warns(RuntimeWarning, match=r"1 of 8 jobs failed.*'x': 5.*WorkerDied"):
        table = sweep(sweep_job.deadly, jobs, store if kept else None, n_jobs=2)
    assert table["status"].tolist() == ["done"] * 5 + ["failed"] + ["done"] * 2
    assert calls(marks, 5) == 3
    assert table["value"].drop(5).tolist() == [0, 1, 2, 3, 4, 6, 7]
    if kept:
        same(table, collect(store))
        with pytest.warns(RuntimeWarning, match="1 of 8"):  # what failed before is tried anew
            sweep(sweep_job.deadly, jobs, store, n_jobs=2)
        assert calls(marks, 5) == 6
        assert calls(marks) == sum(calls(marks, x) for x in range(8))


def test_a_process_killed_once_costs_nothing(marks):
    jobs = grid(x=list(range(8)), marks=str(marks), killer=2, once=True)
    table = sweep(sweep_job.deadly, jobs, n_jobs=2)
    assert table["status"].eq("done").all()
    assert table["value"].tolist() == list(range(8))
    assert calls(marks, 2) == 2


def test_several_callers_of_one_store_take_no_job_for_dead(store, marks):
    jobs, tables = grid(x=[1, 2], marks=str(marks), nap=0.3), []

    def call():
        tables.append(sweep(sweep_job.marked, jobs, store, n_jobs=1, progress=False))

    callers = [threading.Thread(target=call) for _ in range(pool.TRIES + 2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert calls(marks, 1) > pool.TRIES  # more have begun it than one caller may
    assert len(tables) == len(callers)
    for table in [*tables, collect(store)]:
        assert table["status"].tolist() == ["done", "done"]
        assert table["value"].tolist() == [1 / 3, 2 / 3]
    assert not list(store.glob("*.tries"))


def test_what_ended_unheard_of_is_taken_from_the_store(store, marks, monkeypatch):
    class KilledWorker(Exception):
        pass

    class Mute:
        def __init__(self, *args, **rest):
            pass

        def __call__(self, tasks):
            for function, args, rest in tasks:
                function(*args, **rest)
            raise KilledWorker

    monkeypatch.setattr(pool.joblib, "Parallel", Mute)
    table = sweep(sweep_job.marked, grid(x=[1, 2, 3], marks=str(marks)), store)
    assert table["value"].tolist() == [1 / 3, 2 / 3, 1]
    assert calls(marks) == 3


def test_what_cannot_be_sent_to_a_worker_is_raised():
    lock = threading.Lock()
    with pytest.raises(Exception, match="pickle"):
        sweep(lambda x: {"value": lock.locked()}, grid(x=[1, 2]), n_jobs=2)


# --- beyond one machine ---------------------------------------------------------------------------


@pytest.fixture
def local(marks, tmp_path):
    """The small grid, one of its jobs bad, and its table from processes of this machine."""
    jobs = grid(x=list(range(12)), marks=str(marks), nap=0.3, bad=7)
    with pytest.warns(RuntimeWarning, match="1 of 12"):
        table = sweep(sweep_job.marked, jobs, tmp_path / "local", n_jobs=2)
    for path in marks.iterdir():
        path.unlink()
    return jobs, table


@contextlib.contextmanager
def dask_cluster(workers):
    pytest.importorskip("distributed")
    import dask
    from distributed import Client, LocalCluster

    quiet = {"host": "127.0.0.1", "dashboard_address": None, "silence_logs": logging.CRITICAL}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 100}),
        LocalCluster(n_workers=workers, threads_per_worker=1, **quiet) as cluster,
        Client(cluster) as client,
        joblib.parallel_config(backend="dask"),
    ):
        yield client


@pytest.mark.weekly  # every run: the Dask test after this one
@pytest.mark.timeout(120)
def test_a_job_that_kills_each_dask_worker_fails_and_no_other(store, marks):
    with dask_cluster(2), pytest.warns(RuntimeWarning, match=r"1 of 8.*'x': 2.*WorkerDied"):
        table = sweep(sweep_job.deadly, grid(x=list(range(8)), marks=str(marks), killer=2), store)
    assert calls(marks, 2) == 3
    assert table["status"].drop(2).eq("done").all()
    same(table, collect(store))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_dask_with_a_worker_killed_in_the_middle_gives_the_same_table(store, marks, local):
    jobs, table = local
    killed = []

    def running():
        ended = {path.stem for path in marks.glob("*.end")}
        begun = [path for path in marks.iterdir() if path.suffix != ".end"]
        begun = [p for p in begun if p.stem not in ended and not p.name.startswith("7.")]
        return sorted(begun, key=lambda path: path.stat().st_mtime_ns)

    def kill():
        wait(lambda: len(list(store.glob("job-*.json"))) >= 3)
        wait(running)
        killed.extend(running()[-1].name.split("."))  # it has the most time left
        os.kill(int(killed[1]), signal.SIGKILL)

    with dask_cluster(4) as client:
        workers = set(client.run(os.getpid).values())
        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.warns(RuntimeWarning, match="1 of 12"):
            got = sweep(sweep_job.marked, jobs, store)
        thread.join()
    x, pid, _ = killed
    assert int(pid) in workers
    assert calls(marks, x) == 2  # it had begun on the dead worker and began anew on another
    assert len({path.name.split(".")[1] for path in marks.iterdir()}) >= 4
    same(got, table)
    same(collect(store), table)


@pytest.mark.weekly
@pytest.mark.timeout(120)
def test_ray_gives_the_same_table(store, marks, local, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    register_ray = pytest.importorskip("ray.util.joblib").register_ray
    jobs, table = local
    scratch = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it, their names are limited
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        _temp_dir=scratch,
    )
    try:
        register_ray()
        with joblib.parallel_config(backend="ray"), pytest.warns(RuntimeWarning, match="1 of 12"):
            got = sweep(sweep_job.marked, jobs, store)
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
    workers = {path.name.split(".")[1] for path in marks.iterdir()}
    assert workers
    assert str(os.getpid()) not in workers  # not quietly in this process
    same(got, table)
    same(collect(store), table)


# --- jobs that end in other ways, or change their process ---------------------------------------


ENDS = {
    "mute": "Mute: (its text cannot be told: SystemExit)",
    "stuck": "Stuck: stuck",
    "foreign": "Foreign: from elsewhere",
    "cancelled": "CancelledError",
    "interrupted": "KeyboardInterrupt",
    "long": "ValueError: xxx",
    "half": "ValueError: \\udc80",
    "gone": "WorkerDied",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_job_that_ends_in_any_way_fails_and_no_other(store, how):
    jobs = grid(x=[0, 1, 2], how=how)
    with pytest.warns(RuntimeWarning, match="1 of 3 jobs failed"):
        table = sweep(sweep_job.ending, jobs, store, version="1", n_jobs=2)
    assert table["status"].tolist() == ["done", "failed", "done"]
    assert table["error"][1].startswith(ENDS[how])
    assert len(table["error"][1]) < 20_000
    # an interrupt says nothing about its job, so none is kept
    assert len(collect(store)) == (2 if how == "interrupted" else 3)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_what_a_job_changed_of_its_process_is_put_back(n_jobs):
    here = os.getcwd()
    table = sweep(sweep_job.ending, grid(x=[1, 0, 2], how="moved"), version="1", n_jobs=n_jobs)
    assert table["folder"].tolist() == ["/", here, here]
    assert table["talks"].tolist() == [False, True, True]
    assert os.getcwd() == here


@pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
def test_a_job_may_have_data_loaders_with_workers(backend):
    with joblib.parallel_config(backend=backend):
        table = sweep(sweep_job.loading, grid(x=[0, 1]), version="1", n_jobs=2)
    assert table["total"].tolist() == [6.0, 10.0]


@pytest.mark.parametrize("change", [{"rows": None}, {"job": 3}, {"rows": [3]}, {"status": "odd"}])
def test_a_file_that_is_no_record_counts_as_none(store, marks, change):
    jobs = grid(x=[1, 2], marks=str(marks))
    table = sweep(sweep_job.marked, jobs, store, n_jobs=1)
    path = sorted(store.glob("job-*.json"))[0]
    kept = json.loads(path.read_text())
    del kept["check"]
    for record in (kept | change, {k: v for k, v in kept.items() if k not in change}):
        path.write_text(json.dumps(record))
        with pytest.warns(RuntimeWarning, match="is damaged"):
            again = sweep(sweep_job.marked, jobs, store, n_jobs=1)
        pd.testing.assert_frame_equal(again.drop(columns="seconds"), table.drop(columns="seconds"))
