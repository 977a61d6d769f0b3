"""The parts of an explorer's Vega-Lite specification, as plain data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from toolkit.core.show.figures import BASELINES, CYCLE, colour, label
from toolkit.core.show.overlap import WIDTH, widths

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
CROWDED = 60
"""So many letters of all names do not fit under bars: the bars lie on their side."""
LEANING = 40
"""Above so many letters, each name as long as the longest, names lean: a phone shows them all."""


def series_look(
    frame: Any, series: str | None, colours: Mapping[str, str]
) -> tuple[dict[Any, str], dict[str, str]]:
    """Names by value and colours by name, in order of appearance."""
    if series is None:
        return {}, {}
    from toolkit.core.declare.catalogue import catalogue

    house = {*BASELINES, *(entry.slug for entry in catalogue())}
    names: dict[Any, str] = {}
    hues: dict[str, str] = {}
    spare = itertools.cycle(CYCLE)
    for value in frame[series].unique().tolist():
        names[value] = label(value) if value in house else str(value)
        hue = colours.get(value) or (colour(value) if value in house else None)
        hues[names[value]] = hue or next(
            c for c in spare if c not in hues.values() or len(hues) >= len(CYCLE)
        )
    return names, hues


def short(value: Any) -> Any:
    """A JSON value; six digits are more than a chart can show."""
    value = value.item() if hasattr(value, "item") else value
    return float(f"{value:.6g}") if isinstance(value, float) else value


def binding(
    column: str, field: str, values: list[Any], name: str, start: Any
) -> tuple[dict[str, Any], str]:
    """The control of one column and the test that a row belongs to its position."""
    if start is not None and start not in values:
        raise ValueError(f"start[{column!r}] = {start!r}: choose one of {values}.")
    values = [short(value) for value in values]
    param = f"p_{field}"
    gaps = (
        [b - a for a, b in itertools.pairwise(values)]
        if not any(isinstance(v, (str, bool)) for v in values)
        else []
    )
    if len(gaps) > 1 and max(gaps) - min(gaps) < 1e-6 * max(gaps):
        middle = values[len(values) // 2]
        bind = {
            "input": "range",
            "min": values[0],
            "max": values[-1],
            "step": short(gaps[0]),
            "name": name,
        }
        # a slider's positions are sums of steps: compare with room for rounding
        return (
            {"name": param, "value": middle if start is None else short(start), "bind": bind},
            f"abs(datum.{field} - {param}) < {gaps[0] / 2!r}",
        )
    bind = {"input": "select", "options": values, "name": name}
    return (
        {"name": param, "value": values[0] if start is None else short(start), "bind": bind},
        f"datum.{field} === {param}",
    )


def layers(
    frame: Any,
    x: str,
    y: str,
    band: tuple[str, str] | None,
    series: str | None,
    controls: list[str],
    title_of: Mapping[str, str],
    names: Mapping[Any, str],
    hues: Mapping[str, str],
    log_x: bool,
    log_y: bool,
    panels: str | None = None,
) -> list[dict[str, Any]]:
    """Return the marks: band, line and points over numbers; bars with rules over names."""
    numeric = not isinstance(frame[x].iloc[0], (str, bool))
    at_y: dict[str, Any] = {
        "field": "y",
        "type": "quantitative",
        "title": title_of["y"],
        "scale": _range(frame[[y, *(band or ())]].to_numpy(dtype=float), numeric, log_y),
    }
    tips = [
        {"field": f, "title": title_of[f]}
        for f in ("panel", "series", "x", "y", "low", "high")
        if f in title_of
    ]
    encode: dict[str, Any] = {}
    if series:
        encode["color"] = _by_series(list(hues), list(hues.values())) | {"title": None}
    if numeric:
        encode["x"] = _numbers(frame[x], title_of["x"], log_x)
        apart = [*controls, *([panels] if panels else [])]
        made = _lines(frame, x, y, band, series, apart, at_y, tips, names)
    else:
        long = sum(map(len, map(str, frame[x].unique()))) > CROWDED  # then bars lie on their side
        along, across = ("x", "y") if long else ("y", "x")
        title = None if long else title_of["x"]
        order = frame[x].unique().tolist()
        encode[across] = {"field": "x", "type": "nominal", "title": title, "sort": order}
        # room for the longest name of all settings, as the first one sets the margin
        room = min(150, 7 * max(len(str(name)) for name in order))
        side = {"labelLimit": 150, "minExtent": room}
        lean = -35 if len(order) * max(len(str(name)) for name in order) > LEANING else 0
        encode[across]["axis"] = side if long else {"labelAngle": lean, "labelOverlap": False}
        if series and frame.groupby([x, *([panels] if panels else [])])[series].nunique().max() > 1:
            encode[f"{across}Offset"] = {"field": "series", "sort": list(hues)}
        made = _bars(along, at_y, tips, band)
    for layer in made:
        layer["encoding"] = {**encode, **layer["encoding"]}
    return made


def _by_series(names: list[str], values: list[Any]) -> dict[str, Any]:
    return {"field": "series", "type": "nominal", "scale": {"domain": names, "range": values}}


def _range(ends: Any, numeric: bool, log: bool) -> dict[str, Any]:
    """The scale of the results: all of them with some room, and 0 where bars stand on it."""
    low, high = float(ends.min()), float(ends.max())
    if log:
        return {"domain": [low, high], "nice": True, "type": "log"}
    room = 0.05 * (high - low or abs(high) or 1.0)
    low, high = low - room, high + room
    if numeric:
        return {"domain": [low, high], "nice": True, "zero": False}
    return {"domain": [min(0.0, low), max(0.0, high)], "nice": True}


def _numbers(values: Any, title: str, log: bool) -> dict[str, Any]:
    """A horizontal axis of numbers, with room for the marks at both ends."""
    places = sorted(values.unique().tolist())
    axis: dict[str, Any] = {"labelAngle": 0}
    if log:  # 10k reads well, but 10m is no learning rate
        axis["format"] = "~s" if places[-1] >= 1000 else "~g"
    if len(places) <= 10 and not (log and places[-1] >= 100 * places[0]):
        axis["values"] = [short(place) for place in places]  # ticks where the results are
    elif log:  # labels of uneven places would cover each other
        axis["values"] = _ladder(places[0], places[-1])
    kind = {"type": "log", "nice": False} if log else {"zero": False}
    scale = {**kind, "padding": 8}
    return {"field": "x", "type": "quantitative", "title": title, "axis": axis, "scale": scale}


def _ladder(low: float, high: float) -> list[float]:
    """1 and 3 times each power of ten between two numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (short(float(step * 10.0**power)) for power in powers for step in (1, 3))
    return [step for step in steps if low <= step <= high]


