"""Numbers that follow from the published settings of the four methods, as fixed expectations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from toolkit import SNELL, SPT, adapt
from toolkit.select.id3.choice import planned
from toolkit.select.sara import learning_rate
from toolkit.select.snella.allocation import budget
from toolkit.select.snella.competition import sparsify
from toolkit.select.spt.allocation import decide


@pytest.mark.parametrize(
    ("threshold", "rate"), [(2e-4, 9.323938e-4), (8e-4, 7.557837e-4), (2e-3, 4.965853e-4)]
)
def test_saras_rates_at_its_three_thresholds(threshold, rate):
    assert learning_rate(threshold) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(
    ("structured", "rows", "cols", "cost", "enough"),
    [  # query and the two of the feed-forward network of ViT-B/16, rank 8, alpha 10
        ("lora", 768, 768, 12_288, 1_229),
        ("lora", 3072, 768, 30_720, 3_072),
        ("lora", 768, 3072, 30_720, 3_072),
        ("adapter", 768, 768, 13_064, 1_307),
        ("adapter", 3072, 768, 52_232, 5_224),
    ],
)
def test_spts_modules_of_a_vision_transformer(structured, rows, cols, cost, enough):
    method = SPT(structured=structured)
    assert (method.rank, method.alpha, method.beta) == (8, 10.0, 5.0)
    assert method.cost(rows, cols) == cost
    assert decide(method, (rows, cols), enough).cost == cost
    assert decide(method, (rows, cols), enough - 1).cost == enough - 1


def test_spts_vectors_of_a_vision_transformer():
    assert decide(SPT(), (768,), 154).cost == 768
    assert decide(SPT(), (768,), 153).cost == 153


@pytest.mark.parametrize("budget", [103_000, 320_000])
def test_id3s_updates_are_half_of_those_of_a_choice_made_once(budget):
    steps = 1000
    counts = [sum(planned("uniform", budget, steps)[: t + 1]) for t in range(steps)]
    assert counts[-1] == budget
    assert sum(counts) == (steps + 1) * budget // 2
    more = planned("uniform", budget + 7, steps)  # what is left over goes to the first steps
    assert more[:7] == [budget // steps + 1] * 7
    assert set(more[7:]) == {budget // steps}


def test_snellas_budget_in_the_last_of_a_hundred_epochs():
    first, last = 1_000_000_000.0, 0.0
    assert budget(99, first, last, 0, 0, 100) == pytest.approx(first / 100**3, rel=1e-6)


def test_snellas_change_is_hardly_there_at_the_start():
    model = nn.Sequential(nn.Linear(768, 768))
    adapted = adapt(model, SNELL(rank=32, sparsity=0), generator=torch.Generator().manual_seed(0))
    change = adapted.adapters["0"].change().detach()
    # of 768 singular values the author's own code leaves 743 above rounding at rank 32
    assert 735 <= int(torch.linalg.matrix_rank(change)) <= 755
    assert 1e-4 < float(change.abs().mean()) < 1e-3
    kept = sparsify(change, 0.0).abs().mean()  # what acts is the square
    assert math.isclose(kept, change.square().mean(), rel_tol=1e-3)
    assert 1e-7 < float(kept) < 1e-6
