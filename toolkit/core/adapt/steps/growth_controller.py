"""What methods share that let ranks grow around the optimizer's steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.growth import Growth, check_fits, choose, looks
from toolkit.core.adapt.steps.growth_groups import GrowthGroups
from toolkit.core.adapt.steps.ranks import RankController
from toolkit.core.adapt.steps.whole import of_modules, of_optimizer, whole


class GrowthController(RankController):
    """Around each step of a method that grows: checks, learning rates, penalty, growth, history.

    A method subclasses it and decides in :meth:`decide`, before the optimizer acts, or in
    :meth:`finish`, after it; layers grow when the step is done. A layer has ``rank`` (components
    that count), ``limit`` (the largest rank its matrix can have) and ``grow(amount, draws)``, which
    returns the tensors that train from now on by leaf name.

    Attributes: ``total`` (ranks in all, now), ``groups`` (see :class:`GrowthGroups`), and those of
    the base class. The history has a record of the start and of each growth.

    Args:
        method: has ``target_rank``, ``total_rank`` (overrides it), ``start``, ``overshoot``,
            ``restart``, and ``warmup`` and ``interval``: a step t is a look if t > warmup and t is
            divisible by interval.
        layers: layer name -> its adapter.
        optimizer: holds the adapters' tensors in one group; no scheduler on it yet.
        total_steps: optimizer steps of the run. Nothing grows in later steps.
        growth: ranks that one layer gets at a look.
        weight_decay: of grown tensors, see :class:`GrowthGroups`.
        options: ``scorer``, which returns (N,) numbers, and ``penalty``: see the base class.

    Raises:
        ValueError: no ``total_steps``, a schedule or a target that does not fit, or an optimizer
            that cannot be extended.
    """

    lengthening: ClassVar[tuple[str, ...]] = ("history.", "births", "members")

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        growth: int,
        weight_decay: float | None = None,
        **options: Any,
    ):
        super().__init__(method, layers, optimizer, total_steps, **options)
        self.growth, self.warmup, self.interval = growth, method.warmup, method.interval
        self.due: Growth | None = None
        self.check_schedule()
        self._record()
        missing = max(0, self.target - self.total)
        # a layer near its limit takes less than ``growth`` once, so one more growth may be needed
        short = sum(room % growth != 0 for room in self.rooms())
        chances = looks(self.warmup, self.interval, self.total_steps)
        number = min(chances, -(-missing // growth) + short)
        self.groups = GrowthGroups(
            optimizer,
            self.trained,
            number if missing else 0,
            total_steps,
            restart=method.restart,
            warmup=getattr(method, "restart_warmup", 0),
            weight_decay=weight_decay,
        )

    def check_schedule(self) -> None:
        """Raise ValueError where warm-up, target or layers do not fit."""
        start = self.total
        most = start + sum(self.rooms())
        # a saved run that passed its target may go on
        passed = self.method.overshoot and start > len(self.layers) * self.method.start
        target = max(self.target, start) if passed else self.target
        check_fits(self.title, len(self.layers), start, target, most, self.warmup, self.total_steps)

    def rooms(self) -> list[int]:
        """Ranks that each layer can still take."""
        return [max(0, layer.limit - layer.rank) for layer in self.layers]

    @property
    def total(self) -> int:
        """Ranks in all, now."""
        return sum(layer.rank for layer in self.layers)

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
        return {n: layer.rank for n, layer in zip(self.names, self.layers, strict=True)}

    def decide(self) -> Growth | None:
        """What grows before the optimizer acts; may raise, and changes nothing that trains."""
        return None

    def chosen(self, scores: Sequence[float] | Tensor, top: int) -> Growth:
        """How much each layer grows by its score, (N,): see :func:`choose`.

        Raises:
            ValueError: not one score per layer. FloatingPointError: one that is not finite.
        """
        scores, count = torch.as_tensor(scores, dtype=torch.float64).cpu(), len(self.layers)
        if len(scores) != count:
            raise ValueError(f"scorer gave {len(scores)} scores for {count} layers; one per layer")
        good = scores.isfinite().tolist()
        if not all(good):
            raise FloatingPointError(
                f"the score of {self.names[good.index(False)]!r} is not finite at step "
                f"{self.step}; nothing has grown. Lower the learning rate, or go back to an "
                "earlier state"
            )
        missing, overshoot = self.target - self.total, self.method.overshoot
        return choose(scores, missing, self.growth, top, self.rooms(), overshoot)

    def synchronise(self) -> None:
        self.groups.average_gradients()

    @torch.no_grad()
    def before_step(self) -> None:
        self.due = self.decide()
        self.add_penalty()
        self.groups.before_step(self.step)  # the rates last, after all that may raise

    @torch.no_grad()
    def grow(
        self,
        amounts: Sequence[int],
        scores: Tensor | None = None,
        threshold: float = float("nan"),
        *,
        draws: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Let layers grow now; their new tensors get a group of the optimizer.

        Args:
            amounts: ranks to add, one number per layer.
            scores, threshold: what decided, (N,) and a number, for the history.
            draws: layer name -> tensor name -> what its ``grow`` takes instead of its own draw.

        Raises:
            RuntimeError: the schedule has no growth left. ValueError: amounts do not fit.
        """
        if len(amounts) != len(self.layers) or not all(0 <= a <= self.growth for a in amounts):
            raise ValueError(
                f"amounts must be {len(self.layers)} numbers from 0 to growth={self.growth}"
            )
        growing = [row for row in zip(self.names, self.layers, amounts, strict=True) if row[2]]
        for name, layer, amount in growing:
            if layer.rank + amount > layer.limit:
                raise ValueError(
                    f"layer {name!r} has rank {layer.rank} and cannot grow by {amount}: its "
                    f"matrix allows {layer.limit}"
                )
        strange = [name for name in draws or {} if name not in self.names]
        if strange:
            raise ValueError(f"draws are given for {strange[0]!r}, which is no layer that grows")
        if not growing:
            return
        if self.step >= self.total_steps:
            raise RuntimeError(
                f"growth after the end of the schedule: step {self.step} of "
                f"total_steps={self.total_steps}; give attach() more total_steps"
            )
        self.groups.need_free()

        def change() -> None:
            born: dict[str, nn.Parameter] = {}
            for name, layer, amount in growing:
                new = layer.grow(amount, (draws or {}).get(name))
                born |= {f"{name}.{leaf}": p for leaf, p in new.items()}
            self.groups.fill(born, self.step)
            self.trained = self.named()
            self._record(scores, threshold)

        whole(self._containers(), change)

    def _containers(self) -> Iterator[Any]:
        """All that a growth writes into."""
        yield from (vars(self), self.history, vars(self.groups))
        yield from (self.groups.births, self.groups.members)
        yield from of_modules(self.layers)
        yield from of_optimizer(self.optimizer)

    def _record(self, scores: Tensor | None = None, threshold: float = float("nan")) -> None:
        ranks = torch.tensor([*self.ranks().values()])
        self.history.add(self.step, self.total, ranks, scores, threshold)

    @torch.no_grad()
    def after_step(self) -> None:
        """Grow and count the step: both or, if an interrupt comes, neither."""
        if self.allocating or self.step + 1 == self.total_steps:
            whole(self._containers(), self.finish)
        else:
            self.finish()

    def finish(self) -> None:
        """What comes after a step."""
        self.groups.after_step()
        if self.due is not None:
            growth, self.due = self.due, None
            self.grow(*growth)
        super().after_step()

    def state(self) -> dict[str, Tensor]:
        return super().state() | self.groups.state()

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        saved, now = list(self.history[-1].ranks.values()), list(self.ranks().values())
        if saved != now:
            raise ValueError(
                f"the schedule was saved at ranks {saved}, the adapters have {now}; load the "
                "adapters of the same file with toolkit.load"
            )
        self.trained = self.named()
        self.groups.load(state, self.trained)
