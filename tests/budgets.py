"""A plugin of pytest that sums the processor time of tests and fails the run over a budget.

The table ``[tool.motion.budgets]`` of ``pyproject.toml`` says how many seconds each kind of thing
may take: the contracts of a method, its own tests, a page in the browser, a chapter's notebook,
any other test file, and all together. Exceptions stand there by name, each with its reason.

Seconds are processor time of the test's process and of all it started, so waiting and other people
on the machine count little. They hold for a machine on which a fixed piece of work takes
``calibration`` seconds. Each process does the same work every half minute between its tests, where
its neighbours slow it as they slow the tests; where the median is more, the budgets grow with it.
``TEST_BUDGETS=2`` doubles them, ``TEST_BUDGETS=off`` only prints.

Under ``--dist loadgroup`` what shares work goes to one process: the contracts of a method, the
tests of a file.
"""

from __future__ import annotations

import os
import re
import resource
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pytest

KINDS = ("contracts", "own", "page", "chapter", "file", "total")
# of these the fixtures are left out: a rendered book and a running kernel serve many
CALL_ONLY = ("page", "chapter")
EVERY = 30  # seconds between two looks at how fast the machine is
# a test of contracts: its parameters are named contract-method-room-shape
CONTRACT = re.compile(r"^tests/contracts/.*\[\w+-(\w+)-\w+-\d+\]$")


@dataclass(frozen=True)
class Table:
    """What ``[tool.motion.budgets]`` says; see there."""

    limits: dict[str, float]
    calibration: float
    methods: dict[str, list[str]] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    exceptions: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Table | None:
        """The table of a ``pyproject.toml``, or None where there is none.

        Raises:
            pytest.UsageError: a kind has no limit, or an exception no reason.
        """
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        found = tomllib.loads(text).get("tool", {}).get("motion", {}).get("budgets")
        if found is None:
            return None
        exceptions = {}
        for one in found.get("exceptions", []):
            if not {"name", "seconds", "reason"} <= one.keys() or not one["reason"].strip():
                raise pytest.UsageError(f"{file}: a budget's exception needs a reason: {one}")
            exceptions[one["name"]] = float(one["seconds"])
        missing = {*KINDS, "calibration"} - found.keys()
        if missing:
            raise pytest.UsageError(f"{file}: [tool.motion.budgets] sets no {sorted(missing)}")
        limits = {kind: float(found[kind]) for kind in KINDS}
        lists = found.get("methods", {}), found.get("first", [])
        return cls(limits, float(found["calibration"]), *lists, exceptions)

    def limit(self, name: str) -> float:
        return self.exceptions.get(name, self.limits[name.split()[0]])


def calibrate() -> float:
    """Processor seconds of a fixed piece of work."""
    matrix = np.linspace(0, 1, 200 * 200).reshape(200, 200)
    begun = time.process_time()
    counts: dict[int, float] = {}
    for i in range(300_000):
        counts[i % 977] = counts.get(i % 977, 0.0) + i * 0.5
    for _ in range(100):
        matrix @ matrix
    return time.process_time() - begun


def spent(descendants: bool) -> float:
    """Processor seconds of this process and its ended children so far.

    Args:
        descendants: whether those still running count as well, which takes a look at each process
            of the machine.
    """
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    total = sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))
    if descendants:
        for child in psutil.Process().children(recursive=True):
            try:
                total += sum(child.cpu_times()[:4])  # its own and its ended children's
            except psutil.NoSuchProcess:
                continue
    return total


