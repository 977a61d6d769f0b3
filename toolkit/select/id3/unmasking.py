"""What ID3 does around each step: who joins, who moves, and nobody else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.forwards import frozen
from toolkit.core.adapt.layer import Placed
from toolkit.core.adapt.steps import processes
from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.steps.gradients import finite
from toolkit.core.adapt.steps.whole import of_modules, of_optimizer, whole
from toolkit.select.id3 import choice
from toolkit.select.id3.clock import OwnClock


class UnmaskingController(Controller):
    """Before each step: importance of all that may join, the choice, the gradient of the chosen.

    The gradients are those that the step finds: accumulated over micro-batches, unscaled by a
    ``GradScaler``. Clipping by norm changes no ranking. Over ``adapted.parameters()`` it reaches
    what had joined before; over all that the optimizer holds, as in Lightning, the masked too.

    Attributes: ``budget`` (scalars in the end), ``plan`` (how many join at each step), ``chosen``
    (how many have joined), ``updates`` (scalars moved, summed over steps), and those of the base
    class. In later steps than ``total_steps`` nothing joins and training goes on. Where fewer can
    join than planned, because the loss reaches fewer, the rest joins later.

    Args:
        method: the hyperparameters.
        pools: name -> the scalars of one tensor.
        optimizer: what steps.
        total_steps: optimizer steps T of the run.
        schedule: u_0 ... u_T-1 instead of the method's own.
        generator: source of the draws of ``score="random"``; the same on every process.

    Raises:
        ValueError: ``total_steps`` missing or below 1, a budget above the number of candidates, or
            a schedule that does not fit.
    """

    lengthening: ClassVar[tuple[str, ...]] = ("born", "moving")

    def __init__(
        self,
        method: Any,
        pools: Mapping[str, Any],
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        schedule: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(method, layers, optimizer)
        self.pools = dict(pools)
        if total_steps is None or total_steps < 1:
            raise ValueError(
                f"{self.title} unmasks over the run: attach(..., total_steps=T) with T of at least "
                f"1, got {total_steps}"
            )
        self.total_steps, self.repeat = total_steps, method.strategy != "increment"
        self.budget = method.spent(sum(pool.size for pool in self.pools.values()))
        self.plan = choice.planned(method.schedule, self.budget, total_steps)
        if schedule is not None:
            self.plan = self._checked(schedule)
        self.ends = [*itertools.accumulate(self.plan)]
        self.generator = generator or torch.Generator().manual_seed(0)
        self.clock = OwnClock(optimizer) if method.clock == "own" else None
        self.updates, self.line = 0, choice.LEFT_OUT
        self.before: list[int] | None = None  # lengths, while a step is under way

    def _checked(self, schedule: Sequence[int]) -> list[int]:
        plan, most = [int(u) for u in schedule], sum(pool.size for pool in self.pools.values())
        fits = all(0 <= u <= most for u in plan) and len(plan) == self.total_steps
        free = self.method.strategy == "repeat"
        if not fits or (not free and sum(plan) != self.budget):
            raise ValueError(
                f"schedule has {len(plan)} steps and {sum(plan)} scalars; it needs "
                f"total_steps={self.total_steps} whole numbers from 0 to {most}"
                + ("" if free else f" with the sum budget={self.budget}")
            )
        return plan

    @property
    def chosen(self) -> int:
        """Scalars that have joined."""
        return sum(pool.count for pool in self.pools.values())

    @property
    def need(self) -> int:
        """How many scalars are to be chosen in the coming step."""
        if self.step >= self.total_steps:
            return 0
        if self.repeat:
            return self.plan[self.step]
        return max(0, self.ends[self.step] - self.chosen)

    def joined(self) -> Tensor:
        """(T, tensors): how many scalars joined at each step; with "repeat" for the last time."""
        counts = []
        for pool in self.pools.values():
            at = pool.born[pool.born > 0].long().cpu() - 1
            counts.append(torch.bincount(at, minlength=self.total_steps)[: self.total_steps])
        return torch.stack(counts, dim=1)

    @torch.no_grad()
    def before_step(self) -> None:
        need = self.need
        self.before = [pool.length for pool in self.pools.values()]
        if need:
            gradients = {n: p.gradient() for n, p in self.pools.items()}
            there = {n: g for n, g in gradients.items() if g is not None}
            finite(there, self.step)
            scores = [self.score(p, gradients[n]) for n, p in self.pools.items()]
            found = choice.highest(scores, need, self.line)
            self.line = choice.line_of(scores, found)
            whole(self._containers(), lambda: self._join(found, [*gradients.values()]))
        for pool in self.pools.values():
            pool.hold()
        if self.clock is not None:
            self.clock.before([(p.parameter, p.own(self.step + 2)) for p in self.pools.values()])

    def score(self, pool: Any, gradient: Tensor | None) -> Tensor:
        """The scores of one tensor's scalars, flat, in memory order."""
        if gradient is None:  # the loss does not reach it
            return torch.full((pool.size,), choice.LEFT_OUT)
        scores = self._rank(gradient, pool.weight())
        if self.method.strategy == "repeat":
            index, own_gradient, values = pool.moving()
            scores[index] = self._rank(own_gradient, values).to(scores.dtype)
        else:
            scores[pool.taken()] = choice.LEFT_OUT
        return scores

    def _rank(self, gradient: Tensor, value: Tensor) -> Tensor:
        method = self.method
        if method.score == "random":
            draw = torch.rand(gradient.shape, generator=self.generator)
            scores = draw.to(gradient.device)
        elif method.score == "magnitude":
            scores = -value.float().abs()
        else:
            scores = choice.importance(gradient, value, method.exponent, method.epsilon)
        return -scores if method.order == "lowest" else scores

    def _join(self, found: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for pool, index, gradient in zip(self.pools.values(), found, gradients, strict=True):
            pool.join(index, gradient, self.step + 1, self.optimizer)
        self.trained = self.named()

    def _containers(self) -> Iterator[Any]:
        """All that a choice writes into."""
        yield vars(self)
        yield from map(vars, self.pools.values())
        yield from of_modules(self.layers)
        yield from of_optimizer(self.optimizer)
        yield self.optimizer.state

    @torch.no_grad()
    def after_step(self) -> None:
        if self.clock is not None:
            self.clock.after()
        for pool in self.pools.values():
            pool.settle(self.optimizer)
            self.updates += pool.active
        self.before = None
        super().after_step()
        self.watch()

    @torch.no_grad()
    def undo(self) -> None:
        if self.clock is not None:
            self.clock.undo()
        for pool in self.pools.values():
            pool.release(self.optimizer)

    def watch(self) -> None:
        """Collect gradients of what may join, if anything is to join in the coming step."""

    def state(self) -> dict[str, Tensor]:
        found = super().state() | {"updates": torch.tensor(self.updates)}
        parts = [pool.state() for pool in self.pools.values()]
        for key in parts[0]:  # never empty, since some libraries leave out tensors that are
            values = [part[key] for part in parts]
            home = values[0].device
            found[key] = torch.cat([values[0].new_zeros(1), *(v.to(home) for v in values)])
        if self.method.score == "random":
            found["generator"] = self.generator.get_state()
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.updates = int(state["updates"])
        if "generator" in state:
            self.generator.set_state(state["generator"].cpu())
        if self.before is not None and len(state["born"]) == 1 + sum(self.before):
            for pool, length in zip(self.pools.values(), self.before, strict=True):
                pool.take_back(length, self.optimizer)
        lengths = [pool.length for pool in self.pools.values()]
        if len(state["born"]) != 1 + sum(lengths):
            raise ValueError(
                f"the schedule was saved with {len(state['born']) - 1} scalars, and there are "
                f"{sum(lengths)}; load the adapters of the same file with toolkit.load"
            )
        parts = {key: state[key][1:].split(lengths) for key in ("born", "moving") if key in state}
        for i, pool in enumerate(self.pools.values()):
            pool.load({key: part[i] for key, part in parts.items()}, self.optimizer)
        self.trained = self.named()
        self.watch()


class Entries:
    """The scalars of one adapted layer: those that move are a tensor of their own."""

    def __init__(self, name: str, placed: Placed, repeat: bool):
        self.name, self.layer, self.base = name, placed.layer.adapter, placed.layer.base
        self.size = placed.site.rows * placed.site.cols
        self.parameter, self.repeat = self.layer.values, repeat
        self.born = torch.ones(self.count, dtype=torch.int32, device=placed.site.device)
        self.moves = torch.ones_like(self.born, dtype=torch.bool)
        self.held: Tensor | None = None
        self.before: tuple[nn.Parameter, Tensor] | None = None  # the coming step's choice

    @property
    def count(self) -> int:
        """Scalars that have joined."""
        return len(self.layer.values)

    @property
    def length(self) -> int:
        """Of the tensors in :meth:`state`."""
        return self.count

    @property
    def active(self) -> int:
        """Scalars that the coming step moves."""
        return int(self.moves.sum()) if self.repeat else self.count

    def weight(self) -> Tensor:
        return self.layer.seen.detach().reshape(-1)

    def taken(self) -> Tensor:
        return self.layer.index

    def moving(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index, gradient and value of the entries that have a tensor of their own."""
        values = self.layer.values
        grad = torch.zeros_like(values) if values.grad is None else values.grad
        return self.layer.index, grad, values.detach()

    def gradient(self) -> Tensor | None:
        grad = self.layer.seen.grad
        return None if grad is None else grad.reshape(-1)

    def own(self, count: int) -> Tensor:
        """Steps since each scalar joined, the coming one included."""
        return count - self.born

    def join(
        self, index: Tensor, gradient: Tensor | None, now: int, optimizer: torch.optim.Optimizer
    ) -> None:
        layer = self.layer
        if self.repeat:
            stays = torch.isin(layer.index, index)
            self.born = torch.where(stays & ~self.moves, now, self.born)
            self.moves = stays
            index = index[~torch.isin(index, layer.index)]
        if gradient is None or not len(index):
            return
        self.before = layer.values, layer.index
        layer.unmask(index, gradient[index], self.base, processes.several())
        self.born = torch.cat([self.born, self.born.new_full((len(index),), now)])
        self.moves = torch.cat([self.moves, self.moves.new_ones(len(index))])
        self.renew(optimizer)

    def take_back(self, length: int, optimizer: torch.optim.Optimizer) -> None:
        """Undo the choice of a step that is refused."""
        if self.before is not None and length != self.count:
            self.layer.values, self.layer.index = self.before
            self.before = None
            self.renew(optimizer)

    def renew(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the layer's tensor where the optimizer has an older one, moments included."""
        old, new = self.parameter, self.layer.values
        if old is new:
            return
        for group in optimizer.param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        state = optimizer.state.pop(old, None)
        if state and len(new) >= len(old):
            more = len(new) - len(old)
            optimizer.state[new] = {
                key: torch.cat([v, v.new_zeros(more)])
                if isinstance(v, Tensor) and v.shape == old.shape
                else v
                for key, v in state.items()
            }
        self.parameter = new

    def hold(self) -> None:
        """Before a step in which some entries stand still: no gradient, and their values kept."""
        if self.repeat:
            self.held = self.layer.values.detach().clone()
            if self.layer.values.grad is not None:
                self.layer.values.grad.mul_(self.moves)

    def settle(self, optimizer: torch.optim.Optimizer) -> None:
        """After it."""
        self.before = None
        self.release(optimizer)

    def release(self, optimizer: torch.optim.Optimizer) -> None:
        """Entries that stand still are as they were, without momentum."""
        if self.held is not None:
            still(self.layer.values, self.held, self.moves, optimizer)
            self.held = None

    def state(self) -> dict[str, Tensor]:
        return {"born": self.born} | ({"moving": self.moves} if self.repeat else {})

    def load(self, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.born = state["born"].to(self.layer.values.device, copy=True)
        self.moves = state.get("moving", torch.ones_like(self.born)).to(self.born.device).bool()
        self.renew(optimizer)


def still(p: Tensor, held: Tensor, moves: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Give the entries that do not move their value back, and no momentum."""
    p.copy_(torch.where(moves, p, held))
    for value in optimizer.state.get(p, {}).values():
        if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point():
            value.mul_(moves)


class EntriesController(UnmaskingController):
    """The controller of adapted layers.

    The frozen weights stand in the optimizer's groups too, beside the entries, so that its
    ``zero_grad`` and a ``GradScaler`` reach their gradient; at a step they have none and stay.
    Load an optimizer's state after ``attach``, since it names these groups.
    """

    def __init__(
        self,
        method: Any,
        sites: Mapping[str, Placed],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        **options: Any,
    ):
        repeat = method.strategy != "increment"
        pools = {name: Entries(name, placed, repeat) for name, placed in sites.items()}
        layers = {name: placed.layer.adapter for name, placed in sites.items()}
        super().__init__(method, pools, layers, optimizer, total_steps, **options)
        self.weights: dict[str, Tensor] = {}
        for name, placed in sites.items():
            weight = frozen(placed.layer.base, placed.site.parameter, name)
            seen = self.weights[name] = weight.detach().requires_grad_()
            for group in optimizer.param_groups:
                if any(p is self.pools[name].parameter for p in group["params"]):
                    group["params"].append(seen)
                    break
        self.watch()

    def watch(self) -> None:
        wanted = bool(self.need)
        for name, pool in self.pools.items():
            pool.layer.seen = self.weights[name] if wanted else None

    def synchronise(self) -> None:
        if processes.several():
            processes.average_gradients([pool.parameter for pool in self.pools.values()])
            if self.need:
                processes.average_gradients([*self.weights.values()])

    @torch.no_grad()
    def before_step(self) -> None:
        super().before_step()
        for weight in self.weights.values():
            weight.grad = None  # the optimizer leaves it alone

    def released(self) -> None:
        ours = {id(weight) for weight in self.weights.values()}
        for group in self.optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in ours]
        for pool in self.pools.values():
            pool.layer.seen = None
