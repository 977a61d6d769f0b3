"""A lab from the command to the page: measured once, told often, stale for a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.core.runs import jobs_for_tests as jobs
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs import results
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import JobsFailed, Missing
from toolkit.labs import lab as labs
from toolkit.labs.lab import Lab, StaleNumbers, two_blocks

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = two_blocks(8)
SEEDS = [seed for block in BLOCKS for seed in block]


def claim(**changes):
    given = {
        "id": "gap", "text": "The first arm does worse.", "whose": "ours", "unit": "points",
        "quantity": "first minus second", "margin": 0.5, "reason": "half a point is nothing",
        "conditions": (Condition("bowls", n=8, spread=0.1),),
    }  # fmt: skip
    return Claim(**(given | changes))


def toy(rate=0.1, claims=None, trouble="none"):
    functions = {"a": jobs.bowl, "b": jobs.other_bowl}

    def measure(runs, scale):
        runs.blocks("bowls", BLOCKS)
        runs.table("bowls", functions, [
            {"arm": arm, "rate": rate * (1 + (arm == "a") + seed % 3 / 10), "seed": seed}
            for arm in functions for seed in SEEDS
        ])  # fmt: skip
        runs.table("troubled", jobs.troubled, grid(seed=[0, 1], trouble=trouble))

    return Lab(
        slug="toy", part="lowrank", measure=measure, judge=_judge, claims=claims or (claim(),),
        facts=lambda found: [Fact("rows", "There are as many runs as were asked for.",
                                  len(found["bowls"]) == 16, 16, "runs")],
    )  # fmt: skip


def _judge(found):
    ours, theirs = (found.values("bowls", "validation", arm=arm) for arm in "ab")
    return {"gap": {"bowls": Measured(ours, theirs, blocks=found.blocks("bowls"))}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(labs.RESULTS, str(tmp_path))
    return tmp_path


def measured(lab, folder, **options):
    return labs.measure(lab, "cpu", folder=folder, n_jobs=1, progress=False, **options)


def test_a_lab_is_measured_once_and_told_from_its_results(folder, monkeypatch):
    done = measured(toy(), folder)
    assert done.ran == 18
    assert not (folder / "running").exists()
    text = (folder / "toy.cpu.json").read_text()
    again = measured(toy(), folder)
    assert again.ran == 0
    assert (folder / "toy.cpu.json").read_text() == text
    monkeypatch.setenv(labs.TELL, "1")
    found = toy().found("cpu")
    assert len(found["bowls"]) == 16
    assert found.claims["gap"]["verdict"] == "holds"
    assert found.values("bowls", "test", arm="b")[SEEDS[-1]] == SEEDS[-1]
    words = repr(found.claims_table())
    assert "The first arm does worse." in words
    assert "as many runs as were asked for" in words
    with pytest.raises(KeyError, match="no experiment 'bowl'"):
        found["bowl"]
    with pytest.raises(ValueError, match="name every argument"):
        found.values("bowls", "test")


def test_dates_and_durations_stand_apart(folder):
    measured(toy(), folder)
    document = (folder / "toy.cpu.json").read_text()
    times = results.read_times(folder, "toy", "cpu")
    assert set(times) == {"recorded", "verified", "seconds", "jobs"}
    assert len(times["jobs"]) == 18
    assert times["recorded"] not in document
    assert "seconds" not in document


def test_a_page_that_tells_never_measures(folder, monkeypatch):
    monkeypatch.setenv(labs.TELL, "1")
    with pytest.raises(StaleNumbers, match="make record NAME=toy SCALE=cpu"):
        toy().found("cpu")
    assert list(folder.iterdir()) == []


def test_a_reader_without_results_measures_and_keeps_nothing(folder):
    found = toy().found("ci")
    assert len(found["bowls"]) == 16
    assert list(folder.iterdir()) == []


def test_stale_numbers_say_why_and_fresh_ones_nothing(folder):
    assert labs.stale(toy(), "cpu", folder) == ["no results at scale cpu"]
    measured(toy(), folder)
    assert labs.stale(toy(), "cpu", folder) == []
    (reason, *_) = labs.stale(toy(rate=0.2), "cpu", folder)
    assert "not measured" in reason
    assert labs.stale(toy(claims=(claim(margin=0.7),)), "cpu", folder) == [
        "the declared claims changed"
    ]


def test_claims_are_judged_anew_without_a_run(folder):
    measured(toy(), folder)
    done = measured(toy(claims=(claim(margin=0.7),)), folder, look_only=True)
    assert done.ran == 0
    record = json.loads((folder / "toy.cpu.json").read_text())
    assert record["claims"][0]["margin"] == 0.7
    assert record["declaration"]["claims"]["gap"]["late"] is True  # it was changed after measuring
    with pytest.raises(Missing):
        measured(toy(rate=0.3), folder, look_only=True)


def test_a_lab_in_trouble_writes_no_results_and_loses_no_run(folder):
    with pytest.raises(JobsFailed, match="no answer"):
        measured(toy(trouble="raises"), folder)
    assert not (folder / "toy.cpu.json").exists()
    assert measured(toy(trouble="none"), folder).ran == 2  # the bowls are there


@pytest.mark.parametrize("n", [0, 3, 1000])
def test_blocks_are_two_halves(n):
    with pytest.raises(ValueError, match="even number"):
        two_blocks(n)
    assert two_blocks(4, 10) == [[10, 11], [410, 411]]
    assert not set(labs.search_seeds()) & {s for block in two_blocks(800) for s in block}


def test_labs_are_found_by_their_files_alone():
    assert labs.labs()["lora"] == "toolkit.labs.lowrank.lora"
    with pytest.raises(KeyError, match="no lab 'lore'"):
        labs.lab("lore")
    code = (
        "import sys; from toolkit.labs import lab; lab.labs(); "
        "print('toolkit.lowrank' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_command_measures_says_what_is_stale_and_fails_whole(folder, monkeypatch, capsys):
    from toolkit.__main__ import main

    module = types.SimpleNamespace(LAB=toy())
    monkeypatch.setattr(labs.importlib, "import_module", lambda name: module)
    assert main(["lab", "lora", "--scale", "cpu", "--jobs", "1", "--stale"]) == 0
    assert json.loads(capsys.readouterr().out) == {"lora": ["no results at scale cpu"]}
    assert main(["lab", "lora", "--scale", "cpu", "--jobs", "1"]) == 0
    assert "18 runs, 18 of them run now" in capsys.readouterr().out
    module.LAB = toy(trouble="raises")
    assert main(["lab", "lora", "--scale", "cpu", "--jobs", "1"]) == 1
    assert "no answer" in capsys.readouterr().err
    assert main(["lab", "lora", "--scale", "cpu", "--judge"]) == 1
    assert "not measured" in capsys.readouterr().err
    assert main(["lab", "lore"]) == 2
    assert "no lab 'lore'" in capsys.readouterr().err


def test_what_other_labs_measured_is_read_again_once_it_has_changed(folder, monkeypatch):
    monkeypatch.setattr(labs, "labs", lambda: {toy().slug: ""})
    labs.measure(toy(), "cpu", folder=folder, n_jobs=1)
    path = results.results_path(folder, toy().slug, "cpu")
    (before,) = labs._others("another", "cpu", folder)
    (same,) = labs._others("another", "cpu", folder)
    assert same is before
    changed = json.loads(path.read_text()) | {"claims": []}
    path.write_text(json.dumps(changed))
    os.utime(path, ns=(1, 1))
    (after,) = labs._others("another", "cpu", folder)
    assert before["claims"]
    assert after["claims"] == []
    assert list(labs._others(toy().slug, "cpu", folder)) == []