def _lines(
    frame: Any,
    x: str,
    y: str,
    band: tuple[str, str] | None,
    series: str | None,
    apart: list[str],
    at_y: dict[str, Any],
    tips: list[dict[str, Any]],
    names: Mapping[Any, str],
) -> list[dict[str, Any]]:
    """Bands, lines and points; a line that others lie upon is wider than they.

    Rows that differ in the columns ``apart`` are never seen on one axis.
    """
    line: dict[str, Any] = {"mark": {"type": "line", "strokeWidth": WIDTH}, "encoding": {"y": at_y}}
    point: dict[str, Any] = {
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
        "encoding": {"y": at_y, "tooltip": tips},
    }
    under: list[dict[str, Any]] = []
    if series:
        called = list(names.values())
        shapes = list(itertools.islice(itertools.cycle(SHAPES), len(called)))
        point["encoding"]["shape"] = _by_series(called, shapes) | {"title": None}
        parts = [part for _, part in frame.groupby(apart)] if apart else [frame]
        wide = widths([
            {n: rows.set_index(x)[y].to_dict() for n, rows in part.groupby(series, sort=False)}
            for part in parts
        ])  # fmt: skip
        under = [
            {
                "mark": {"type": "line", "strokeWidth": wide[value], "opacity": 0.4},
                "encoding": {"y": at_y},
                "transform": [{"filter": {"field": "series", "equal": name}}],
            }
            for value, name in names.items()
            if wide[value] > WIDTH
        ]
    area = {"mark": {"type": "area", "opacity": 0.18}, "encoding": _ends("y", at_y)}
    return [*([area] if band else []), *under, line, point]


def _bars(
    along: str,
    at_y: dict[str, Any],
    tips: list[dict[str, Any]],
    band: tuple[str, str] | None,
) -> list[dict[str, Any]]:
    bar = {"mark": {"type": "bar"}, "encoding": {along: at_y, "tooltip": tips}}
    rule = {
        "mark": {"type": "rule", "strokeWidth": 2, "color": "#1a1a1a"},
        "encoding": {**_ends(along, at_y), "color": {"value": "#1a1a1a"}},
    }
    return [bar, *([rule] if band else [])]


def _ends(along: str, at_y: dict[str, Any]) -> dict[str, Any]:
    return {along: at_y | {"field": "low"}, f"{along}2": {"field": "high"}}


def side_by_side(panels: list[Any], made: list[dict[str, Any]], height: int) -> dict[str, Any]:
    """Return marks on one axis for each panel; the page's script gives them the column's width."""
    head = {"title": None, "labelFontSize": 13, "labelColor": "#1a1a1a", "labelPadding": 4}
    column = {"field": "panel", "type": "nominal", "sort": panels, "header": head}
    return {
        "facet": {"column": column},
        "spacing": 12,
        "spec": {"width": 90, "height": height, "layer": made},
    }


def config() -> dict[str, Any]:
    """Return the look of all explorers: text large enough for a phone, legend underneath."""
    return {
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelFontSize": 13,
            "titleFontSize": 13,
            "titleFontWeight": "normal",
            "labelColor": "#1a1a1a",
            "titleColor": "#1a1a1a",
            "gridColor": "#e3e3e3",
            "tickCount": 5,
            "labelOverlap": True,
        },
        "legend": {
            "orient": "bottom",
            "labelFontSize": 13,
            "columns": 2,
            "labelLimit": 260,
            "symbolSize": 110,
            "symbolOpacity": 1,
            "labelColor": "#1a1a1a",
        },
    }
