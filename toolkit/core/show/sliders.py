"""One control for one hyperparameter: its kind, range, start, and the widget for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

STEPS = 50
"""Positions of a slider over a range of real numbers."""


def control_spec(hyper: Any, given: Any) -> dict[str, Any]:
    """Return kind, range and start of one control.

    Args:
        hyper: The declared hyperparameter, or a stand-in with ``name`` and ``default``.
        given: A range that wins over the declaration: ``(low, high)``, ``(low, high, step)``, a
            list of choices, or None.
    """
    default = hyper.default
    if isinstance(given, list) or (given is None and hyper.choices is not None):
        options = given if given is not None else list(hyper.choices)
        if not options:
            raise ValueError(f"ranges[{hyper.name!r}] is empty: give at least one choice.")
        return {
            "kind": "choice",
            "options": options,
            "value": default if default in options else options[0],
        }
    if given is None and hyper.type is bool:
        return {"kind": "switch", "value": bool(default)}
    if given is None and hyper.type is str:
        return {"kind": "text", "value": default}
    low, high, *step = given if given is not None else (hyper.low, hyper.high)
    if low is None or high is None or not low < high:
        raise ValueError(
            f"{hyper.name} has no range to slide over (low {low}, high {high}): "
            f"pass ranges={{{hyper.name!r}: (low, high)}}."
        )
    whole = hyper.type is int or (
        hyper.type is None and all(isinstance(end, int) for end in (low, high, *step))
    )
    if whole:
        start = default if default is not None else (low + high) // 2
        return {
            "kind": "int",
            "min": low,
            "max": high,
            "step": step[0] if step else 1,
            "value": min(max(start, low), high),
        }
    step = step[0] if step else (high - low) / STEPS
    log = bool(hyper.log and low > 0)
    if given is None and not log:  # a bound that is itself not allowed is no slider position
        low, high = low + step * hyper.open_low, high - step * hyper.open_high
    middle = math.sqrt(low * high) if log else (low + high) / 2
    start = default if default is not None else middle
    return {
        "kind": "log" if log else "float",
        "min": low,
        "max": high,
        "step": step,
        "value": min(max(start, low), high),
    }


class Undeclared:
    """A control that no method declares."""

    choices, type, log, open_low, open_high, help, default, low, high = (
        None,
        None,
        False,
        False,
        False,
        "",
        None,
        None,
        None,
    )

    def __init__(self, name: str) -> None:
        self.name = name


def make_widget(name: str, spec: Mapping[str, Any], words: str) -> Any:
    import ipywidgets

    common = {
        "description": name,
        "tooltip": words or name,
        "style": {"description_width": "initial"},
        "layout": ipywidgets.Layout(width="100%", max_width="30em"),
    }
    if spec["kind"] == "choice":
        return ipywidgets.Dropdown(options=spec["options"], value=spec["value"], **common)
    if spec["kind"] == "text":
        return ipywidgets.Text(value=spec["value"], continuous_update=False, **common)
    if spec["kind"] == "switch":
        return ipywidgets.Checkbox(value=spec["value"], indent=False, **common)
    if spec["kind"] == "log":
        low, high = math.log10(spec["min"]), math.log10(spec["max"])
        return ipywidgets.FloatLogSlider(
            value=spec["value"],
            min=low,
            max=high,
            step=(high - low) / STEPS,
            readout_format=".2g",
            **common,
        )
    kind = ipywidgets.IntSlider if spec["kind"] == "int" else ipywidgets.FloatSlider
    extra = {} if spec["kind"] == "int" else {"readout_format": ".3g"}
    return kind(
        value=spec["value"], min=spec["min"], max=spec["max"], step=spec["step"], **extra, **common
    )
