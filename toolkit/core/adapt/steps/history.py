"""What allocations and growths decided: kept small, saved with the schedule, told as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Record:
    """One decision. Its tensors stay where they were made until they are read.

    Attributes:
        step: the step at which it was taken.
        total: ranks allowed in all, or given in all, from then on.
        values: (S,) float32 scores that were compared, layer after layer; NaN where there are none.
        limit: () float32, the score at which the line was drawn.
        counts: (N,) ranks of the layers afterwards.
        names, widths: the N layers, and how many of the S scores each has.
    """

    step: int
    total: int
    values: Tensor
    limit: Tensor
    counts: Tensor
    names: Sequence[str]
    widths: Sequence[int]

    @property
    def threshold(self) -> float:
        """The score at which the line was drawn, NaN where there is none."""
        return float(self.limit)

    @property
    def scores(self) -> dict[str, Tensor]:
        """Layer name -> the scores that were compared, (w,)."""
        return dict(zip(self.names, self.values.cpu().split(list(self.widths)), strict=True))

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name -> its rank afterwards."""
        return dict(zip(self.names, self.counts.tolist(), strict=True))


class History(list[Record]):
    """The decisions of a run in order.

    Args:
        names: the layers.
        widths: scores that each layer has: 1, or one for each of its ranks.
    """

    def __init__(self, names: Sequence[str], widths: Sequence[int]):
        super().__init__()
        self.names, self.widths = tuple(names), tuple(widths)

    def add(
        self,
        step: int,
        total: int,
        counts: Tensor,
        scores: Tensor | None = None,
        threshold: Tensor | float = float("nan"),
    ) -> None:
        """Keep a decision: scores (S,) or None, ranks (N,) afterwards."""
        if scores is None:
            scores = torch.full((sum(self.widths),), float("nan"))
        limit = torch.as_tensor(threshold, dtype=torch.float32)
        values = scores.detach().to(torch.float32)
        self.append(Record(step, total, values, limit, counts, self.names, self.widths))

    def table(self) -> pd.DataFrame:
        """One row per decision and layer.

        Columns: step, total, threshold, layer, score (summed over the layer's ranks where each has
        its own), rank.
        """
        import pandas as pd

        columns = ["step", "total", "threshold", "layer", "score", "rank"]
        rows = [
            (record.step, record.total, record.threshold, name, float(scores.sum()), rank)
            for record in self
            for (name, scores), rank in zip(
                record.scores.items(), record.ranks.values(), strict=True
            )
        ]
        return pd.DataFrame(rows, columns=columns)

    def state(self) -> dict[str, Tensor]:
        """As tensors whose first dimension counts the decisions."""

        def all_of(tensors: list[Tensor], width: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            kept = [t.to("cpu", dtype) for t in tensors]
            return torch.stack(kept) if kept else torch.zeros(0, *width, dtype=dtype)

        whole, real = torch.int64, torch.float32
        return {
            "history.step": torch.tensor([r.step for r in self], dtype=whole),
            "history.total": torch.tensor([r.total for r in self], dtype=whole),
            "history.threshold": all_of([r.limit for r in self], (), real),
            "history.scores": all_of([r.values for r in self], (sum(self.widths),), real),
            "history.ranks": all_of([r.counts for r in self], (len(self.names),), whole),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take on what was saved, instead of what is here."""
        self.clear()
        steps, totals = state["history.step"].tolist(), state["history.total"].tolist()
        kept = (state[f"history.{name}"] for name in ("ranks", "scores", "threshold"))
        for row in zip(steps, totals, *kept, strict=True):
            self.add(*row)
