r"""Classifier-free guidance: away from what is predicted without a label.

.. math:: \hat x_0 = \hat x_0(x) + w\,\big(\hat x_0(x \mid y) - \hat x_0(x)\big)

Source: Ho and Salimans, arXiv 2207.12598. With :math:`w = 1` the label alone decides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from toolkit.core.sample.schedule import Level, Network
from toolkit.core.train.labels import class_numbers


def guided(
    denoiser: Network,
    labels: Any = None,
    weight: float = 1.0,
    untold: int | None = None,
) -> Network:
    """A denoiser with its labels, and guidance, built in.

    Args:
        denoiser: ``denoiser(x, level)``, or ``denoiser(x, level, labels)`` if labels are given.
        labels: (batch,) class numbers, or None.
        weight: of the guidance, ``w``.
        untold: the label that means that the class is not told; needed where ``weight`` is not 1.

    Returns:
        A function of a state and a level. With guidance it asks once, for twice as many images.

    Raises:
        ValueError: guidance without labels or without ``untold``, or a weight that is not finite.
    """
    if not math.isfinite(weight):
        raise ValueError(f"guidance: a finite weight, got {weight}")
    if labels is None:
        if weight != 1:
            raise ValueError(
                f"guidance: {weight} needs labels to guide towards; give labels, or leave it at 1"
            )
        return denoiser
    told = class_numbers(labels, len(labels))
    if weight == 1:
        return lambda x, level: denoiser(x, level, told)
    if untold is None:
        raise ValueError(
            f"untold: guidance {weight} compares with predictions that know no label; say which "
            "label the denoiser takes for that"
        )
    both = torch.cat([told, torch.full_like(told, untold)])

    def answer(x: Tensor, level: Level) -> Tensor:
        said, without = denoiser(torch.cat([x, x]), level, both).chunk(2)
        return torch.lerp(without, said, weight)

    return answer
