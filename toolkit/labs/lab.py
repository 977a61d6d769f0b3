"""What a lab is: claims declared first, jobs that measure, a judge; and how a page reads it.

A lab lies in ``toolkit/labs/<part>/<slug>.py`` and names its :class:`Lab` ``LAB``. Measuring and
telling are apart: :func:`measure` runs what the store lacks and writes ``<slug>.<scale>.json``;
:meth:`Lab.found` reads it for a page.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.core import evidence
from toolkit.core.runs import results
from toolkit.core.runs.code import Tracer
from toolkit.core.runs.code import digest as joined
from toolkit.core.runs.jobs import function_name
from toolkit.core.runs.measure import Missing, Runs, frame
from toolkit.core.runs.provenance import provenance
from toolkit.core.scale import Scale
from toolkit.core.scale import scale as named_scale

ROOT = Path(__file__).resolve().parents[2]
LIMIT = {"ci": 120.0, "cpu": 1800.0, "gpu": 1800.0}
"""Seconds that one job may take."""
TELL = "TOOLKIT_TELL"
RESULTS = "TOOLKIT_RESULTS"


class StaleNumbers(RuntimeError):
    """A page asks for numbers that are not in the store, and may not measure them."""


@dataclass(frozen=True)
class Lab:
    """The experiments of one chapter.

    Args:
        slug: the chapter's.
        part: its folder.
        measure: called with :class:`~toolkit.core.runs.measure.Runs` and the scale; asks for every
            experiment by ``runs.table`` and ``runs.tune``.
        judge: called with :class:`Found`; returns for each claim what was measured, by condition.
        claims: declared before anything is measured.
        facts: called with :class:`Found`; exact things that were checked, such as counts.
        data: names of data sets and pretrained models that scales ``cpu`` and ``gpu`` need.
    """

    slug: str
    part: str
    measure: Callable[[Runs, Scale], None]
    judge: Callable[[Found], Mapping[str, Mapping[str, evidence.Measured]]]
    claims: tuple[evidence.Claim, ...]
    facts: Callable[[Found], Sequence[evidence.Fact]] = lambda found: ()
    data: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The file that declares this lab, from the project's folder."""
        return f"toolkit/labs/{self.part}/{self.slug}.py"

    def found(self, scale: Scale | str) -> Found:
        """What was measured at a scale, for a page.

        Results come from the folder that ``TOOLKIT_RESULTS`` names, or from ``book/results`` of
        this checkout. Where there are none, they are measured now and kept nowhere, unless
        ``TOOLKIT_TELL`` is set: then a page only tells.

        Args:
            scale: a scale or its name.

        Raises:
            StaleNumbers: there are no results, and none may be measured.
        """
        name = str(getattr(scale, "name", scale))
        document = results.read(results_folder(), self.slug, name)
        if document is None:
            if os.environ.get(TELL):
                raise StaleNumbers(
                    f"{self.slug} has no results at scale {name}: measure them with "
                    f"`make record NAME={self.slug} SCALE={name}`."
                )
            document = measure(self, name, folder=None).document
        return Found(self, document)


@dataclass
class Found:
    """What a lab measured, as tables.

    Args:
        lab: whose.
        document: as :mod:`toolkit.core.runs.results` keeps it.
    """

    lab: Lab
    document: Mapping[str, Any]
    _tables: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> str:
        """The name of the scale."""
        return self.document["scale"]

    def __getitem__(self, name: str) -> Any:
        """The runs of an experiment as a DataFrame: arguments, results, ``error``.

        Raises:
            KeyError: there is no such experiment; the message names those there are.
        """
        if name not in self._tables:
            experiments = self.document["experiments"]
            if name not in experiments:
                raise KeyError(f"no experiment {name!r} at {self.scale}: {sorted(experiments)}")
            self._tables[name] = frame(experiments[name]["jobs"])
        return self._tables[name].copy()

    def tuned(self, name: str) -> Mapping[str, Any]:
        """Arm -> rate, scores, seeds and edge of the search of one experiment."""
        return self.document["tuning"][name]

    def blocks(self, name: str) -> list[list[int]]:
        """The blocks of seeds of an experiment."""
        return self.document["seeds"][name]

    def values(self, name: str, column: str, **where: Any) -> dict[int, float]:
        """Seed -> one result of the runs that match, NaN where a run diverged.

        Args:
            name: the experiment.
            column: the result.
            **where: arguments that the runs must have.

        Raises:
            ValueError: no run matches, or two runs of one seed do.
        """
        table = self[name]
        for argument, value in where.items():
            table = table[table[argument] == value]
        if table.empty or table.seed.duplicated().any():
            raise ValueError(
                f"{name}: {len(table)} runs match {where}, some of one seed: name every argument "
                "that tells them apart."
            )
        return dict(zip(table.seed.tolist(), table[column].astype(float).tolist(), strict=True))

    @property
    def claims(self) -> dict[str, Mapping[str, Any]]:
        """The claims as they were judged when the results were written, by id."""
        return {claim["id"]: claim for claim in self.document["claims"]}

    def claims_table(self) -> evidence.ClaimsTable:
        """The claims, and the facts below them, as a table for the page."""
        return evidence.ClaimsTable(
            self.document["claims"],
            self.document["facts"],
            caption=f"Claims, tested at scale {self.scale}",
            note=self.document["declaration"]["note"],
            dropped=self.document["declaration"]["dropped"],
        )


