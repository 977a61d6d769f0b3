"""The runs of a lab: looked up where they are there, run where they are not, and nothing lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from tests.core.runs import jobs_for_tests as jobs
from toolkit.core.runs import results
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import JobsFailed, Missing, Runs

ROOT = Path(__file__).resolve().parents[3]
NOW = {"commit": "c" * 40, "versions": {"torch": "1"}, "constraints": "k", "device": "cpu"}


def code(**changed):
    """A tracer that knows one definition per function; ``changed`` gives it another hash."""
    return lambda function: {f"jobs.py:{function.__name__}": changed.get(function.__name__, "1")}


def opened(folder, known=None, hashes=None, **options):
    now = options.pop("now", NOW)
    return Runs(
        "toy", "cpu", provenance=now, code=code(**(hashes or {})), known=known,
        folder=folder, progress=False, **options,
    )  # fmt: skip


BOWLS = {"a": jobs.bowl, "b": jobs.other_bowl}


def both(runs, marks):
    return runs.table("bowls", BOWLS, grid(arm=["a", "b"], rate=0.1, seed=[0, 1], marks=str(marks)))


@pytest.fixture
def marks(tmp_path):
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def begun(marks):
    return sorted(path.name.rpartition(".")[0] for path in marks.iterdir())


def test_a_table_has_arguments_results_and_errors(tmp_path):
    with opened(tmp_path / "w") as runs:
        table = runs.table("t", jobs.troubled, grid(seed=[0, 1, 2], trouble="diverges"))
    assert table.columns.tolist() == ["seed", "trouble", "value", "curve", "bad", "error"]
    assert table.value.tolist()[0] == 0.0
    assert math.isnan(table.value[1])
    assert "not finite" in table.error[1]
    assert table.error[0] is None
    assert table.curve[0] == [0.5, None]
    assert table.bad.isna().all()
    assert results.text(runs.document() | {"claims": []})  # strict JSON takes it


def test_known_runs_are_not_run_again_and_new_ones_are(tmp_path, marks):
    with opened(tmp_path / "w") as runs:
        first = both(runs, marks)
        known = json.loads(json.dumps(runs.document()))
    assert len(begun(marks)) == runs.ran == 4
    with opened(tmp_path / "v", known) as runs:
        again = both(runs, marks)
        more = runs.table("more", jobs.bowl, grid(arm="a", rate=0.1, seed=[5], marks=str(marks)))
    assert runs.ran == 1
    assert again.equals(first)
    assert len(more) == 1


def test_changing_the_code_of_one_arm_runs_that_arm_only(tmp_path, marks):
    with opened(tmp_path / "w") as runs:
        both(runs, marks)
        known = runs.document()
    before = len(begun(marks))
    with opened(tmp_path / "v", known, {"other_bowl": "2"}) as runs:
        both(runs, marks)
    new = begun(marks)
    assert runs.ran == 2
    assert len(new) - before == 2
    assert sum(name.startswith("b-") for name in new) == 4
    assert sum(name.startswith("a-") for name in new) == 2


def test_other_versions_run_everything_again_and_another_commit_nothing(tmp_path, marks):
    with opened(tmp_path / "w") as runs:
        both(runs, marks)
        known = runs.document()
    with opened(tmp_path / "v", known, now=NOW | {"commit": "d" * 40}) as runs:
        both(runs, marks)
    assert runs.ran == 0
    assert [p["commit"] for p in runs.document()["provenance"]] == ["c" * 40]
    with opened(tmp_path / "u", known, now=NOW | {"versions": {"torch": "2"}}) as runs:
        both(runs, marks)
    assert runs.ran == 4


def test_looking_runs_nothing_and_says_what_is_missing_or_changed(tmp_path, marks):
    with opened(tmp_path / "w") as runs:
        both(runs, marks)
        known = runs.document()
    with opened(None, known, look_only=True) as runs:
        assert len(both(runs, marks)) == 4
        with pytest.raises(Missing, match="not measured"):
            runs.table("t", jobs.bowl, grid(arm="a", rate=0.2, seed=[0]))
    changed = pytest.raises(Missing, match=r"jobs\.py: bowl changed")
    with opened(None, known, {"bowl": "2"}, look_only=True) as runs, changed:
        both(runs, marks)
    changed = pytest.raises(Missing, match="constraints changed")
    other = NOW | {"constraints": "other"}
    with opened(None, known, now=other, look_only=True) as runs, changed:
        both(runs, marks)


def test_two_recordings_are_equal_byte_for_byte(tmp_path):
    texts = []
    for n_jobs in (1, 2):
        with opened(tmp_path / str(n_jobs), n_jobs=n_jobs) as runs:
            runs.table("bowls", BOWLS, grid(arm=["a", "b"], rate=[0.1, 0.2], seed=[0, 1]))
            runs.blocks("bowls", [[0], [1]])
            texts.append(results.text(runs.document()))
    assert texts[0] == texts[1]


# --- trouble --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("raises", "ArithmeticError: no answer"),
        ("dies", "WorkerDied"),
        ("never ends", "JobTimeout: it ran longer than its limit"),
        ("no number", "TypeError: a result is a object"),
        ("nested", "flat dict of numbers"),
        ("several rows", "flat dict of numbers"),
    ],
)
def test_a_job_in_trouble_is_named_and_nothing_is_lost(tmp_path, marks, trouble, words):
    wanted = grid(seed=[0, 1, 2], trouble=trouble, marks=str(marks))
    # only a death needs a process of its own; workers take seconds to start
    options = {"n_jobs": 2 if trouble == "dies" else 1, "limit": 1.0}
    with opened(tmp_path / "w", **options) as runs, pytest.raises(JobsFailed, match=words) as told:
        runs.table("t", jobs.troubled, wanted)
    assert "'seed': 1" in str(told.value)
    assert "1 of 3 jobs failed; the others are kept" in str(told.value)
    if trouble == "dies":
        return  # a pool that breaks takes seconds to start again; the rest is the same for it
    for path in marks.iterdir():
        path.unlink()
    with opened(tmp_path / "w", **options) as runs, pytest.raises(JobsFailed):
        runs.table("t", jobs.troubled, wanted)
    assert set(begun(marks)) == {"1"}  # only the one in trouble was tried again


def test_kill_9_at_any_moment_loses_nothing(tmp_path, marks):
    program = (
        "import sys; from tests.core.runs import test_measure as t; from pathlib import Path\n"
        "with t.opened(Path(sys.argv[1])) as runs: t.slow(runs, sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "w"), str(marks)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    end = time.monotonic() + 60
    while len(list((tmp_path / "w").glob("job-*.json"))) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list((tmp_path / "w").glob("job-*.json")))
    assert 3 <= kept < 16
    with opened(tmp_path / "w") as runs:
        table = slow(runs, str(marks))
    assert runs.ran == 16 - kept
    with opened(tmp_path / "fresh") as runs:
        assert slow(runs, str(marks)).equals(table)


def slow(runs, marks):
    from tests.core.runs.sweep_job import marked

    return runs.table("slow", marked, grid(x=list(range(16)), marks=marks, nap=0.2))


def test_a_damaged_record_is_named_and_measured_again(tmp_path, marks):
    with opened(tmp_path / "w") as runs:
        both(runs, marks)
        document = runs.document() | {"claims": []}
    results.write(tmp_path, document)
    path = tmp_path / "toy.cpu.json"
    whole = path.read_text()
    altered = whole.replace('"test": 1.0', '"test": 9.0', 1)
    assert altered != whole
    path.write_text(altered)
    with pytest.warns(RuntimeWarning, match=r"toy\.cpu\.json is damaged.*bowls with"):
        known = results.read(tmp_path, "toy", "cpu")
    with opened(tmp_path / "v", known) as runs:
        both(runs, marks)
    assert runs.ran == 1
    path.write_text(whole[:-40])
    with pytest.warns(RuntimeWarning, match=r"toy\.cpu\.json is damaged"):
        assert results.read(tmp_path, "toy", "cpu") is None
    path.write_text(json.dumps({"schema": 3, "slug": "toy", "scale": "cpu"}))
    with pytest.raises(ValueError, match="schema 3"):
        results.read(tmp_path, "toy", "cpu")
    path.write_text(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert results.read(tmp_path, "toy", "cpu") == document


def test_an_arm_without_a_function_is_refused(tmp_path):
    with opened(tmp_path / "w") as runs, pytest.raises(ValueError, match="no function for the arm"):
        runs.table("t", BOWLS, grid(arm="c", rate=0.1, seed=[0]))


# --- searches -------------------------------------------------------------------------------------


def search(runs, **options):
    given = {"seeds": [90, 91, 92], "reported": [0, 1], "judged": "validation", "better": "min"}
    return runs.tune("bowls", BOWLS, {"a": {}, "b": {"best": 0.3}}, {"a": 0.01, "b": 0.01},
                     **(given | options))  # fmt: skip


def test_a_search_is_kept_with_its_runs_and_their_seeds(tmp_path):
    with opened(tmp_path / "w") as runs:
        found = search(runs)
        document = runs.document()
    assert found["a"].rate == 0.01
    assert 0.2 < found["b"].rate < 0.5
    kept = document["tuning"]["bowls"]["b"]
    assert kept["seeds"] == [90, 91, 92]
    assert kept["edge"] is False
    runs_of = document["experiments"]["bowls, tuning"]["jobs"]
    assert len(runs_of) == 3 * (len(found["a"].scores) + len(found["b"].scores))
    with opened(None, document, look_only=True) as runs:
        assert search(runs) == found  # the same search, told again without a run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reported": [91]}, r"seeds \[91\] are used for tuning and for reporting"),
        ({"seeds": [90]}, "1 seeds"),
        ({"extensions": 0}, "'b'.*edge"),
        ({"nothing": -1.0}, "worse than doing nothing"),
    ],
)
def test_a_search_that_may_not_be_reported_on_is_an_error(tmp_path, options, words):
    with opened(tmp_path / "w") as runs, pytest.raises(ValueError, match=words):
        search(runs, **options)
    with opened(tmp_path / "w", strict=False) as runs:
        search(runs, **options)  # scale ci is too small to choose well, and judges nothing


def test_blocks_share_no_seed(tmp_path):
    with opened(tmp_path / "w") as runs, pytest.raises(ValueError, match="two blocks"):
        runs.blocks("t", [[0, 1], [1, 2]])


def test_a_run_of_another_lab_is_taken_over_with_its_provenance(tmp_path, marks):
    with opened(tmp_path / "w", now=NOW | {"commit": "d" * 40}) as runs:
        both(runs, marks)
        theirs = runs.document()
    first = begun(marks)
    with opened(tmp_path / "v", others=lambda: [theirs]) as runs:
        both(runs, marks)
        ours = runs.document()
        assert runs.ran == 0
    assert begun(marks) == first
    assert ours["provenance"] == theirs["provenance"]
    with opened(tmp_path / "u", others=lambda: [theirs], hashes={"bowl": "2"}) as runs:
        both(runs, marks)
        assert runs.ran == 2  # the code of one arm differs there
