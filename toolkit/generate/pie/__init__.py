r"""PIE: show how an image would look further on, by many small edits towards a class.

Each round noises the image part of the way, cleans it under the class by deterministic DDIM, and
pulls the result back to the original: strongly outside a region of interest :math:`M`, weakly
inside it.

.. math:: z &= \mathrm{DDIM}_y\big(\alpha_{t_1} x^{(k-1)} + s_{t_1}\varepsilon_a\big) \\
    x^{(k)} &= x^{(0)} + [\beta_1(1-M) + \beta_2 M] \odot (z - x^{(0)})

With a mask, what lies outside it is overwritten before every step but the first by the original,
noised to the level of that step with one noise :math:`\varepsilon_b`. Without a mask
:math:`x^{(k)} = z`. Nothing is trained.

Source: Liang et al., *PIE: Simulating Disease Progression via Progressive Image Editing*,
arXiv 2309.11745; official code ``IrohXu/PIE``. The rounds follow the code; of the paper the
abstract was read. The code takes whatever sampler its checkpoint names; here it is DDIM, as the
paper says. Between rounds the code decodes, cuts to 8 bits and encodes again; that is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from toolkit.core.declare.fields import Declared, Range, Share
from toolkit.core.declare.info import Info
from toolkit.core.sample.draws import Draws
from toolkit.core.sample.guidance import guided
from toolkit.core.sample.loop import sample
from toolkit.core.sample.plans import DDIM
from toolkit.core.sample.schedule import Level, Network, Schedule
from toolkit.generate.pie.steps import fits, inverted, leading, mixed, noises, replaced
from toolkit.generate.pie.theory import (
    ddim_factor,
    expected_path,
    fixed_point,
    flow_factor,
    kappa,
    path_variance,
)

__all__ = ["Progress", "ddim_factor", "expected_path", "fixed_point", "flow_factor", "inverted",
           "kappa", "leading", "mixed", "path_variance", "replaced"]  # fmt: skip


class Progress(NamedTuple):
    """What the rounds leave.

    Attributes:
        path: images (rounds + 1, batch, ...), the original first.
        edits: cleaned images z (rounds, batch, ...) before they are mixed with the original.
        calls: how often the network was asked, in all rounds. Guidance asks for two images per
            sample each time.
    """

    path: Tensor
    edits: Tensor
    calls: int

    @property
    def x(self) -> Tensor:
        """The last images (batch, ...)."""
        return self.path[-1]


@dataclass(frozen=True)
class PIE(Declared):
    """How far each round goes, how many there are, and how much of the original is put back.

    Args:
        rounds: N. Source: official code, 10.
        strength: gamma, the share of the sampler's steps that a round takes, the last ones.
            Source: README of the official code, 0.5.
        outside: beta 1, how much of an edit is kept outside the mask. Source: official code, 0.01.
        inside: beta 2, the same inside the mask. Source: official code, 0.75.
        guidance: w, the weight of classifier-free guidance; up to 1 there is none. Source:
            official code, 7.5; its README takes 27.5, small networks want 2 to 4.
        back: how a round goes back to noise, by a random draw or by deterministic inversion.
            Source: official code draws noise; the inversion is ours.
        anchor: the image that a round is mixed with. Source: official code, the original; the
            previous is a control of ours.
        known: the image that overwrites what lies outside the mask, or none. Source: official
            code, the original; the others are controls of ours.
        clip: bound of the absolute predicted clean image. Source: ours, none.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    rounds: Annotated[int, Range(1, 10_000)] = 10
    strength: Annotated[float, Range(0.0, 1.0, open_low=True)] = 0.5
    outside: Share = 0.01
    inside: Share = 0.75
    guidance: Annotated[float, Range(0.0, 1000.0)] = 7.5
    back: Literal["noise", "inversion"] = "noise"
    anchor: Literal["original", "previous"] = "original"
    known: Literal["original", "previous", "none"] = "original"
    clip: Annotated[float, Range(0.0, 1e6, open_low=True)] | None = None

    info: ClassVar[Info] = Info(
        slug="pie",
        part="generate",
        title="PIE",
        arxiv="2309.11745",
        year=2023,
        code="IrohXu/PIE",
        equation=r"x^{(k)} = x^{(0)} + [\beta_1(1-M) + \beta_2 M] \odot (z - x^{(0)})",
        acts_on="the image, in rounds of part noising and cleaning",
        count="0",
        inference="N m network calls an image, twice that with guidance",
        colour="#6B8E23",
    )

    def kept(self, steps: int) -> int:
        """How many of a sampler's steps a round takes, m: the last floor(n gamma) of n.

        The product is rounded as the official code does, so 50 steps at 0.58 keep 28.

        Raises:
            ValueError: no step is left; the message says which strength keeps one.
        """
        count = min(int(steps * self.strength), steps)
        if count < 1:
            raise ValueError(
                f"strength: {self.strength:g} of {steps} steps keeps none; give at least "
                f"{1 / steps:.3g}, or more steps"
            )
        return count

    def part(self, schedule: Schedule) -> Schedule:
        """The levels of a round: the last m steps of a sampler's schedule."""
        return schedule.last(self.kept(schedule.steps))

    def edit(
        self,
        denoiser: Network,
        schedule: Schedule,
        x: Tensor,
        labels: Any = None,
        *,
        mask: Tensor | None = None,
        untold: int | None = None,
        source: Any = None,
        draws: Draws | None = None,
        noise: Tensor | None = None,
        known_noise: Tensor | None = None,
    ) -> Progress:
        """All rounds for a batch of images. Nothing is drawn but from ``draws``.

        Args:
            denoiser: ``denoiser(x, level, labels)`` gives predicted clean images; see
                :func:`~toolkit.core.sample.schedule.clean_from` for one that predicts noise.
            schedule: the sampler's n steps, of which each round takes the last m. Its last level
                may hold noise, as in the official code; see :func:`leading`.
            x: original images (batch, ...), clean.
            labels: (batch,) classes to edit towards, or None for a network without labels.
            mask: 1 inside the region of interest, 0 outside, and between at soft edges; any shape
                that broadcasts to that of ``x``. None: neither mixing nor overwriting.
            untold: the label that means no label, for guidance.
            source: (batch,) labels told to the inversion; left out, ``untold``, else ``labels``.
            draws: gives the noises that are not given.
            noise: epsilon a, (rounds, batch, ...), or (batch, ...) for all rounds.
            known_noise: epsilon b, in the same shapes; the same at all levels of a round.

        Raises:
            TypeError, ValueError: arguments that do not fit; the message names one and the remedy.
            FloatingPointError: the network's answer is not finite.
        """
        part = self.part(schedule)
        mask = fits(x, mask)
        random = self.back == "noise"
        overwrite = mask is not None and self.known != "none" and part.steps > 1
        first = noises(x, self.rounds, noise, draws, "noise") if random else None
        # drawn after the others, so that these do not depend on whether there is a mask
        second = noises(x, self.rounds, known_noise, draws, "known_noise") if overwrite else None
        if labels is not None and len(labels) != len(x):
            raise ValueError(f"labels: {len(labels)} labels for {len(x)} images; give one each")
        weight = self.guidance if self.guidance > 1 and labels is not None else 1.0
        guided(denoiser, labels, weight, untold)  # refuses what does not fit before any work
        begin, calls = part.levels[0], 0
        path, edits = [x], []
        with torch.no_grad():
            for k in range(self.rounds):
                before = path[-1]
                if first is not None:
                    z = begin.alpha * before + begin.std * first[k]
                else:
                    told = labels if untold is None or labels is None else [untold] * len(x)
                    told = told if source is None else source
                    z = inverted(denoiser, part, before, told)
                    calls += part.steps
                state = None
                if mask is not None and second is not None:
                    state = replaced(x if self.known == "original" else before, mask, second[k])
                done = sample(
                    denoiser, part, DDIM(), z, labels=labels, guidance=weight, untold=untold,
                    clean=self._clipped, state=state,
                )  # fmt: skip
                calls += done.calls
                edits.append(done.x)
                anchor = x if self.anchor == "original" else before
                path.append(mixed(done.x, anchor, mask, self.outside, self.inside))
        return Progress(torch.stack(path), torch.stack(edits), calls)

    def _clipped(self, clean: Tensor, number: int, level: Level) -> Tensor:
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)
