"""The phase diagram: what it draws, what it says, and that its words keep their room."""

import itertools
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.patches import Rectangle

from toolkit.core.show import figures
from toolkit.diagnose.three_regime.diagram import PhaseDiagram
from toolkit.diagnose.three_regime.heatmap import outline, widest_cells

PAPER = (0.05, 0.06, 0.07, 0.08, 0.1, 0.14, 0.2, 0.4, 0.8)


def landscape(temperatures=8, densities=PAPER, seeds=2, noise=0.002):
    """Regime I in the cold and sparse corner; CKA and the cost of heat grow with density."""
    rng, rows = np.random.default_rng(0), []
    for s, t, j in itertools.product(range(seeds), range(temperatures), range(len(densities))):
        x, y = t / (temperatures - 1), j / (len(densities) - 1)
        deep = max(0.0, 0.62 * (1 - 1.4 * x - 2.2 * y))
        rows.append(
            {
                "seed": s,
                "temperature": t,
                "density": densities[j],
                "test_error": 0.16 - 0.08 * y + 0.08 * deep + 0.05 * x * (0.35 + y),
                "lmc": -deep,
                "cka": 0.99 - 0.06 * x - 0.05 * (1 - y),
            }
        )
    cells = pd.DataFrame(rows)
    cells["test_error"] += noise * rng.normal(size=len(cells))
    return cells


def along(cells):
    rows = []
    for cell, pair, t in itertools.product(
        cells.to_dict("records"), ("0-1", "0-2"), np.linspace(0, 1, 11)
    ):
        error = 0.02 - 4 * t * (1 - t) * cell["lmc"] * (1 + 0.1 * (pair == "0-2"))
        keys = {key: cell[key] for key in ("seed", "temperature", "density")}
        rows.append({**keys, "pair": pair, "t": t, "train_error": error})
    return pd.DataFrame(rows)


EPOCHS = [str(160 - 20 * k) for k in range(8)]


@pytest.fixture(scope="module")
def diagram():
    cells = landscape()
    return PhaseDiagram(cells, along(cells), temperature_label="epochs", labels=EPOCHS)


def boxes(fig):
    """Bounding boxes of all words but those drawn on the maps."""
    FigureCanvasAgg(fig).draw()
    words = [text for text in fig.findobj(matplotlib.text.Text) if text.get_text().strip()]
    on_maps = {text for ax in fig.axes for text in ax.texts}
    hidden = {
        label
        for ax in fig.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not (label.get_visible() and _within(axis, tick))
    }
    return {w: w.get_window_extent() for w in words if w not in on_maps | hidden}


def _within(axis, tick):
    low, high = sorted(axis.get_view_interval())
    return low - 1e-9 <= tick.get_loc() <= high + 1e-9


def check_room(fig):
    found = boxes(fig)
    page = fig.bbox.padded(1)
    for word, box in found.items():
        assert page.contains(box.x0, box.y0), word
        assert page.contains(box.x1, box.y1), word
    for (a, one), (b, two) in itertools.combinations(found.items(), 2):
        assert not one.padded(-1).overlaps(two.padded(-1)), (a.get_text(), b.get_text())


def meshes(fig):
    return [m for ax in fig.axes for m in ax.collections if isinstance(m, QuadMesh)]


def test_means_and_regimes(diagram):
    assert len(diagram.means) == 72
    assert (diagram.means.groupby("density")["normalised"].min() == 0).all()
    assert list(diagram.regimes.index) == list(range(7, -1, -1))  # hot at the top
    assert list(diagram.regimes.columns) == list(PAPER)
    assert diagram.regimes.loc[0, 0.05] == "I"
    assert diagram.regimes.loc[0, 0.8] == "II-B"
    assert diagram.regimes.loc[7, 0.8] == "II-A"


