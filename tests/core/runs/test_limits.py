"""A job that never ends is ended, and no other with it."""

from __future__ import annotations

import threading
import time

import pytest

from tests.core.runs import jobs_for_tests as jobs
from toolkit.core.runs import limits
from toolkit.core.runs.limits import JobTimeout, time_limit
from toolkit.core.runs.sweep import grid, sweep


def test_a_block_that_ends_in_time_is_left_alone():
    with time_limit(5.0):
        pass
    with time_limit(None):
        pass


def test_python_code_is_interrupted_in_the_main_thread_and_in_any_other():
    with pytest.raises(JobTimeout, match=r"limit of 0\.1 s"), time_limit(0.1):
        time.sleep(30)
    caught = []

    def work():
        try:
            with time_limit(0.1):
                while True:
                    time.sleep(0.01)
        except JobTimeout as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert caught == ["it ran longer than its limit of 0.1 s"]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_job_that_never_ends_fails_and_the_rest_goes_on(tmp_path, n_jobs):
    jobs_ = grid(seed=[0, 1, 2], trouble="never ends")
    with pytest.warns(RuntimeWarning, match="1 of 3 jobs failed.*JobTimeout"):
        table = sweep(jobs.troubled, jobs_, tmp_path / "s", n_jobs=n_jobs, limit=1.0)
    assert table.status.tolist() == ["done", "failed", "done"]


def test_code_that_never_comes_back_to_python_costs_its_process_only(tmp_path):
    jobs_ = grid(seed=[0, 1, 2], trouble="hangs outside Python")
    with pytest.warns(RuntimeWarning, match="1 of 3 jobs failed.*JobTimeout: its process"):
        table = sweep(jobs.troubled, jobs_, tmp_path / "s", n_jobs=2, limit=0.5)
    assert table.status.tolist() == ["done", "failed", "done"]


def test_a_limit_must_be_a_time():
    with pytest.raises(ValueError, match="limit = 0"):
        sweep(jobs.troubled, grid(seed=[0], trouble="none"), limit=0)
    assert limits.GRACE > 0