class Budgets:
    """One run: what was spent, by budget and by folder."""

    def __init__(self, config: pytest.Config, table: Table):
        self.config = config
        self.table = table
        self.worker = hasattr(config, "workerinput")
        self.paces: list[float] = []  # what the fixed work took
        self.looked = -float(EVERY)  # when it was last done
        self.factor = 1.0
        self.reading: tuple[bool | None, float] = None, 0.0  # whether of all processes, seconds
        self.spent: Counter[str] = Counter()
        self.folders: Counter[str] = Counter()
        self.tests: Counter[str] = Counter()

    # --- where tests run -------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        first = {group: number for number, group in enumerate(self.table.first)}

        def place(item: pytest.Item) -> int:
            # a chapter takes as long as many files of tests together
            return first.get(group(item.nodeid), len(first) + (item.path.suffix != ".ipynb"))

        items.sort(key=place)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Groups by :func:`group`. xdist's own by marks needs a pytest below 9.2."""
        if config.getvalue("dist") != "loadgroup":
            return None
        from xdist.scheduler import LoadScopeScheduling

        class Together(LoadScopeScheduling):
            def _split_scope(self, nodeid: str) -> str:
                return group(nodeid)

        return Together(config, log)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._measured(item))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._measured(item))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._measured(item))

    def _measured(self, item: pytest.Item) -> Iterator[None]:
        name = self.name(item)
        # a browser runs on between its tests: all of them are measured alike, or it counts twice
        browser = item.get_closest_marker("browser") is not None
        everyone = browser or name.startswith(CALL_ONLY)
        # a phase begins where the one before it ended: half as many looks at all processes
        counted, begun = self.reading
        if counted != everyone:
            begun = spent(everyone)
        try:
            return (yield)
        finally:
            now = spent(everyone)
            item.stash[SECONDS] = max(0.0, now - begun)
            self.reading = everyone, now
            if time.monotonic() - self.looked >= EVERY:
                self.paces.append(calibrate())
                self.looked = time.monotonic()
                self.reading = None, 0.0  # the fixed work is no test's

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        seconds = item.stash.get(SECONDS, 0.0)
        report.user_properties.append(("budget", self.name(item)))
        report.user_properties.append(("processor", seconds))
        return report

    def name(self, item: pytest.Item) -> str:
        """The budget a test belongs to: its kind, a space, and whose."""
        if NAME not in item.stash:  # asked for six times a test
            item.stash[NAME] = self._name(item)
        return item.stash[NAME]

    def _name(self, item: pytest.Item) -> str:
        path = Path(self._path(item))
        if path.suffix == ".ipynb":
            return f"chapter {path.parent.name}/{path.stem}"
        if group(item.nodeid).startswith("contracts "):
            return group(item.nodeid)
        page = getattr(getattr(item, "callspec", None), "params", {}).get("path")
        if page is not None and "site" in item.fixturenames:
            return f"page {page}"
        method = self._method(path)
        return f"own tests of {method}" if method else f"file {path.as_posix()}"

    def _method(self, path: Path) -> str | None:
        """The method that a file below ``tests/<part>`` belongs to, by the file's name."""
        part, stem = path.parent.name, path.stem.removeprefix("test_")
        home = self.config.rootpath / "toolkit" / part
        for slug, names in self.table.methods.items():
            if stem in names and any(
                (home / f).is_file() for f in (f"{slug}.py", f"{slug}/__init__.py")
            ):
                return slug
        while stem:
            if (home / f"{stem}.py").is_file() or (home / stem / "__init__.py").is_file():
                return stem if part != "core" else None
            stem = stem.rpartition("_")[0]
        return None

    def _path(self, item: pytest.Item) -> str:
        return item.path.relative_to(self.config.rootpath).as_posix()

    # --- where reports come together -------------------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        facts = dict(report.user_properties)
        if self.worker or "budget" not in facts:
            return
        folder = report.nodeid.partition("::")[0].rpartition("/")[0]
        self.folders[folder] += facts["processor"]
        self.tests[folder] += report.when == "call"
        whole = not facts["budget"].startswith(CALL_ONLY)
        if whole or report.when == "call":
            self.spent[facts["budget"]] += facts["processor"]
        kind = "notebooks" if facts["budget"].startswith("chapter") else "tests"
        self.spent[f"total {kind}"] += facts["processor"]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.paces += getattr(node, "workeroutput", {}).get("paces", [])

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.worker:
            self.config.workeroutput["paces"] = self.paces
        elif self.paces:
            self.factor = max(1.0, median(self.paces) / self.table.calibration)
        if not self.worker and self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def limit(self, name: str) -> float:
        """The seconds a budget has on this machine."""
        chosen = os.environ.get("TEST_BUDGETS", "1")
        wish = float("inf") if chosen == "off" else float(chosen)
        return self.table.limit(name) * self.factor * wish

    def over(self) -> list[str]:
        """Budgets that were passed."""
        return [name for name, seconds in self.spent.items() if seconds > self.limit(name)]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.worker or not self.spent:
            return
        say = terminalreporter.write_line
        terminalreporter.section(f"processor seconds; budgets x {self.factor:.2f} for this machine")
        for folder, seconds in sorted(self.folders.items()):
            say(f"{seconds:8.1f} s           {self.tests[folder]:5} tests  {folder}")
        shown = sorted(self.spent.items(), key=lambda one: (KINDS.index(one[0].split()[0]), one[0]))
        for name, seconds in shown:
            limit = self.limit(name)
            if seconds > min(limit / 2, 10) or name.startswith(("contracts", "own", "total")):
                say(f"{seconds:8.1f} s of {limit:6.1f}  {name}")
        for name in self.over():
            say(
                f"OVER BUDGET: {name} took {self.spent[name]:.1f} of {self.limit(name):.1f} "
                "processor seconds; make it cheaper, or give its exception a reason in "
                "pyproject.toml, [tool.motion.budgets]",
                red=True,
            )


SECONDS = pytest.StashKey[float]()
NAME = pytest.StashKey[str]()


def group(nodeid: str) -> str:
    """What a test is run with, in one process: a method's contracts, or its file."""
    found = CONTRACT.match(nodeid)
    return f"contracts of {found[1]}" if found else nodeid.partition("::")[0]


def pytest_configure(config: pytest.Config) -> None:
    """Count, where the project has a table of budgets."""
    table = Table.read(config.rootpath / "pyproject.toml")
    if table is not None and not config.pluginmanager.hasplugin("motion-budgets"):
        config.pluginmanager.register(Budgets(config, table), "motion-budgets")
