"""Parameter groups for tensors that are born during training, and their learning rates.

A scheduler of torch keeps one entry per group of its optimizer, so a group added later breaks it.
All groups that growth may need are therefore added at once, empty, before any scheduler exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.growth import restarted_rate
from toolkit.core.adapt.steps.hooks import group_of
from toolkit.core.adapt.steps.processes import average_gradients
from toolkit.core.adapt.steps.wrappers import fresh


class GrowthGroups:
    """Empty groups of an optimizer, filled one per growth, each with its own clock.

    A group's rate is :func:`~toolkit.core.adapt.steps.growth.restarted_rate`, or with
    ``restart=False`` that of the adapters' own group. The rates stand in the groups only while
    ``optimizer.step()`` runs; between steps the groups hold what a scheduler wrote, so that
    schedulers that compute a rate from the last one are not disturbed.

    Args:
        optimizer: the optimizer; groups are addressed by position, because ``load_state_dict``
            replaces the dictionaries.
        named: the adapters' tensors that exist already, by name. They must lie in one group.
        number: how many groups to reserve.
        total_steps: optimizer steps T of the run.
        restart: a clock per group, or the rate of the adapters' group.
        warmup: steps w of a restarted warm-up.
        weight_decay: decay of the new groups; None takes that of the adapters' group.

    Raises:
        ValueError: a scheduler exists already, or the adapters lie in several groups.
        TypeError: the optimizer takes no tensors later, or has no learning rate.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named: Mapping[str, nn.Parameter],
        number: int,
        total_steps: int,
        *,
        restart: bool = True,
        warmup: int = 0,
        weight_decay: float | None = None,
    ):
        self.optimizer, self.total_steps = optimizer, total_steps
        self.restart, self.warmup = restart, warmup
        self.source = group_of(optimizer, named)
        if "lr" not in self._source:
            raise TypeError(
                f"{type(optimizer).__name__} has no learning rate in its groups, and tensors that "
                "grow get one of their own; use AdamW"
            )
        new = fresh(optimizer)
        if new is not None and new.state:
            raise TypeError(
                f"{type(optimizer).__name__} makes what it keeps for a tensor when it is built, so "
                "tensors that grow later cannot join it; use RMSprop or AdamW"
            )
        self._own_rate = new is not None and "initial_lr" in new.param_groups[0]
        scheduled = getattr(optimizer.step, "_wrapped_by_lr_sched", False)
        marked = any("initial_lr" in group for group in optimizer.param_groups)
        if scheduled or (marked and not self._own_rate):
            raise ValueError(
                "the optimizer has a scheduler already, which cannot follow parameter groups that "
                "growth adds: build the scheduler after attach()"
            )
        if weight_decay and "weight_decay" not in self._source:
            raise ValueError(
                f"weight_decay={weight_decay} was given for the grown tensors, but "
                f"{type(optimizer).__name__} has no weight decay; leave it at None"
            )
        self.weight_decay = weight_decay
        self.eta0 = float(self._source["lr"])
        self.first, self.number = len(optimizer.param_groups), 0
        self.births: list[int] = []
        self.members: list[list[str]] = []
        self._kept: list[Any] | None = None
        self._reserve(number)

    @property
    def _source(self) -> dict[str, Any]:
        return self.optimizer.param_groups[self.source]

    @property
    def free(self) -> int:
        """How many reserved groups are still empty."""
        return self.number - len(self.births)

    def _reserve(self, number: int) -> None:
        """Have exactly so many groups behind the user's own."""
        del self.optimizer.param_groups[self.first + number :]
        for _ in range(number - self.number):
            new = {k: _copy(v) for k, v in self._source.items() if k not in _OWN}
            if self._own_rate:
                new["initial_lr"] = self._source["initial_lr"]
            if "param_names" in self._source:
                new["param_names"] = []
            if self.weight_decay is not None and "weight_decay" in new:
                new["weight_decay"] = self.weight_decay
            self.optimizer.add_param_group({"params": [], **new})
        self.number = number

    def fill(self, named: Mapping[str, nn.Parameter], step: int) -> None:
        """Give the next empty group the tensors born in this step.

        Raises:
            RuntimeError: no group is left; nothing is changed.
        """
        self.need_free()
        group = self.optimizer.param_groups[self.first + len(self.births)]
        group["params"].extend(named.values())
        if "param_names" in group:
            group["param_names"].extend(named)
        self.births.append(step)
        self.members.append(list(named))

    def need_free(self) -> None:
        """Raise RuntimeError when every reserved group is filled."""
        if not self.free:
            raise RuntimeError(
                f"all {self.number} growths that the schedule allows have happened; raise the "
                "target, or train longer with more looks, before attach()"
            )

    def rate(self, step: int, birth: int) -> float:
        """Learning rate at a step of the group born at ``birth``."""
        if not self.restart:
            return float(self._source["lr"])
        eta0 = float(self._source.get("initial_lr", self.eta0))
        return restarted_rate(step, birth, self.total_steps, self.warmup, eta0)

    def rates(self, step: int) -> list[float]:
        """Learning rate of every filled group at a step."""
        return [self.rate(step, birth) for birth in self.births]

    def before_step(self, step: int) -> None:
        """Put the groups' own rates in place; the last thing before the optimizer acts."""
        self.after_step()
        groups = self.optimizer.param_groups[self.first : self.first + len(self.births)]
        self._kept = [_copy(group["lr"]) for group in groups]
        for group, rate in zip(groups, self.rates(step), strict=True):
            _write(group, rate)

    def after_step(self) -> None:
        """Put back what the groups held before the step."""
        if self._kept is not None:
            for i, rate in enumerate(self._kept):
                _write(self.optimizer.param_groups[self.first + i], rate)
        self._kept = None

    def average_gradients(self) -> None:
        """Average the members' gradients over processes: DDP does not know late tensors."""
        groups = self.optimizer.param_groups[self.first :]
        average_gradients([p for group in groups for p in group["params"]])

    def state(self) -> dict[str, Tensor]:
        text = "\n".join("\t".join(names) for names in self.members)
        return {
            "groups": torch.tensor(self.number),
            "births": torch.tensor(self.births, dtype=torch.int64),
            "members": torch.tensor(list(text.encode()), dtype=torch.uint8),
            "eta0": torch.tensor(self.eta0, dtype=torch.float64),
        }

    def load(self, state: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
        """Lay out the groups as they were: a new optimizer holds grown tensors with the others.

        Args:
            state: from :meth:`state`.
            named: every adapter tensor that trains now, by name.

        Raises:
            ValueError: a tensor of the saved groups does not exist, or their number is none that
                a run of so many steps makes.
        """
        births, text = state["births"].tolist(), bytes(state["members"].tolist()).decode()
        members = [line.split("\t") for line in text.split("\n")] if births else []
        number, all_names = int(state["groups"]), [name for names in members for name in names]
        if not len(births) == len(members) <= number <= max(self.total_steps, self.number):
            raise ValueError(
                f"the saved schedule has groups={number}, {len(births)} births and {len(members)} "
                f"sets of members, which no run of total_steps={self.total_steps} makes"
            )
        if len(set(all_names)) < len(all_names):
            raise ValueError("the saved schedule names a tensor in two groups (members)")
        missing = [name for names in members for name in names if name not in named]
        if missing:
            raise ValueError(
                f"the schedule was saved after tensor {missing[0]!r} was born, but the adapters "
                "have not grown it; load the adapters of the same file with toolkit.load"
            )
        self._reserve(len(self.births))
        grown = {id(named[name]) for names in members for name in names}
        for group in self.optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if id(p) not in grown]
            group["params"][:] = [group["params"][i] for i in kept]
            if "param_names" in group:
                group["param_names"][:] = [group["param_names"][i] for i in kept]
        self.births, self.members = [], []
        self._reserve(number)
        self.eta0 = float(state["eta0"])
        for birth, names in zip(births, members, strict=True):
            self.fill({name: named[name] for name in names}, birth)


_OWN = ("params", "param_names", "initial_lr")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _write(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # in place: a captured graph reads this very tensor
    else:
        group["lr"] = rate
