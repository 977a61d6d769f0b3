"""Pictures of recorded pages are stored with a palette."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from book.engine.pictures import INLINE, lighten


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
