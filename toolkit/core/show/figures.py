"""The house look: one style, one colour per method, and figures that carry their description."""

from __future__ import annotations

import base64
import difflib
import html
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008), for series without a name.
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Baselines that many chapters share: colour, label, marker, dash pattern.
BASELINES = {
    "full": ("#000000", "full training", "s", "--"),
    "frozen": ("#7F7F7F", "frozen", "x", ":"),
    "head": ("#7F7F7F", "head only", "x", ":"),
    "random": ("#999933", "random", "v", "-."),
    "oracle": ("#117733", "oracle", "*", "--"),
    "magnitude": ("#CC6677", "magnitude", "^", "-."),
}
COLUMN = 5.6
"""Width of a figure in inches."""
SVG_LIMIT = 40_000
"""Bytes above which a figure is stored as PNG: scatter plots would bloat the page as SVG."""


def style() -> None:
    """Set the house style for matplotlib and seaborn.

    Figures are 5.6 x 3.8 inches with 12 point text, which a phone 390 pixels wide shows at about
    10 pixels: still legible. Output is the same on every run (fixed SVG ids, no date).
    """
    import matplotlib as mpl
    import seaborn as sns

    sns.set_theme(context="notebook", style="ticks", palette=list(CYCLE))
    mpl.rcParams.update(
        {
            "figure.figsize": (5.6, 3.8),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "font.size": 12,
            "axes.labelsize": 12,
            "axes.titlesize": 13,
            "axes.titlelocation": "left",
            "legend.fontsize": 11,
            "legend.frameon": False,
            "xtick.labelsize": 11,
            "ytick.labelsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E3E3E3",
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "lines.linewidth": 2.0,
            "lines.markersize": 6,
            "axes.formatter.use_mathtext": True,
            "svg.hashsalt": "parameters-in-motion",
            "svg.fonttype": "path",
        }
    )


def _known(slug: str) -> tuple[str, str, str, str]:
    """Colour, label, marker and dash of a method or baseline."""
    if slug in BASELINES:
        return BASELINES[slug]
    from toolkit.core.declare.catalogue import catalogue

    entries = {entry.slug: entry for entry in catalogue()}
    if slug not in entries:
        names = [*BASELINES, *entries]
        near = difflib.get_close_matches(slug, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {names}."
        raise KeyError(f"{slug!r} is neither a method nor a baseline: {hint}")
    return entries[slug].colour, entries[slug].title, "o", "-"


def colour(slug: str) -> str:
    """Return the hex colour of a method or baseline, the same in every figure of the book.

    Raises:
        KeyError: If ``slug`` is unknown; the message suggests the nearest name.
    """
    return _known(slug)[0]


def label(slug: str) -> str:
    """Return the readable name of a method or baseline.

    Raises:
        KeyError: If ``slug`` is unknown; the message suggests the nearest name.
    """
    return _known(slug)[1]


def look(slug: str) -> dict[str, str]:
    """Return colour, label, marker and dash for ``plt.plot(x, y, **look("lora"))``.

    Marker and dash tell baselines from methods where colour cannot.
    """
    hue, name, marker, dash = _known(slug)
    return {"color": hue, "label": name, "marker": marker, "linestyle": dash}


def figure_html(fig: Any, alt: str, caption: str = "") -> str:
    """Return a matplotlib figure as one HTML element that needs no file beside it.

    Args:
        fig: The figure. It is closed, so that no notebook shows it a second time.
        alt: What the figure shows, in words, for readers who cannot see it.
        caption: Text under the figure; shown to everyone.

    Raises:
        ValueError: If ``alt`` is empty.
    """
    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what the figure shows.")
    import matplotlib.pyplot as plt

    kind, data = "svg+xml", _saved(fig, "svg")
    if len(data) > SVG_LIMIT and len(points := _few_colours(_saved(fig, "png"))) < len(data):
        kind, data = "png", points
    plt.close(fig)
    width = round(fig.get_size_inches()[0] * 96)
    under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="house-figure" style="margin:0 0 1em"><img alt="{html.escape(alt)}" '
        f'style="width:{width}px;max-width:100%;height:auto;background:white" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">{under}</figure>'
    )


def _saved(fig: Any, kind: str) -> bytes:
    import matplotlib as mpl

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with mpl.rc_context({"svg.hashsalt": "parameters-in-motion"}):
        fig.savefig(buffer, format=kind, dpi=160, metadata=metadata, bbox_inches="tight")
    return buffer.getvalue()


def _few_colours(png: bytes) -> bytes:
    """A picture with the 256 colours that suit it best, a third of its bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


class Html:
    """A piece of HTML that a notebook shows; prints as its description.

    Args:
        body: The HTML.
        words: What it shows, for front ends without HTML.
    """

    def __init__(self, body: str, words: str) -> None:
        self.body, self.words = body, words

    def _repr_html_(self) -> str:
        return self.body

    def __repr__(self) -> str:
        return f"[{self.words}]"


def figure(fig: Any, alt: str, caption: str = "") -> Html:
    """Return a figure with its description, to be shown by ``display`` or as a cell's last line.

    Args:
        fig: The figure. It is closed, so that no notebook shows it a second time.
        alt: What the figure shows, in words.
        caption: Text under the figure.

    Raises:
        ValueError: If ``alt`` is empty.
    """
    return Html(figure_html(fig, alt, caption), alt)


@contextmanager
def house() -> Iterator[None]:
    """Draw in the house style without leaving it behind."""
    import matplotlib as mpl

    with mpl.rc_context():
        style()
        yield


def subplots(height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure outside pyplot, so that nothing stays open."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(COLUMN, height), layout="constrained")
    return fig, fig.subplots(rows, columns)
