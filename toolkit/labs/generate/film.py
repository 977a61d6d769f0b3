"""Pictures on pages: small grey images kept as text, shown in rows, and switched without a script.

Results hold images as short strings (:func:`encode`), so a page shows samples without sampling.
:func:`flip` is an explorer of pictures. Its controls are radio buttons and its answer is a rule of
the style sheet, since pages run no script of their own; each setting has words for who does not
see it. Without such rules the first setting stays.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io as streams
import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from toolkit.core.show import Html
from toolkit.labs.pictures import grid

Rows: TypeAlias = Mapping[str, Tensor]
Setting: TypeAlias = str | tuple[str, ...]
IMAGE = "display:block;width:100%;height:auto;image-rendering:pixelated;filter:none"


def encode(images: Tensor, levels: int = 32) -> str:
    """Images as one short string, for a results file.

    Args:
        images: (n, 1, height, width) from -1 to 1; what lies outside is cut.
        levels: of grey, 2 to 256; fewer make a shorter string.

    Raises:
        ValueError: another shape, no number, or levels out of range.
    """
    if images.dim() != 4 or images.shape[1] != 1 or not images.numel():
        raise ValueError(f"images: (n, 1, height, width), got {tuple(images.shape)}")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels: 2 to 256, got {levels}")
    if not bool(images.isfinite().all()):
        raise ValueError("images: they hold numbers that are not finite; leave such samples out")
    grey = ((images.detach().cpu().double() + 1) / 2).clamp(0, 1)
    data = (grey * (levels - 1)).round().to(torch.uint8).numpy().tobytes()
    count, _, high, wide = images.shape
    return f"{count}x{high}x{wide}:{levels}:{base64.b64encode(zlib.compress(data, 9)).decode()}"


def decode(text: str) -> Tensor:
    """The images (n, 1, height, width) from -1 to 1 that :func:`encode` made a string of.

    Raises:
        ValueError: it is no such string.
    """
    try:
        shape, levels, data = text.split(":")
        count, high, wide = map(int, shape.split("x"))
        grey = torch.frombuffer(
            bytearray(zlib.decompress(base64.b64decode(data, validate=True))), dtype=torch.uint8
        ).view(count, 1, high, wide)
        return grey.float() / (int(levels) - 1) * 2 - 1
    except (ValueError, RuntimeError, zlib.error) as error:
        raise ValueError(f"text: not a string that encode made ({error})") from error


def address(images: Tensor, columns: int) -> str:
    """Images in rows of so many, as the address of a PNG that lies in the page itself."""
    from PIL import Image

    stream = streams.BytesIO()
    Image.fromarray(grid(images, columns).numpy()).save(stream, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def grid_html(images: Tensor, alt: str, columns: int = 10, caption: str = "") -> Html:
    """One figure of images in rows.

    Args:
        images: (n, 1, height, width) from -1 to 1.
        alt: what they show, in words.
        columns: images in a row.
        caption: words under the figure.

    Raises:
        ValueError: no words, or images of another shape.
    """
    _worded(alt)
    return Html(_figure(_image(address(images, columns), alt), caption), alt)


def strip(rows: Rows, alt: str, columns: int | None = None, caption: str = "") -> Html:
    """One figure of named rows, such as the same noise taken through several networks.

    Args:
        rows: name -> images (n, 1, height, width) from -1 to 1; all with as many images.
        alt: what they show, in words.
        columns: images in a line; left out, a row is one line.
        caption: words under the figure.

    Raises:
        ValueError: no words, no row, or rows that do not fit together.
    """
    _worded(alt)
    return Html(_figure(_rows(rows, alt, columns), caption), alt)


def flip(
    frames: Mapping[Setting, Tensor | Rows],
    controls: Sequence[str],
    *,
    title: str,
    alt: str,
    said: Mapping[Setting, str],
    fixed: Rows | None = None,
    start: Setting | None = None,
    columns: int | None = None,
) -> Html:
    """An explorer of pictures: radio buttons switch between stored ones, without a script.

    Args:
        frames: setting -> its images, or named rows of them. A setting is the label chosen of each
            control, in order; with one control, a string. Every combination must answer.
        controls: names of the controls, with units.
        title: heading.
        alt: what all settings show, in words; the setting is added.
        said: setting -> what it shows, in words, with numbers; read out when it is chosen.
        fixed: rows that every setting is compared with, shown above.
        start: first setting; left out, the first of ``frames``.
        columns: images in a line; left out, a row is one line.

    Raises:
        ValueError: no words, a setting that does not fit the controls, or one that is missing.
    """
    _worded(alt, title, *said.values())
    pictures = {_place(key): made for key, made in frames.items()}
    words = {_place(key): text for key, text in said.items()}
    first = _place(start) if start is not None else next(iter(pictures), ())
    wrong = [key for key in pictures if len(key) != len(controls)]
    if not controls or wrong or first not in pictures or words.keys() != pictures.keys():
        raise ValueError(
            f"frames, said, start: one label for each of {list(controls)}, the same settings in "
            f"frames and said, and one of them to start at; got {wrong or [*pictures][:2]}"
        )
    choices = [list(dict.fromkeys(key[i] for key in pictures)) for i in range(len(controls))]
    lacking = [place for place in itertools.product(*choices) if place not in pictures]
    if lacking:
        raise ValueError(f"frames: no pictures for {lacking[0]}: every setting must answer")
    block = "flip-" + hashlib.sha256(repr((title, alt, words)).encode()).hexdigest()[:8]
    number = [{label: n for n, label in enumerate(labels)} for labels in choices]
    rules, shown = [], []
    # the first setting stands first: it is what stays where rules are not understood
    for key in sorted(pictures, key=lambda key: key != first):
        ids = [f"{block}-{i}-{number[i][label]}" for i, label in enumerate(key)]
        chosen = "".join(f":has(#{one}:checked)" for one in ids)
        frame = "-".join([block, "at", *(str(number[i][label]) for i, label in enumerate(key))])
        rules.append(f"#{block}{chosen} #{frame}{{display:block}}")
        made = pictures[key]
        body = (
            _rows({"": made} if isinstance(made, Tensor) else made, f"{alt} {words[key]}", columns)
            + f'<p class="flip-said" style="margin:.3em 0 0">{html.escape(words[key])}</p>'
        )
        shown.append(f'<div class="flip-frame" id="{frame}">{body}</div>')
    style = (
        f"#{block} .flip-frame{{display:none}}"
        + "".join(rules)
        + f"@supports not selector(:has(a)){{#{block} .flip-frame:first-child{{display:block}}"
        f"#{block} fieldset{{display:none}}}}"
    )
    sets = "".join(
        _fieldset(block, i, name, choices[i], first[i]) for i, name in enumerate(controls)
    )
    above = _rows(fixed, f"{alt} What each setting is compared with.", columns) if fixed else ""
    return Html(
        f'<figure class="house-figure flip" id="{block}" role="group" '
        f'aria-label="{html.escape(title)}" style="margin:0 0 1em"><style>{style}</style>'
        f'<p style="margin:0 0 .3em"><strong>{html.escape(title)}</strong></p>{sets}'
        f'{above}<div aria-live="polite">{"".join(shown)}</div></figure>',
        f"{title}: {alt} {words[first]}",
    )


def _place(key: Setting) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _fieldset(block: str, at: int, name: str, labels: Sequence[str], chosen: str) -> str:
    """One control: a radio button for each label, in a line that wraps on a phone."""
    buttons = "".join(
        '<label style="display:inline-flex;align-items:center;gap:.35em;min-height:2.2em;margin:0">'
        f'<input type="radio" name="{block}-{at}" id="{block}-{at}-{n}"'
        f"{' checked' if label == chosen else ''}>{html.escape(label)}</label>"
        for n, label in enumerate(labels)
    )
    return (
        '<fieldset style="border:0;margin:0;padding:0;min-width:0;display:flex;flex-wrap:wrap;'
        'align-items:center;gap:0 1em"><legend style="float:left;width:auto;font-size:1em;'
        f'font-weight:600;margin:0;padding:0">{html.escape(name)}</legend>{buttons}</fieldset>'
    )


def _rows(rows: Rows, alt: str, columns: int | None) -> str:
    """Named rows below each other; the first image bears the words, the others their names."""
    sizes = {len(images) for images in rows.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"rows: some, all with as many images, got {sorted(sizes)}")
    wide = columns or sizes.pop()
    parts = []
    for n, (name, images) in enumerate(rows.items()):
        words = alt if n == 0 else name
        label = f'<div style="font-size:.9em;line-height:1.3">{html.escape(name)}</div>'
        parts.append(
            f'<div style="margin:0 0 .35em">{label if name else ""}'
            f"{_image(address(images, wide), words)}</div>"
        )
    return "".join(parts)


def _image(source: str, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" style="{IMAGE}" src="{source}">'


def _figure(body: str, caption: str) -> str:
    under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    look = "margin:0 0 1em;max-width:540px"
    return f'<figure class="house-figure" style="{look}">{body}{under}</figure>'


def _worded(*words: str) -> None:
    if not all(text.strip() for text in words):
        raise ValueError("title, alt and said must say in words what the pictures show")
