"""Pictures of recorded pages are stored light: with a palette, or with short paths."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from book.engine.pictures import INLINE, VECTOR, lighten
from toolkit.core import show


def picture(size=200, alpha=False):
    """A chart-like picture as HTML: two smooth lines on white."""
    y, x = np.mgrid[:size, :size] / size
    line = np.exp(-((y - 0.5 - 0.3 * np.sin(6 * x)) ** 2) * 900)
    pixels = np.stack([255 - 255 * line, 255 - 141 * line, 255 - 77 * line], -1).astype(np.uint8)
    if alpha:
        pixels = np.concatenate([pixels, np.full((size, size, 1), 255, np.uint8)], -1)
        pixels[: size // 4, :, 3] = 0
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "PNG")
    return pixels, f'<img src="data:image/png;base64,{base64.b64encode(made.getvalue()).decode()}">'


def opened(html):
    return Image.open(io.BytesIO(base64.b64decode(INLINE.search(html)[1])))


def test_a_chart_gets_smaller_and_looks_the_same():
    pixels, html = picture()
    light = lighten(f"<p>words</p>{html}<p>more</p>")
    assert light.startswith("<p>words</p><img")
    assert light.endswith("<p>more</p>")
    assert len(light) < 0.7 * len(html)
    after = np.asarray(opened(light).convert("RGB")).astype(int)
    assert after.shape == pixels.shape
    assert np.abs(after - pixels).mean() < 1
    assert np.abs(after - pixels).max() < 16


def test_transparent_parts_become_white():
    _, html = picture(alpha=True)
    after = np.asarray(opened(lighten(html)).convert("RGB"))
    assert (after[:40] == 255).all()


def test_twice_is_once_and_other_text_is_left_alone():
    _, html = picture()
    once = lighten(html)
    assert lighten(once) == once
    assert lighten("no picture here") == "no picture here"


def drawing():
    """A chart as the chapters store it, and its SVG."""
    figure = show.figure_html(_figure(), "two lines", "a caption")
    return figure, base64.b64decode(VECTOR.search(figure)[1]).decode()


def _figure():
    fig, axis = plt.subplots(figsize=(3, 2))
    axis.plot(np.linspace(0, 1, 300), np.random.default_rng(0).normal(size=300).cumsum())
    axis.set(xlabel="step", ylabel="loss", title="a - b")
    return fig


def test_a_drawing_gets_shorter_and_keeps_its_points():
    figure, before = drawing()
    light = lighten(f"<p>- 0.123456 -</p>{figure}")
    assert light.startswith("<p>- 0.123456 -</p><figure")
    after = base64.b64decode(VECTOR.search(light)[1]).decode()
    assert len(after) < 0.85 * len(before)
    paths = [re.findall(r'\sd="([^"]*)"', svg) for svg in (before, after)]
    assert len(paths[0]) == len(paths[1]) > 20
    for one, two in zip(*paths, strict=True):
        old, new = ([float(n) for n in re.findall(r"-?[\d.]+", d)] for d in (one, two))
        assert re.sub(r"[-\d.\s]", "", one) == re.sub(r"[-\d.\s]", "", two)
        assert np.abs(np.subtract(old, new)).max() <= 0.0051
    assert re.findall(r"scale\([^)]*\)", before) == re.findall(r"scale\([^)]*\)", after)
    assert "two lines" in light
    ElementTree.fromstring(after)


def test_shortening_twice_is_once():
    once = lighten(drawing()[0])
    assert lighten(once) == once
