"""Recordings into log-mel frames, and the tones that stand in for speech at scale ``ci``."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from toolkit.core.data.datasets import Speech
from toolkit.core.seeds import generator

FRAMES, BANDS = 48, 32
WINDOW, HOP = 256, 128


def mel_filters(
    bands: int = BANDS, low: float = 60.0, high: float = 4000.0, rate: int = 8000
) -> Tensor:
    """Triangular filters (bands, WINDOW / 2 + 1), their corners evenly spaced in mel.

    mel(f) = 2595 log10(1 + f / 700), f in hertz (O'Shaughnessy, *Speech Communication*, 1987).
    """

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    corners = torch.linspace(mel(low), mel(high), bands + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners / 2595) - 1)
    bins = torch.arange(WINDOW // 2 + 1, dtype=torch.float64) * rate / WINDOW
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0).float()


def frames(recordings: list[np.ndarray], rate: int = 8000) -> Tensor:
    """Recordings, each (length,) int16, to (n, FRAMES, BANDS), each of mean 0 and deviation 1.

    Scaled to peak 1, the logarithm of the power in each band plus 1e-5, centred in time: a long
    recording loses both ends, a short one gets its quietest value on both sides.
    """
    filters, window, made = mel_filters(rate=rate), torch.hann_window(WINDOW), []
    for recording in recordings:
        sound = torch.from_numpy(recording.astype(np.float32))
        sound = sound / sound.abs().max().clamp(min=1)
        power = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True).abs().square()
        bands = torch.log(filters @ power + 1e-5).T
        spare = FRAMES - len(bands)
        if spare < 0:
            bands = bands[-spare // 2 :][:FRAMES]
        else:
            ends = spare // 2, spare - spare // 2
            quiet = [bands.min().expand(end, BANDS) for end in ends]
            bands = torch.cat([quiet[0], bands, quiet[1]])
        made.append((bands - bands.mean()) / bands.std())
    return torch.stack(made)


def varied(batch: Tensor, draws: torch.Generator, most: int = 5) -> Tensor:
    """A batch (n, frames, bands) shifted in time by up to ``most`` frames (turning round), with one
    mask of 6 frames and one of 4 bands set to the mean, 0."""
    count, length, bands = batch.shape
    shift = torch.randint(-most, most + 1, (count, 1), generator=draws)
    batch = batch[torch.arange(count)[:, None], (torch.arange(length) + shift) % length]
    at_frame = torch.randint(length - 6 + 1, (count, 1), generator=draws)
    at_band = torch.randint(bands - 4 + 1, (count, 1), generator=draws)
    in_time = (torch.arange(length) >= at_frame) & (torch.arange(length) < at_frame + 6)
    in_band = (torch.arange(bands) >= at_band) & (torch.arange(bands) < at_band + 4)
    return batch.masked_fill(in_time[:, :, None] | in_band[:, None, :], 0.0)


def tones(count: int = 6) -> Speech:
    """Six made-up speakers who say each digit ``count`` times: two tones that tell the digit, at a
    pitch and a speed of the speaker's own, with noise."""
    draws, rows, samples = generator(0, "tones"), [], []
    for speaker in range(6):
        for digit in range(10):
            for index in range(count):
                length = 2400 + 200 * speaker + int(torch.randint(200, (), generator=draws))
                time = torch.arange(length) / 8000
                pitch = (1 + 0.06 * speaker) * 2 * math.pi
                first, second = 250 + 130 * (digit % 5), 1200 + 500 * (digit // 5)
                noise = 0.1 * torch.randn(length, generator=draws)
                sound = torch.sin(pitch * first * time) + torch.sin(pitch * second * time) + noise
                samples.append((8000 * sound).to(torch.int16).numpy())
                rows.append((digit, f"speaker {speaker}", index))
    digits, who, indices = zip(*rows, strict=True)
    return Speech(
        np.concatenate(samples), np.array([len(s) for s in samples]), np.array(digits),
        np.array(who), np.array(indices), 8000, "generated tones, no speech",
    )  # fmt: skip
