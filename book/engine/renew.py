"""Renewing the keys of numbers that a comparison has cleared, results first, the page last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from book.engine import beds, clear, key, lab, record
from book.engine.clear import Side
from book.engine.plan import Task, parted, recorded
from book.engine.project import EngineError, Project, write
from book.engine.source import Source
from toolkit.core.runs import code, results
from toolkit.core.runs.provenance import pins

CODE = {"cells", "code", "format", "text"}  # parts through which numbers are stale by code alone


def renew(
    task: Task, base: Source, project: Project, sides: tuple[Side, Side], ran: set[str]
) -> list[str]:
    """Renew a chapter whose two runs agree; returns what was done, or what speaks against it.

    Args:
        task: the chapter today, and what is stale about it.
        base: its source at the base.
        project: today's.
        sides: code of the base and of today.
        ran: functions that today's run called.
    """
    chapter, page = task.chapter, task.recorded
    if page is None:
        return ["no page to renew"]
    if not task.numbers and not task.page:
        return ["fresh"]
    chapter.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(chapter.lock, timeout=0):
            if recorded(chapter)[0] != page:
                return ["not renewed: another engine has recorded it meanwhile"]
            against = _against(task, base, sides, ran)
            if against:
                return [f"not renewed: {words}" for words in against]
            return _write(task, project, sides[1])
    except filelock.Timeout:
        return ["not renewed: another engine is at it"]


def _against(task: Task, base: Source, sides: tuple[Side, Side], ran: set[str]) -> list[str]:
    page, (before, now) = task.recorded, sides
    scale = page["scale"]
    changed = key.differences(page["parts"], task.parts)
    if others := [words for name, words in changed.items() if name not in CODE]:
        return others
    if apart := parted(task.chapter, page):
        return [apart]
    commit = page.get("commit") or "not told"
    earlier = f"it was recorded with other code than the base has (its commit: {commit[:9]})"
    if not clear.recorded_at(page["parts"], base, before):
        return [earlier]
    found = []
    if task.parts["constraints"] != pins(before.root):
        found.append("the base pins other versions of packages")
    if changed.keys() & {"cells"} and not clear.same_cells(base, task.source):
        found.append("its cells differ in more than import lines")
    old = before.tracer(scale).of_source(cell.source for cell in base.code)
    found += clear.objections(old, task.parts["code"], before, now, ran)
    if task.chapter.lab is not None:
        document = lab.load(task.chapter.results(scale))
        found += _against_results(document, scale, sides, ran, earlier)
    return list(dict.fromkeys(found))


def _against_results(
    document: Mapping[str, Any],
    scale: str,
    sides: tuple[Side, Side],
    ran: set[str],
    earlier: str,
) -> list[str]:
    """What speaks against giving results the keys of today, in words."""
    found: list[str] = []
    for function, digests in results.digests_by_function(document).items():
        try:
            then, today = (side.tracer(scale).of_name(function) for side in sides)
        except ValueError as error:
            return [str(error)]
        if digests - {code.digest(then), code.digest(today)}:
            return [earlier]
        found += clear.objections(then, today, *sides, ran)
    return list(dict.fromkeys(found))


def renew_bed(bed: beds.Bed, sides: tuple[Side, Side], ran: set[str]) -> list[str]:
    """Renew a bed whose two runs agree; returns what was done, or what speaks against it.

    Args:
        bed: today's results.
        sides: code of the base and of today.
        ran: functions that today's run called.
    """
    reasons = beds.stale_reasons(bed, sides[1].tracer)
    if not reasons:
        return ["fresh"]
    document = lab.load(bed.file)
    commits = ", ".join(sorted({source["commit"][:9] for source in document["provenance"]}))
    earlier = f"it was measured with other code than the base has (its commit: {commits})"
    pinned = {source["constraints"] for source in document["provenance"]}
    if pinned | {pins(sides[0].root)} != {pins(bed.root)}:
        against = ["versions of packages changed"]
    else:
        against = _against_results(document, bed.scale, sides, ran, earlier)
    if against:
        return [f"not renewed: {words}" for words in against]
    _renew_results(bed.root, bed.slug, bed.scale, sides[1], record.today())
    return [f"renewed: {'; '.join(reasons)}"]


def _write(task: Task, project: Project, now: Side) -> list[str]:
    chapter, page = task.chapter, dict(task.recorded)
    scale, today = page["scale"], record.today()
    told = page["results"]
    file = chapter.results(scale)
    if chapter.lab is not None:
        _renew_results(project.root, chapter.slug, scale, now, today)
    if told:
        told = {"file": file.name, "sha256": lab.sha256(file)}
    provenance = {
        **page,
        "verified": today,
        "results": told,
        "parts": task.parts,
        "key": key.digest(task.parts),
    }
    outputs = record.recorded_outputs(chapter)
    new = record.page(task.source, scale, outputs, provenance, project.repository)
    write(chapter.page, record.text_of(new))
    left = lab.stale_reasons(project, [chapter], scale)[chapter] if chapter.lab else []
    if isinstance(left, EngineError):
        raise left
    if left:
        return [f"renewed, but its lab says: {'; '.join(left)}"]
    return [f"renewed: {'; '.join([*task.numbers, *task.page])}"]


def _renew_results(root: Path, slug: str, scale: str, now: Side, today: str) -> None:
    """Store today's code keys with every job, and the day they were verified."""
    folder = root / "book" / "results"
    document = lab.load(results.results_path(folder, slug, scale))
    new = results.renewed(document, now.tracer(scale).of_name)
    results.write(folder, new)
    told = results.read_times(folder, slug, scale)
    told = results.renewed_times(document, new, told)
    results.write_times(folder, slug, scale, {**told, "verified": today})
