"""The lab of PCB-Merging: the rule without its parts, equal searches, shares."""

from __future__ import annotations

import pytest
import torch

from toolkit import PCBMerging, merge
from toolkit.labs.merge import pcb_merging as lab


def merged(rule) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    models = [{"w": torch.randn(400, generator=draws)} for _ in range(3)]
    return merge({"w": torch.zeros(400)}, models, rule)["w"]


class Whole(lab.Lesser):
    """Nothing taken away."""

    def _scores(self, piece, facts):
        kept = object.__new__(lab.Lesser)
        object.__setattr__(kept, "without", "rescaling")
        return lab.Lesser._scores(kept, piece, facts)


def test_with_all_parts_it_is_the_toolkits_rule() -> None:
    assert torch.allclose(merged(Whole(ratio=0.3)), merged(PCBMerging(ratio=0.3)), atol=1e-6)


@pytest.mark.parametrize("part", ["size", "agreement", "rescaling"])
def test_without_a_part_it_is_another(part: str) -> None:
    lesser, whole = merged(lab.Lesser(ratio=0.3, without=part)), merged(PCBMerging(ratio=0.3))
    assert not torch.allclose(lesser, whole, atol=1e-2)


def test_without_rescaling_what_is_kept_has_equal_weights() -> None:
    draws = torch.Generator().manual_seed(2)
    vectors = torch.randn(2, 300, generator=draws)
    rule = lab.Lesser(ratio=1.0, clip=0.0, without="rescaling")
    found = merge({"w": torch.zeros(300)}, [{"w": v} for v in vectors], rule)["w"]
    alike = (vectors[0] * vectors[1] > 0) & (vectors.abs().min(dim=0).values > 0.3)
    mean = vectors.mean(dim=0)
    assert torch.allclose(found[alike], mean[alike], atol=1e-6)


def test_all_searched_rules_have_as_many_evaluations() -> None:
    counts = {len(tried.densities) * len(tried.scales) for tried in lab.RULES.values()}
    assert counts == {16}
    for tried in lab.RULES.values():
        assert all(getattr(tried.rule(d), "scale", 1.0) == 1.0 for d in tried.densities)
