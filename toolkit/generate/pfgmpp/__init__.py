r"""PFGM++: sample down the field of charges that lie in a space with D extra dimensions.

Data :math:`y\in\mathbb R^N` are charges on the plane :math:`z=0` of :math:`\mathbb R^{N+D}`.
Only the norm :math:`r=\|z\|` matters, and with :math:`r=\sigma\sqrt D` the sampler is that of
diffusion:

.. math:: \frac{dx}{d\sigma}=\frac{x-D_\theta(x,\sigma)}{\sigma},\qquad
    \min_\theta\ \mathbb E\,\lambda(\sigma)\,\|D_\theta(x,\sigma)-y\|^2,\qquad
    x\sim p_r(x\mid y)\propto(\|x-y\|^2+r^2)^{-(N+D)/2}

Only the noise differs, in training and at the start of sampling: Student-t noise of D degrees of
freedom (:mod:`~toolkit.generate.pfgmpp.kernel`). D = 1 is PFGM, an infinite D is diffusion (EDM).

Source: Xu et al., *PFGM++: Unlocking the Potential of Physics-Inspired Generative Models*, arXiv
2302.04265; official code ``Newbeeer/pfgmpp``. The paper was read in parts only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from toolkit.core.declare.fields import Declared, Like, Range
from toolkit.core.declare.info import Info
from toolkit.core.sample.draws import Draws, student_noise
from toolkit.core.sample.loop import Sampled, sample
from toolkit.core.sample.plans import Heun, Plan
from toolkit.core.sample.schedule import Network, Schedule
from toolkit.generate.pfgmpp.field import Field, acted_on, field, posterior_mean, shares
from toolkit.generate.pfgmpp.kernel import (
    beta_quantiles,
    check_finite,
    check_positive,
    drawn_betas,
    drawn_taus,
    radii,
    spread,
    turned,
)
from toolkit.generate.pfgmpp.probes import Told, excess, few_bits, injected, quantised

__all__ = [
    "Field", "Told", "acted_on", "beta_quantiles", "drawn_betas", "drawn_taus", "excess",
    "few_bits", "field", "injected", "posterior_mean", "quantised", "radii", "shares",
]  # fmt: skip

CLIP, GUARD = 1e-3, 1e-8
"""What the official training code does to Beta draws."""
MOST_BETA = 1e5
"""Beyond this D the Beta law has too few digits left, and the Gamma law is drawn."""


@dataclass(frozen=True)
class PFGMpp(Declared):
    """Noise, loss and sampler for a number D of extra dimensions.

    Args:
        D: extra dimensions, any number above 0; ``math.inf`` is diffusion. Source: official code,
            128 for CIFAR-10 and FFHQ.
        sigma_data: standard deviation of the data. Source: EDM, 0.5.
        P_mean: mean of the logarithm of the noise levels in training. Source: EDM, -1.2.
        P_std: their standard deviation. Source: EDM, 1.2.
        clip: Beta draws are held between this and one minus this; left out, 0, or with
            ``like="code"`` 0.001, in training. Source: official code; the paper does not clip.
        like: "code" clips and guards Beta draws as the training code does. Source: ours.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    D: Annotated[float, Range(0.0, 1e9, open_low=True)] = 128.0
    sigma_data: Annotated[float, Range(0.0, 1e3, open_low=True)] = 0.5
    P_mean: Annotated[float, Range(-20.0, 20.0)] = -1.2
    P_std: Annotated[float, Range(0.0, 10.0, open_low=True)] = 1.2
    clip: Annotated[float, Range(0.0, 0.5, open_high=True)] | None = None
    like: Like = "paper"

    info: ClassVar[Info] = Info(
        slug="pfgmpp",
        part="generate",
        title="PFGM++",
        arxiv="2302.04265",
        year=2023,
        code="Newbeeer/pfgmpp",
        equation=r"p_r(x\mid y)\propto(\|x-y\|^2+r^2)^{-(N+D)/2},\quad r=\sigma\sqrt D",
        acts_on="the law of the noise, in training and at the sampler's start",
        count="0",
        inference="none",
        colour="#0F8B8D",
    )

    def __post_init__(self) -> None:
        if isinstance(self.D, float) and math.inf == self.D:
            dataclasses.replace(self, D=1.0)  # checks the other fields
        else:
            super().__post_init__()

    def r(self, sigma: Tensor | float) -> Tensor | float:
        r"""The norm :math:`\sigma\sqrt D` of the extra coordinates, for a noise level."""
        return sigma * math.sqrt(check_finite(self.D))

    def sigma(self, r: Tensor | float) -> Tensor | float:
        """The noise level that a norm stands for."""
        return r / math.sqrt(check_finite(self.D))

    def aligned(self, sigma: Tensor | float, N: int) -> Tensor | float:
        r"""The official code's other alignment, :math:`\sigma\sqrt{1+N/D}`, so :math:`r =
        \sigma\sqrt{N+D}`. For drawn levels and for both ends of a schedule; not the paper's main
        method."""
        return sigma * math.sqrt(1 + N / self.D)

    def levels(self, normals: Tensor) -> Tensor:
        """Noise levels (batch,) to train at, from standard normal numbers (batch,)."""
        return (normals * self.P_std + self.P_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        r""":math:`\lambda(\sigma)=(\sigma^2+\sigma_d^2)/(\sigma\sigma_d)^2`."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def offset(
        self,
        sigma: Tensor | float,
        normals: Tensor,
        betas: Tensor | None = None,
        taus: Tensor | None = None,
        training: bool = True,
    ) -> Tensor:
        """Noise (batch, ...) of given levels from given draws: what is added to data.

        Args:
            sigma: levels (batch,), or one for all.
            normals: standard normal numbers (batch, ...); with ``betas`` their direction counts.
            betas: (batch,) of Beta(N/2, D/2): the radius, as in paper and code.
            taus: (batch,) of Gamma(D/2, rate D/2), instead of ``betas``.
            training: False clips and guards nothing, as at the start of sampling.

        Raises:
            ValueError: no sample, levels that are not positive, or draws that do not fit: one of
                ``betas`` and ``taus`` for a finite D, neither for an infinite one.
        """
        if normals.dim() < 2 or not normals.numel():
            raise ValueError(
                f"normals: (batch, ...), one sample or more, got {tuple(normals.shape)}"
            )
        kind = sigma.dtype if isinstance(sigma, Tensor) else torch.float64
        levels = torch.as_tensor(sigma, dtype=kind, device=normals.device)
        check_positive(levels, "sigma")
        tails = [draws for draws in (betas, taus) if draws is not None]
        if len(tails) != (not math.isinf(self.D)) or any(
            t.shape != normals.shape[:1] for t in tails
        ):
            raise ValueError(
                "betas, taus: (batch,) of one of them for a finite D, neither for an infinite one"
            )
        if betas is not None:
            hard = training and self.like == "code"
            clip = self.clip if self.clip is not None else CLIP * hard
            r = levels.double() * math.sqrt(self.D)
            return turned(normals, radii(betas, r, clip * training, GUARD * hard))
        if levels.dim():
            levels = spread(levels, normals).to(normals.dtype)
        if taus is None:
            return normals * levels
        check_positive(taus, "taus")
        return (normals.double() * levels / spread(taus.double(), normals).sqrt()).to(normals.dtype)

    def noise(
        self, shape: Sequence[int], sigma: Tensor | float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Noise ``shape``, (batch, ...), of given levels for training, drawn here.

        Raises:
            ValueError: as :meth:`offset`.
        """
        clipped = bool(self.clip) or (self.clip is None and self.like == "code")
        if clipped and self.D <= MOST_BETA:
            normals = torch.randn(*shape, generator=generator)
            return self.offset(
                sigma, normals, drawn_betas(len(normals), normals[0].numel(), self.D, generator)
            )
        made = student_noise(shape, self.D, generator)
        return PFGMpp(D=math.inf).offset(sigma, made)

    def loss(
        self, denoiser: Callable[..., Tensor], y: Tensor, sigma: Tensor, noise: Tensor,
        labels: Tensor | None = None, target: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        r"""The weighted squared error of every number, :math:`\lambda(\sigma)(D_\theta-y)^2`.

        Args:
            denoiser: ``denoiser(x, sigma)``, or with labels ``denoiser(x, sigma, labels)``.
            y: clean samples (batch, ...).
            sigma: levels (batch,), not r.
            noise: n (batch, ...), as :meth:`offset` or :meth:`noise` gives it.
            labels: of the samples, or None.
            target: takes the place of y in the error, such as :func:`posterior_mean` of a batch.

        Returns:
            (batch, ...); its sum over a sample, averaged over samples, is the paper's objective
            times a weight.

        Raises:
            ValueError: shapes that do not fit, no sample, or levels that are not positive.
        """
        if y.dim() < 2 or not len(y) or noise.shape != y.shape or sigma.shape != y.shape[:1]:
            raise ValueError(
                f"y, noise, sigma: (batch, ...), the same, and (batch,), one sample or more; got "
                f"{tuple(y.shape)}, {tuple(noise.shape)}, {tuple(sigma.shape)}"
            )
        check_positive(sigma, "sigma")
        said = denoiser(y + noise, sigma, *(() if labels is None else (labels,)))
        wanted = y if target is None else target
        return spread(self.weight(sigma), y) * (said - wanted).square()

    def start(self, shape: Sequence[int], sigma_max: float, draws: Draws, **kind: Any) -> Tensor:
        """States (batch, ...) to start from: the kernel around 0 at ``sigma_max``, unclipped."""
        return draws.student(shape, self.D, **kind) * sigma_max

    def sample(
        self, denoiser: Network, schedule: Schedule, shape: Sequence[int], seeds: Iterable[int], *,
        plan: Plan | None = None, alpha: float = 0.0, batch: int = 256, **options: Any,
    ) -> Sampled:  # fmt: skip
        """Samples from seeds, one each, by Heun's method unless another plan is given.

        Args:
            denoiser: ``denoiser(x, level)``: it is told :math:`\\sigma`, never r.
            schedule: levels from much noise to little; its first is where sampling starts.
            shape: of one sample.
            seeds: one per sample.
            plan: a solver.
            alpha: noise injected before every step, in units of the level; see :func:`injected`.
            batch: samples at a time.
            options: passed to :func:`toolkit.core.sample.loop.sample`.

        Raises:
            TypeError, ValueError, FloatingPointError: as that function.
        """
        seeds = list(seeds)
        if batch < 1 or not seeds:
            raise ValueError(f"seeds, batch: one or more, got {len(seeds)} and {batch}")
        made = []
        for first in range(0, len(seeds), batch):
            draws = Draws(seeds[first : first + batch])
            x = self.start(shape, schedule.levels[0].std, draws)
            hook = injected(alpha, draws) if alpha else None
            made.append(sample(denoiser, schedule, plan or Heun(), x, state=hook, **options))
        path = tuple(torch.cat(states) for states in zip(*(m.path for m in made), strict=True))
        return Sampled(torch.cat([m.x for m in made]), made[0].calls, path)
