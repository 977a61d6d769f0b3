"""A sound lies in the page itself, as a WAV that says what was recorded."""

from __future__ import annotations

import base64
import html.parser
import io
import re
import wave

import numpy as np
import pytest

from toolkit.core.show import sound

TONE = (8000 * np.sin(np.arange(2000) / 5)).astype(np.int16)
FRAMES = np.linspace(-1, 2, 48 * 32).reshape(48, 32)
ALT = "The digit <7>, said & seen."


class Tags(html.parser.HTMLParser):
    """Open tags with their attributes, and whether all were closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def heard(address: str) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The samples, and rate, channels and bytes of each."""
    kind, data = address.split(",")
    assert kind == "data:audio/wav;base64"
    with wave.open(io.BytesIO(base64.b64decode(data))) as file:
        facts = file.getframerate(), file.getnchannels(), file.getsampwidth()
        return np.frombuffer(file.readframes(file.getnframes()), "<i2"), facts


def test_a_clip_is_a_picture_and_a_player_with_words_and_nothing_from_outside():
    made = sound.clip(TONE, 8000, FRAMES, alt=ALT, caption="Seven.")
    text = made._repr_html_()
    tags = Tags(text)
    assert not tags.open
    names = [tag for tag, _ in tags.found]
    assert names.count("figure") == names.count("img") == names.count("audio") == 1
    assert "script" not in names
    by = dict(tags.found)
    assert by["img"]["alt"] == ALT
    assert by["audio"]["aria-label"] == f"Play: {ALT}"
    assert "controls" in by["audio"]
    assert by["audio"]["preload"] == "none"
    for _, attrs in tags.found:
        for name in ("src", "href", "srcset", "poster"):
            assert attrs.get(name, "data:").startswith("data:")
    assert "<figcaption>Seven.</figcaption>" in text
    assert repr(made) == f"[{ALT}]"
    samples, facts = heard(by["audio"]["src"])
    assert np.array_equal(samples, TONE)
    assert facts == (8000, 1, 2)
    assert len(text) < 60_000


def test_the_same_sound_gives_the_same_bytes():
    one, two = (sound.clip(TONE, 8000, FRAMES, alt=ALT)._repr_html_() for _ in range(2))
    assert one == two


def test_floats_are_scaled_to_the_whole_range():
    samples, _ = heard(sound.address(np.array([0.0, 1.0, -0.5]), 16000))
    assert samples.tolist() == [0, 32767, -16384]


def test_the_span_of_the_spectrogram_can_be_given():
    short, long = (
        sound.clip(TONE, 8000, FRAMES, alt=ALT, seconds=s)._repr_html_() for s in (None, 0.77)
    )
    assert re.sub('src="[^"]*"', "", short) == re.sub('src="[^"]*"', "", long)
    assert short != long


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rate": 16000}, ValueError, r"16000.*8000.*resample_poly\(samples, 8000, 16000\)"),
        ({"rate": 16000, "expected": 8000}, ValueError, "pass expected=16000"),
        ({"rate": 8000.5}, ValueError, "whole samples a second"),
        ({"rate": 100, "expected": 100}, ValueError, "4000 to 96000"),
        ({"rate": True}, ValueError, "whole samples"),
        ({"samples": TONE[None]}, ValueError, r"one channel.*\(1, 2000\)"),
        ({"samples": TONE[:0]}, ValueError, "one channel"),
        ({"samples": np.zeros(90_000, np.int16)}, ValueError, "cut them to 10 s"),
        ({"samples": TONE.astype(np.int32)}, TypeError, "not int32"),
        ({"samples": TONE.astype(float)}, ValueError, "scale them first"),
        ({"samples": np.array([0.0, np.nan])}, ValueError, "finite"),
        ({"spectrogram": FRAMES[0]}, ValueError, r"\(frames, bands\)"),
        ({"spectrogram": FRAMES * np.inf}, ValueError, "finite"),
        ({"alt": " "}, ValueError, "alt is empty"),
    ],
)  # fmt: skip
def test_what_would_not_be_what_is_seen_is_refused(changes, error, match):
    given = {"samples": TONE, "rate": 8000, "spectrogram": FRAMES, "alt": ALT} | changes
    with pytest.raises(error, match=match):
        sound.clip(given.pop("samples"), given.pop("rate"), given.pop("spectrogram"), **given)


def test_another_rate_is_right_where_it_is_expected():
    made = sound.clip(TONE, 16000, FRAMES, alt=ALT, expected=16000)
    assert heard(dict(Tags(made._repr_html_()).found)["audio"]["src"])[1][0] == 16000
