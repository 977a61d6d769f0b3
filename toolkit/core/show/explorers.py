"""Static explorers: results of a small grid, stored with the page, that answer without a kernel.

An explorer is one block of HTML: a Vega-Lite chart as data, and the same numbers as a table. In
the rendered book the page's own script draws the chart from the runtime stored beside it, so
nothing leaves the page's origin; without JavaScript the table stands open. In a live notebook the
block brings the runtime along (from the installed ``vl_convert``, else from a public CDN, as on
Colab).
"""

from __future__ import annotations

import html
import importlib.resources
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.core.evidence.results import RESULTS_VARIABLE
from toolkit.core.show.chart import binding, config, layers, series_look, short, side_by_side

# The versions the bundled runtime holds; Colab fetches the same majors.
CDN = tuple(
    f"https://cdn.jsdelivr.net/npm/{name}" for name in ("vega@6", "vega-lite@6", "vega-embed@7")
)


def page_script() -> str:
    """Return the JavaScript that draws every explorer of a page."""
    return importlib.resources.files("toolkit.core.show").joinpath("explorer.js").read_text("utf-8")


class Explorer:
    """An explorer as a notebook shows it. Made by :func:`explorer`.

    Attributes:
        spec: The Vega-Lite specification, as plain data.
        html: The block the rendered book holds: no script of its own, no address.
    """

    def __init__(self, spec: dict[str, Any], table: str, title: str, alt: str) -> None:
        self.spec, self.alt = spec, alt
        data = json.dumps(spec, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        name = html.escape(title)
        self.html = (
            f'<div class="explorer" role="group" aria-label="{name}" style="background:#fff;'
            'color:#1a1a1a;border:1px solid #d0d0d0;border-radius:6px;padding:.8em 1em">'
            f'<p class="explorer-title"><strong>{name}</strong></p>'
            '<div class="explorer-controls"></div><div class="explorer-chart"></div>'
            '<p class="explorer-said" role="status" aria-live="polite"></p>'
            f'<p class="explorer-alt"><small>{html.escape(self.alt)}</small></p>'
            f'<script type="application/json" class="explorer-spec">{data}</script>'
            '<details class="explorer-table" open><summary>The numbers as a table</summary>'
            f'<div role="region" tabindex="0" aria-label="Table: {name}" '
            f'style="overflow:auto;max-height:22em">{table}</div></details></div>'
        )

    def _repr_html_(self) -> str:
        if os.environ.get(RESULTS_VARIABLE):  # being recorded: the book's page brings the script
            return self.html
        return self.html + _live_scripts()

    def __repr__(self) -> str:
        return f"[explorer: {self.alt}]"


def _live_scripts() -> str:
    """Scripts for a front end that is not the book: the runtime, then the drawing."""
    draw = f"<script>{page_script()}</script>"
    if "google.colab" not in sys.modules and importlib.util.find_spec("vl_convert"):
        from toolkit.core.show.runtime import runtime

        bundled = runtime().replace("</script", "<\\/script")
        return f"<script>window.vegaEmbed || (() => {{{bundled}}})()</script>{draw}"
    sources = json.dumps(CDN).replace("<", "\\u003c")
    return f"<script>window.explorerRuntime = {sources}</script>{draw}"


def explorer(
    frame: Any,
    x: str,
    y: str,
    series: str | None = None,
    controls: Sequence[str] = (),
    *,
    title: str,
    alt: str,
    panels: str | None = None,
    table_columns: Sequence[str] | None = None,
    band: tuple[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    colours: Mapping[str, str] | None = None,
    start: Mapping[str, Any] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    height: int = 300,
) -> Explorer:
    """Return a static explorer over a grid of results.

    Args:
        frame: Tidy DataFrame: one row for each position of the controls, series and ``x``.
        x: Column along the horizontal axis; text makes bars of it, which lie on their side where
            names are long, numbers make lines.
        y: Column of finite numbers along the vertical axis. Its range stays the same whatever the
            controls say, so that a change is seen as one.
        series: Column that tells the lines apart. Slugs of methods and baselines get their colour
            and name of the book.
        controls: Columns to choose by: evenly spaced numbers get a slider, others a drop-down.
        title: Heading of the block.
        alt: What the chart shows and how to read it, in words.
        panels: Column of which each value gets an axis of its own, side by side; the controls
            move them all.
        table_columns: Columns of the table, by default all that the chart uses.
        band: Columns of the lower and upper end of an interval round ``y``.
        labels: Readable names, with units, by column.
        colours: Colours by value of ``series``, where the book has none.
        start: First position of controls, by column.
        log_x, log_y: Whether an axis is logarithmic.
        height: Height of the chart in pixels.

    Raises:
        ValueError: If the frame is empty, lacks a column, repeats a position, leaves one of the
            controls' positions without a row, or holds a number that is not finite; if ``alt`` or
            ``title`` is empty.
    """
    if not alt.strip() or not title.strip():
        raise ValueError("title and alt must say in words what the chart shows.")
    controls, labels = list(controls), dict(labels or {})
    roles = {f"c{i}": column for i, column in enumerate(controls)} | {"x": x, "y": y}
    roles |= {"series": series} if series else {}
    roles |= {"panel": panels} if panels else {}
    roles |= {"low": band[0], "high": band[1]} if band else {}
    by = [column for column in (panels, series) if column]
    used = list(dict.fromkeys([*controls, *by, x, y, *(band or ())]))
    columns = list(table_columns) if table_columns is not None else used
    _check(frame, used, columns, [c for c in used if c != y and c not in (band or ())], controls)
    names, hues = series_look(frame, series, colours or {})
    records = [
        {
            role: names[row[column]] if column == series else short(row[column])
            for role, column in roles.items()
        }
        for row in frame[used].to_dict(orient="records")
    ]
    title_of = {role: labels.get(column, column) for role, column in roles.items()}
    spec: dict[str, Any] = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": alt,
        "background": "white",
        "data": {"values": records},
        "params": [],
        "transform": [],
        "config": config(),
    }
    for i, column in enumerate(controls):
        param, test = binding(
            column,
            f"c{i}",
            sorted(frame[column].unique().tolist()),
            labels.get(column, column),
            (start or {}).get(column),
        )
        spec["params"].append(param)
        spec["transform"].append({"filter": test})
    made = layers(frame, x, y, band, series, controls, title_of, names, hues, log_x, log_y, panels)
    spec |= (
        side_by_side(frame[panels].unique().tolist(), made, height)
        if panels
        else {
            "width": "container",
            "height": height,
            "autosize": {"type": "fit", "contains": "padding"},
            "layer": made,
        }
    )
    return Explorer(spec, _table(frame, columns, labels, series, names, title), title, alt)


def _check(
    frame: Any, used: list[str], columns: list[str], keys: list[str], controls: list[str]
) -> None:
    missing = [c for c in [*used, *columns] if c not in frame.columns]
    if missing or len(frame) == 0:
        raise ValueError(
            f"frame lacks {missing or 'rows'}: it has {len(frame)} rows and columns "
            f"{list(frame.columns)}."
        )
    for column in used:
        for value in frame[column]:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"frame[{column!r}] holds {value}: leave that row out and say so.")
    if frame.duplicated(keys).any():
        again = frame[frame.duplicated(keys)].iloc[0][keys].to_dict()
        raise ValueError(f"frame has several rows for {again}: average over the rest first.")
    if controls:
        there = set(frame[controls].itertuples(index=False, name=None))
        for place in itertools.product(*(frame[c].unique() for c in controls)):
            if tuple(place) not in there:
                raise ValueError(
                    f"frame has no row for {dict(zip(controls, place, strict=True))}: "
                    "every position of the controls must answer."
                )


def _table(
    frame: Any,
    columns: list[str],
    labels: Mapping[str, str],
    series: str | None,
    names: Mapping[Any, str],
    title: str,
) -> str:
    def cell(column: str, value: Any) -> str:
        value = value.item() if hasattr(value, "item") else value
        if column == series:
            value = names[value]
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f'<th scope="col">{html.escape(labels.get(c, c))}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(c, row[c])}</td>" for c in columns) + "</tr>"
        for row in frame[columns].to_dict(orient="records")
    )
    return (
        f"<table><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
