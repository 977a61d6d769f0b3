"""Figures carry their description, controls follow their declaration, explorers answer."""

import asyncio
import html.parser
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest

from toolkit.core import show
from toolkit.core.declare.catalogue import catalogue
from toolkit.core.declare.fields import Range
from toolkit.core.show.live import WIDGET
from toolkit.core.show.runtime import runtime

matplotlib.use("Agg")


@dataclass(frozen=True)
class Method:
    """A stand-in method with one hyperparameter of each kind.

    Args:
        rank: rank of the difference
        rate: learning rate
        decay: share kept
        score: importance
        orthogonal: penalty on or off
        warmup: steps before the first cut
        free: has no range
    """

    rank: Annotated[int, Range(1, 64)] = 8
    rate: Annotated[float, Range(1e-5, 1e-1, log=True)] = 1e-3
    decay: Annotated[float, Range(0.0, 1.0, open_low=True)] = 0.5
    score: Literal["sensitivity", "magnitude"] = "sensitivity"
    orthogonal: bool = True
    warmup: Annotated[int, Range(0, 100)] | None = None
    free: float = 1.0


FIELDS = ["rank", "rate", "decay", "score", "orthogonal", "warmup"]


def words(**values):
    return f"<p>{values}</p>"


def simple_figure():
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, 1])
    return fig


# ---------------------------------------------------------------- style, colours, figures
def test_every_method_and_baseline_has_a_colour_and_a_name():
    slugs = [*show.BASELINES, *(entry.slug for entry in catalogue())]
    for slug in slugs:
        assert re.fullmatch(r"#[0-9A-Fa-f]{6}", show.colour(slug))
        assert show.label(slug)
        assert show.look(slug)["color"] == show.colour(slug)
    assert show.colour("full") == "#000000"
    assert show.colour("lora") == "#6B7A8F"
    looks = {tuple(show.look(slug).items()) for slug in slugs}
    assert len(looks) == len(slugs)


def test_unknown_colour_suggests_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'adalora'"):
        show.colour("adalor")


def test_figures_are_legible_on_a_phone():
    with matplotlib.rc_context():
        show.style()
        width = matplotlib.rcParams["figure.figsize"][0] * 72
        for name in ("font.size", "xtick.labelsize", "legend.fontsize", "axes.labelsize"):
            assert matplotlib.rcParams[name] * 350 / width >= 9.0  # pixels on 350 pixels


def test_figure_html_is_whole_described_and_repeatable():
    import matplotlib.pyplot as plt

    first = show.figure_html(simple_figure(), 'A "rising" line', caption="One & only")
    assert first == show.figure_html(simple_figure(), 'A "rising" line', caption="One & only")
    assert 'alt="A &quot;rising&quot; line"' in first
    assert "<figcaption>One &amp; only</figcaption>" in first
    assert "data:image/svg+xml;base64," in first
    assert "http" not in first
    assert plt.get_fignums() == []
    assert repr(show.figure(simple_figure(), "A line")) == "[A line]"


def test_a_crowded_figure_becomes_a_png():
    fig = simple_figure()
    x = np.random.default_rng(0).normal(size=(2, 20_000))
    fig.axes[0].scatter(*x)
    assert "data:image/png;base64," in show.figure_html(fig, "Many points")


def test_a_figure_needs_a_description():
    with pytest.raises(ValueError, match="alt is empty"):
        show.figure(simple_figure(), " ")


# ---------------------------------------------------------------- controls
def test_controls_follow_the_declaration():
    import ipywidgets

    made = show.controls(Method, words, FIELDS, alt="Words.")
    kinds = {name: type(widget) for name, widget in made.widgets.items()}
    assert kinds == {
        "rank": ipywidgets.IntSlider,
        "rate": ipywidgets.FloatLogSlider,
        "decay": ipywidgets.FloatSlider,
        "score": ipywidgets.Dropdown,
        "orthogonal": ipywidgets.Checkbox,
        "warmup": ipywidgets.IntSlider,
    }
    assert made.values == {
        "rank": 8,
        "rate": 1e-3,
        "decay": 0.5,
        "score": "sensitivity",
        "orthogonal": True,
        "warmup": 50,
    }
    assert (made.widgets["rank"].min, made.widgets["rank"].max) == (1, 64)
    assert made.widgets["decay"].min == pytest.approx(0.02)  # zero itself is not allowed
    assert made.widgets["rate"].min == pytest.approx(-5)
    assert made.widgets["rank"].description == "rank"
    assert made.widgets["rank"].tooltip == "rank of the difference"


