"""Competition across layers: a shrinking number of non-zeros, shared out by importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from toolkit.core.adapt.steps.budget import budget
from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.steps.history import History
from toolkit.core.adapt.steps.importance import smooth

if TYPE_CHECKING:
    import pandas as pd

MOST = 1000  # records of a run; of more allocations every so many are kept, and the last


def share_out(volume: float, scores: Tensor, rooms: Tensor) -> list[int]:
    r"""Non-zeros of each layer.

    Each gets :math:`v_l=\min(N_l, \lfloor V p_l \rfloor)` with :math:`p_l` its part of the scores;
    what is left goes to the layers that have room, in proportion to their scores and not beyond
    their room, until nothing is left.

    Args:
        volume: V, in all.
        scores: (L,) not negative; where all are zero, all layers count the same.
        rooms: (L,) entries :math:`N_l` of the layers.

    Returns:
        v, whole numbers, which may sum to less than V by one for each layer, and to a little more
        or less where V is beyond the 2^24 that single precision counts.

    Raises:
        ValueError: a score that is negative or not finite.
    """
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise ValueError(f"scores of layers must be finite and not negative, got {scores.tolist()}")
    whole, dtype = rooms.long().cpu(), torch.float32  # in which the official code counts
    scores, rooms = scores.to("cpu", dtype), whole.to(dtype)
    total = scores.sum()
    parts = scores / total if total > 0 else torch.full_like(scores, 1 / len(scores))
    given = torch.minimum(rooms, (volume * parts).long().to(dtype))
    left = volume - given.sum()
    while left > 0:
        open_ = (rooms - given).nonzero()[:, 0]
        if not len(open_):
            break
        weights = parts[open_]
        if not weights.any():  # only layers without a score have room
            weights = torch.ones_like(weights)
        more = torch.minimum(left * weights / weights.sum(), (rooms - given)[open_])
        given[open_] += more
        before, left = left, volume - given.sum()
        if left == before:  # what is left is below rounding
            break
    return torch.minimum(given.long(), whole).tolist()


class ShareController(Controller):
    """After each step: importance of the factors; every ``interval`` steps a new share-out.

    Attributes: ``initial`` and ``target`` (non-zeros in all), ``volume`` (allowed now),
    ``importance`` and ``uncertainty`` (smoothed, one tensor per A and B of each layer), ``history``
    (its ranks are non-zeros), and those of the base class.

    Args:
        method: the hyperparameters.
        layers: layer name -> its factors.
        optimizer: what steps.
        total_steps: optimizer steps of the run.
        scorer: replaces the score: called with the controller, returns (L,) numbers. For controls
            such as equal or random shares.

    Raises:
        ValueError: ``total_steps`` missing or too short for the schedule.
    """

    lengthening: ClassVar[tuple[str, ...]] = ("history.",)

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, Any],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        scorer: Callable[[Any], Any] | None = None,
    ):
        super().__init__(method, layers, optimizer)
        if total_steps is None:
            raise ValueError(f"{self.title} shrinks a budget over the run: attach(total_steps=T)")
        if method.warmup + method.final >= total_steps:
            raise ValueError(
                f"warmup={method.warmup} and final={method.final} leave no step to shrink the "
                f"budget in total_steps={total_steps}; lower them or train longer"
            )
        self.total_steps, self.scorer = total_steps, scorer
        rooms = [layer.site.rows * layer.site.cols for layer in layers.values()]
        self.rooms = torch.tensor(rooms)
        self.initial = sum((1 - method.start_sparsity) * room for room in rooms)
        self.target = sum((1 - method.target_sparsity) * room for room in rooms)
        self.volume = self.initial
        self.tensors = [t for layer in layers.values() for t in (layer.A, layer.B)]
        self.importance = [torch.zeros_like(t) for t in self.tensors]
        self.uncertainty = [torch.zeros_like(t) for t in self.tensors]
        self.history = History(self.names, [1] * len(self.names))
        self.every = method.interval * max(1, -(-total_steps // method.interval // MOST))

    @property
    def allocating(self) -> bool:
        """Whether the coming step ends with an allocation."""
        return self._due(self.step + 1)

    def _due(self, done: int) -> bool:
        """Whether to allocate once so many steps are done; after the last nothing would follow."""
        m, last = self.method, self.total_steps
        return m.warmup < done < last and (done % m.interval == 0 or done == last - m.final)

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the gradients into the scores, then share out if it is time."""
        self.update_scores()
        super().after_step()
        if self._due(self.step):
            m = self.method
            self.allocate(
                budget(self.step, self.initial, self.target, m.warmup, m.final, self.total_steps)
            )

    @torch.no_grad()
    def update_scores(self) -> None:
        r"""Take :math:`|\theta\,\nabla_\theta\mathcal L|` of A and B into the averages."""
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in self.tensors]
        now = torch._foreach_mul([t.detach() for t in self.tensors], grads)
        torch._foreach_abs_(now)
        smooth(now, self.importance, self.uncertainty, self.method.beta1, self.method.beta2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """(L,) the mean of importance times uncertainty over A, plus that over B."""
        if self.scorer is not None:
            return torch.as_tensor(self.scorer(self), dtype=torch.float32)
        entries = torch._foreach_mul(self.importance, self.uncertainty)
        means = torch.stack([entry.mean() for entry in entries]).view(-1, 2)
        return means.sum(1)

    @torch.no_grad()
    def allocate(self, volume: float) -> None:
        """Share out so many non-zeros among the layers, from now on.

        Raises:
            RuntimeError: no step has been scored yet.
        """
        if self.step == 0 and self.scorer is None:
            raise RuntimeError(
                f"{self.title} shares its budget out by scores, and no step has been scored yet; "
                "call backward() and optimizer.step() first"
            )
        scores = self.scores()
        given = share_out(volume, scores, self.rooms)
        for layer, kept, room in zip(self.layers, given, self.rooms.tolist(), strict=True):
            layer.drop(min(max(1 - kept / room, 0.0), 1.0))
        self.volume = volume
        if self.step % self.every == 0 or self.step + self.method.interval >= self.total_steps:
            self.history.add(self.step, int(volume), torch.tensor(given), scores.cpu())

    def shares(self) -> dict[str, float]:
        """Layer name -> share of its entries that is kept now."""
        pairs = zip(self.names, self.layers, strict=True)
        return {name: 1 - float(layer.sparsity) for name, layer in pairs}

    def table(self) -> pd.DataFrame:
        """One row per allocation and layer: step, total, layer, score, nonzero."""
        table = self.history.table().drop(columns="threshold")
        return table.rename(columns={"rank": "nonzero"})

    def state(self) -> dict[str, Tensor]:
        state = super().state() | {"volume": torch.tensor(float(self.volume), dtype=torch.float64)}
        for i, (s, u) in enumerate(zip(self.importance, self.uncertainty, strict=True)):
            state[f"importance.{i}"], state[f"uncertainty.{i}"] = s, u
        return state | self.history.state()

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.volume = float(state["volume"])
        for i, (s, u) in enumerate(zip(self.importance, self.uncertainty, strict=True)):
            s.copy_(state[f"importance.{i}"])
            u.copy_(state[f"uncertainty.{i}"])
        self.history.load(state)
