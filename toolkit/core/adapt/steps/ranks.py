"""What methods share that move ranks between layers during training, by taking or by giving."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.history import History
from toolkit.core.adapt.steps.orthogonality import PenalisedController

if TYPE_CHECKING:
    import pandas as pd

Scorer = Callable[[Any], Sequence[Any] | Tensor]


class RankController(PenalisedController):
    """Reads gradients around each step, knows the target, and records what was decided.

    Attributes: ``total_steps``, ``target`` (ranks in all at the end), ``history`` (list of
    :class:`~toolkit.core.adapt.steps.history.Record`), ``trained`` (name -> tensor), and
    those of the base class.

    Args:
        method: has ``target_rank`` and ``total_rank``, which overrides it times the layers.
        layers, optimizer: as in the base class.
        total_steps: optimizer steps of the run.
        scorer: replaces the score: called with the controller, returns what :meth:`scores` would.
            For controls such as random or planted allocations.
        penalty: "step" or "loss", see the base class.
        widths: scores that each layer has: one, or one for each of its ranks.

    Raises:
        ValueError: ``total_steps`` is missing.
    """

    lengthening: ClassVar[tuple[str, ...]] = ("history.",)

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        scorer: Scorer | None = None,
        penalty: str = "step",
        widths: Sequence[int] | None = None,
    ):
        super().__init__(method, layers, optimizer, penalty)
        if total_steps is None:
            raise ValueError(f"{self.title} moves ranks over the run: attach(..., total_steps=T)")
        self.total_steps, self.scorer = total_steps, scorer
        self.target = method.total_rank
        if self.target is None:
            self.target = method.target_rank * len(self.layers)
        self.history = History(self.names, [1] * len(self.layers) if widths is None else widths)

    @property
    def allocating(self) -> bool:
        """Whether ranks move in the coming step."""
        raise NotImplementedError

    def table(self) -> pd.DataFrame:
        """The history, one row per decision and layer: see :meth:`History.table`."""
        return self.history.table()

    def state(self) -> dict[str, Tensor]:
        return super().state() | self.history.state()

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.history.load(state)
