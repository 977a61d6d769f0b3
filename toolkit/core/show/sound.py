"""A sound on a page: its spectrogram as a picture, and a player that needs no file and no script.

The recording lies in the page itself, as a WAV in a data address, so nothing is asked of anybody.
"""

from __future__ import annotations

import base64
import html
import io
import wave
from typing import Any

import numpy as np

from toolkit.core.show.figures import Html, figure_html, house, subplots

LONGEST = 10.0
"""Seconds above which a recording would make the page heavy."""
LOWEST, HIGHEST = 4_000, 96_000
"""Samples a second that browsers play."""


def clip(
    samples: Any,
    rate: int,
    spectrogram: Any,
    *,
    alt: str,
    expected: int = 8000,
    seconds: float | None = None,
    caption: str = "",
) -> Html:
    """Return one recording as a figure: its spectrogram above a player.

    Args:
        samples: (length,) int16, or floats from -1 to 1.
        rate: Samples a second of the recording.
        spectrogram: (frames, bands), as the network reads it; the lowest band first.
        alt: What is heard and seen, in words; the player bears them as well.
        expected: Samples a second that the spectrogram, and the network, were made for.
        seconds: What the spectrogram spans; left out, the length of the recording.
        caption: Text under the player; shown to everyone.

    Raises:
        ValueError: If the rate is not the expected one, the recording is empty, too long or not of
            such numbers, the spectrogram has another form, or ``alt`` is empty.
        TypeError: If the samples are neither int16 nor floats.
    """
    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what is heard and seen.")
    sound = _checked(samples, rate, expected)
    picture = np.asarray(spectrogram, dtype=float)
    if picture.ndim != 2 or not picture.size or not np.isfinite(picture).all():
        raise ValueError(
            f"spectrogram: finite numbers of shape (frames, bands), got shape {picture.shape}."
        )
    with house():
        fig, ax = subplots(2.2)
        span = len(sound) / rate if seconds is None else seconds
        ax.imshow(
            picture.T, origin="lower", aspect="auto", cmap="magma",
            extent=(0, span, 0, picture.shape[1]),
        )  # fmt: skip
        ax.set(xlabel="time (s)", ylabel="band")
        ax.grid(False)
        drawn = figure_html(fig, alt)
    words = html.escape(alt)
    player = (
        f'<audio controls preload="none" aria-label="Play: {words}" '
        'style="display:block;width:100%;max-width:540px;margin:.3em 0 0" '
        f'src="{address(sound, rate)}">This browser plays no sound.</audio>'
    )
    under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return Html(drawn.removesuffix("</figure>") + player + under + "</figure>", alt)


def address(samples: Any, rate: int) -> str:
    """Return a recording as the address of a WAV that lies in the page itself.

    Args:
        samples: (length,) int16, or floats from -1 to 1.
        rate: Samples a second.

    Raises:
        ValueError, TypeError: As :func:`clip` does.
    """
    sound = _checked(samples, rate, rate)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(sound.astype("<i2").tobytes())
    return f"data:audio/wav;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _checked(samples: Any, rate: int, expected: int) -> np.ndarray:
    """The samples as int16."""
    if isinstance(rate, bool) or int(rate) != rate or not LOWEST <= rate <= HIGHEST:
        raise ValueError(
            f"rate = {rate!r}: give whole samples a second, {LOWEST} to {HIGHEST}, as the "
            "recording's file says."
        )
    if rate != expected:
        raise ValueError(
            f"rate = {rate}: the spectrogram was made for {expected} samples a second, so what is "
            f"heard would not be what is seen; resample the recording "
            f"(scipy.signal.resample_poly(samples, {expected}, {rate})), or pass expected={rate} "
            "with a spectrogram of that rate."
        )
    sound = np.asarray(samples)
    if sound.ndim != 1 or not sound.size:
        raise ValueError(f"samples: one channel of shape (length,), got shape {sound.shape}.")
    if len(sound) > LONGEST * rate:
        raise ValueError(
            f"samples: {len(sound) / rate:.1f} s would make the page heavy; cut them to "
            f"{LONGEST:g} s."
        )
    if sound.dtype == np.int16:
        return sound
    if not np.issubdtype(sound.dtype, np.floating):
        raise TypeError(f"samples: int16, or floats from -1 to 1, not {sound.dtype}.")
    if not np.isfinite(sound).all() or np.abs(sound).max() > 1:
        raise ValueError("samples: floats must be finite and lie from -1 to 1; scale them first.")
    return np.round(sound * 32767).astype(np.int16)
