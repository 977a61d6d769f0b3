"""PCB-Merging: the card's properties, and the formulas computed with whole sorts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from toolkit import PCBMerging, merge
from toolkit.core.states import orders


def vectors(n: int = 3, count: int = 300, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    heavy = torch.rand(n, count, generator=g, dtype=torch.float64) ** 2
    return 0.01 * heavy * torch.randn(n, count, generator=g, dtype=torch.float64)


def merged(T: Tensor, weights: list[float] | None = None, **settings) -> Tensor:
    """The merged task vector of a model of two tensors."""
    cut = T.shape[1] // 3
    base = {"a": T.new_zeros(cut), "b": T.new_zeros(T.shape[1] - cut)}
    models = [{"a": t[:cut], "b": t[cut:]} for t in T]
    found = merge(base, models, PCBMerging(**settings), weights=weights)
    return torch.cat([found["a"], found["b"]])


def norm(x: Tensor) -> Tensor:
    low, high = x.min(dim=1, keepdim=True).values, x.max(dim=1, keepdim=True).values
    return (x - low) / (high - low)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    ordered, count = x.sort(dim=1).values, x.shape[1]
    return x.clamp(ordered[:, [int(count * low)]], ordered[:, [int(count * (1 - high) - 1)]])


def expected(T: Tensor, ratio: float, variant: str, ends: float, weights: Tensor) -> Tensor:
    """The card's steps, on the whole stack at once."""
    n = len(T)
    if variant == "softmax":
        own = (n * norm(T * T)).softmax(dim=1)
        pairs = torch.stack([norm(t * T).softmax(dim=1).sum(dim=0) for t in T])
        scores = own * pairs
        least = scores.sort(dim=1).values[:, [int(T.shape[1] * (1 - ratio))]]
        share, bar = scores * (scores >= least), T
    else:
        size = clip(T.abs(), ends, ends)
        bar, unit = T.sign() * size, T.sign() * norm(size)
        own = torch.exp(n * norm(size) ** 2)
        between = {
            "es": lambda: torch.stack([torch.tanh(u * unit).sum(dim=0) for u in unit]),
            "vision": lambda: torch.tanh(T * unit.sum(dim=0)),
            "raw": lambda: torch.tanh(T * T.sum(dim=0)),
        }[variant]()
        share = norm(clip(own * between, 1 - ratio, 0))
    return (weights[:, None] * bar * share).sum(dim=0) / share.sum(dim=0).clamp(min=1e-38)


@pytest.mark.parametrize("variant", ["es", "vision", "raw", "softmax"])
@pytest.mark.parametrize(("ratio", "ends"), [(0.05, 0.01), (0.5, 0.0001), (1.0, 0.0)])
def test_it_is_the_formula(variant: str, ratio: float, ends: float, monkeypatch) -> None:
    monkeypatch.setattr(orders, "SAMPLE", 32)  # so that ranks are found by brackets
    T, weights = vectors(), [1.0, 0.5, 1.5]
    found = merged(T, weights, ratio=ratio, variant=variant, clip=ends)
    told = expected(T, ratio, variant, ends, torch.tensor(weights, dtype=torch.float64))
    assert torch.allclose(found, told, atol=1e-12)


def test_a_single_task_keeps_its_own_clipped_values_at_full_size() -> None:
    T = vectors(1)
    found, bar = merged(T, ratio=0.2), T.sign() * clip(T.abs(), 0.01, 0.01)
    kept = found.abs() > 1e-15
    assert int(kept.sum()) == pytest.approx(0.2 * 300, abs=1)
    assert torch.allclose(found[kept], bar[0][kept], atol=1e-12)
    everything = merged(T, ratio=1.0).abs() > 1e-15
    # sizes at the lower clip share the lowest score, which is worth nothing
    assert int((~everything).sum()) == 1 + int(300 * 0.01)


def test_equal_tasks_give_the_task_and_opposite_ones_the_base() -> None:
    one = vectors(1)
    found = merged(torch.cat([one, one]), ratio=0.3)
    kept = found.abs() > 1e-15
    bar = one.sign() * clip(one.abs(), 0.01, 0.01)
    assert bool(kept.any())
    assert torch.allclose(found[kept], bar[0][kept], atol=1e-12)
    against = merged(torch.cat([one, -one]), ratio=0.3)
    assert torch.equal(against, torch.zeros_like(against))


def test_order_of_tasks_and_of_coordinates_does_not_matter() -> None:
    T = vectors()
    found = merged(T)
    for order in itertools.permutations(range(3)):
        assert torch.allclose(merged(T[list(order)]), found, atol=1e-12)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(merged(T[:, shuffled]), found[shuffled], atol=1e-12)


@pytest.mark.parametrize("factor", [2.0, 1000.0])
def test_the_default_does_not_depend_on_the_size_of_task_vectors_but_raw_does(factor) -> None:
    T = vectors()
    assert torch.allclose(merged(factor * T), factor * merged(T), rtol=1e-9, atol=1e-9)
    if factor > 100:
        raw = merged(T, variant="raw")
        assert not torch.allclose(merged(factor * T, variant="raw"), factor * raw, rtol=0.01)


def test_it_is_a_mean_so_no_coordinate_exceeds_its_largest_task() -> None:
    T = vectors()
    size = clip(T.abs(), 0.01, 0.01)
    assert bool((merged(T, ratio=1.0).abs() <= size.max(dim=0).values + 1e-12).all())
    assert torch.allclose(merged(T, scale=1.7), 1.7 * merged(T), atol=1e-12)


def test_numbers_compete_within_the_model_unless_told_otherwise() -> None:
    T = vectors()
    T[:, :100] *= 1e-3  # the first tensor's numbers are all small
    assert int((merged(T, ratio=0.1)[:100].abs() > 1e-15).sum()) == 0
    assert int((merged(T, ratio=0.1, over="tensor")[:100].abs() > 1e-15).sum()) > 0


def test_bad_settings_are_refused_by_name() -> None:
    for name, value in (("ratio", 0.0), ("ratio", 1.1), ("clip", 0.5), ("variant", "best")):
        with pytest.raises(ValueError, match=name):
            PCBMerging(**{name: value})
    with pytest.raises(ValueError, match="scale"):
        PCBMerging(scale=math.nan)
