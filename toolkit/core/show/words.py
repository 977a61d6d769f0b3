"""Sentences and tables that take their numbers from a run, so that they stay true at any scale."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from toolkit.core.show.figures import Html

COSTS = {
    "trained": ("numbers trained", 1),
    "changed": ("entries changed", 1),
    "stored_bytes": ("stored per task (kB)", 1e3),
    "training_bytes": ("gradients and optimiser (kB)", 1e3),
}
"""The four costs: title of the column, and what one unit of it is."""


def answer(text: str) -> Html:
    """Return the answer to a question as a paragraph, to stand below its figure or table.

    Args:
        text: Plain sentences; ``*word*`` is set in italics.
    """
    parts = html.escape(text).split("*")
    if len(parts) % 2 == 0:
        raise ValueError(f"a * without its partner in {text!r}")
    marked = "".join(f"<em>{part}</em>" if i % 2 else part for i, part in enumerate(parts))
    return Html(f'<p class="answer">{marked}</p>', text.replace("*", ""))


def costs(rows: Mapping[str, Mapping[str, float]], unit: str) -> Html:
    """Return the four costs of several arms as one table, beside multiples of one arm's.

    Args:
        rows: Arm -> the four costs, as ``adapted.costs()`` gives them.
        unit: The arm whose storage counts as 1 in the last column.

    Raises:
        KeyError: ``unit`` is no arm.
    """
    if unit not in rows:
        raise KeyError(f"unit = {unit!r} is no arm; there are {list(rows)}")
    one = rows[unit]["stored_bytes"]
    titles = [title for title, _ in COSTS.values()] + [f"stored, multiple of {unit}"]
    made = {
        name: [f"{cost[key] / size:,.0f}" for key, (_, size) in COSTS.items()]
        + [f"{cost['stored_bytes'] / one:.3g}"]
        for name, cost in rows.items()
    }
    return table("arm", titles, made)


def _number(cell: Any) -> bool:
    """Whether a cell is a number, an interval or empty: such columns are set to the right."""
    return not re.search(r"[^\W\d_]", str(cell))


def table(first: str, titles: list[str], rows: Mapping[str, list[Any]]) -> Html:
    """Return a table with a heading for every row and column: numbers to the right, words left.

    Args:
        first: Title of the column of row headings.
        titles: Titles of the other columns, with units.
        rows: Heading of a row -> its cells, as many as ``titles``.
    """
    if short := [name for name, cells in rows.items() if len(cells) != len(titles)]:
        raise ValueError(f"row {short[0]!r} has not {len(titles)} cells")
    worded = [not all(map(_number, column)) for column in zip(*rows.values(), strict=True)]
    marks = ["", *(' class="words"' if words else "" for words in worded)]
    head = "".join(
        f'<th scope="col"{mark}>{html.escape(title)}</th>'
        for mark, title in zip(marks, [first, *titles], strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(
            f'<td data-label="{html.escape(title)}"{mark}>{html.escape(str(cell))}</td>'
            for mark, title, cell in zip(marks[1:], titles, cells, strict=True)
        )
        + "</tr>"
        for name, cells in rows.items()
    )
    words = "; ".join(
        f"{name}: " + ", ".join(f"{t} {c}" for t, c in zip(titles, cells, strict=True))
        for name, cells in rows.items()
    )
    return Html(
        f'<table class="house-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
        words,
    )