def test_four_maps(diagram):
    fig = diagram.maps()
    maps = fig.axes[:4]
    assert [ax.get_title(loc="left") for ax in maps] == [
        "test error",
        "error above the best",
        "LMC",
        "CKA",
    ]
    for ax, column in zip(maps, ("test_error", "normalised", "lmc", "cka"), strict=True):
        mesh = next(m for m in ax.collections if isinstance(m, QuadMesh))
        wanted = diagram.means.pivot(index="temperature", columns="density", values=column)
        assert np.array_equal(mesh.get_array().reshape(8, 9), wanted.to_numpy())
        hatched = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()]
        assert len(hatched) == (diagram.regimes == "I").to_numpy().sum()
        assert {text.get_text() for text in ax.texts} == {"I", "II-A", "II-B"}
    lmc = maps[2].collections[0].norm
    assert lmc.vmin == -lmc.vmax
    assert [ax.get_xlabel() for ax in maps] == ["", "", "density (%)", "density (%)"]
    assert fig.get_supylabel() == "epochs, hotter →"
    assert fig.get_size_inches()[0] == 5.6
    assert [t.get_text() for t in maps[2].get_xticklabels()] == ["5", "7", "10", "20", "80"]
    assert maps[2].get_yticklabels()[0].get_text() == "160"  # the coldest below
    assert maps[0].get_ylim()[0] < maps[0].get_ylim()[1]


def test_small_grids_carry_numbers():
    diagram = PhaseDiagram(landscape(3, (0.02, 0.1, 0.5)))
    fig = diagram.maps()
    words = [text.get_text() for text in fig.axes[3].texts]
    assert len(words) == 9
    assert words[0] == f"{diagram.means['cka'][0]:.3f}\n{diagram.means['regime'][0]}"
    assert not [p for p in fig.axes[3].patches if p.get_hatch()]
    check_room(fig)


def test_regime_map(diagram):
    fig = diagram.regime_map()
    (ax,) = fig.axes
    assert [t.get_text() for t in ax.texts] == diagram.regimes.iloc[
        ::-1
    ].to_numpy().ravel().tolist()
    assert ax.get_xlabel() == "density (% of weights kept)"
    assert len(fig.legends[0].get_texts()) == 3


def test_arrows_point_where_the_advice_says(diagram):
    fig = diagram.arrows()
    ax = fig.axes[0]
    arrows = [c for c in ax.collections if isinstance(c, matplotlib.quiver.Quiver)]
    stays = sum(len(line.get_xdata()) for line in ax.lines)
    assert len(arrows) + stays == 72
    for arrow in arrows:
        word, _ = diagram.advice(int(arrow.Y[0]), PAPER[int(arrow.X[0])])
        assert word == ("hotter" if arrow.V[0] > 0 else "colder")
    assert len(meshes(fig)) == 2  # the map and its colour bar


FIGURES = ("maps", "regime_map", "arrows", "path")
SIX = (0.01, 0.02, 0.05, 0.125, 0.3, 0.8)  # labels of many widths


# the four maps of three temperatures have a test of their own, and other sizes no new labels
@pytest.mark.parametrize(
    ("name", "rows", "densities"),
    [*((name, 8, PAPER) for name in FIGURES), ("maps", 6, SIX), *((n, 2, (0.5,)) for n in FIGURES)],
)
def test_words_keep_their_room(name, rows, densities):
    cells = landscape(rows, densities) if len(densities) > 1 else flat()
    diagram = PhaseDiagram(cells, along(cells))
    fig = getattr(diagram, name)()
    check_room(fig)
    alt = getattr(diagram, f"{name}_alt")()
    assert len(alt) > 60
    assert "nan" not in alt
    if name == "regime_map":  # what is drawn once more depends on neither
        assert "<img" in figures.figure(fig, alt)._repr_html_()


def flat():
    """Two temperatures, one density, nothing differs."""
    keys = {"seed": 0, "density": 0.5, "test_error": 0.1, "lmc": 0.0, "cka": 1.0}
    return pd.DataFrame([{**keys, "temperature": t} for t in (0, 1)])


def test_style_is_not_left_behind(diagram):
    before = dict(matplotlib.rcParams)
    diagram.maps()
    assert dict(matplotlib.rcParams) == before


