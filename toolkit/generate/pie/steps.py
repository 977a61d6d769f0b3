"""The pieces of a round of PIE: the times, the way back to noise, overwriting and mixing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolkit.core.sample.draws import Draws
from toolkit.core.sample.loop import Hook
from toolkit.core.sample.schedule import Betas, Level, Network, Schedule
from toolkit.core.train.labels import class_numbers


def leading(
    law: Betas, steps: int, total: int = 1000, offset: int = 1, to_one: bool = False
) -> Schedule:
    r"""The DDIM levels of the official code: n times :math:`i\lfloor T/n\rfloor` plus an offset.

    The last step leads to the level of time 0, which still holds a little noise
    (``set_alpha_to_one=False``), or to none.

    Args:
        law: of discrete times, such as ``Betas.scaled_linear()`` for Stable Diffusion.
        steps: n.
        total: T, how many times the law has.
        offset: added to every time.
        to_one: end without noise.

    Raises:
        ValueError: no step, more steps than times, or an offset that leaves no step to time 0.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps: 1 to {total}, got {steps}")
    if offset < 0 or (offset == 0 and not to_one):
        raise ValueError(
            f"offset: {offset} ends at time 0 already; give 1 or more, or end without noise by "
            "to_one=True"
        )
    gap = total // steps
    times = [number * gap + offset for number in reversed(range(steps))]
    return Schedule.of(law, [*times, law.clean if to_one else 0])


def inverted(denoiser: Network, schedule: Schedule, x: Tensor, labels: Any = None) -> Tensor:
    r"""Clean images taken up to the first level of a schedule by DDIM run backwards.

    Each step undoes one of DDIM's, with the noise that the network predicts at the *higher* level
    from the state below it: :math:`\varepsilon = (x - \alpha_i\hat x_0(x, t_i))/s_i`. So nothing
    is asked at a level without noise, and it is exact as the steps grow small.

    Args:
        denoiser: gives predicted clean images, as for :func:`toolkit.core.sample.loop.sample`.
        schedule: from much noise to little; ``x`` is a state of its last level.
        x: (batch, ...).
        labels: (batch,) class numbers, or None.
    """
    told = () if labels is None else (class_numbers(labels, len(x)).to(x.device),)
    for there, here in zip(schedule.levels[-2::-1], schedule.levels[:0:-1], strict=True):
        noise = (x - there.alpha * denoiser(x, there, *told)) / there.std
        x = there.alpha / here.alpha * (x - here.std * noise) + there.std * noise
    return x


def replaced(known: Tensor, mask: Tensor, noise: Tensor) -> Hook:
    r"""A hook that overwrites what lies outside a mask before every step but the first.

    .. math:: z \leftarrow M\odot z + (1-M)\odot(\alpha_{t}\,x + s_{t}\,\varepsilon_b)

    Args:
        known: images x (batch, ...).
        mask: M, 1 where the state stays; it broadcasts to the images.
        noise: epsilon b (batch, ...), the same at all levels.
    """

    def hook(z: Tensor, number: int, level: Level) -> Tensor:
        if number == 0:
            return z
        return mask * z + (1 - mask) * (level.alpha * known + level.std * noise)

    return hook


def mixed(
    edit: Tensor, anchor: Tensor, mask: Tensor | None, outside: float, inside: float
) -> Tensor:
    r"""An edit pulled back: :math:`a + [\beta_1(1-M) + \beta_2 M]\odot(z - a)`; z without a mask.

    Args:
        edit: z (batch, ...).
        anchor: a (batch, ...), the original.
        mask: M, or None.
        outside, inside: beta 1 and beta 2.
    """
    if mask is None:
        return edit
    return anchor + (outside * (1 - mask) + inside * mask) * (edit - anchor)


def fits(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask in the images' precision, once both are found to fit.

    Raises:
        TypeError, ValueError: no images, or a mask of another shape or beyond 0 and 1.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x: images as a tensor of floating-point numbers")
    if x.dim() < 2 or not len(x):
        raise ValueError(f"x: images (batch, ...), one or more, got shape {tuple(x.shape)}")
    if mask is None:
        return None
    mask = torch.as_tensor(mask)
    try:
        same = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        same = False
    if not same:
        raise ValueError(
            f"mask: shape {tuple(mask.shape)} does not broadcast to images {tuple(x.shape)}; "
            "resize it to their height and width"
        )
    mask = mask.to(x.device, x.dtype)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask: numbers from 0, outside, to 1, inside; divide bytes by 255")
    return mask


def noises(x: Tensor, rounds: int, given: Tensor | None, draws: Draws | None, name: str) -> Tensor:
    """Noise of all rounds, (rounds, batch, ...): what is given, or drawn for each round anew.

    Args:
        x: images (batch, ...), whose shape, precision and device it takes.
        rounds: how many.
        given: noise of these shapes, or (batch, ...) for all rounds; or None.
        draws: one stream per image; needed where none is given.
        name: of the argument, for messages.

    Raises:
        ValueError: neither of both, or another shape.
    """
    if given is not None:
        if given.shape == x.shape:
            given = given.expand(rounds, *x.shape)
        if given.shape != (rounds, *x.shape):
            raise ValueError(
                f"{name}: shape {(rounds, *x.shape)}, or {tuple(x.shape)} for all rounds, got "
                f"{tuple(given.shape)}"
            )
        return given.to(x)
    if draws is None:
        raise ValueError(f"{name}: give it, or draws=Draws(seeds) with a seed for each image")
    if len(draws.seeds) != len(x):
        raise ValueError(f"draws: {len(draws.seeds)} seeds for {len(x)} images; give one each")
    return draws.normal((rounds, *x.shape[1:]), x.dtype, x.device).transpose(0, 1)
