"""Every search for a rate: what was tried for each arm, with which score, and what was chosen."""

from __future__ import annotations

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

SUMMARY = ("arm", "chosen rate", "mean score", "rates tried", "from", "to", "chosen on the edge")


def searches(document: Mapping[str, Any]) -> Section:
    """One search per experiment, the same for each of its arms."""
    title = "Searches for the rate"
    if not document["tuning"]:
        return Section("searches", title, paragraph("This lab searched for no rate."))
    said = paragraph(
        "Within an experiment every arm's rate is found by the same search, on runs whose seeds "
        "are used for nothing else. Scores are means over these seeds."
    )
    made = (_search(name, arms, document) for name, arms in document["tuning"].items())
    return Section("searches", title, said + Markup("").join(made))


def _search(name: str, arms: Mapping[str, Any], document: Mapping[str, Any]) -> Markup:
    some = next(iter(arms.values()))
    jobs = document["experiments"].get(f"{name}, tuning", {"jobs": []})["jobs"]
    best = "largest" if some["better"] == "max" else "smallest"
    told = [
        f"{counted(len(jobs), 'run')} on seeds {seeds_text(some['seeds'])}.",
        f"The rate with the {best} mean of \u201c{spelled(some['judged'])}\u201d was chosen.",
        f"Doing nothing scores {number(some['nothing'])}." if some["nothing"] is not None else "",
    ]
    rows, tried = [], []
    for arm, found in arms.items():
        rates = sorted(map(float, found["scores"]))
        score = found["scores"][f"{found['rate']:g}"]
        ends = [number(rates[0]), number(rates[-1])] if rates else [None, None]
        rows.append([spelled(arm), number(found["rate"]), _score(score), len(rates), *ends,
                     number(found["edge"])])  # fmt: skip
        tried += _tried(arm, found, jobs)
    seeds = [f"seed {seed}" for seed in some["seeds"]]
    every = table(f"Chosen rates of {spelled(name)}", SUMMARY, rows)
    long = table("Every rate tried", ["arm", "rate", "mean score", *seeds, "chosen"], tried, long=0)
    return heading(anchor("search", name), spelled(name)) + paragraph(*told) + every + long


def _tried(arm: str, found: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]) -> list[list]:
    """A row for each rate: its mean score, and that of each seed."""
    by_run = {
        (f"{job['args']['rate']:g}", job["args"].get("seed")): (job["record"] or {}).get(
            found["judged"]
        )
        for job in jobs
        if job["args"].get("arm") == arm and "rate" in job["args"]
    }
    rows = []
    for rate, mean in sorted(found["scores"].items(), key=lambda item: float(item[0])):
        each = [by_run.get((rate, seed), "") for seed in found["seeds"]]
        chosen = "chosen" if float(rate) == float(f"{found['rate']:g}") else ""
        scores = [_score(one) if one != "" else None for one in each]
        rows.append([spelled(arm), number(float(rate)), _score(mean), *scores, chosen])
    return rows


def _score(value: float | None) -> str:
    return "diverged" if value is None else number(value)