def test_path(diagram):
    fig = diagram.path()
    (ax,) = fig.axes
    labels = [line.get_label() for line in ax.lines]
    assert labels == [
        "Regime I: density 5 %, epochs 160",
        "Regime II-A: density 5 %, epochs 20",
        "Regime II-B: density 80 %, epochs 160",
    ]
    assert ax.get_xlabel() == "place t on the straight line"
    assert ax.get_ylabel() == "training error (share)"
    assert len(ax.collections) == 3  # bands
    one = diagram.path([(0, 0.06)]).axes[0].lines[0]
    deep = -diagram.means.query("temperature == 0 and density == 0.06")["lmc"].item()
    assert max(one.get_ydata()) == pytest.approx(0.02 + 1.05 * deep)
    assert "highest" in diagram.path_alt([(0, 0.06)])


def test_alt_texts_tell_the_numbers(diagram):
    count = (diagram.regimes == "I").to_numpy().sum()
    text = diagram.maps_alt()
    assert "9 densities, 5 % to 80 %" in text
    assert "epochs 160 (coldest) to 20 (hottest)" in text
    assert f"Regime I (not connected) {count}" in text
    assert f"{diagram.means['lmc'].min():.3g} (density 5 %, epochs 160)" in text
    assert "160: I at 5 to 8 %, II-B at 10 to 80 %" in diagram.regime_map_alt()
    told = [int(n) for n in re.findall(r"(?:hotter|colder|stay) in (\d+)", diagram.arrows_alt())]
    assert sum(told) == 72


def test_advice(diagram):
    assert diagram.advice(0, 0.05)[0] == "hotter"
    assert diagram.advice(7, 0.8)[0] == "colder"
    assert diagram.advice(0, 0.8)[0] == "stay"
    edge = diagram.regimes[0.05].ne("I")[::-1].idxmax()  # the coldest connected temperature
    word, text = diagram.advice(edge, 0.05)
    assert word == "stay"
    assert "one notch colder, the copies are no longer connected" in text
    assert diagram.advice(edge - 1, 0.05)[0] == "hotter"
    everywhere = PhaseDiagram(landscape(3).assign(lmc=-0.5))
    word, text = everywhere.advice(2, 0.05)
    assert word == "hotter"
    assert "beyond the hottest" in text


def test_outline_of_known_regimes():
    ax = matplotlib.figure.Figure().subplots()
    outline(ax, np.array([["I", "II-B"], ["II-A", "II-B"]]))
    _, soft, _, hard = [c for c in ax.collections if isinstance(c, LineCollection)]
    lines = {tuple(map(tuple, line)) for line in hard.get_segments()}
    assert lines == {((0.5, -0.5), (0.5, 0.5)), ((-0.5, 0.5), (0.5, 0.5))}
    assert [line.tolist() for line in soft.get_segments()] == [[[0.5, 0.5], [0.5, 1.5]]]
    whole = matplotlib.figure.Figure().subplots()
    outline(whole, np.array([["I", "I"], ["II-B", "II-B"]]))
    assert whole.collections[-1].get_segments()[0].tolist() == [[-0.5, 0.5], [1.5, 0.5]]  # one run


def test_names_stand_inside_their_regime():
    kinds = np.array([["I", "I", "I", "II-B"], ["I", "I", "I", "II-B"], ["I", "I", "I", "II-B"]])
    assert widest_cells(kinds) == [(1, 1), (1, 3)]


def test_bad_input():
    cells = landscape(3)
    with pytest.raises(ValueError, match=r"lacks the columns \['cka'\]"):
        PhaseDiagram(cells.drop(columns="cka"))
    with pytest.raises(ValueError, match="no word for temperature"):
        PhaseDiagram(cells, labels=["cold", "hot"])
    with pytest.raises(ValueError, match="no word for temperature"):
        PhaseDiagram(cells, labels={0: "cold"})
    diagram = PhaseDiagram(cells)
    with pytest.raises(ValueError, match="paths lacks the columns"):
        diagram.path()
    with pytest.raises(ValueError, match="there is no cell at temperature 9"):
        diagram.advice(9, 0.05)
    some = PhaseDiagram(cells, along(cells.query("density < 0.5")))
    with pytest.raises(ValueError, match=r"no rows for temperature 0, density 0\.8"):
        some.path([(0, 0.8)])
    with pytest.raises(ValueError, match="cells is empty"):
        some.path([])
