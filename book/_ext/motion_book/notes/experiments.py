"""Every experiment: its runs, and the mean of each measured column with its interval, by arm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from motion_book.notes.parts import (
    Section,
    anchor,
    counted,
    heading,
    number,
    paragraph,
    seeds_text,
    spelled,
    table,
)

Group = tuple[dict[str, Any], list[Mapping[str, Any]]]
INSIDE = ": "  # parts an arm from a column, where one run measures several arms


def experiments(document: Mapping[str, Any]) -> Section:
    """All experiments but the searches, which have a section of their own."""
    searches = {f"{name}, tuning" for name in document["tuning"]}
    told = {n: e["jobs"] for n, e in document["experiments"].items() if n not in searches}
    reported = {s for blocks in document["seeds"].values() for block in blocks for s in block}
    said = paragraph(
        "What every experiment measured, by arm: the mean over its runs with the 95 % interval of "
        "that mean, by Student's t. The claims are judged on differences seed by seed; their "
        "intervals stand with the verdicts above."
    )
    made = (_experiment(name, jobs, reported) for name, jobs in told.items())
    return Section("experiments", "Experiments", said + Markup("").join(made))


def _experiment(name: str, jobs: Sequence[Mapping[str, Any]], reported: set[int]) -> Markup:
    shown = spelled(name)
    groups, fixed = grouped(jobs, reported)
    rows, lists = _rows(groups)
    seeds = {seed for job in jobs for seed in _seeds(job["args"])}
    told = [
        f"{counted(len(jobs), 'run')}{f', seeds {seeds_text(seeds)}' if seeds else ''}.",
        f"The same in all: {fixed}." if fixed else "",
        f"Each run also keeps lists, which the chapter draws: {lists}." if lists else "",
    ]
    made = heading(anchor("experiment", name), shown) + paragraph(*told)
    if not rows:
        return made
    keys = list(dict.fromkeys(key for row in rows for key in row[0]))
    names = list(dict.fromkeys(column for row in rows for column in row[2]))
    cells = [
        [*(row[0].get(key) for key in keys), row[1], *(row[2].get(column) for column in names)]
        for row in rows
    ]
    if not keys:
        whole = spelled(jobs[0]["args"].get("arm", "all runs"))
        keys, cells = ["arm"], [[whole, *row] for row in cells]
    return made + table(
        f"Means of {shown}", [*map(spelled, keys), "runs", *map(spelled, names)], cells
    )


def grouped(jobs: Sequence[Mapping[str, Any]], reported: set[int]) -> tuple[list[Group], str]:
    """Jobs that differ in nothing but their seed, together; and what all jobs share, in words.

    Args:
        jobs: of one experiment.
        reported: seeds that some experiment reports on; where the others were used as well, for a
            search inside the experiment, they are told apart.
    """
    plain = [{k: v for k, v in job["args"].items() if k not in ("seed", "seeds")} for job in jobs]
    names = dict.fromkeys(key for arguments in plain for key in arguments)
    values = {key: {json.dumps(arguments.get(key)) for arguments in plain} for key in names}
    searched = [not reported.issuperset(_seeds(job["args"])) for job in jobs]
    both = any(searched) and not all(searched)
    groups: dict[str, Group] = {}
    for arguments, job, search in zip(plain, jobs, searched, strict=True):
        key = {n: number(arguments[n]) for n in names if n in arguments and len(values[n]) > 1}
        if both:
            key["seeds"] = "of the search" if search else "reported"
        groups.setdefault(json.dumps(key), (key, []))[1].append(job)
    fixed = [
        f"{spelled(key)} {number(plain[0][key])}"
        for key in names
        if len(values[key]) == 1 and key != "arm"
    ]
    return list(groups.values()), "; ".join(fixed)


def _rows(groups: Sequence[Group]) -> tuple[list[tuple[dict, int, dict]], str]:
    """For each group, and each arm inside its runs: what it is, runs, and means by column."""
    rows, lists = [], {}
    for key, jobs in groups:
        measured: dict[str, dict[str, list[Any]]] = {}
        for job in jobs:
            for name, value in (job["record"] or {}).items():
                arm, _, column = name.rpartition(INSIDE)
                if isinstance(value, (list, str)):
                    lists.setdefault(spelled(column), _shape(value))
                else:
                    measured.setdefault(arm, {}).setdefault(column, []).append(value)
        for arm, columns in measured.items():
            inside = {**key, "arm": spelled(arm)} if arm else key
            whole = {name: mean(values, len(jobs)) for name, values in columns.items()}
            rows.append((inside, len(jobs), whole))
        if not measured and len(groups) > 1:
            rows.append((key, len(jobs), {}))
    return rows, ", ".join(f"{name}{shape}" for name, shape in lists.items())


def _seeds(arguments: Mapping[str, Any]) -> Sequence[int]:
    """The seeds of a run: one, or several where a run trains one network for each."""
    return [arguments["seed"]] if "seed" in arguments else arguments.get("seeds", [])


def _shape(value: Any) -> str:
    """How many numbers a list holds: " (5 by 3)"; nothing for text."""
    sizes = []
    while isinstance(value, list) and value:
        sizes.append(str(len(value)))
        value = value[0]
    return f" ({' by '.join(sizes)})" if sizes else ""


def mean(values: Sequence[float | None], runs: int) -> str:
    """The mean of a column with its interval, and of how many runs where it is not of all.

    Args:
        values: one per run that did not crash; None where it was not finite.
        runs: all of them.
    """
    from toolkit.core.evidence.intervals import interval

    known = [value for value in values if value is not None]
    if not known:
        return "not finite"
    tail = f" ({len(known)} of {runs})" if len(known) < runs else ""
    if all(isinstance(value, bool) for value in known):
        share = f"{sum(known)} of {len(known)}"
        return f"yes in {share}"
    if min(known) == max(known):
        return number(known[0]) + tail
    return str(interval([float(v) for v in known])).partition(" (")[0] + tail