@dataclass(frozen=True)
class Measurement:
    """What :func:`measure` gave.

    Args:
        document: the results.
        ran: how many jobs were run; the others were in the store.
        seconds: of the whole.
    """

    document: dict[str, Any]
    ran: int
    seconds: float


def results_folder() -> Path | None:
    """The folder that ``TOOLKIT_RESULTS`` names, else ``book/results`` of this checkout, if any."""
    named = os.environ.get(RESULTS)
    if named:
        return Path(named)
    here = ROOT / "book" / "results"
    return here if here.is_dir() else None


@functools.cache
def tracer(scale: str) -> Tracer:
    """Follows names in this project, for the keys of one scale."""
    return Tracer(ROOT, scale)


def open_runs(slug: str, scale: Scale, store: Path | None, **options: Any) -> Runs:
    """The runs of a lab or a bed of this project, with what its store holds.

    Args:
        slug: its name.
        scale: the scale.
        store: folder of results; None for none.
        **options: of :class:`~toolkit.core.runs.measure.Runs`.
    """
    return Runs(
        slug, scale.name,
        provenance=provenance(ROOT, scale.device.type),
        code=tracer(scale.name).of_function,
        known=results.read(store, slug, scale.name),
        others=functools.partial(_others, slug, scale.name, store),
        limit=LIMIT[scale.name],
        strict=scale.name != "ci",
        **options,
    )  # fmt: skip


def _others(slug: str, scale: str, store: Path | None) -> Iterator[Mapping[str, Any]]:
    """What other labs measured at this scale."""
    for other in labs():
        if store is None or other == slug:
            continue
        with contextlib.suppress(FileNotFoundError):
            stamp = results.results_path(store, other, scale).stat().st_mtime_ns
            document = _of_that_time(store, other, scale, stamp)
            if document is not None and "experiments" in document:
                yield document


@functools.cache
def _of_that_time(store: Path, slug: str, scale: str, stamp: int) -> dict[str, Any] | None:
    """Results as a file of that time has them: one process may ask for many labs in turn."""
    return results.read(store, slug, scale)


def measure(
    lab: Lab,
    scale: str,
    *,
    folder: Path | None,
    work: Path | None = None,
    n_jobs: int | None = None,
    progress: bool | None = None,
    look_only: bool = False,
    keep_stale: bool = False,
) -> Measurement:
    """Run what the store lacks, judge the claims, and write the results whole.

    Args:
        lab: what to measure.
        scale: ``ci``, ``cpu`` or ``gpu``.
        folder: the store; None keeps nothing.
        work: where jobs are kept as they end; left out, beside the store or in a folder that goes.
        n_jobs: at once, one thread each; left out, 1 at ``ci`` and on a GPU, else one per core.
        progress: show one bar; by default only on a terminal.
        look_only: run nothing, only judge the claims anew.
        keep_stale: run only what has no record; runs of earlier code stay, and stay stale.

    Raises:
        toolkit.core.runs.measure.JobsFailed: jobs failed; the others are kept.
        toolkit.core.runs.measure.Missing: with ``look_only``, runs are missing.
        ValueError: a search chose badly, or the claims are malformed.
    """
    size = named_scale(scale)
    if n_jobs is None:
        n_jobs = size.threads if size.name == "cpu" else 1
    if work is None and folder is not None:
        # absolute, since workers of a cluster run in other folders
        work = folder.resolve() / "running" / f"{lab.slug}.{size.name}"
    declared = evidence.declare(lab.claims)  # before anything runs: bad claims cost no run
    start = time.monotonic()
    options = {"folder": work, "n_jobs": n_jobs, "progress": progress, "look_only": look_only,
               "keep_stale": keep_stale}  # fmt: skip
    with open_runs(lab.slug, size, folder, **options) as runs:
        lab.measure(runs, size)
        document = runs.document() | judged(lab, runs.document(), declared, folder)
        done = Measurement(document, runs.ran, round(time.monotonic() - start, 1))
    if folder is not None:
        write_times(folder, lab.slug, size.name, runs, done.seconds)
        results.write(folder, document)
        if not look_only:
            clear(work)
    return done


