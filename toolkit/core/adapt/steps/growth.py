"""What methods share whose ranks grow during training: draws, choice of layers, controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.steps.growth_groups import GrowthGroups, name_all

Scorer = Callable[["GrowthController"], Sequence[float] | Tensor]


class GrowingLayer(Protocol):
    """What a controller asks of the adapter of one layer."""

    rank: int  # components that count
    limit: int  # the largest rank its matrix can have

    def grow(self, amount: int, draws: Any = None) -> dict[str, nn.Parameter]:
        """Raise the rank; returns the tensors that train from now on, by leaf name."""


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A seed for one layer's later draws, (1,) int64: register it as a buffer, so it is saved."""
    where = generator.device if generator is not None else "cpu"
    return torch.randint(2**62, (1,), generator=generator, device=where).to(device)


def block_generator(seed: Tensor, block: int) -> torch.Generator:
    """The source of block number ``block``: the same on every rank and after a resume."""
    mixed = (int(seed) + block * 0x9E3779B97F4A7C15) % 2**63
    return torch.Generator().manual_seed(mixed)


def looks(warmup: int, interval: int, total_steps: int) -> int:
    """Steps t of a run in which growth is decided: t > warmup and t divisible by interval."""
    return max(0, (total_steps - 1) // interval - warmup // interval)


def choose(
    scores: Tensor | Sequence[float],
    missing: int,
    growth: int,
    top: int,
    rooms: Sequence[int],
    overshoot: bool = False,
) -> list[int]:
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
        return amounts
    threshold = scores[order[top - 1]]
    for i in order:
        left = growth if overshoot else missing
        if scores[i] < threshold or left < 1:
            break
        amounts[i] = min(growth, rooms[i], left)
        missing -= amounts[i]
    return amounts


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Mean over the processes of a distributed run, in place; nothing happens in a lone process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    kinds: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.dtype, t.device), []).append(t)
    for same in kinds.values():
        flat = torch.cat([t.flatten() for t in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for t, mean in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(mean.view_as(t))


class GrowthController(Controller):
    """Around each step of a method that grows: checks, learning rates, history, growth.

    A method subclasses it and calls :meth:`grow` where its rule says so.

    Attributes: ``step`` (steps done), ``target`` and ``total`` (ranks in all, at the end and now),
    ``history`` (list of (step, ranks of all layers), one entry at the start and one per growth),
    ``groups`` (see :class:`GrowthGroups`), ``names``, ``layers``, ``total_steps``.

    Args:
        title: name of the method, for messages.
        layers: layer name -> its adapter.
        optimizer: holds the adapters' tensors in one group; no scheduler on it yet.
        total_steps: optimizer steps of the run. Nothing grows in later steps.
        target: ranks in all at the end.
        warmup, interval: a step t is a look if t > warmup and t is divisible by interval.
        growth: ranks that one layer gets at a look.
        restart, restart_warmup, weight_decay: see :class:`GrowthGroups`.
        scorer: replaces the score: called with the controller, returns (N,) numbers. For controls
            such as random or planted growth.

    Raises:
        ValueError: no ``total_steps``, a schedule or a target that does not fit, or an optimizer
            that cannot be extended.
    """

    def __init__(
        self,
        title: str,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        target: int,
        warmup: int,
        interval: int,
        growth: int,
        restart: bool = True,
        restart_warmup: int = 0,
        weight_decay: float | None = None,
        scorer: Scorer | None = None,
    ):
        self.names = list(layers)
        self.layers: list[Any] = list(layers.values())
        self.target, self.scorer = target, scorer
        self.warmup, self.interval, self.growth = warmup, interval, growth
        if total_steps is None:
            raise ValueError(f"{title} grows over the run: attach(..., total_steps=T)")
        self._check_schedule(total_steps)
        self.total_steps, self.step, self.optimizer = total_steps, 0, optimizer
        self.history: list[tuple[int, tuple[int, ...]]] = [(0, self._ranks())]
        self._named = self.named()
        missing = target - self.total
        # a layer near its limit takes less than ``growth`` once, so one more growth may be needed
        short = sum((a.limit - a.rank) % growth != 0 for a in self.layers)
        number = min(looks(warmup, interval, total_steps), -(-missing // growth) + short)
        self.groups = GrowthGroups(
            optimizer,
            self._named,
            number if missing else 0,
            total_steps,
            restart=restart,
            warmup=restart_warmup,
            weight_decay=weight_decay,
        )

    def _check_schedule(self, total_steps: int) -> None:
        start, most = self.total, sum(a.limit for a in self.layers)
        if total_steps <= self.warmup:
            raise ValueError(
                f"warmup={self.warmup} leaves no step to grow in total_steps={total_steps}; lower "
                "it or train longer"
            )
        if self.target < start:
            raise ValueError(
                f"the target of {self.target} ranks in all is below the {start} that the "
                f"{len(self.layers)} layers have at the start; {self.title} only grows, so raise "
                "target_rank or total_rank, or start with a lower rank"
            )
        if self.target > most:
            raise ValueError(
                f"the target of {self.target} ranks in all is above the {most} that the layers' "
                "matrices can hold; lower target_rank or total_rank"
            )

    def _ranks(self) -> tuple[int, ...]:
        return tuple(a.rank for a in self.layers)

    def named(self) -> dict[str, nn.Parameter]:
        """Every tensor of the adapters that trains now, by layer and leaf name."""
        return name_all(list(zip(self.names, self.layers, strict=True)))

    @property
    def total(self) -> int:
        """Ranks in all, now."""
        return sum(self._ranks())

    @property
    def growing(self) -> bool:
        """Whether the target is still to be reached."""
        return self.total < self.target

    @property
    def allocating(self) -> bool:
        """Whether the coming step is one in which layers grow."""
        t = self.step
        look = self.warmup < t < self.total_steps and t % self.interval == 0
        return look and self.growing and self.groups.free > 0

    def ranks(self) -> dict[str, int]:
        """Layer name -> its rank now, reserves not counted."""
        return dict(zip(self.names, self._ranks(), strict=True))

    @torch.no_grad()
    def check_gradients(self, finite: bool) -> None:
        """Make sure that there are gradients to read, before anything is changed.

        Raises:
            RuntimeError: no gradients, or scaled ones. TypeError: sparse ones.
            FloatingPointError: ``finite`` is asked for and some are not.
        """
        grads = {n: p.grad for n, p in self._named.items() if p.grad is not None}
        if not grads:
            raise RuntimeError(
                f"optimizer.step() was called before any backward pass: {self.title} has nothing "
                "to act on. Call loss.backward() first, and zero_grad() only after step()"
            )
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "GradScaler left the gradients scaled because the optimizer is fused, so the "
                "method would read wrong ones; call scaler.unscale_(optimizer) before "
                "scaler.step(optimizer), or use fused=False"
            )
        sparse = next((n for n, g in grads.items() if g.is_sparse), None)
        if sparse is not None:
            raise TypeError(f"the gradient of {sparse!r} is sparse; {self.title} needs dense ones")
        if finite:
            good = torch.isfinite(torch.stack(torch._foreach_norm(list(grads.values()))))
            if not bool(good.all()):
                name = list(grads)[int((~good).nonzero()[0])]
                self.refuse(name.rpartition(".")[0], "gradient")

    def refuse(self, layer: str, what: str) -> None:
        """Raise FloatingPointError about a layer's gradient or score."""
        raise FloatingPointError(
            f"the {what} of layer {layer!r} is not finite at the growth of step {self.step}; no "
            "weight was changed (a gradient that is not finite is the usual cause). Lower the "
            "learning rate, clip gradients, or skip the step"
        )

    def average_grown(self) -> None:
        """Average the gradients of grown tensors over processes: DDP does not know them."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        groups = self.optimizer.param_groups[self.groups.first :]
        born = [p for group in groups for p in group["params"]]
        for p in born:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        average_over_ranks([p.grad for p in born])

    @torch.no_grad()
    def grow(self, amounts: Sequence[int], draws: Mapping[str, Any] | None = None) -> None:
        """Let layers grow now; their new tensors get a group of the optimizer.

        Args:
            amounts: ranks to add, one number per layer.
            draws: layer name -> what its ``grow`` takes instead of its own draw.

        Raises:
            RuntimeError: the schedule has no growth left. ValueError: amounts do not fit.
        """
        if len(amounts) != len(self.layers) or not all(0 <= a <= self.growth for a in amounts):
            raise ValueError(
                f"amounts must be {len(self.layers)} numbers from 0 to growth={self.growth}"
            )
        if not any(amounts):
            return
        for name, layer, amount in zip(self.names, self.layers, amounts, strict=True):
            if layer.rank + amount > layer.limit:
                raise ValueError(
                    f"layer {name!r} has rank {layer.rank} and cannot grow by {amount}: its "
                    f"matrix allows {layer.limit}"
                )
        if self.step >= self.total_steps:
            raise RuntimeError(
                f"growth after the end of the schedule: step {self.step} of "
                f"total_steps={self.total_steps}; give attach() more total_steps"
            )
        self.groups.need_free()
        born: dict[str, nn.Parameter] = {}
        for name, layer, amount in zip(self.names, self.layers, amounts, strict=True):
            if amount:
                new = layer.grow(amount, None if draws is None else draws.get(name))
                born |= {f"{name}.{leaf}": p for leaf, p in new.items()}
        self.groups.fill(born, self.step)
        self._named = self.named()
        self.history.append((self.step, self._ranks()))

    def before_step(self) -> None:
        """Subclasses: call after all that may raise, so that the rates are set last."""
        self.groups.before_step(self.step)

    def after_step(self) -> None:
        self.groups.after_step()
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        rows = [[step, *ranks] for step, ranks in self.history]
        return {
            "step": torch.tensor(self.step),
            "history": torch.tensor(rows, dtype=torch.int64),
            **self.groups.state(),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        rows = state["history"].tolist()
        if rows[-1][1:] != list(self._ranks()):
            raise ValueError(
                f"the schedule was saved at ranks {rows[-1][1:]}, the adapters have "
                f"{list(self._ranks())}; load the adapters of the same file with toolkit.load"
            )
        self.groups.load(state, self.named())
        self._named = self.named()
        self.step = int(state["step"])
        self.history = [(row[0], tuple(row[1:])) for row in rows]
