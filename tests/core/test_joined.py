"""Saved adapters of one base, merged by a rule or joined without forming weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from toolkit import IA3, TIES, LoRA, SparseMask, TaskArithmetic, adapt, merge
from toolkit.core.adapt.joined import join_adapters, merge_adapters


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    parts = {"table": nn.Embedding(9, 6), "body": body, "head": nn.Linear(8, 3)}
    return nn.Sequential(OrderedDict(parts))


def saved(tmp_path: Path, methods: list, peft: bool = False) -> tuple[nn.Module, list, list]:
    """A base, files of adapters with random factors, and the merged models."""
    base, files, models = network(), [], []
    for i, method in enumerate(methods):
        adapted = adapt(copy.deepcopy(base), method, "body.*", train="head.*")
        with torch.no_grad():
            for p in adapted.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        path = tmp_path / (f"a{i}" if peft else f"a{i}.safetensors")
        adapted.save_peft(path) if peft else adapted.save(path)
        files.append(path)
        models.append(adapted.merge().state_dict())
    return base, files, models


@pytest.mark.parametrize("peft", [False, True])
def test_joined_adapters_are_the_sum_of_their_differences(tmp_path, peft: bool) -> None:
    base, files, models = saved(tmp_path, [LoRA(rank=2), LoRA(rank=3, alpha=5.0)], peft)
    before = copy.deepcopy(base.state_dict())
    expected = merge(before, models, TaskArithmetic(scale=1.0), weights=[0.7, -0.4])
    adapted = join_adapters(base, files, [0.7, -0.4])
    assert {placed.layer.adapter.rank for placed in adapted.sites.values()} == {5}
    adapted.save(tmp_path / "joined.safetensors")
    merged = adapted.merge().state_dict()
    for name, value in expected.items():
        assert torch.allclose(merged[name], value, atol=1e-6), name


@pytest.mark.parametrize("methods", [[LoRA(rank=2), LoRA(rank=3)], [SparseMask(), LoRA(rank=2)]])
def test_other_rules_see_the_entries_and_the_base_stays(tmp_path, methods) -> None:
    base, files, models = saved(tmp_path, methods)
    before = copy.deepcopy(base.state_dict())
    expected = merge(before, models, TIES(density=0.4))
    merged = merge_adapters(base, files, TIES(density=0.4))
    for name, value in expected.items():
        assert torch.allclose(merged[name], value, atol=1e-6), name
    now = base.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_what_is_no_product_of_factors_or_has_no_weight_is_refused(tmp_path) -> None:
    base, files, _ = saved(tmp_path, [LoRA(rank=2), SparseMask()])
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="no product of factors; use merge_adapters"):
        join_adapters(base, files)
    with pytest.raises(ValueError, match="finite number for each of 2"):
        join_adapters(base, files, [1.0])
    with pytest.raises(ValueError, match="finite number for each of 0"):
        join_adapters(base, [])
    adapted = adapt(copy.deepcopy(base), IA3(), "body.*")
    adapted.save(tmp_path / "beside.safetensors")
    now = base.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_running_statistics_go_with_one_adapter_and_are_told_of_with_several(tmp_path) -> None:
    def norm() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    files = []
    for shift in (1.0, 5.0):
        model = norm()
        adapted = adapt(model, LoRA(rank=2))
        for p in adapted.parameters():
            nn.init.normal_(p)
        model(torch.randn(8, 6) + shift)
        files.append(tmp_path / f"{shift}.safetensors")
        adapted.save(files[-1])
    x, fresh, merged = torch.randn(4, 6), norm(), norm()
    join_adapters(fresh, files[1:])
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x))
    merged.load_state_dict(merge_adapters(norm(), files[1:], TaskArithmetic(scale=1.0)))
    torch.testing.assert_close(merged.eval()(x), model.eval()(x))
    with pytest.warns(UserWarning, match=r"'1.num_batches_tracked', '1.running_mean'.*train\(\)"):
        join_adapters(fresh := norm(), files)
    assert torch.equal(fresh[1].running_mean, torch.zeros(4))