def test_controls_work_for_every_method_of_the_catalogue():
    for entry in catalogue():
        if not entry.hyperparameters:
            continue
        names = [h.name for h in entry.hyperparameters]
        wide = {
            h.name: (1, 100)
            for h in entry.hyperparameters
            if h.choices is None and h.type not in (bool, str) and None in (h.low, h.high)
        }
        made = show.controls(entry.method, words, names, wide, alt="Words.")
        entry.method(**{n: v for n, v in made.values.items() if n not in wide})


def test_moving_a_control_updates_the_panel():
    made = show.controls(
        Method, words, ["rank"], {"width": (0.0, 1.0), "kind": ["a", "b"]}, alt="Words.", seed=3
    )
    assert made.shown == words(rank=8, width=0.5, kind="a", seed=3)
    made.widgets["rank"].value = 9
    assert made.shown == made._panel.value == words(rank=9, width=0.5, kind="a", seed=3)


def test_an_error_is_shown_in_the_panel_and_the_next_move_recovers():
    def update(rank):
        if rank > 8:
            raise ValueError("rank <9> is too large")
        return words(rank=rank)

    made = show.controls(Method, update, ["rank"], alt="Words.")
    made.widgets["rank"].value = 9
    assert "ValueError: rank &lt;9&gt; is too large" in made._panel.value
    made.widgets["rank"].value = 2
    assert made._panel.value == words(rank=2)


def test_quick_moves_are_drawn_once():
    calls = []

    def update(rank):
        calls.append(rank)
        return words(rank=rank)

    async def drag():
        made = show.controls(Method, update, ["rank"], alt="Words.", delay=0.05)
        for rank in (9, 10, 11, 12):
            made.widgets["rank"].value = rank
        assert calls == [8]
        while made._waiting is not None:
            await asyncio.sleep(0.01)

    asyncio.run(drag())
    assert calls == [8, 12]


def test_output_shows_a_figure_without_a_kernel_and_a_widget_with_one(monkeypatch):
    made = show.controls(Method, lambda rank: simple_figure(), ["rank"], alt="A rising line")
    bundle = made._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == made.box.model_id
    assert 'alt="A rising line"' in bundle["text/html"]
    assert "rank = 8" in bundle["text/html"]
    assert "live notebook" in bundle["text/html"]
    monkeypatch.setitem(sys.modules, "google.colab", object())
    assert "text/html" not in made._repr_mimebundle_()


def test_without_ipywidgets_the_first_figure_still_shows(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    bundle = show.controls(Method, words, ["rank"], alt="Words.")._repr_mimebundle_()
    assert WIDGET not in bundle
    assert "Install ipywidgets" in bundle["text/html"]
    assert words(rank=8) in bundle["text/html"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"fields": ["rnak"]}, "rnak"),
        ({"fields": ["free"]}, r"free has no range .*ranges=\{'free'"),
        ({"fields": ["rank"], "ranges": {"rank": (9, 3)}}, "rank has no range"),
        ({"fields": ["rank"], "ranges": {"rank": []}}, "empty"),
        ({"fields": ["rank"], "start": {"rank": 65}}, "outside"),
        ({"fields": ["score"], "start": {"score": "luck"}}, "outside"),
        ({"fields": []}, "start name"),
        ({"fields": ["rank"], "alt": ""}, "alt is empty"),
    ],
)
def test_bad_controls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        show.controls(Method, words, **{"alt": "Words."} | call)


def test_an_update_that_shows_nothing_is_refused():
    with pytest.raises(TypeError, match="update returned int"):
        show.controls(Method, lambda rank: rank, ["rank"], alt="Words.")


def test_controls_run_headless_under_papermill(tmp_path):
    source = (
        "from toolkit.core import show\nfrom IPython.display import display\n"
        "moved = show.controls(None, lambda rank: f'<p>rank is {rank}</p>',\n"
        "                      ranges={'rank': (1, 8)}, alt='The rank.')\n"
        "display(moved)\nmoved.widgets['rank'].value = 7\n"
    )
    cells = [
        nbformat.v4.new_code_cell(source),
        nbformat.v4.new_code_cell(
            "import asyncio\nawait asyncio.sleep(0.5)\nprint(moved._panel.value)"
        ),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "in.ipynb")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "in.ipynb",
            "out.ipynb",
            "--execution-timeout",
            "60",
            "--no-progress-bar",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    data = done.cells[0].outputs[0]["data"]
    assert "<p>rank is 4</p>" in data["text/html"]
    assert WIDGET in data
    assert done.cells[1].outputs[0]["text"] == "<p>rank is 7</p>\n"


