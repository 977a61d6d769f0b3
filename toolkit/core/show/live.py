"""Live controls, generated from the hyperparameters a method declares.

Widgets only carry values and one HTML panel. ``interact`` and ``Output`` are not used: they need
the kernel to capture output while it answers, which hangs headless runs now and then.

A rendered page has no kernel. There the same cell shows the figure of the initial values and says
where the sliders move, because the output carries a plain HTML form beside the widget.
"""

from __future__ import annotations

import asyncio
import html
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toolkit.core.show.figures import figure_html
from toolkit.core.show.sliders import Undeclared, control_spec, make_widget

NOTE = (
    "These controls move in a live notebook (Colab or Jupyter). "
    "On this page the explorer below answers."
)
WIDGET = "application/vnd.jupyter.widget-view+json"


class Controls:
    """Sliders above a panel that follows them. Made by :func:`controls`.

    Attributes:
        widgets: The widgets by name; empty where ipywidgets is not installed.
        values: The present values by name.
        shown: The HTML in the panel.
    """

    def __init__(
        self,
        specs: Mapping[str, dict[str, Any]],
        words: Mapping[str, str],
        update: Callable[..., Any],
        alt: str,
        note: str,
        fixed: Mapping[str, Any],
        delay: float,
    ) -> None:
        self._update, self._alt, self._note, self._fixed = update, alt, note, dict(fixed)
        self._delay = delay
        self._waiting: asyncio.TimerHandle | None = None
        self._start = {name: spec["value"] for name, spec in specs.items()}
        self.shown = self._first = self._render()
        self.widgets: dict[str, Any] = {}
        try:
            import ipywidgets
        except ImportError:
            self._note = "Install ipywidgets to move the controls of this figure. " + note
            return
        self.widgets = {name: make_widget(name, spec, words[name]) for name, spec in specs.items()}
        self._panel = ipywidgets.HTML(self.shown)
        for widget in self.widgets.values():
            widget.observe(self._changed, names="value")
        self.box = ipywidgets.VBox([*self.widgets.values(), self._panel])

    @property
    def values(self) -> dict[str, Any]:
        """The present value of each control."""
        return {n: w.value for n, w in self.widgets.items()} or dict(self._start)

    def _render(self) -> str:
        values = self.values if getattr(self, "widgets", None) else self._start
        made = self._update(**values, **self._fixed)
        if isinstance(made, str):
            return made
        if hasattr(made, "savefig"):
            return figure_html(made, self._alt)
        if hasattr(made, "_repr_html_"):
            return made._repr_html_()
        raise TypeError(f"update returned {type(made).__name__}: return a figure or HTML.")

    def _changed(self, change: Any) -> None:
        """Wait until the reader pauses, then draw once."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no event loop: a plain script or a test
            self._refresh()
        else:
            self._waiting = loop.call_later(self._delay, self._refresh)

    def _refresh(self) -> None:
        """Draw the present values; an error is shown in the panel, where the reader looks."""
        self._waiting = None
        try:
            self.shown = self._render()
        except Exception as error:
            self.shown = (
                '<p role="alert"><strong>No figure for these values.</strong> '
                f"{html.escape(f'{type(error).__name__}: {error}')}</p>"
            )
        self._panel.value = self.shown

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        at = ", ".join(f"{name} = {value}" for name, value in self._start.items())
        static = (
            f'<div class="controls-static">{self._first}<p><small>Shown for '
            f"{html.escape(at)}. {html.escape(self._note)}</small></p></div>"
        )
        bundle: dict[str, Any] = {"text/plain": f"[{self._alt}; {at}]"}
        # Colab picks among several forms by its own order: there, give the widget alone.
        if not self.widgets or "google.colab" not in sys.modules:
            bundle["text/html"] = static
        if self.widgets:
            bundle[WIDGET] = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return bundle


def controls(
    method: type | None,
    update: Callable[..., Any],
    fields: Sequence[str] | None = None,
    ranges: Mapping[str, Any] | None = None,
    *,
    alt: str,
    note: str = NOTE,
    start: Mapping[str, Any] | None = None,
    delay: float = 0.15,
    **fixed: Any,
) -> Controls:
    """Return live controls for the hyperparameters of a method.

    Args:
        method: A method class whose fields carry their type, range and meaning; or None.
        update: Called with one keyword per control and ``fixed``; returns a matplotlib figure or
            HTML. Called once now, then whenever the reader moves a control and pauses.
        fields: Which hyperparameters get a control; all of them by default.
        ranges: Ranges that win over the declaration, or add controls that no method declares:
            ``(low, high)``, ``(low, high, step)`` or a list of choices. Whole-number ends make a
            whole-number slider.
        alt: What the figure shows, in words.
        note: Line under the figure of the rendered page.
        start: Initial values that win over the defaults.
        delay: Pause in seconds before drawing.
        fixed: Passed to ``update`` unchanged.

    Raises:
        ValueError: If a field is unknown, has no range, starts outside its range, or ``alt`` is
            empty.
    """
    ranges, start = dict(ranges or {}), dict(start or {})
    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what the figure shows.")
    declared: dict[str, Any] = {}
    if method is not None:
        from toolkit.core.declare.fields import hyperparameters

        declared = {hyper.name: hyper for hyper in hyperparameters(method)}
    names = list(fields) if fields is not None else list(declared)
    names += [name for name in ranges if name not in names]
    unknown = [name for name in names if name not in declared and name not in ranges]
    unknown += [name for name in start if name not in names]
    if unknown or not names:
        raise ValueError(
            f"fields or start name {unknown}, which is no hyperparameter and has no "
            f"range: choose from {list(declared) or 'the keys of ranges'}."
        )
    hypers = {name: declared.get(name, Undeclared(name)) for name in names}
    specs = {name: control_spec(hyper, ranges.get(name)) for name, hyper in hypers.items()}
    for name, value in start.items():
        spec = specs[name]
        inside = (
            value in spec["options"]
            if "options" in spec
            else ("min" not in spec or spec["min"] <= value <= spec["max"])
        )
        if not inside:
            raise ValueError(f"start[{name!r}] = {value!r} lies outside the control's range.")
        spec["value"] = value
    words = {name: hyper.help for name, hyper in hypers.items()}
    return Controls(specs, words, update, alt, note, fixed, delay)
