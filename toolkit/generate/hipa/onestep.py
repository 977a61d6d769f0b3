r"""One step from pure noise to an image, and the targets that a frozen model makes in many.

A state :math:`x = \alpha x_0 + s\,\varepsilon` and what a network says of it give the clean sample

.. math:: \hat x_0 = \frac{x - s\,\varepsilon}{\alpha} = \alpha\,x - s\,v

the last for states that preserve variance, :math:`\alpha^2 + s^2 = 1`, with
:math:`v = \alpha\varepsilon - s\,x_0`. At the last time :math:`1/\alpha` multiplies every error of
:math:`\varepsilon`, 157 times with the linear schedule of DDPM; ``v`` or a denoiser has no such
factor.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from toolkit.core.sample.guidance import guided
from toolkit.core.sample.loop import sample
from toolkit.core.sample.plans import Plan
from toolkit.core.sample.schedule import Level, Network, Schedule

Predicts = Literal["clean", "eps", "v"]


def from_eps(x: Tensor, eps: Tensor, alpha: float, std: float) -> Tensor:
    """The clean sample (batch, ...) from a state and its noise, at least in single precision.

    Args:
        x: states (batch, ...).
        eps: the noise that is said to be in them, of the same shape.
        alpha, std: factors of the clean sample and of the noise in the state.

    Raises:
        ValueError: shapes that differ, or an ``alpha`` that is not positive.
    """
    _fits(x, eps, "eps")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: above 0, as it is divided by, got {alpha}")
    return (_wide(x) - std * _wide(eps)) / alpha


def from_v(x: Tensor, v: Tensor, alpha: float, std: float) -> Tensor:
    r"""The clean sample (batch, ...) from a state and :math:`v = \alpha\varepsilon - s x_0`.

    Args:
        x: states (batch, ...).
        v: what the network says, of the same shape.
        alpha, std: of the state, with ``alpha**2 + std**2 = 1``.

    Raises:
        ValueError: shapes that differ, or factors that do not preserve variance.
    """
    _fits(x, v, "v")
    if not math.isclose(alpha**2 + std**2, 1.0, abs_tol=1e-4):
        raise ValueError(
            f"alpha, std: {alpha} and {std}: v needs alpha**2 + std**2 = 1; scale the state by "
            "1 / sqrt(1 + sigma**2) first"
        )
    return alpha * _wide(x) - std * _wide(v)


def one_step(
    network: Network,
    start: Tensor,
    level: Level,
    labels: Tensor | None = None,
    *,
    predicts: Predicts = "clean",
    guidance: float = 1.0,
    untold: int | None = None,
) -> Tensor:
    """One call, from states at the highest level to images. Gradients flow.

    Args:
        network: ``network(x, level)``, or ``network(x, level, labels)`` with labels.
        start: states (batch, ...) at ``level``, such as ``level.std`` times normal noise.
        level: the highest of the schedule; ask the network at this very level.
        labels: (batch,) class numbers, or None.
        predicts: what the network says: the clean sample, the noise, or v.
        guidance, untold: of classifier-free guidance, as :func:`toolkit.core.sample.loop.sample`
            takes them.

    Raises:
        ValueError: an unknown ``predicts``, or what :func:`from_eps` and :func:`from_v` refuse.
    """
    if predicts not in ("clean", "eps", "v"):
        raise ValueError(f'predicts: choose "clean", "eps" or "v", got {predicts!r}')
    said = guided(network, labels, guidance, untold)(start, level)
    if predicts == "clean":
        _fits(start, said, "network")
        return said
    form = from_eps if predicts == "eps" else from_v
    return form(start, said, level.alpha, level.std)


class Pairs(NamedTuple):
    """Noise and what the frozen model makes of it.

    Attributes:
        start: states (n, ...) at the highest level.
        wanted: images (n, ...) after all steps of the schedule.
        labels: (n,) class numbers, or None.
    """

    start: Tensor
    wanted: Tensor
    labels: Tensor | None

    def rows(self, at: Tensor) -> Pairs:
        """Some of the pairs."""
        return Pairs(*(None if part is None else part[at] for part in self))


@torch.no_grad()
def make_pairs(
    network: Network,
    schedule: Schedule,
    plan: Plan,
    start: Tensor,
    labels: Tensor | None = None,
    *,
    batch: int = 250,
    guidance: float = 1.0,
    untold: int | None = None,
) -> Pairs:
    """Targets for one step: the samples that a frozen model makes in many, from the same noise.

    A random real image is no target: the noise says nothing of it, and the mean of all images
    would be learned.

    Args:
        network: the frozen denoiser, adaptors off.
        schedule: from the level at which the one step will be taken.
        plan: a deterministic solver.
        start: states (n, ...) at the first level of the schedule.
        labels: (n,) class numbers, or None.
        batch: states at a time.
        guidance, untold: of classifier-free guidance.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`toolkit.core.sample.loop.sample`.
    """
    if batch < 1:
        raise ValueError(f"batch: at least 1, got {batch}")
    made = []
    for rows in torch.arange(len(start)).split(batch):
        told = None if labels is None else labels[rows]
        made.append(
            sample(
                network, schedule, plan, start[rows], labels=told, guidance=guidance, untold=untold
            ).x
        )
    return Pairs(start, torch.cat(made), labels)


def _wide(x: Tensor) -> Tensor:
    """Half precision has no room for 1 / alpha."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _fits(x: Tensor, said: Tensor, name: str) -> None:
    if x.shape != said.shape:
        raise ValueError(f"{name}: shape {tuple(said.shape)} for states {tuple(x.shape)}")
