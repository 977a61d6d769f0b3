r"""What a sampler is tried with: noise between the steps, and weights of few bits.

Source: Xu et al., arXiv 2302.04265, and its official code, ``generate_alpha.py`` and
``generate_quant.py``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from toolkit.core.sample.draws import Draws
from toolkit.core.sample.loop import Hook
from toolkit.core.sample.schedule import Level

SKIPPED = ("norm", "affine", "map", "32")
"""Parts of names whose layers the official code leaves at full precision."""

Noises = Draws | Sequence[Tensor] | Callable[[int, Tensor], Tensor]
"""Generators of each sample; or one tensor for each step; or what makes one from a step's number
and the state."""


def injected(alpha: float, noises: Noises) -> Hook:
    r"""A hook for the loop's ``state`` that adds noise before every step.

    .. math:: x\leftarrow x+\alpha\,\sigma_i\,\varepsilon

    Args:
        alpha: strength, 0 or more; 0 leaves states as they are and draws nothing.
        noises: standard normal numbers in the shape of the states.

    Raises:
        ValueError: a strength that is negative or not finite; during sampling, fewer noises than
            steps.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: 0 or more and finite, got {alpha}")

    def hook(x: Tensor, number: int, level: Level) -> Tensor:
        if alpha == 0:
            return x
        if isinstance(noises, Draws):
            noise = noises.normal(x.shape[1:], x.dtype, x.device)
        elif callable(noises):
            noise = noises(number, x)
        elif number < len(noises):
            noise = noises[number].to(x)
        else:
            raise ValueError(f"noises: {len(noises)} given, and step {number} needs one; give more")
        return x + alpha * level.std * noise

    return hook


def excess(alpha: float, number: int) -> float:
    r"""Noise in a state over the level's, after ``number + 1`` injections: at most
    :math:`\sqrt{1+(i+1)\alpha^2}`.

    A step shrinks what is left of earlier injections as it shrinks all noise, so in units of the
    level their variances add up. This reading is ours; it holds where a denoiser leaves it alone.
    """
    return math.sqrt(1 + (number + 1) * alpha**2)


class Told:
    """A denoiser that is told how much noise a state has after injections, as a control.

    Use it as ``denoiser`` together with its :meth:`hook` as ``state``.

    Args:
        denoiser: ``denoiser(x, level)``.
        alpha, noises: as for :func:`injected`.
    """

    def __init__(
        self, denoiser: Callable[[Tensor, Level], Tensor], alpha: float, noises: Noises
    ) -> None:
        self.denoiser, self.alpha, self.number = denoiser, alpha, 0
        self._inject = injected(alpha, noises)

    def hook(self, x: Tensor, number: int, level: Level) -> Tensor:
        """Inject, and remember which step it is."""
        self.number = number
        return self._inject(x, number, level)

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """The denoiser's answer at the raised level."""
        std = level.std * excess(self.alpha, self.number)
        return self.denoiser(x, Level(std / level.alpha, level.alpha, std))


def quantised(weight: Tensor, bits: int) -> Tensor:
    r"""A tensor rounded to :math:`2^b` evenly spaced numbers between its least and its greatest:

    .. math:: s=\frac{\max-\min}{2^b-1},\quad z=\lfloor -\min/s\rfloor,\quad
        q=\mathrm{round}(\mathrm{clamp}(w/s+z,\,0,\,2^b-1)),\quad \hat w=s\,(q-z)

    The offset z is itself held between 0 and :math:`2^b-1`. A constant tensor stays as it is.

    Args:
        weight: floating-point numbers of any shape.
        bits: 1 to 16.

    Raises:
        TypeError, ValueError: no whole number of bits from 1 to 16, or weights that are not finite.
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits: a whole number from 1 to 16, got {bits!r}")
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: from 1 to 16, got {bits}")
    if not weight.is_floating_point() or not weight.numel():
        raise TypeError("weight: floating-point numbers, one or more")
    low, high = weight.min(), weight.max()
    if not bool((high - low).isfinite()):
        raise ValueError("weight: holds numbers that are not finite; look at the network first")
    most = 2.0**bits - 1
    step = (high - low) / most
    zero = (-low / step).clamp(0, most).trunc()
    rounded = (weight / step + zero).clamp(0, most).round()
    return torch.where(step > 0, step * (rounded - zero), weight)


@contextlib.contextmanager
def few_bits(
    network: nn.Module, bits: int, skip: Sequence[str] = SKIPPED
) -> Iterator[dict[str, Tensor]]:
    """Within the block, weights of a network are rounded to few bits; then they are as before.

    What is rounded are parameters with ``weight`` in their name and no part of ``skip``.

    Args:
        network: changed in place.
        bits: 1 to 16.
        skip: parts of names that stay.

    Yields:
        Name -> weight as it was, of all that is rounded.

    Raises:
        TypeError, ValueError: as :func:`quantised`; and nothing that would be rounded.
    """
    chosen = {
        name: parameter
        for name, parameter in network.named_parameters()
        if "weight" in name and not any(part in name for part in skip)
    }
    if not chosen:
        raise ValueError(f"skip: {tuple(skip)} leaves no weight to round; name fewer parts")
    made = {name: quantised(parameter.detach(), bits) for name, parameter in chosen.items()}
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    try:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(made[name])
        yield before
    finally:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(before[name])
