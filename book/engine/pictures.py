"""Lighter pictures: charts have few colours, so a palette stores them in a quarter of the bytes."""

from __future__ import annotations

import base64
import io
import re

COLOURS = 128
INLINE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def lighten(html: str) -> str:
    """HTML with its inline PNG pictures stored with a palette, where that is smaller."""
    if "data:image/png;base64," not in html:
        return html
    return INLINE.sub(lambda found: f"data:image/png;base64,{_with_palette(found[1])}", html)


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
