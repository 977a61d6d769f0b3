r"""Ratios by gradient descent, step by step, against states of a fine reference run.

.. math:: \rho_i^* = \arg\min_\rho\; \mathbb E\,\|\tilde x^c_{t_{i+1}}(\rho) - x^{GT}_{t_{i+1}}\|^2

The state that is compared is the corrected one, so the gradient passes through the network. Earlier
steps stay as they were searched: the state and the memory are detached.

Source: Zhao et al., arXiv 2409.03755; official code ``wl-zhao/DC-Solver``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.core.sample.guidance import guided
from toolkit.core.sample.loop import combined, sample
from toolkit.core.sample.plans import DDIM, Plan, Step
from toolkit.core.sample.schedule import Law, Network, Schedule
from toolkit.generate.dc_solver.blend import has_history, lagrange_weights, refined


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        ratios: (steps,), or (groups, steps) where there are several groups; 1 where not searched.
        losses: (steps, iterations, groups), mean squared distance of each iterate from the
            reference, the start first; NaN where not searched.
        calls: how often the network was asked, for all samples each time.
    """

    ratios: Tensor
    losses: Tensor
    calls: int


def reference_states(
    denoiser: Network,
    schedule: Schedule,
    start: Tensor,
    law: Law,
    parts: int = 40,
    plan: Plan | None = None,
    **options: Any,
) -> list[Tensor]:
    """States of a fine run at exactly the levels of a schedule but the first.

    Args:
        denoiser: as :func:`toolkit.core.sample.loop.sample` takes it.
        schedule: the solver's; each of its steps is cut into ``parts``.
        start: states (batch, ...) at the first level.
        law: that the schedule was made of.
        parts: fine steps in one of the schedule's.
        plan: the solver of the fine run; left out, DDIM, as published.
        options: labels, guidance and untold, for ``sample``.

    Raises:
        ValueError, FloatingPointError: as ``sample`` and ``refined``.
    """
    fine = refined(schedule, law, parts)
    made = sample(denoiser, fine, plan or DDIM(), start, keep=True, **options)
    return list(made.path[parts::parts])


def search_ratios(
    denoiser: Network,
    schedule: Schedule,
    steps: Sequence[Step],
    start: Tensor,
    reference: Sequence[Tensor],
    *,
    degree: int = 2,
    kept: int | None = None,
    groups: int = 1,
    iterations: int = 40,
    rate: float = 0.1,
    decay: float = 0.01,
    first: float = 1.0,
    keep: str = "last",
    labels: Any = None,
    guidance: float = 1.0,
    untold: int | None = None,
) -> Searched:
    """Search the ratio of each step that has enough history, the first step first.

    Args:
        denoiser: as :func:`toolkit.core.sample.loop.sample` takes it.
        schedule: levels from much noise to little.
        steps: of the solver without compensation, such as ``UniPC().steps(schedule)``.
        start: states (batch, ...) at the first level; the paper takes 10.
        reference: states like ``start`` at each level but the first.
        degree, kept: as :func:`~toolkit.generate.dc_solver.blend.compensated`.
        groups: equal parts of the batch, one after the other, each with ratios of its own.
        iterations: of AdamW per step.
        rate, decay: its rate and weight decay, which pulls ratios to 0 a little.
        first: the ratio that the search starts at.
        keep: "last" takes the last iterate, as published; "best" that of least loss seen.
        labels, guidance, untold: as ``sample`` takes them.

    Raises:
        ValueError: numbers of steps, states or groups that do not fit, or another word.
        FloatingPointError: a loss that is not finite; the message names the step.
    """
    count = schedule.steps
    if len(steps) != count or len(reference) != count:
        raise ValueError(
            f"steps, reference: {count} each for this schedule, got {len(steps)} and "
            f"{len(reference)}; reference_states makes them"
        )
    if any(state.shape != start.shape for state in reference):
        raise ValueError(f"reference: states of shape {tuple(start.shape)}, as the start")
    if groups < 1 or len(start) % groups:
        raise ValueError(f"groups: {len(start)} samples do not make {groups} equal groups")
    if iterations < 1 or keep not in ("last", "best"):
        raise ValueError(
            f'iterations, keep: 1 or more, "last" or "best", got {iterations}, {keep!r}'
        )
    if labels is not None and len(labels) != len(start):
        raise ValueError(f"labels: {len(labels)} labels for {len(start)} samples; give one each")
    network = guided(denoiser, labels, guidance, untold)
    ratios = torch.ones(groups, count, dtype=torch.float64)
    losses = torch.full((count, iterations, groups), torch.nan, dtype=torch.float64)
    depth = max(degree + 1, *(len(step.predict.weights) for step in steps))
    x, memory, calls = start, [_free(network, start, schedule.levels[0])], 1
    for number, step in enumerate(steps):
        there = schedule.levels[number + 1]
        if has_history(number, degree, kept):
            times = [s.time for s in schedule.levels[number - degree : number + 1]][::-1]
            ends = functools.partial(
                _compensated_end, network, step, x, memory, times, there, groups
            )
            found = _descend(
                ends, reference[number], groups, iterations, rate, decay, first, keep, number
            )
            ratios[:, number], losses[number] = found
            calls += iterations * (step.correct is not None)
            with torch.no_grad():
                x, memory, newest = ends(ratios[:, number])
        else:
            with torch.no_grad():
                x, memory, newest = _moved(network, step, x, memory, there)
        if step.correct is not None:
            calls += 1
        if (newest is None or step.again) and number < count - 1:
            newest = _free(network, x, there)
            calls += 1
        if newest is not None:
            memory = [newest, *memory[: depth - 1]]
    return Searched(ratios if groups > 1 else ratios[0], losses, calls)


