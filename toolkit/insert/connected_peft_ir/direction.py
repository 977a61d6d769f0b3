r"""How far the change that a step makes is from the sum of what its parts promise.

.. math:: 1 - \cos\big(J\,\delta,\ f(\theta + \delta) - f(\theta)\big)

Each module is stepped as if the others stood still. J δ is what the outputs would then do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def discrepancy(
    outputs: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    step: Sequence[Tensor],
    size: float | None = None,
    small: float = 1e-4,
) -> tuple[float, float]:
    """Direction discrepancy of a step, in double precision if it is to mean anything.

    Args:
        outputs: computes the outputs with the parameters as they are.
        parameters: what moves; they are put back bit for bit.
        step: how each would move, of the same shapes.
        size: scale the step so that the predicted change has this norm, as a share of the outputs'
            own; None takes it as it is.
        small: share of the step at which the slope is taken, by central differences.

    Returns:
        1 - cos of predicted and actual change, in [0, 2], and the factor the step was scaled by.

    Raises:
        ValueError: shapes that differ, or a step that predicts no change.
    """
    if [p.shape for p in parameters] != [s.shape for s in step] or not len(step):
        raise ValueError("step: give one tensor for each parameter, of its shape")
    before = [p.clone() for p in parameters]

    def moved(share: float) -> Tensor:
        for p, old, s in zip(parameters, before, step, strict=True):
            p.copy_(old + share * s)
        found = outputs().clone()
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        return found

    start = outputs().clone()
    predicted = (moved(small) - moved(-small)) / (2 * small)
    norm = float(predicted.norm())
    if not norm > 0:
        raise ValueError("step: predicts no change of the outputs, so it has no direction")
    factor = 1.0 if size is None else size * float(start.norm()) / norm
    actual = moved(factor) - start
    cosine = torch.nn.functional.cosine_similarity(predicted.flatten(), actual.flatten(), dim=0)
    return 1 - float(cosine), factor
