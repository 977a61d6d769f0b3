"""Runs that crashed, and where all numbers come from: versions, processor, days, durations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from motion_book.notes.parts import (
    Section,
    code,
    commit,
    counted,
    duration,
    heading,
    number,
    paragraph,
    spelled,
    table,
)


def runs(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of all experiments."""
    return [job for e in document["experiments"].values() for job in e["jobs"]]


def crashed(document: Mapping[str, Any]) -> Section:
    """Which runs diverged, and what they said."""
    rows = []
    for name, experiment in document["experiments"].items():
        arms: dict[str, list[Mapping[str, Any]]] = {}
        for job in experiment["jobs"]:
            arms.setdefault(spelled(job["args"].get("arm", "all runs")), []).append(job)
        for arm, jobs in arms.items():
            said = [job["error"] for job in jobs if job["error"] is not None]
            if said:
                words = "; ".join(dict.fromkeys(said))
                rows.append([spelled(name), arm, len(said), len(jobs), words])
    total = sum(row[2] for row in rows)
    whole = len(runs(document))
    if not rows:
        body = paragraph(f"None of the {counted(whole, 'run')} diverged.")
        return Section("crashed", "Runs that crashed", body)
    told = f"{total} of {counted(whole, 'run')} diverged. They are counted, and left out of means."
    columns = ("experiment", "arm", "crashed", "runs", "what they said")
    made = table("Runs that crashed", columns, rows)
    return Section("crashed", "Runs that crashed", paragraph(told) + made)


def provenance(document: Mapping[str, Any], times: Mapping[str, Any]) -> Section:
    """Code, packages and processor of the runs, and how long they took.

    Args:
        document: the results.
        times: days and durations beside them; may be empty.
    """
    said = paragraph(
        "Which code, packages and processor gave the numbers. Runs that were taken over from an "
        "earlier recording keep theirs."
    )
    body = said + _sources(document) + heading("durations", "When, and how long")
    return Section("provenance", "Where the numbers come from", body + _durations(document, times))


def _sources(document: Mapping[str, Any]) -> Markup:
    jobs = runs(document)
    packages = dict.fromkeys(n for source in document["provenance"] for n in source["versions"])
    columns = ["commit", "runs", "files differed from it", *packages, "pinned packages", "device",
               "processor", "threads"]  # fmt: skip
    rows = [
        [
            commit(source["commit"]),
            f"{sum(job['from'] == place for job in jobs):,}",
            number(source["dirty"]),
            *(source["versions"].get(name) for name in packages),
            code(source["constraints"]),
            source["device"],
            source["processor"],
            source["threads"],
        ]
        for place, source in enumerate(document["provenance"])
    ]
    return table("Where the numbers come from", columns, rows)


def _durations(document: Mapping[str, Any], times: Mapping[str, Any]) -> Markup:
    if not times:
        return paragraph("Days and durations of this recording were not kept.")
    took = times.get("jobs", {})
    told = [
        f"Recorded on {times['recorded']}." if times.get("recorded") else "",
        f"Verified against later code on {times['verified']}." if times.get("verified") else "",
        f"The last measurement took {duration(times['seconds'])}." if times.get("seconds") else "",
        "Each run uses one thread; times are those of the processor above, and nothing is judged "
        "by them.",
    ]
    rows = [
        [spelled(name), len(e["jobs"]), *_spent([took[j["check"]] for j in e["jobs"]
                                                 if j["check"] in took])]
        for name, e in document["experiments"].items()
    ]  # fmt: skip
    columns = ("experiment", "runs", "of them timed", "mean of a run", "longest run")
    return paragraph(*told) + table("How long the runs took", columns, rows)


def _spent(seconds: Sequence[float]) -> list[Any]:
    if not seconds:
        return [0, None, None]
    return [len(seconds), duration(sum(seconds) / len(seconds)), duration(max(seconds))]
