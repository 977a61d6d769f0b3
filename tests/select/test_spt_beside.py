"""A budget of SPT in a mapping: alone, beside other methods, and what cannot be meant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from toolkit import IA3, SPT, LoRA, Train, adapt, load
from toolkit.core import nets

METHOD = SPT(budget=600, rank=3, dropout=0.0, drop_path=0.0)


def vit() -> nn.Module:
    return nets.digits_transformer(
        width=16, depth=2, heads=2, generator=torch.Generator().manual_seed(0)
    )


def images(seed: int = 0):
    x = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(6)


def loss(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


DATA = {"batches": [images(0), images(1)], "loss": loss}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def same(one, other) -> None:
    """Two handles train tensors of the same names and numbers, at the same sites."""
    assert list(one.sites) == list(other.sites)
    found = dict(other.named_parameters())
    assert found.keys() == dict(one.named_parameters()).keys()
    for key, value in one.named_parameters():
        assert torch.equal(value, found[key])


@pytest.mark.parametrize(("pattern", "budget"), [("*", 600), ("blocks.0.*", 400), ("*.query", 96)])
def test_one_pattern_is_that_pattern_as_targets(pattern, budget):
    method = SPT(budget=budget, rank=3, dropout=0.0, drop_path=0.0)
    alone = adapt(vit(), method, pattern, generator=seeded(), **DATA)
    same(adapt(vit(), {pattern: method}, generator=seeded(), **DATA), alone)


def test_what_trains_beside_it_is_no_candidate_and_not_in_the_budget(tmp_path):
    model = vit()
    adapted = adapt(model, {"blocks.*": METHOD, "head.*": Train()}, generator=seeded(), **DATA)
    same(adapt(vit(), METHOD, "blocks.*", train="head.*", generator=seeded(), **DATA), adapted)
    plan = METHOD.plan(vit(), targets="blocks.*", train="head.*", **DATA)
    head = sum(p.numel() for p in model.head.parameters())
    assert adapted.costs()["trained"] == plan.total + head
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.attach(optimizer)
    loss(model, images()).backward()
    optimizer.step()
    adapted.save(tmp_path / "a.safetensors")
    again = load(vit(), tmp_path / "a.safetensors")
    assert torch.equal(again(images()[0]), model(images()[0]))


def test_biases_may_train_whole_beside_it():
    model = vit()
    adapted = adapt(model, {"blocks.*": METHOD, "*.bias": Train()}, **DATA)
    biases = {n for n, _ in vit().named_parameters() if n.endswith(".bias")}
    assert set(adapted.extra) == biases
    plan = METHOD.plan(vit(), targets="blocks.*", train="*.bias", **DATA)
    assert not any(name.endswith(".bias") for name in plan.scores)
    assert adapted.costs()["trained"] == plan.total + sum(
        p.numel() for n, p in vit().named_parameters() if n in biases
    )


def test_another_method_beside_it_has_its_own_sites():
    adapted = adapt(vit(), {"blocks.0.*": METHOD, "blocks.1.*.query": LoRA(rank=2)}, **DATA)
    methods = {
        type(p.method).__name__ for n, p in adapted.sites.items() if n.startswith("blocks.1")
    }
    assert methods == {"LoRA"}
    first = [n for n in adapted.sites if n.startswith("blocks.0")]
    assert first
    assert {*METHOD.plan(vit(), targets="blocks.0.*", **DATA).sites} >= {*first}


def test_two_budgets_are_spent_each_on_its_own_pattern():
    small = SPT(budget=90, rank=2, dropout=0.0, drop_path=0.0)
    adapted = adapt(vit(), {"blocks.0.*": METHOD, "blocks.1.*": small}, **DATA)
    plans = [
        METHOD.plan(vit(), targets="blocks.0.*", **DATA),
        small.plan(vit(), targets="blocks.1.*", **DATA),
    ]
    assert adapted.costs()["trained"] == sum(plan.total for plan in plans)


REFUSED = {
    "a layer both want": (
        {"*": METHOD, "*.query": LoRA(rank=2)}, "SPT and LoRA both want 'blocks.0.*query'",
    ),
    "in the other order": (
        {"*.query": LoRA(rank=2), "*": METHOD}, "LoRA and SPT both want 'blocks.0.*query'",
    ),
    "a layer that the plan leaves alone": (
        {"*": SPT(budget=3, rank=3, half="entries"), "head": IA3()}, "SPT and IA3 both want 'head'",
    ),
    "two budgets for one layer": (
        {"blocks.*": METHOD, "*.query": SPT(budget=96, rank=3)},
        "SPT and SPT both want 'blocks.0.*query'",
    ),
    "nothing left": ({"head": METHOD, "head.weight": Train()}, "targets='head'"),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(key):
    mapping, words = REFUSED[key]
    model = vit()
    before = copy.deepcopy(model.state_dict())
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=words):
        adapt(model, mapping, **DATA)
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
