"""The parts of an explorer's Vega-Lite specification, as plain data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from toolkit.core.show.figures import BASELINES, CYCLE, colour, label

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
CROWDED = 60
"""So many letters of all names under bars need slanted labels."""


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
    title_of: Mapping[str, str],
    names: list[str],
    hues: list[str],
    log_x: bool,
    log_y: bool,
) -> list[dict[str, Any]]:
    """Return the marks: band, line and points over numbers; bars with rules over names."""
    numeric = not isinstance(frame[x].iloc[0], (str, bool))
    ends = frame[[y, *(band or ())]].to_numpy(dtype=float)
    low, high = float(ends.min()), float(ends.max())
    room = 0.0 if log_y else 0.05 * (high - low or abs(high) or 1.0)
    scale_y: dict[str, Any] = {
        "domain": [low - room, high + room],
        "nice": True,
        **({"type": "log"} if log_y else {"zero": False}),
    }
    if not numeric and not log_y:
        scale_y = {"domain": [min(0.0, low - room), max(0.0, high + room)], "nice": True}
    at_x: dict[str, Any] = {
        "field": "x",
        "type": "quantitative" if numeric else "nominal",
        "title": title_of["x"],
        "axis": {"labelAngle": 0},
    }
    places = sorted(frame[x].unique().tolist())
    if numeric:
        wide = log_x and places[-1] >= 100 * places[0]
        if wide:  # ticks at powers of ten: labels of uneven places would cover each other
            at_x["axis"]["format"] = "~s"
        elif len(places) <= 10:  # ticks where the results are
            at_x["axis"]["values"] = [short(place) for place in places]
        at_x["scale"] = {"type": "log", "nice": False} if log_x else {"zero": False}
    else:
        at_x["sort"] = None
        if sum(map(len, map(str, places))) > CROWDED:
            at_x["axis"] |= {"labelAngle": -40, "labelLimit": 130}
    at_y = {"field": "y", "type": "quantitative", "title": title_of["y"], "scale": scale_y}
    tips = [
        {"field": f, "title": title_of[f]}
        for f in ("series", "x", "y", "low", "high")
        if f in title_of
    ]
    encode: dict[str, Any] = {"x": at_x}
    if series:
        encode["color"] = {
            "field": "series",
            "type": "nominal",
            "title": None,
            "scale": {"domain": names, "range": hues},
        }
        if not numeric and frame.groupby(x)[series].nunique().max() > 1:
            encode["xOffset"] = {"field": "series", "sort": names}
    made: list[dict[str, Any]] = []
    ends_of = {
        "y": {"field": "low", "type": "quantitative", "title": title_of["y"], "scale": scale_y},
        "y2": {"field": "high"},
    }
    if numeric:
        if band:
            made.append({"mark": {"type": "area", "opacity": 0.18}, "encoding": ends_of})
        shape = (
            {}
            if not series
            else {
                "shape": {
                    "field": "series",
                    "title": None,
                    "scale": {
                        "domain": names,
                        "range": list(itertools.islice(itertools.cycle(SHAPES), len(names))),
                    },
                }
            }
        )
        made.append({"mark": {"type": "line", "strokeWidth": 2.2}, "encoding": {"y": at_y}})
        made.append(
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {"y": at_y, "tooltip": tips, **shape},
            }
        )
    else:
        made.append({"mark": {"type": "bar"}, "encoding": {"y": at_y, "tooltip": tips}})
        if band:
            made.append(
                {
                    "mark": {"type": "rule", "strokeWidth": 2, "color": "#1a1a1a"},
                    "encoding": {**ends_of, "color": {"value": "#1a1a1a"}},
                }
            )
    for layer in made:
        layer["encoding"] = {**encode, **layer["encoding"]}
    return made


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
