"""Order statistics of numbers seen in pieces are those of the sorted whole."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from toolkit.core.states import orders
from toolkit.core.states.orders import order_statistics
from toolkit.core.states.rules import Piece


@dataclass
class Rows:
    """Rows (n, D) in pieces of unequal length."""

    numbers: torch.Tensor
    seen: int = 0

    @property
    def count(self) -> int:
        return self.numbers.shape[1]

    def __iter__(self):
        self.seen += 1
        for part in self.numbers.split(700, dim=1):
            yield Piece("w", (self.count,), 0, None, list(part), (1.0,) * len(part), {})


def stacked(piece: Piece) -> torch.Tensor:
    return torch.stack(piece.models)


KINDS = {
    "normal": lambda g: torch.randn(2, 9001, generator=g),
    "few values": lambda g: torch.randint(0, 3, (2, 9001), generator=g).float(),
    "constant": lambda g: torch.full((2, 9001), 0.5),
    "mostly zero": lambda g: torch.randn(2, 9001, generator=g).relu().floor(),
    "heavy tail": lambda g: torch.randn(2, 9001, generator=g).pow(9),
    # a sample of every so manieth number sees only the small ones
    "hidden from the sample": lambda g: torch.where(
        torch.arange(9001) % (9001 // 64) == 0, 0.0, torch.rand(2, 9001, generator=g) + 5
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_that_of_the_sorted_rows(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(orders, "SAMPLE", 64)
    rows = Rows(KINDS[kind](torch.Generator().manual_seed(0)))
    ranks = [0, 1, 90, 4500, 8999, 9000]
    found = order_statistics(rows, stacked, ranks)
    assert torch.equal(found, rows.numbers.sort(dim=1).values[:, ranks])


def test_a_sample_saves_passes(monkeypatch) -> None:
    rows = Rows(torch.randn(2, 9001, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(orders, "SAMPLE", 512)
    order_statistics(rows, stacked, [4500, 8900])
    assert rows.seen == 2  # the sample, and one pass for both ranks and rows


def test_ranks_outside_and_numbers_that_are_none_are_refused() -> None:
    rows = Rows(torch.zeros(1, 10))
    with pytest.raises(ValueError, match=r"ranks \[10\] of 10 numbers"):
        order_statistics(rows, stacked, [10])
    rows.numbers[0, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        order_statistics(rows, stacked, [3])
