"""One recording of the bed, to be heard: samples, rate, and the frames that the network reads."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from toolkit.core import data
from toolkit.labs.beds import sounds, speech


class Heard(NamedTuple):
    """A recording: ``samples`` (length,) int16, ``rate`` samples a second, ``frames`` (48, 32)."""

    samples: Any
    rate: int
    frames: Tensor
    digit: int
    speaker: str


def recording(scale: str, digit: int, speaker: int, index: int = 0) -> Heard:
    """A recording by its digit, speaker (in alphabetical order) and number; tones at ``ci``.

    Raises:
        ValueError: there is none.
    """
    every = speech.load(scale)
    found = sounds.tones() if scale == "ci" else data.load("fsdd")
    rows = (every.digit == digit) & (every.speaker == speaker) & (every.index == index)
    if not rows.any():
        raise ValueError(f"no recording of digit {digit} by speaker {speaker}, number {index}")
    place = int(rows.nonzero()[0, 0])
    samples = found.recordings()[place]
    return Heard(samples, found.sample_rate, every.frames[place], digit, every.names[speaker])


def seconds() -> float:
    """What the frames of the bed span, at 8,000 samples a second."""
    return sounds.FRAMES * sounds.HOP / 8000