# ---------------------------------------------------------------- explorers
def grid():
    rows = [
        (budget, score, method, rank, budget + rank / 8 + (method == "lora"))
        for budget in (2, 4, 6)
        for score in ("a", "b")
        for method in ("lora", "other")
        for rank in (1, 2, 8)
    ]
    frame = pd.DataFrame(rows, columns=["budget", "score", "method", "rank", "loss"])
    return frame.assign(low=frame.loss - 0.1, high=frame.loss + 0.1)


def explore(frame=None, **change):
    call = {
        "x": "rank",
        "y": "loss",
        "series": "method",
        "controls": ["budget", "score"],
        "title": "Loss </script> & rank",
        "alt": "Lines of loss.",
        "band": ("low", "high"),
    }
    return show.explorer(grid() if frame is None else frame, **(call | change))


def bars(names, kinds):
    """The place and offset of the bars of an explorer over names."""
    rows = [(n, k, v) for v, (n, k) in enumerate(zip(names, kinds, strict=True))]
    frame = pd.DataFrame(rows, columns=["name", "kind", "share"])
    spec = show.explorer(frame, "name", "share", "kind", title="t", alt="a").spec
    layers = spec.get("layer", [spec])
    return layers[0]["encoding"]


def test_bars_of_long_names_lie_on_their_side_and_one_series_a_name_is_as_wide_as_can_be():
    many = [f"a variant of LoRA, number {n}" for n in range(8)]
    found = bars(many, ["ours"] * 4 + ["theirs"] * 4)
    assert (found["y"]["field"], found["x"]["field"]) == ("x", "y")
    assert "yOffset" not in found
    some = bars(["query", "key", "value", "output", "up", "down", "vectors"], ["ours"] * 7)
    assert (some["x"]["axis"]["labelAngle"], some["x"]["axis"]["labelOverlap"]) == (-35, False)
    few = bars(["one", "two", "one", "two"], ["ours", "ours", "theirs", "theirs"])
    assert few["x"]["axis"]["labelAngle"] == 0
    assert few["xOffset"]["field"] == "series"


def marks_of(y):
    rows = [(line, x, value) for line, values in y.items() for x, value in enumerate(values)]
    frame = pd.DataFrame(rows, columns=["line", "rate", "y"]).assign(rate=lambda f: 2.0**-f.rate)
    return show.explorer(frame, "rate", "y", "line", log_x=True, title="t", alt="a").spec["layer"]


def test_a_line_that_another_lies_upon_is_wider():
    series = {"under": [0, 50, 99, 90], "upon": [0.5, 50.5, 99, 60], "apart": [0, 9, 9, 9]}
    under, lines, _ = marks_of(series)
    assert under["mark"]["strokeWidth"] > lines["mark"]["strokeWidth"]
    assert under["transform"] == [{"filter": {"field": "series", "equal": "under"}}]
    assert len(marks_of({"one": [0, 50, 100], "two": [20, 70, 80]})) == 2


def test_learning_rates_are_decimals_and_marks_have_room_at_both_ends():
    x = marks_of({"one": [1, 2, 3]})[0]["encoding"]["x"]
    assert x["axis"]["format"] == "~g"
    assert x["scale"]["padding"] > 0


def test_a_wide_logarithmic_axis_has_few_labels():
    x = marks_of({"one": list(range(12))})[0]["encoding"]["x"]
    assert x["axis"]["values"] == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


def test_even_numbers_get_a_slider_and_the_rest_a_list():
    spec = explore(start={"score": "b"}, labels={"budget": "final budget"}).spec
    slider, choice = spec["params"]
    assert slider["bind"] == {
        "input": "range",
        "min": 2,
        "max": 6,
        "step": 2,
        "name": "final budget",
    }
    assert slider["value"] == 4
    assert choice["bind"] == {"input": "select", "options": ["a", "b"], "name": "score"}
    assert choice["value"] == "b"
    uneven = explore(controls=["rank", "score"], x="budget").spec["params"][0]
    assert uneven["bind"]["input"] == "select"
    assert uneven["bind"]["options"] == [1, 2, 8]


def test_each_panel_has_an_axis_and_one_control_moves_them_all():
    spec = explore(panels="score", controls=["budget"], labels={"score": "task"}).spec
    assert spec["facet"]["column"]["sort"] == ["a", "b"]
    assert [param["name"] for param in spec["params"]] == ["p_c0"]
    assert "filter" in spec["transform"][0]  # before the rows part among the panels
    assert {row["panel"] for row in spec["data"]["values"]} == {"a", "b"}
    tips = spec["spec"]["layer"][-1]["encoding"]["tooltip"]
    assert {"field": "panel", "title": "task"} in tips
    with pytest.raises(ValueError, match="several rows"):
        explore(controls=["budget"])


