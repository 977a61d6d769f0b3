"""How many ranks a method that shrinks them may still use after each step."""

from __future__ import annotations


def budget(step: int, initial: int, target: int, warmup: int, final: int, total_steps: int) -> int:
    r"""Ranks allowed after a step.

    .. math:: b(t) = \Big\lfloor b_T + (b_0 - b_T)
        \Big(1 - \frac{t - t_i}{T - t_i - t_f}\Big)^3 \Big\rfloor

    between ``warmup`` = :math:`t_i` and T - ``final`` = :math:`T - t_f`; the initial budget before,
    the target after. Steps count from 0 (AdaLoRA's paper, equation 11; official code,
    ``schedule_threshold``).
    """
    if step <= warmup:
        return initial
    if step > total_steps - final:
        return target
    left = 1 - (step - warmup) / (total_steps - final - warmup)
    return int(target + (initial - target) * left**3)
