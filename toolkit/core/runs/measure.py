"""The runs of one lab: what its store holds is looked up, what is missing is run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from toolkit.core.runs import results, store, tuning
from toolkit.core.runs.jobs import finite, function_name, is_plain, key, keyed
from toolkit.core.runs.pool import Task, new_caller, run_all

DIVERGED = "FloatingPointError"
ENVIRONMENT = ("versions", "constraints", "device")
Functions = Callable[..., Any] | Mapping[str, Callable[..., Any]]
_There = tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, str]]
"""A job of known results, its provenance, and the definitions of its code."""


class Missing(Exception):
    """Numbers that a page asks for are not in the store.

    Args:
        experiment: its name.
        reasons: what is missing or has changed, in words.
    """

    def __init__(self, experiment: str, reasons: Sequence[str]) -> None:
        super().__init__(f"{experiment}: {'; '.join(reasons)}")
        self.experiment, self.reasons = experiment, list(reasons)


class JobsFailed(RuntimeError):
    """Jobs of a lab failed. Those that ended well are kept, and are not run again."""


class Runs:
    """The runs of one lab at one scale.

    Args:
        slug: The lab's slug.
        scale: ``ci``, ``cpu`` or ``gpu``.
        provenance: What a run made now is, from :func:`toolkit.core.runs.provenance.provenance`.
        code: Gives the definitions that a function can reach, each with its hash.
        known: Results already there, from :func:`toolkit.core.runs.results.read`.
        others: Called at the first run that ``known`` lacks: results of other labs. A run of the
            same function, arguments and code stands there for this lab too.
        folder: Where jobs are kept as they end; None keeps them in memory only.
        n_jobs: Jobs at once, one thread each; 1 runs them in this process.
        limit: Seconds one job may take; None for no limit.
        look_only: Never run a job: raise :class:`Missing` instead.
        keep_stale: Take over known runs of earlier code too, which stay stale, and run the others.
        progress: Show one bar on stderr; by default only on a terminal.
        strict: Whether a search that chose badly is an error. Scale ``ci`` is too small for that.
    """

    def __init__(
        self,
        slug: str,
        scale: str,
        *,
        provenance: Mapping[str, Any],
        code: Callable[[Callable[..., Any]], Mapping[str, str]],
        known: Mapping[str, Any] | None = None,
        others: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
        folder: Path | None = None,
        n_jobs: int = 1,
        limit: float | None = None,
        look_only: bool = False,
        keep_stale: bool = False,
        progress: bool | None = None,
        strict: bool = True,
    ) -> None:
        self.slug, self.scale, self.strict = slug, scale, strict
        self._now, self._code, self._look_only = dict(provenance), code, look_only
        self._n_jobs, self._limit = n_jobs, limit
        self._folder = folder
        self._known = dict(known or {})
        self._there = self._index(self._known)
        self._others = others
        # by function and arguments alone: runs of earlier code, which stay what they are
        self._older = {name[:2]: job for name, job in self._there.items()} if keep_stale else {}
        self._caller = new_caller()
        self._digests: dict[str, tuple[str, dict[str, str]]] = {}
        self._provenance: list[dict[str, Any]] = []
        self._codes: dict[str, dict[str, str]] = {}
        self._experiments: dict[str, dict[str, Any]] = {}
        self._tuning: dict[str, dict[str, Any]] = {}
        self._seeds: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.ran = 0
        hidden = None if progress is None else not progress
        self._bar = tqdm(total=0, desc=f"{slug} at {scale}", unit="run", disable=hidden)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def _index(self, known: Mapping[str, Any]) -> dict[tuple[str, str, str], _There]:
        """Jobs of known results that this environment may take over, by what they are."""
        found = {}
        sources = known.get("provenance", [])
        for experiment in known.get("experiments", {}).values():
            for job in experiment["jobs"]:
                source = sources[job["from"]]
                if all(source.get(name) == self._now.get(name) for name in ENVIRONMENT):
                    function = results.function_of(experiment, job["args"])
                    name = (function, json.dumps(job["args"], sort_keys=True), job["code"])
                    found[name] = (job, source, known["codes"][job["code"]])
        return found

    @functools.cached_property
    def _elsewhere(self) -> dict[tuple[str, str, str], _There]:
        """Jobs of other labs' results, by what they are."""
        found: dict[tuple[str, str, str], _There] = {}
        for known in self._others():
            found |= self._index(known)
        return found

    def table(self, name: str, function: Functions, jobs: Sequence[Mapping[str, Any]]) -> Any:
        """Run what is missing of an experiment and return all of it.

        Args:
            name: The experiment's name, unique in the lab but for further jobs of the same one.
            function: Called with each job's arguments; returns a flat dict of plain values. Or one
                such function for each value of the argument ``arm``, so that a change of one arm's
                code runs that arm's jobs only. A ``FloatingPointError`` says that the run diverged.
            jobs: Arguments by name: text, numbers, bools, None, lists of these.

        Returns:
            A DataFrame with a row per job, in order: arguments, results, ``error`` (None, or why a
            run diverged; its results are not a number).

        Raises:
            JobsFailed: If jobs failed. The others are kept.
            Missing: If runs are missing and none may be run.
            TypeError, ValueError: Bad jobs or a function without a source.
        """
        functions = dict(function) if isinstance(function, Mapping) else {"*": function}
        names = {arm: function_name(f) for arm, f in functions.items()}
        made, tasks, reasons = {}, {}, []
        for word, job in keyed(name, jobs).items():
            arm = "*" if "*" in functions else job.get("arm")
            if arm not in functions:
                raise ValueError(
                    f"{name}: no function for the arm of {job}; there are {sorted(functions)}."
                )
            code = self._digest(functions[arm])
            arguments = json.dumps(job, sort_keys=True)
            there = self._there.get((names[arm], arguments, code))
            there = there or self._elsewhere.get((names[arm], arguments, code))
            there = there or self._older.get((names[arm], arguments))
            if there is not None:
                made[word] = self._again(*there)
            elif self._look_only:
                reasons += self._why(names[arm], arguments, job, code)
            else:
                path = self._path(key(names[arm], job, code))
                record = store.record(path)
                if record is not None and record["status"] == "done":
                    made[word] = self._new(name, job, record, code)
                else:
                    if path is not None:
                        path.unlink(missing_ok=True)
                    tasks[word] = Task(
                        functions[arm], job, path, code, self._limit, 1, self._caller
                    )
        if reasons:
            raise Missing(name, list(dict.fromkeys(reasons))[:8])
        self._run(name, tasks, made)
        experiment = self._experiments.setdefault(name, {"functions": {}, "jobs": []})
        experiment["functions"] |= names
        have = {json.dumps(job["args"], sort_keys=True) for job in experiment["jobs"]}
        ordered = [made[word] for word in keyed(name, jobs)]
        new = [job for job in ordered if json.dumps(job["args"], sort_keys=True) not in have]
        experiment["jobs"] += new
        return frame(ordered)

    def _run(self, name: str, tasks: Mapping[str, Task], made: dict[str, Any]) -> None:
        self._bar.total += len(made) + len(tasks)
        self._bar.update(len(made))
        if not tasks:
            return
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        failed = []
        for word, record in run_all(tasks, self._n_jobs):
            task = tasks[word]
            self.ran += 1
            self._bar.update()
            diverged = record["status"] == "failed" and record["error"].startswith(DIVERGED)
            if record["status"] == "failed" and not diverged:
                failed.append(f"{name} with {dict(task.job)}: {record['error']}")
                continue
            try:
                made[word] = self._new(name, task.job, record, task.version)
            except TypeError as error:
                if task.path is not None:
                    task.path.unlink(missing_ok=True)
                failed.append(str(error))
        if failed:
            more = f"\n... and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise JobsFailed(
                f"{len(failed)} of {len(tasks)} jobs failed; the others are kept and will not be "
                "run again.\n" + "\n".join(failed[:3]) + more
            )

    def _path(self, word: str) -> Path | None:
        return None if self._folder is None else store.job_path(self._folder, word)

    def _digest(self, function: Callable[..., Any]) -> str:
        name = function_name(function)
        if name not in self._digests:
            from toolkit.core.runs.code import digest as joined

            definitions = dict(self._code(function))
            self._digests[name] = (joined(definitions), definitions)
        return self._digests[name][0]

    def _new(self, name: str, job: Mapping, record: Mapping, code: str) -> dict[str, Any]:
        """A job of today as the results hold it."""
        rows = record["rows"]
        plain = len(rows) == 1 and all(is_plain(value) for value in rows[0].values())
        if record["status"] == "done" and not plain:
            raise TypeError(
                f"{name} with {dict(job)}: a job of a lab returns one flat dict of numbers, text, "
                f"bools and lists of these, got {rows!r:.200}."
            )
        definitions = next(d for c, d in self._digests.values() if c == code)
        made = {
            "args": dict(job),
            "record": finite(rows[0]) if record["status"] == "done" else None,
            "error": None if record["status"] == "done" else record["error"].splitlines()[0],
            "code": code,
            "from": self._source(self._now),
        }
        self._codes[code] = definitions
        self.seconds[results.check(made)] = round(record["seconds"] or 0.0, 3)
        return made | {"check": results.check(made)}

    def _again(
        self, job: Mapping[str, Any], source: Mapping[str, Any], code: Mapping[str, str]
    ) -> dict[str, Any]:
        """A job of known results, with its provenance."""
        self._codes[job["code"]] = dict(code)
        return {**job, "from": self._source(source)}

    def _source(self, provenance: Mapping[str, Any]) -> int:
        kept = dict(provenance)
        if kept not in self._provenance:
            self._provenance.append(kept)
        return self._provenance.index(kept)

    def _why(self, function: str, arguments: str, job: Mapping[str, Any], code: str) -> list[str]:
        """Why a job is not among the known results."""
        from toolkit.core.runs.code import differences

        for name, known, old in self._there:
            if known == arguments and old != code and name == function:
                new = next(d for c, d in self._digests.values() if c == code)
                return differences(self._known["codes"][old], new)
        for source in self._known.get("provenance", []):
            for part in ENVIRONMENT:
                if source.get(part) != self._now.get(part):
                    return [f"{part} changed"]
        return [f"not measured: {dict(job)}"]

    def tune(
        self,
        name: str,
        function: Functions,
        arms: Mapping[str, Mapping[str, Any]],
        starts: Mapping[str, float],
        *,
        seeds: Sequence[int],
        reported: Sequence[int],
        judged: str,
        better: str,
        nothing: float | None = None,
        rate: str = "rate",
        **options: Any,
    ) -> dict[str, tuning.Tuned]:
        """Find the best rate for every arm by the same search, on runs of their own seeds.

        Args:
            name: The experiment; its runs are kept under ``<name>, tuning``.
            function: As in :meth:`table`; called with ``arm``, the arm's arguments, the rate, and
                ``seed``.
            arms: Name -> further arguments.
            starts: Middle of the first rates, per arm.
            seeds: Seeds of the search, three or more; where the runs are not strict, in quick
                checks, only the first is used.
            reported: Seeds that will be reported; none may be among ``seeds``.
            judged: The entry of the records that decides, measured on validation data.
            better: ``"min"`` or ``"max"``.
            nothing: The same entry for doing nothing; a tuned arm that is worse is an error.
            rate: Name of the argument that is searched.
            **options: Of :func:`toolkit.core.runs.tuning.search`.

        Raises:
            ValueError: If the search chose badly: a rate on the edge, an arm worse than nothing,
                fewer than three seeds, or seeds that are reported as well.
        """
        wrong = [w for w in tuning.check({}, seeds, reported, better=better) if self.strict]
        if wrong:
            raise ValueError(f"{name}: {'; '.join(wrong)}.")
        where = f"{name}, tuning"
        if not self.strict:
            seeds = seeds[:1]

        def evaluate(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
            jobs = [
                {"arm": arm, **arms[arm], rate: value, "seed": seed}
                for arm, value in pairs
                for seed in seeds
            ]
            scores = self.table(where, function, jobs)[judged].to_numpy(dtype=float)
            means = scores.reshape(len(pairs), len(seeds)).mean(1)
            return dict(zip(pairs, means.tolist(), strict=True))

        found = tuning.search(evaluate, starts, better=better, **options)
        wrong = tuning.check(found, seeds, reported, better=better, nothing=nothing)
        if wrong and self.strict:
            raise ValueError(f"{name}: {'; '.join(wrong)}.")
        self._tuning[name] = {
            arm: {
                "rate": tuned.rate,
                "scores": {f"{r:g}": finite(s) for r, s in tuned.scores.items()},
                "seeds": list(seeds),
                "judged": judged,
                "better": better,
                "nothing": nothing,
                "edge": tuned.on_edge,
            }
            for arm, tuned in found.items()
        }
        return found

    def blocks(self, name: str, blocks: Sequence[Sequence[int]]) -> None:
        """State the blocks of seeds over which an experiment is judged.

        Raises:
            ValueError: If two blocks share a seed.
        """
        every = [seed for block in blocks for seed in block]
        if len(set(every)) != len(every):
            raise ValueError(f"{name}: a seed stands in two blocks: {blocks}.")
        self._seeds[name] = [list(block) for block in blocks]

    def document(self) -> dict[str, Any]:
        """The results so far, as :mod:`toolkit.core.runs.results` keeps them, without claims."""
        return {
            "schema": results.SCHEMA,
            "slug": self.slug,
            "scale": self.scale,
            "provenance": self._provenance,
            "codes": dict(sorted(self._codes.items())),
            "experiments": self._experiments,
            "tuning": self._tuning,
            "seeds": self._seeds,
        }


def frame(jobs: Sequence[Mapping[str, Any]]) -> Any:
    """Jobs as the results hold them, as a DataFrame: arguments, results, ``error``."""
    import pandas as pd

    rows = [{**job["args"], **(job["record"] or {}), "error": job["error"]} for job in jobs]
    arguments = dict.fromkeys(name for job in jobs for name in job["args"])
    names = dict.fromkeys(name for row in rows for name in row if name != "error")
    columns: dict[str, Any] = {}
    for name in [*names, "error"]:
        values = [row.get(name) for row in rows]
        keep = (name in arguments or name == "error") and None in values
        if not keep and any(value is None for value in values):
            values = [np.nan if value is None else value for value in values]
        columns[name] = pd.Series(values, dtype=object if keep else None)
    return pd.DataFrame(columns)
