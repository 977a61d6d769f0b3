"""The rules of methods whose ranks grow during training: draws, when to look, who grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A seed for one layer's later draws, (1,) int64: register it as a buffer, so it is saved."""
    where = generator.device if generator is not None else "cpu"
    return torch.randint(2**62, (1,), generator=generator, device=where).to(device)


def block_generator(seed: Tensor, block: int) -> torch.Generator:
    """The source of block number ``block``: the same on every rank and after a resume."""
    mixed = (int(seed) + block * 0x9E3779B97F4A7C15) % 2**63
    return torch.Generator().manual_seed(mixed)


def given(
    layer: str, own: dict[str, Tensor], draws: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """A new block's own draws, by tensor name, with those of them that are given instead.

    Raises:
        ValueError: what is given has another name or another shape.
    """
    for key, value in (draws or {}).items():
        if key not in own or value.shape != own[key].shape:
            raise ValueError(
                f"draws of layer {layer!r}: {key} has shape {tuple(value.shape)}, the new block "
                f"needs { ({k: tuple(t.shape) for k, t in own.items()}) }"
            )
    return own | dict(draws or {})


def looks(warmup: int, interval: int, total_steps: int) -> int:
    """Steps t of a run in which growth is decided: t > warmup and t divisible by interval."""
    return max(0, (total_steps - 1) // interval - warmup // interval)


class Growth(NamedTuple):
    """How much each layer grows, and what decided it: scores (N,) and the line drawn there."""

    amounts: list[int]
    scores: Tensor | None = None
    threshold: float = float("nan")


def choose(
    scores: Tensor | Sequence[float],
    missing: int,
    growth: int,
    top: int,
    rooms: Sequence[int],
    overshoot: bool = False,
) -> Growth:
    """How much each layer grows.

    The threshold is the M-th largest score with M = min(top, missing); every layer at or above it
    grows by ``growth``, ties included (official IncreLoRA). The best are served first and the total
    never passes ``missing``, so the last one may get less.

    Args:
        scores: (N,) importance of each layer.
        missing: ranks left to give.
        growth: ranks one layer gets.
        top: layers M that may grow, before ties.
        rooms: ranks each layer can still take; full layers are not ranked.
        overshoot: give ``growth`` to all of them even beyond ``missing`` (official code).
    """
    scores = torch.as_tensor(scores, dtype=torch.float64).cpu()
    amounts = [0] * len(rooms)
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    order = [i for i in order if rooms[i] > 0]
    top = min(top, missing, len(order))
    if top < 1:
        return Growth(amounts, scores)
    threshold = float(scores[order[top - 1]])
    for i in order:
        left = growth if overshoot else missing
        if scores[i] < threshold or left < 1:
            break
        amounts[i] = min(growth, rooms[i], left)
        missing -= amounts[i]
    return Growth(amounts, scores, threshold)


def check_fits(
    title: str, count: int, start: int, target: int, most: int, warmup: int, total_steps: int
) -> None:
    """Raise ValueError unless a run can go from ``start`` ranks in all to ``target``.

    Args:
        title: the method's name.
        count: layers.
        start, target, most: ranks in all, now, at the end, and the most that the layers can hold.
        warmup, total_steps: steps before the first growth, and in all.
    """
    if total_steps <= warmup:
        raise ValueError(
            f"warmup={warmup} leaves no step to grow in total_steps={total_steps}; lower it or "
            "train longer"
        )
    if target < start:
        raise ValueError(
            f"the target of {target} ranks in all is below the {start} that the {count} layers "
            f"have at the start; {title} only grows, so raise target_rank or total_rank, or start "
            "with a lower rank"
        )
    if target > most:
        raise ValueError(
            f"the target of {target} ranks in all is above the {most} that the layers' matrices "
            "can hold; lower target_rank or total_rank"
        )


def restarted_rate(step: int, birth: int, total_steps: int, warmup: int, eta0: float) -> float:
    r"""Learning rate of tensors born at step :math:`\tau`, in which they have no gradient.

    With :math:`u=t-\tau-1`, :math:`T'=T-\tau-1` and :math:`w` steps of warm-up

    .. math:: \eta(t) = \eta_0 \cdot \begin{cases} u/w & u < w \\ (T'-u)/(T'-w) & u \ge w\end{cases}

    so it starts at 0 and is back at 0 when the run ends (IncreLoRA's restarted warm-up).
    """
    u, end = step - birth - 1, total_steps - birth - 1
    if u < 0:
        return 0.0
    return eta0 * u / warmup if u < warmup else eta0 * max(end - u, 0) / max(end - warmup, 1)