def judged(
    lab: Lab, document: Mapping[str, Any], declared: Any, folder: Path | None
) -> dict[str, Any]:
    """The declaration and the judged claims, as the results file holds them."""
    found = Found(lab, document)
    before = (results.read(folder, lab.slug, document["scale"]) or {}).get("declaration")
    judges = document["scale"] != "ci"  # quick checks judge nothing
    declaration = evidence.register(
        declared, before,
        evidence.first_declaration(ROOT, lab.slug) if judges else None,
        evidence.committed(ROOT, lab.module),
    )  # fmt: skip
    claims = evidence.judge_all(lab.claims, lab.judge(found), declaration if judges else None)
    return {
        "declaration": declaration,
        "claims": [claim.record() for claim in claims],
        "facts": [fact.record() for fact in lab.facts(found)],
        "judging": _judging(lab, document["scale"]),
    }


def _judging(lab: Lab, scale: str) -> dict[str, str]:
    """The function that judges, and the digest of its code."""
    return {
        "function": function_name(lab.judge),
        "code": joined(tracer(scale).of_function(lab.judge)),
    }


def stale(lab: Lab, scale: str, folder: Path) -> list[str]:
    """Why the numbers of a lab are stale, in words; nothing when they are fresh. Runs no job."""
    size = _scale_without_device(scale)
    if results.read(folder, lab.slug, scale) is None:
        return [f"no results at scale {scale}"]
    with open_runs(lab.slug, size, folder, look_only=True, progress=False) as runs:
        try:
            lab.measure(runs, size)
        except Missing as missing:
            return [f"{missing.experiment}: {reason}" for reason in missing.reasons]
        document = runs.document()
    before = results.read(folder, lab.slug, scale)
    if [claim.id for claim in lab.claims] != [claim["id"] for claim in before["claims"]] or (
        evidence.declare(lab.claims).hash != before["declaration"]["hash"]
    ):
        return ["the declared claims changed"]
    if before.get("judging") != _judging(lab, scale):
        return ["the code that judges the claims changed"]
    kept = {name: len(e["jobs"]) for name, e in before["experiments"].items()}
    asked = {name: len(e["jobs"]) for name, e in document["experiments"].items()}
    return [] if kept == asked else [f"other runs are asked for: {asked}, there are {kept}"]


def _scale_without_device(name: str) -> Scale:
    """A scale to look at results with, also ``gpu`` where there is no GPU."""
    try:
        return named_scale(name)
    except RuntimeError:
        import torch

        return Scale("gpu", torch.device("cuda"), torch.float32, 1, 120)


def labs() -> dict[str, str]:
    """Slug -> module of every lab, from the files that define one; nothing is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*/*.py")):
        if "\nLAB = " in path.read_text(encoding="utf-8"):
            found[path.stem] = f"toolkit.labs.{path.parent.name}.{path.stem}"
    return found


def lab(slug: str) -> Lab:
    """The lab of a chapter.

    Raises:
        KeyError: there is none; the message names those there are.
    """
    known = labs()
    if slug not in known:
        raise KeyError(f"no lab {slug!r}; there are {sorted(known)}")
    return importlib.import_module(known[slug]).LAB


def two_blocks(n: int, base: int = 0) -> list[list[int]]:
    """Two blocks of seeds, ``n`` in all: the second tells whether the first was luck.

    Seeds from ``base + 900`` on belong to searches: see :func:`search_seeds`.

    Raises:
        ValueError: ``n`` is odd, below 2 or above 800.
    """
    if n % 2 or not 2 <= n <= 800:
        raise ValueError(f"n = {n}: give an even number of seeds, 2 to 800.")
    half = n // 2
    return [list(range(base, base + half)), list(range(base + 400, base + 400 + half))]


def search_seeds(base: int = 0, n: int = 3) -> list[int]:
    """Seeds of a search for rates, which no report uses."""
    return list(range(base + 900, base + 900 + n))


def write_times(
    folder: Path, slug: str, scale: str, runs: Runs, seconds: float | None = None
) -> None:
    """Write when the numbers were measured and how long each run took, beside the results.

    What was not run now keeps its day and its seconds.

    Args:
        folder: of results.
        slug, scale: whose.
        runs: the runs, ended.
        seconds: of the whole measurement; left out, the sum of its runs.
    """
    before = results.read_times(folder, slug, scale)
    kept = {job["check"] for e in runs.document()["experiments"].values() for job in e["jobs"]}
    known = {name: took for name, took in before.get("jobs", {}).items() if name in kept}
    took = round(sum(runs.seconds.values()), 1) if seconds is None else seconds
    new = {"recorded": _today(), "verified": None, "seconds": took}
    if not runs.ran:
        new |= {name: before[name] for name in new if name in before}
    results.write_times(folder, slug, scale, new | {"jobs": known | runs.seconds})


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def clear(work: Path) -> None:
    """Remove the kept jobs: all of them stand in the results now."""
    shutil.rmtree(work, ignore_errors=True)
    with contextlib.suppress(OSError):  # other labs are at work there, or none ever was
        work.parent.rmdir()
