"""The budgets of processor time: an overrun fails the run, alone and over several processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests import budgets

ROOT = Path(__file__).resolve().parent.parent
TABLE = """
[tool.pytest.ini_options]
addopts = "--import-mode=importlib"
[tool.motion.budgets]
calibration = 1000
contracts = 30
own = 30
page = 30
chapter = 30
file = 30
total = 60
"""
# burns exactly what it says, however slow the machine is
BURN = """
import subprocess, sys, time
def burn(seconds):
    begun = time.process_time()
    while time.process_time() - begun < seconds:
        pass
"""
FILES = {
    "toolkit/lowrank/lora.py": "",
    "tests/lowrank/test_lora.py": BURN + "def test_own():\n    burn(0.1)\n",
    "tests/lowrank/test_lora_files.py": BURN + "def test_own():\n    burn(0.1)\n",
    "tests/lowrank/test_growth.py": "def test_quick():\n    pass\n",
    "tests/contracts/test_contracts.py": BURN
    + "import os, pytest\n"
    + "@pytest.mark.parametrize('slug', 'aabb', ids=['x-a-r-0', 'y-a-r-0', 'x-b-r-0', 'y-b-r-0'])\n"
    + "def test_contract(slug):\n"
    + "    print(slug, os.getpid(), file=open('processes.txt', 'a'))\n"
    + "    burn(0.1 if slug == 'a' else 0)\n",
    "tests/core/test_child.py": BURN
    + "import pathlib\n"
    + "def test_child():\n"
    + "    program = pathlib.Path(__file__).read_text().partition('import pathlib')[0]\n"
    + "    subprocess.run([sys.executable, '-c', program + 'burn(0.1)'], check=True)\n",
}


@pytest.fixture
def toy(tmp_path):
    """Runs a small project's tests under budgets; returns exit code and report."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(*lines: str, options: tuple[str, ...] = ()):
        table = TABLE
        for line in lines:
            key = line.partition(" ")[0]
            if re.search(rf"^{key} = ", table, re.MULTILINE):
                table = re.sub(rf"^{key} = .*$", line, table, flags=re.MULTILINE)
            else:
                table += line + "\n"
        (tmp_path / "pyproject.toml").write_text(table)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "tests.budgets", *options, "tests"],
            cwd=tmp_path,
            env={
                **kept,
                "PYTHONPATH": str(ROOT),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "TEST_BUDGETS": "1",
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


ONE, TWO = (), ("-p", "xdist", "-n", "2", "--dist", "loadgroup")
TIGHT = {
    "own = 0.15": "own tests of lora",
    "contracts = 0.05": "contracts of a",
    "file = 0.05": "file tests/core/test_child.py",
    "total = 0.3": "total tests",
}


def test_a_run_within_its_budgets_passes_and_tells_where_the_time_went(toy, tmp_path):
    code, said = toy(options=TWO)
    assert code == 0, said
    assert "OVER BUDGET" not in said
    lines = re.findall(r"([\d.]+) s of +[\d.]+  (.+)", said)
    found = {name: float(seconds) for seconds, name in lines}
    assert found["own tests of lora"] >= 0.2  # two files of one method
    assert found["contracts of a"] >= 0.1
    assert found["contracts of b"] < found["contracts of a"]
    assert found["total tests"] >= 0.4  # the child process counts
    assert re.search(r"4 tests  tests/contracts\b", said), said
    pairs = (tmp_path / "processes.txt").read_text().splitlines()
    assert len(pairs) == 4
    assert len(set(pairs)) == 2, f"the contracts of a method ran in several processes: {pairs}"


@pytest.mark.parametrize("options", [ONE, TWO], ids=["alone", "two"])
def test_an_overrun_fails_the_run_and_is_named(toy, options):
    code, said = toy(*TIGHT, options=options)
    assert code == 1, said
    assert sorted(re.findall(r"OVER BUDGET: (.+?) took", said)) == sorted(TIGHT.values())
    assert " failed" not in said  # every test passed


def test_an_exception_lifts_one_budget_and_a_slow_machine_all(toy):
    given = [{"name": name, "seconds": 20, "reason": "a toy"} for name in [*TIGHT.values()][:-1]]
    words = ", ".join(
        "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in one.items()) + "}" for one in given
    )
    code, said = toy(*TIGHT, f"exceptions = [{words}]")
    assert code == 1, said
    assert re.findall(r"OVER BUDGET: (.+?) took", said) == ["total tests"]
    code, said = toy(*TIGHT, "calibration = 1e-9", options=TWO)
    assert code == 0, said


def test_the_fixed_work_is_done_again_and_again_and_is_no_tests_own(toy, tmp_path):
    (tmp_path / "conftest.py").write_text(
        "from tests import budgets\n"
        "budgets.EVERY = 0\n"
        "budgets.calibrate = lambda: sum(range(2 * 10**6)) and PACES.pop(0)\n"
        "PACES = [9.0, 3.0, 2.0] + 99 * [3.0]\n"
    )
    code, said = toy("calibration = 2", "own = 0.2")
    assert code == 0, said
    assert "budgets x 1.50 for this machine" in said


def test_a_failing_test_stays_a_failure(toy, tmp_path):
    (tmp_path / "tests/core/test_child.py").write_text("def test_bad():\n    assert False\n")
    code, said = toy(*TIGHT)
    assert code == 1
    assert "1 failed" in said
    assert "OVER BUDGET" in said


def test_an_exception_needs_a_reason(tmp_path):
    file = tmp_path / "pyproject.toml"
    for reason, sound in (("two files", True), (" ", False)):
        one = f'{{name = "own tests of lora", seconds = 20, reason = "{reason}"}}'
        file.write_text(f"{TABLE}exceptions = [{one}]\n")
        if sound:
            table = budgets.Table.read(file)
            assert table.limit("own tests of lora") == 20
            assert table.limit("own tests of adalora") == 30
        else:
            with pytest.raises(pytest.UsageError, match="needs a reason"):
                budgets.Table.read(file)


def test_the_environment_moves_or_lifts_the_limits(tmp_path, monkeypatch):
    file = tmp_path / "pyproject.toml"
    file.write_text(TABLE)
    run = budgets.Budgets(mock.Mock(spec=["option"]), budgets.Table.read(file))
    run.factor = 1.5
    for wish, limit in (("1", 45.0), ("2", 90.0), ("off", float("inf"))):
        monkeypatch.setenv("TEST_BUDGETS", wish)
        assert run.limit("contracts of lora") == limit


def test_a_kind_without_a_budget_is_refused(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(TABLE.replace("page = 30\n", ""))
    with pytest.raises(pytest.UsageError, match=r"sets no \['page'\]"):
        budgets.Table.read(file)
    file.write_text("[project]\n")
    assert budgets.Table.read(file) is None


def test_this_project_sets_budgets():
    table = budgets.Table.read(ROOT / "pyproject.toml")
    assert table is not None
    assert (table.limits["contracts"], table.limits["own"]) == (12, 8)
    assert (table.limits["page"], table.limits["chapter"]) == (5, 17)
    for group in table.first:
        assert (ROOT / group).is_file(), f"{group} is not there"
    for slug, stems in table.methods.items():
        for stem in stems:
            assert list(ROOT.glob(f"tests/*/test_{stem}.py")), f"{slug}: no test_{stem}.py"
