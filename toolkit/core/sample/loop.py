"""The sampling loop: from noise to a sample, by any plan, down any schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.core.sample.draws import Draws, check_memory
from toolkit.core.sample.guidance import guided
from toolkit.core.sample.plans import Move, Plan, Step
from toolkit.core.sample.schedule import Level, Network, Schedule

Hook = Callable[[Tensor, int, Level], Tensor]
"""Called with a tensor, the number of its level and the level; what it returns takes its place."""


class Sampled(NamedTuple):
    """What a loop leaves.

    Attributes:
        x: states (batch, ...) at the last level.
        calls: how often the network was asked. Guidance asks for two images per sample each time.
        path: states at all levels from the first to the last, if they were kept.
    """

    x: Tensor
    calls: int
    path: tuple[Tensor, ...] = ()


def sample(
    denoiser: Network,
    schedule: Schedule,
    plan: Plan,
    start: Tensor,
    *,
    labels: Any = None,
    guidance: float = 1.0,
    untold: int | None = None,
    clean: Hook | None = None,
    state: Hook | None = None,
    keep: bool = False,
    gradient: bool = False,
) -> Sampled:
    """Walk states down the levels of a schedule. Nothing is drawn.

    Args:
        denoiser: ``denoiser(x, level)`` gives the predicted clean samples of states (batch, ...);
            with labels, ``denoiser(x, level, labels)``. See :func:`clean_from` for networks that
            predict something else.
        schedule: levels from much noise to little.
        plan: a solver, such as ``UniPC()``.
        start: states (batch, ...) at the first level, ``alpha`` and ``std`` counted in.
        labels: (batch,) class numbers, or None.
        guidance: weight of classifier-free guidance; 1 is none.
        untold: the label that means no label, for guidance.
        clean: hook on every predicted clean sample.
        state: hook on the state at the start of every step, before the network sees it.
        keep: keep the state of every level.
        gradient: let gradients flow through the loop.

    Raises:
        TypeError, ValueError: arguments that do not fit together, or a denoiser or hook whose
            answer has another shape; the message names the argument and the remedy.
        FloatingPointError: the network's answer is not finite; the message names the step. On
            a CPU this ends the loop at once. On other devices nothing waits during the loop, and
            it is found out at its end.
    """
    if not isinstance(start, Tensor) or not start.is_floating_point():
        raise TypeError("start: a tensor of floating-point numbers")
    if start.dim() < 2 or not len(start):
        raise ValueError(
            f"start: states (batch, ...) with a batch of 1 or more, got {tuple(start.shape)}"
        )
    if labels is not None and len(labels) != len(start):
        raise ValueError(f"labels: {len(labels)} labels for {len(start)} samples; give one each")
    steps = plan.steps(schedule)
    if len(steps) != schedule.steps:
        raise ValueError(f"plan: {len(steps)} steps planned for a schedule of {schedule.steps}")
    depth = max(_reach(step) for step in steps)
    check_memory(start.shape, start.element_size() * (depth + 2), start.device)
    ask = _Asking(guided(denoiser, labels, guidance, untold), clean, start)
    x, path = start, [start]
    memory: list[Tensor] = []
    fresh = False  # whether the newest prediction belongs to this level
    with torch.set_grad_enabled(gradient):
        for number, (step, here, there) in enumerate(
            zip(steps, schedule.levels[:-1], schedule.levels[1:], strict=True)
        ):
            if state is not None:
                x = _same(state(x, number, here), start, "state")
            if not fresh:
                memory = [ask(x, number, here), *memory[: depth - 1]]
            if step.blend is not None:
                memory[0] = combined(0.0, x, step.blend, memory)
            moved = _moved(step.predict, x, memory)
            fresh = step.correct is not None
            if step.correct is not None:
                newest = ask(moved, number + 1, there)
                moved = _moved(step.correct, x, [newest, *memory])
                if step.again:
                    fresh = False
                else:
                    memory = [newest, *memory[: depth - 1]]
            x = moved
            if keep:
                path.append(x)
        ask.finish()
    return Sampled(x, ask.calls, tuple(path) if keep else ())


def generate(
    denoiser: Network,
    schedule: Schedule,
    plan: Plan,
    shape: Sequence[int],
    seeds: Iterable[int],
    *,
    labels: Any = None,
    batch: int = 64,
    freedom: float = math.inf,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Sampled:
    """Samples from seeds, one each. A seed gives the same sample in any batch, up to rounding.

    Args:
        denoiser, schedule, plan: as :func:`sample` takes them.
        shape: of one sample.
        seeds: one per sample.
        labels: class numbers, one per sample, or None.
        batch: samples at a time.
        freedom: D of Student-t noise at the start, for PFGM++; infinite for Gaussian noise.
        dtype, device: of the states.
        options: passed to :func:`sample`.

    Returns:
        All samples; ``calls`` counts those of one batch, and ``path`` has the states of all.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`sample`.
    """
    seeds = list(seeds)
    if batch < 1:
        raise ValueError(f"batch: at least 1, got {batch}")
    if labels is not None and len(labels) != len(seeds):
        raise ValueError(f"labels: {len(labels)} labels for {len(seeds)} seeds; give one each")
    made = []
    for first in range(0, max(len(seeds), 1), batch):
        rows = slice(first, first + batch)
        draws = Draws(seeds[rows])
        noise = draws.student(shape, freedom, dtype, device)
        told = None if labels is None else torch.as_tensor(labels)[rows].to(device)
        start = noise * schedule.levels[0].std
        made.append(sample(denoiser, schedule, plan, start, labels=told, **options))
    path = tuple(torch.cat(states) for states in zip(*(m.path for m in made), strict=True))
    return Sampled(torch.cat([m.x for m in made]), made[0].calls, path)


def combined(keep: Any, x: Tensor, weights: Sequence[Any], terms: Sequence[Tensor]) -> Tensor:
    """``keep * x + sum(weights[k] * terms[k])`` in a new tensor; numbers may be tensors.

    Raises:
        ValueError: fewer terms than weights.
    """
    if len(terms) < len(weights):
        raise ValueError(
            f"plan: a step needs {len(weights)} predictions and there are {len(terms)}; its first "
            "steps must do with fewer"
        )
    out = None if isinstance(keep, float) and keep == 0 else x * keep
    for weight, term in zip(weights, terms, strict=False):
        if out is None:
            out = term * weight
        elif isinstance(weight, Tensor):
            out = out + weight * term
        else:
            out.add_(term, alpha=weight)
    return torch.zeros_like(x) if out is None else out


def _reach(step: Step) -> int:
    """How many predictions a step looks back to."""
    corrected = len(step.correct.weights) - 1 if step.correct else 0
    return max(1, len(step.predict.weights), corrected, len(step.blend or ()))


def _moved(move: Move, x: Tensor, memory: Sequence[Tensor]) -> Tensor:
    return combined(move.keep, x, move.weights, memory)


def _same(made: Any, like: Tensor, name: str) -> Tensor:
    if not isinstance(made, Tensor):
        raise TypeError(f"{name}: must return a tensor, got {type(made).__name__}")
    if made.shape != like.shape:
        raise ValueError(
            f"{name}: returned shape {tuple(made.shape)} for states of shape {tuple(like.shape)}; "
            "it must return one value for each of theirs"
        )
    return made


class _Asking:
    """Asks the network, counts how often, and sees to it that answers fit and are finite."""

    def __init__(self, network: Network, clean: Hook | None, like: Tensor) -> None:
        self.network, self.clean, self.like = network, clean, like
        self.calls = 0
        self.sums: list[tuple[int, Level, Tensor]] = []
        self.at_once = like.device.type == "cpu"

    def __call__(self, x: Tensor, number: int, level: Level) -> Tensor:
        said = _same(self.network(x, level), self.like, "denoiser")
        self.calls += 1
        # a sum is finite where its numbers are, and takes a fifth of the time of looking at each
        total = said.detach().sum(dtype=torch.promote_types(said.dtype, torch.float32))
        if not self.at_once:
            self.sums.append((number, level, total))
        elif not math.isfinite(total.item()):
            raise _not_finite(number, level)
        said = said.to(self.like.dtype)
        return said if self.clean is None else _same(self.clean(said, number, level), x, "clean")

    def finish(self) -> None:
        """Look at the sums that were put off; here the loop is over, and waiting harms nothing."""
        if not self.sums:
            return
        finite = torch.stack([total for *_, total in self.sums]).isfinite().tolist()
        for (number, level, _), fine in zip(self.sums, finite, strict=True):
            if not fine:
                raise _not_finite(number, level)


def _not_finite(number: int, level: Level) -> FloatingPointError:
    return FloatingPointError(
        f"denoiser: its answer at level {number} (time {level.time:g}, noise {level.sigma:g}) is "
        "not finite; look at its input there, lower the guidance, or start with less noise"
    )
