r"""DiffuseHigh: pictures larger than a diffusion model was trained for, without training.

Sample at the native size. Enlarge, sharpen, add as much noise as the last :math:`\tau` steps of
the schedule begin with, and take these steps with the same network at the larger size. In the
first :math:`\delta` of them the low wavelet band of each predicted clean picture gives way to that
of the sharpened enlargement :math:`g`:

.. math:: g = u + a\,(u - G * u), \qquad
    \hat x_0 \leftarrow \mathrm{iDWT}(LL_g, LH_{\hat x_0}, HL_{\hat x_0}, HH_{\hat x_0})

Repeat for the next size, with the result as the picture to enlarge.

Source: Kim et al., *DiffuseHigh: Training-free Progressive High-Resolution Image Synthesis through
Structure Guidance*, arXiv 2406.18459; official code ``yhyun225/DiffuseHigh``. Of the paper, the
abstract and opening pages were read; the order of operations is the code's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from toolkit.core.declare.fields import Declared, Range
from toolkit.core.declare.info import Info
from toolkit.core.sample.loop import Hook, Sampled, sample
from toolkit.core.sample.plans import DDIM, Plan
from toolkit.core.sample.schedule import Level, Network, Schedule
from toolkit.generate.diffusehigh.enlarge import blur, enlarge, sharpen, sides
from toolkit.generate.diffusehigh.wavelets import (
    Bands,
    band_size,
    check_fits,
    check_images,
    dwt,
    filters,
    idwt,
    swap_low,
    taps,
)

__all__ = ["Bands", "Guide", "Made", "Stage", "band_size", "blur", "dwt", "enlarge", "filters",
           "idwt", "sharpen", "swap_low", "taps"]  # fmt: skip

Map = Callable[[Tensor], Tensor]


class Guide(NamedTuple):
    """What leads a stage.

    Attributes:
        picture: the sharpened enlargement (batch, channels, height, width).
        low: its low band.
    """

    picture: Tensor
    low: Tensor


class Stage(NamedTuple):
    """What a stage leaves.

    Attributes:
        picture: the decoded result (batch, channels, height, width).
        guide: what led it.
        calls: how often the network was asked.
        path: states at all levels, if they were kept.
    """

    picture: Tensor
    guide: Guide
    calls: int
    path: tuple[Tensor, ...] = ()


class Made(NamedTuple):
    """What a whole run leaves.

    Attributes:
        picture: the decoded result at the last size.
        native: the decoded sample at the native size.
        stages: one for each size.
        calls: how often the network was asked, over all sizes.
    """

    picture: Tensor
    native: Tensor
    stages: tuple[Stage, ...]
    calls: int


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class DiffuseHigh(Declared):
    """How far a picture is noised again, and what holds its structure.

    Pictures run from 0 to 1, states of the network as it wants them: ``encode`` and ``decode``
    lead from one to the other. They are an autoencoder, or for a network of pixels from -1 to 1
    ``lambda x: 2 * x - 1`` and its inverse; left out, states are pictures.

    Args:
        renoised: steps that a stage takes, the last of the schedule (tau); 0 returns the sharpened
            enlargement. Source: official code, 15 of 50.
        guided: the first steps of them in which the low band is replaced (delta). Source: official
            code, 5; its README advises 5 to 7.
        strength: of the sharpening (a); 0 is none. Source: official code, 1.0.
        sigma: of its Gaussian, in pixels. Source: ours; the official code draws one from 0.1 to 2
            at each call.
        kernel: its side in pixels, odd. Source: official code, 3.
        wavelet: "haar", or "db1" to "db10". Source: official code, db4; haar suits images of less
            than 64 pixels.
        levels: of the transform; only the last low band is replaced. Source: official code, 1.
        padding: beyond the border. Source: official code, symmetric.
        interpolation: of the enlargement. Source: official code, bicubic; a summary of the paper
            says bilinear.
        guidance: weight of classifier-free guidance at the native size; 1 is none and the only
            one without labels. Source: official code, 5.
        guidance_high: the same at larger sizes. Source: official code, 10.
        clamp: bring the decoded prediction to 0 to 1 before its transform, and not what the
            inverse gives. Source: official code, True; False for data without bounds.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range; more guided steps
            than steps; an unknown wavelet; an even kernel.
    """

    renoised: Annotated[int, Range(0, 1000)] = 15
    guided: Annotated[int, Range(0, 1000)] = 5
    strength: Annotated[float, Range(0.0, 10.0)] = 1.0
    sigma: Annotated[float, Range(0.0, 100.0, open_low=True)] = 1.0
    kernel: Annotated[int, Range(1, 99)] = 3
    wavelet: str = "db4"
    levels: Annotated[int, Range(1, 10)] = 1
    padding: Literal["symmetric", "zero", "reflect", "periodic", "periodization"] = "symmetric"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    guidance: Annotated[float, Range(0.0, 100.0)] = 5.0
    guidance_high: Annotated[float, Range(0.0, 100.0)] = 10.0
    clamp: bool = True

    info: ClassVar[Info] = Info(
        slug="diffusehigh",
        part="generate",
        title="DiffuseHigh",
        arxiv="2406.18459",
        year=2024,
        code="yhyun225/DiffuseHigh",
        equation=r"\hat x_0 \leftarrow \mathrm{iDWT}(LL_g, LH_{\hat x_0}, HL_{\hat x_0}, "
        r"HH_{\hat x_0})",
        acts_on="the low wavelet band of predicted clean pictures",
        count="0",
        inference="tau calls for each larger size",
        colour="#3B6FB6",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        taps(self.wavelet)
        if self.guided > self.renoised:
            raise ValueError(
                f"guided: {self.guided} steps of the {self.renoised} that a stage takes; give at "
                "most that many"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: an odd number of pixels, got {self.kernel}")

    def at(self, steps: int) -> DiffuseHigh:
        """The same shares of another schedule: renoised and guided as if these were of 50 steps,
        rounded; a stage that had steps keeps one at least."""
        renoised = max(min(self.renoised, 1), round(self.renoised * steps / 50))
        guided = min(renoised, max(min(self.guided, 1), round(self.guided * steps / 50)))
        return dataclasses.replace(self, renoised=renoised, guided=guided)

    def guide(self, picture: Tensor, size: int | Sequence[int]) -> Guide:
        """The sharpened enlargement of pictures, and its low band.

        Args:
            picture: (batch, channels, height, width), from 0 to 1.
            size: height and width to draw, or one number for both.

        Raises:
            TypeError, ValueError: another shape, a smaller size, or one below the filter's length.
        """
        check_fits(sides(size), self.wavelet, self.levels, self.padding)
        large = enlarge(picture, size, self.interpolation)
        sharp = sharpen(large, self.strength, self.kernel, self.sigma)
        return Guide(sharp, dwt(sharp, self.wavelet, self.levels, self.padding).low)

    def guided_clean(self, low: Tensor, encode: Map = _same, decode: Map = _same) -> Hook:
        """The hook ``clean`` of :func:`toolkit.core.sample.loop.sample`: in the first ``guided``
        levels it gives predictions the low band of the guide."""

        def clean(said: Tensor, number: int, level: Level) -> Tensor:
            if number >= self.guided:
                return said
            picture = decode(said)
            if self.clamp:
                picture = picture.clamp(0, 1)
            return encode(swap_low(picture, low, self.wavelet, self.levels, self.padding))

        return clean

    def stage(
        self,
        denoiser: Network,
        schedule: Schedule,
        picture: Tensor,
        size: int | Sequence[int],
        noise: Tensor,
        *,
        plan: Plan | None = None,
        encode: Map = _same,
        decode: Map = _same,
        labels: Any = None,
        untold: int | None = None,
        keep: bool = False,
    ) -> Stage:
        r"""Draw pictures larger, :math:`z = \alpha E(g) + s\,\varepsilon` and ``renoised`` steps.

        Args:
            denoiser: gives predicted clean states, see
                :func:`toolkit.core.sample.loop.sample`.
            schedule: the whole of it, from much noise to little, in any view.
            picture: to enlarge, (batch, channels, height, width) from 0 to 1.
            size: height and width to draw, or one number for both.
            noise: standard normal numbers of the shape of the encoded guide.
            plan: the solver; left out, the Euler step.
            encode, decode: between pictures and states.
            labels, untold: classes, and the label that means none, for guidance.
            keep: keep the states of every level.

        Raises:
            TypeError, ValueError: arguments that do not fit together; the message names the
                argument and the remedy. Nothing has been asked of the network by then.
            FloatingPointError: its answer is not finite.
        """
        self._check(schedule)
        guide = self.guide(picture, size)
        if not self.renoised:
            return Stage(guide.picture, guide, 0)
        state = encode(guide.picture)
        if noise.shape != state.shape:
            raise ValueError(
                f"noise: one number for each of the encoded guide, {tuple(state.shape)}, got "
                f"{tuple(noise.shape)}"
            )
        last = schedule.last(self.renoised)
        first = last.levels[0]
        done = sample(
            denoiser, last, plan or DDIM(), first.alpha * state + first.std * noise.to(state),
            labels=labels, guidance=self.guidance_high, untold=untold, keep=keep,
            clean=self.guided_clean(guide.low, encode, decode) if self.guided else None,
        )  # fmt: skip
        return Stage(decode(done.x), guide, done.calls, done.path)

    def sample(
        self,
        denoiser: Network,
        schedule: Schedule,
        start: Tensor,
        sizes: Sequence[int | Sequence[int]],
        noises: Sequence[Tensor],
        *,
        plan: Plan | None = None,
        encode: Map = _same,
        decode: Map = _same,
        labels: Any = None,
        untold: int | None = None,
        keep: bool = False,
    ) -> Made:
        """A sample at the native size, and one stage for each larger size. Nothing is drawn.

        Args:
            start: states (batch, channels, height, width) at the first level, at the native size.
            sizes: of the pictures, not falling.
            noises: standard normal numbers for each size, of the shape of its states.
            denoiser, schedule, plan, encode, decode, labels, untold, keep: as :meth:`stage`
                takes them.

        Raises:
            TypeError, ValueError, FloatingPointError: as :meth:`stage`; also sizes that fall, or
                another number of noises, before the network is asked.
        """
        self._check(schedule)
        both = [sides(size) for size in sizes]
        if len(noises) != len(both):
            raise ValueError(f"noises: one for each of {len(both)} sizes, got {len(noises)}")
        for smaller, larger in itertools.pairwise(both):
            if larger[0] < smaller[0] or larger[1] < smaller[1]:
                raise ValueError(f"sizes: must not fall, got {smaller} and then {larger}")
        self._check_shapes(start, both, noises, encode, decode)
        plan = plan or DDIM()
        done: Sampled = sample(
            denoiser, schedule, plan, start, labels=labels, guidance=self.guidance, untold=untold
        )
        native = picture = decode(done.x)
        stages = []
        for size, noise in zip(both, noises, strict=True):
            stages.append(self.stage(
                denoiser, schedule, picture, size, noise, plan=plan, encode=encode, decode=decode,
                labels=labels, untold=untold, keep=keep,
            ))  # fmt: skip
            picture = stages[-1].picture
        return Made(picture, native, tuple(stages), done.calls + sum(s.calls for s in stages))

    def _check_shapes(
        self, start: Tensor, both: Sequence[tuple[int, int]], noises: Sequence[Tensor],
        encode: Map, decode: Map,
    ) -> None:  # fmt: skip
        """Sizes and noises against one picture that is led through the maps, before any call."""
        check_images(start, "start")
        with torch.no_grad():
            one = decode(start[:1])
            for size, noise in zip(both, noises, strict=True):
                check_fits(size, self.wavelet, self.levels, self.padding)
                wanted = (len(start), *encode(enlarge(one, size, self.interpolation)).shape[1:])
                if self.renoised and tuple(noise.shape) != wanted:
                    raise ValueError(
                        f"noises: states at {size[0]} x {size[1]} have shape {wanted}, got "
                        f"{tuple(noise.shape)}"
                    )

    def _check(self, schedule: Schedule) -> None:
        if self.renoised > schedule.steps:
            raise ValueError(
                f"renoised: {self.renoised} steps of a schedule of {schedule.steps}; give at most "
                "that many, or use at() for the same shares"
            )
