"""Lighter pictures: charts have few colours, so a palette stores them in a quarter of the bytes."""

from __future__ import annotations

import base64
import io
import re

COLOURS = 128
ASIDE = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>", re.DOTALL)
PATH = re.compile(r'(\sd=)"([^"]*)"')
LONG = re.compile(r"-?\d+\.\d{3,}")
BETWEEN = re.compile(r">\s+<")
VECTOR = re.compile(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)")
INLINE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def lighten(html: str) -> str:
    """HTML with lighter inline pictures, where that is smaller.

    PNG pictures get a palette. SVG pictures lose comments, metadata and line breaks, and their
    paths keep two decimals, a hundredth of a point.
    """
    if "data:image/png;base64," in html:
        html = INLINE.sub(lambda m: f"data:image/png;base64,{_with_palette(m[1])}", html)
    if "data:image/svg+xml;base64," in html:
        html = VECTOR.sub(lambda m: f"data:image/svg+xml;base64,{_shortened(m[1])}", html)
    return html


def _shortened(picture: str) -> str:
    svg = base64.b64decode(picture).decode("utf-8")
    svg = ASIDE.sub("", svg)
    # paths only: a scale of 0.015625 in a transform must stay what it is
    svg = PATH.sub(lambda m: f'{m[1]}"{" ".join(LONG.sub(_rounded, m[2]).split())}"', svg)
    svg = BETWEEN.sub("><", svg)
    lighter = base64.b64encode(svg.encode("utf-8")).decode()
    return lighter if len(lighter) < len(picture) else picture


def _rounded(number: re.Match) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _with_palette(picture: str) -> str:
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    flat = Image.new("RGB", image.size, "white")  # transparent parts show the page: it is white
    flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    made = io.BytesIO()
    flat.quantize(COLOURS, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    lighter = base64.b64encode(made.getvalue()).decode()
    return lighter if len(lighter) < len(picture) else picture