def _free(network: Network, x: Tensor, level: Any) -> Tensor:
    """The network's answer, without a gradient."""
    with torch.no_grad():
        return network(x, level).to(x.dtype)


def _compensated_end(
    network: Network, step: Step, x: Tensor, memory: list[Tensor], times: list[float], there: Any,
    groups: int, ratio: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor | None]:  # fmt: skip
    """:func:`_moved` with the newest prediction compensated, by a ratio (groups,)."""
    wide = ratio.to(x).repeat_interleave(len(x) // groups).view(-1, *[1] * (x.dim() - 1))
    newest = combined(0.0, x, lagrange_weights(times, wide), memory)
    return _moved(network, step, x, [newest, *memory[1:]], there)


def _moved(
    network: Network, step: Step, x: Tensor, memory: list[Tensor], there: Any
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The state after a step, the memory that it used, and the prediction it made, if any."""
    moved = combined(step.predict.keep, x, step.predict.weights, memory)
    if step.correct is None:
        return moved, memory, None
    newest = network(moved, there).to(x.dtype)
    return combined(step.correct.keep, x, step.correct.weights, [newest, *memory]), memory, newest


def _descend(
    ends: Callable[[Tensor], tuple[Tensor, list[Tensor], Tensor | None]],
    goal: Tensor, groups: int, iterations: int, rate: float, decay: float, first: float,
    keep: str, number: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ratio (groups,) of one step, and the losses (iterations, groups) on the way."""
    ratio = torch.full((groups,), float(first), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([ratio], lr=rate, weight_decay=decay)
    seen, tried = [], []
    for _ in range(iterations):
        with torch.enable_grad():
            off = (ends(ratio)[0] - goal).square().view(groups, -1).mean(1).double()
            # the sum over groups: each group's ratio moves as if it were alone
            (slope,) = torch.autograd.grad(off.sum().cpu(), ratio)
        seen.append(off.detach().cpu())
        tried.append(ratio.detach().clone())
        ratio.grad = slope
        optimizer.step()
    losses = torch.stack(seen)
    if not bool(losses.isfinite().all()):
        raise FloatingPointError(
            f"search: the distance from the reference at step {number} is not finite; lower the "
            "guidance or the rate, or take more steps"
        )
    if keep == "last":
        return ratio.detach(), losses
    return torch.stack(tried).gather(0, losses.argmin(0)[None])[0], losses
