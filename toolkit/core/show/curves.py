"""Figures over a table of runs: means with their intervals, against a setting or arm by arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.core.evidence.intervals import interval
from toolkit.core.show.figures import Html, colour, figure, house, label, look
from toolkit.core.show.overlap import WIDTH, widths


def curves(
    table: Any,
    x: str,
    y: str,
    arm: str,
    *,
    names: Mapping[str, str],
    xlabel: str,
    ylabel: str,
    alt: str,
    levels: Sequence[str] = (),
    log_x: float | None = None,
) -> Html:
    """Return mean and 95 % interval of ``y`` against ``x``, a line for each arm.

    Args:
        table: Runs as a DataFrame, one row for each arm, place and seed.
        x, y, arm: Names of its columns.
        names: Arm -> its name in the legend, in order; slugs of methods get their colour.
        xlabel, ylabel: Titles of the axes, with units.
        alt: What the figure shows, in words and numbers.
        levels: Arms that have no ``x``: each a horizontal line.
        log_x: Base of a logarithmic horizontal axis.
    """
    import matplotlib.pyplot as plt

    with house():
        fig, ax = plt.subplots()
        for name in levels:
            runs = table[table[arm] == name]
            line = look(name) if name != "nothing" else {"color": "#BBBBBB", "linestyle": ":"}
            ax.axhline(runs[y].mean(), color=line["color"], linestyle=line["linestyle"],
                       label=names.get(name) or label(name))  # fmt: skip
        drawn = [name for name in names if name not in levels]
        means = table[table[arm].isin(drawn)].groupby([arm, x])[y].mean()
        wide = widths([{n: means[n].to_dict() for n in drawn if n in means}])
        marks = zip("osD^vP", ("-", "--", "-.", ":", "-", "--"), strict=True)
        for (name, title), (mark, dash) in zip(
            ((n, t) for n, t in names.items() if n not in levels), marks, strict=False
        ):
            runs = table[table[arm] == name]
            places = sorted(runs[x].unique())
            ends = [interval(runs[runs[x] == place][y]) for place in places]
            middle = [end.estimate for end in ends]
            below = [end.estimate - end.low for end in ends]
            above = [end.high - end.estimate for end in ends]
            hue = colour(name) if _house(name) else None
            more = wide.get(name, WIDTH) - WIDTH  # where another line lies upon this one
            ax.errorbar(places, middle, (below, above), marker=mark, linestyle=dash, color=hue,
                        capsize=3, label=title, linewidth=2 + 1.2 * more, elinewidth=2,
                        markersize=6 + 1.2 * more, alpha=0.55 if more else 1)  # fmt: skip
        if log_x:
            ax.set_xscale("log", base=log_x)
        places = sorted(table[~table[arm].isin(levels)][x].unique())
        if len(places) <= 10:
            ax.set_xticks(places, [f"{place:g}" for place in places])
            ax.minorticks_off()
        ax.set(xlabel=xlabel, ylabel=ylabel)
        fig.legend(loc="outside lower center", ncols=2)
        return figure(fig, alt)


def dots(
    panels: Mapping[str, Any],
    y: Mapping[str, str],
    arm: str,
    *,
    names: Mapping[str, str],
    colours: Mapping[str, str] | None = None,
    alt: str,
) -> Html:
    """Return one panel for each table: a row for each arm, its runs as dots, its interval as a bar.

    Args:
        panels: Title with unit -> runs as a DataFrame.
        y: Title -> column that is shown.
        arm: Column of the arms.
        names: Arm -> its name at the axis, from top to bottom; arms that a table lacks are left
            out of its panel.
        colours: Arm -> colour, where the house has none.
        alt: What the figure shows, in words and numbers.
    """
    import matplotlib.pyplot as plt

    shown = {t: [n for n in names if (panels[t][arm] == n).any()] for t in panels}
    height = 0.75 * len(panels) + 0.36 * sum(map(len, shown.values()))
    with house():
        fig, axes = plt.subplots(
            len(panels), 1, figsize=(5.6, height), squeeze=False,
            height_ratios=[len(arms) for arms in shown.values()],
        )  # fmt: skip
        for ax, (title, table) in zip(axes[:, 0], panels.items(), strict=True):
            for place, name in enumerate(reversed(shown[title])):
                values = table[table[arm] == name][y[title]].dropna()
                hue = (colours or {}).get(name) or (colour(name) if _house(name) else "#BBBBBB")
                ax.plot(values, [place] * len(values), "o", color=hue, alpha=0.35, markersize=5)
                if values.nunique() > 1:
                    end = interval(values)
                    for ink, width in (("white", 8), (hue, 5)):  # a rim, as runs lie below
                        ax.plot(
                            [end.low, end.high], [place, place], color=ink, linewidth=width,
                            solid_capstyle="butt",
                        )  # fmt: skip
                    ax.plot(end.estimate, place, "|", color="#1A1A1A", markersize=11)
            ax.set_yticks(range(len(shown[title])), [names[n] for n in reversed(shown[title])])
            ax.set(xlabel=title, ylim=(-0.6, len(shown[title]) - 0.4))
            ax.grid(axis="y", visible=False)
        fig.get_layout_engine().set(h_pad=0.12)  # the title of an axis belongs to its own panel
        return figure(fig, alt)


def _house(slug: str) -> bool:
    from toolkit.core.declare.catalogue import catalogue
    from toolkit.core.show.figures import BASELINES

    return slug in BASELINES or any(entry.slug == slug for entry in catalogue())
