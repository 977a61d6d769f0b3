"""The lab of M2N2: the published images and network, searches, and whose numbers a child holds."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from toolkit.labs.merge import m2n2 as lab
from toolkit.labs.merge.specialists import bed, searches
from toolkit.merge.m2n2 import crossover, slerp


def test_digits_are_split_as_published() -> None:
    x, y, test_x, test_y = bed.pictures("digits", "ci")
    pixels, labels = load_digits(return_X_y=True)
    assert len(y) == 1437
    assert torch.equal(torch.cat([x, test_x]), torch.from_numpy(pixels).float())
    assert torch.equal(torch.cat([y, test_y]), torch.from_numpy(labels))
    assert bed.length(x, bed.size("digits", "cpu").width) == 19_210


def test_networks_in_lanes_are_the_networks_alone() -> None:
    there = bed.world("mnist", [3, 4], "ci")
    this = bed.size("mnist", "ci")
    vectors = bed.fresh(bed.length(there.x, this.width), [3, 4], "start")
    got = bed.logits(vectors, there.x, this.width)
    for r, vector in enumerate(vectors):
        sizes = [196 * this.width, this.width, 10 * this.width, 10]
        W1, b1, W2, b2 = vector.split(sizes)
        hidden = (there.x[r] @ W1.view(196, -1) + b1).relu()
        assert torch.allclose(got[r], hidden @ W2.view(-1, 10) + b2, atol=1e-5)
    assert not torch.equal(there.x[0], there.x[1])


def test_specialists_know_their_own_digits() -> None:
    there, this = bed.world("digits", [0], "ci"), bed.size("digits", "ci")
    for who, vector in enumerate(bed.specialists("digits", [0], "ci", there).unbind(1)):
        solved, mine = bed.right(there, this, vector)[0], (there.y[0] < 5) == (who == 0)
        assert solved[mine].float().mean() > 0.6
        assert not solved[~mine].any()


@pytest.mark.parametrize("name", ["ratio", "once", "layers"])
def test_a_search_keeps_the_best_it_has_seen(name: str) -> None:
    both, seen = torch.randn(2, 2, 3 * 4 + 4 + 4 * 10 + 10), []

    def score(children: torch.Tensor) -> torch.Tensor:
        seen.append(children)
        return children[:, :20] > 0.3

    propose = {"ratio": searches.ratios, "once": searches.once, "layers": searches.layers}[name]
    best = []
    found = searches.searched(
        propose(both, [0, 1], 25, 4), score, lambda c: best.append(c.clone()) or c[:, 0], 25, 10
    )
    assert len(seen) == 25
    assert found["moments"] == [10, 20, 25]
    reached = torch.stack([(c[:, :20] > 0.3).float().mean(1) for c in seen])
    assert torch.allclose(torch.tensor(found["train"]), 100 * reached.amax(0), atol=1e-3)
    winner = torch.stack(seen)[reached.argmax(0), torch.arange(2)]
    assert torch.equal(best[-1], winner)
    assert len({tuple(c[0].tolist()) for c in seen}) == 25


def test_whose_numbers_a_child_holds() -> None:
    a, b = torch.randn(2, 1, 4800)
    both = torch.stack([a, b], 1)
    assert torch.allclose(
        searches.whose(a, both), torch.zeros(1, 48, dtype=torch.float64), atol=1e-6
    )
    half = searches.whose(slerp(a, b, 0.5), both)
    assert torch.allclose(half, torch.full_like(half, 0.5), atol=1e-5)
    child = searches.whose(crossover(a, b, 0.2, 2400), both)[0]
    assert (child[:24] < 0.4).all()
    assert torch.allclose(child[24:], 1 - child[:24], atol=1e-4)


def test_claims_name_arms_that_are_measured() -> None:
    for arm in lab.AGAINST.values():
        assert all(arm in arms for arms in lab.ARMS.values())
    assert [claim.id for claim in lab.CLAIMS] == [*lab.AGAINST, "scratch"]
