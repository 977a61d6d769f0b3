"""Two runs of a chapter beside each other: every number and every printed word, exactly."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# what may differ between two runs of the same code, or says where numbers come from
ASIDE = {
    "provenance",
    "codes",
    "code",
    "check",
    "judging",
    "schema",
    "from",
    "hash",
    "commit",
    "declaration",
    "late",
    "date",
}
IMAGE = re.compile(r"<img\b[^>]*>", re.IGNORECASE)
TAG = re.compile(r"<[^>]*>")


@dataclass
class Run:
    """What a run gave, as values by place.

    Args:
        values: by place; ``("results", path)`` or ``("cell 3", number of the word)``.
        failed: why there are none, '' when it ran.
    """

    values: dict[tuple[str, Any], Any] = field(default_factory=dict)
    failed: str = ""


@dataclass
class Comparison:
    """What differs.

    Args:
        differing: a few words for each place whose value differs.
        unstable: places that differ between two runs of the same code, such as timings.
    """

    differing: list[str]
    unstable: list[str]


def run_of(
    outputs: Sequence[Sequence[Mapping[str, Any]]], results: Mapping[str, Any] | None
) -> Run:
    """The values of a run.

    Args:
        outputs: one list per code cell.
        results: its results file; None without one.
    """
    found = Run()
    for path, value in _flat(results or {}, ""):
        found.values["results", path] = value
    for number, cell in enumerate(outputs, 1):
        words = printed(cell)
        found.values[f"cell {number}", "words"] = len(words)
        for place, word in enumerate(words):
            found.values[f"cell {number}", place] = word
    return found


def _flat(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        parts = [(f"{path}.{k}" if path else str(k), v) for k, v in value.items() if k not in ASIDE]
    elif isinstance(value, list):
        parts = [(f"{path}[{_label(v, k)}]", v) for k, v in enumerate(value)]
    else:
        return [(path, value)]
    return [(path, type(value).__name__)] + [pair for p, v in parts for pair in _flat(v, p)]


def _label(value: Any, number: int) -> str:
    """A job by its arguments, a claim by its name, anything else by its number."""
    if isinstance(value, Mapping) and isinstance(value.get("args"), Mapping):
        return ", ".join(f"{k}={v}" for k, v in value["args"].items())
    return str(value["id"]) if isinstance(value, Mapping) and "id" in value else str(number)


def printed(outputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The words of a cell's outputs: streams, plain text, and HTML without tags or pictures."""
    streams: dict[str, str] = {}
    rest: list[str] = []
    for output in outputs:
        kind, data = output["output_type"], output.get("data", {})
        if kind == "stream":
            streams[output["name"]] = streams.get(output["name"], "") + _text(output["text"])
        elif kind == "error":
            rest.append(f"{output['ename']}: {output['evalue']}")
        if "text/plain" in data:
            rest.append(_text(data["text/plain"]))
        if "text/html" in data:
            shown = TAG.sub(" ", IMAGE.sub(" ", _text(data["text/html"])))
            rest.append(html.unescape(shown))
    return " ".join([streams.get("stdout", ""), streams.get("stderr", ""), *rest]).split()


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def compare(before: Run, now: Run, again: Run | None = None) -> Comparison:
    """What differs between a run and a later one, without what the earlier code itself varies in.

    Args:
        before: the earlier code's run.
        now: today's.
        again: a second run of the earlier code; None to take every difference for one.
    """
    unstable = _differing(before, again) if again is not None else {}
    found = {p: w for p, w in _differing(before, now).items() if p not in unstable}
    loose = {place[0] for place in unstable if place[1] == "words"}
    found = {p: w for p, w in found.items() if p[0] not in loose}
    names = {place[0] if place[0] != "results" else place[1] for place in unstable}
    return Comparison(list(found.values()), sorted(names))


def _differing(one: Run, other: Run) -> dict[tuple[str, Any], str]:
    found: dict[tuple[str, Any], str] = {}
    recounted = {
        place[0]
        for place in {*one.values, *other.values}
        if place[1] == "words" and one.values.get(place) != other.values.get(place)
    }
    for place in [*one.values, *(p for p in other.values if p not in one.values)]:
        if place[0] in recounted and place[1] != "words":
            continue  # words cannot be paired where one has more of them
        old, new = one.values.get(place, "nothing"), other.values.get(place, "nothing")
        if old != new and not (old != old and new != new):  # two NaN are the same
            where = place[1] if place[0] == "results" else place[0]
            unit = " words" if place[1] == "words" else ""
            found[place] = f"{where}: {old}{unit} -> {new}{unit}"
    return found