def test_bars_of_one_series_a_name_in_each_panel_are_as_wide_as_can_be():
    rows = [("p", "long", 1.0), ("p", "short", 2.0), ("q", "long", 3.0), ("q", "short", 4.0)]
    frame = pd.DataFrame(rows, columns=["task", "name", "share"])
    frame["kind"] = ["ours", "theirs", "theirs", "ours"]
    made = show.explorer(frame, "name", "share", "kind", panels="task", title="t", alt="a").spec
    assert "xOffset" not in made["spec"]["layer"][0]["encoding"]


def test_the_chart_holds_every_row_and_the_colours_of_the_book():
    spec = explore().spec
    assert len(spec["data"]["values"]) == len(grid())
    scale = spec["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == ["LoRA", "other"]
    assert scale["range"][0] == show.colour("lora")
    assert scale["range"][1] not in (show.colour("lora"), None)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"band": None},
        {"series": None, "controls": ["budget", "score", "method"]},
        {"x": "score", "controls": ["budget", "rank"]},
        {"log_x": True, "log_y": True},
        {"x": "method", "controls": ["budget", "rank", "score"]},
        {"panels": "score", "controls": ["budget"]},
        {
            "controls": ["method"],
            "series": "budget",
            "x": "score",
            "frame": grid().query("rank == 1"),
        },
    ],
)
def test_every_form_compiles_without_a_warning(change, capfd):
    vl_convert = pytest.importorskip("vl_convert")
    spec = explore(**change).spec
    made = vl_convert.vegalite_to_svg(dict(spec, width=400))
    assert made.count('aria-roledescription="') > 3
    assert "WARN" not in "".join(capfd.readouterr())


class Blocks(html.parser.HTMLParser):
    """Collects the tags and the data of a block."""

    def __init__(self):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = ("class", "explorer-spec") in attrs

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        self.data += data if self.inside else ""


def test_the_recorded_block_is_data_and_table_only(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_RESULTS", str(tmp_path))
    made = explore()
    page = made._repr_html_()
    blocks = Blocks()
    blocks.feed(page)
    assert json.loads(blocks.data) == json.loads(json.dumps(made.spec))
    assert blocks.tags.count("script") == 1
    assert blocks.tags.count("tr") == len(grid()) + 1
    assert 'src="' not in page
    assert "<details" in page
    assert 'aria-label="Loss &lt;/script&gt; &amp; rank"' in page
    assert '<th scope="col">budget</th>' in page


def test_a_live_notebook_gets_the_runtime(monkeypatch):
    monkeypatch.delenv("TOOLKIT_RESULTS", raising=False)
    pytest.importorskip("vl_convert")
    page = explore()._repr_html_()
    assert "window.vegaEmbed=" in page
    assert "explorerRuntime =" not in page
    monkeypatch.setitem(sys.modules, "google.colab", object())
    page = explore()._repr_html_()
    assert len(page) < 60_000
    assert "vega-embed@7" in page


def test_the_runtime_is_bundled_once_for_each_version(monkeypatch, tmp_path):
    vl_convert = pytest.importorskip("vl_convert")
    bundled = []
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda: bundled.append(1) or "a script")
    monkeypatch.setenv("TOOLKIT_DATA", str(tmp_path / "data"))
    assert [runtime(), runtime()] == ["a script"] * 2
    assert len(bundled) == 1
    monkeypatch.setattr(vl_convert, "__version__", "another")
    assert runtime() == "a script"
    assert len(bundled) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("TOOLKIT_DATA", str(tmp_path / "file"))  # no folder: nothing can be kept
    assert [runtime(), runtime()] == ["a script"] * 2
    assert len(bundled) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alt": ""}, "title and alt"),
        ({"y": "lost"}, "lacks"),
        ({"frame": grid().iloc[:0]}, "rows"),
        ({"frame": grid().assign(loss=np.nan)}, "holds nan"),
        ({"frame": pd.concat([grid(), grid()])}, "several rows"),
        ({"controls": ["budget"]}, "several rows"),
        ({"frame": grid().query("not (budget == 2 and score == 'a')")}, "no row for"),
        ({"start": {"score": "c"}}, "choose one of"),
    ],
)
def test_bad_grids_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        explore(**change)
