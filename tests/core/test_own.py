"""What would take over a parameter of an adapted layer: norms, pruning, parametrisations."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import toolkit
from toolkit import LoRA, adapt

TAKES = {
    "weight norm, old": weight_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm, old": spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrization": lambda layer: parametrize.register_parametrization(
        layer, "weight", nn.Identity()
    ),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned rows": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "pruned by nothing": lambda layer: prune.identity(layer, "weight"),
    "pruned by a mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.ones(6, 8)),
    "bias, weight norm, old": lambda layer: weight_norm(layer, "bias"),
    "bias, parametrization": lambda layer: parametrize.register_parametrization(
        layer, "bias", nn.Identity()
    ),
    "bias, pruned": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
}
METHODS = {
    "LoRA": {"rank": 2},
    "AdaLoRA": {"rank": 2, "target_rank": 1, "warmup": 1, "final": 2, "interval": 2},
    "IncreLoRA": {"target_rank": 2, "warmup": 1, "interval": 2, "restart_warmup": 2},
    "TriAdaptLoRA": {"target_rank": 2, "block": 1, "warmup": 1},
    "LoRAPro": {"rank": 2},
    "LoRAGGPO": {"rank": 2},
    "DoRA": {"rank": 2},
    "IA3": {"shift": True},
    "SparseMask": {"share": 0.02},
    "SaRA": {"share": 0.02, "rank_weight": 0.0},
    "ID3": {"share": 0.02},
    "SPT": {"rank": 2, "dropout": 0.0, "drop_path": 0.0},
}


def method(name: str):
    return getattr(toolkit, name)(**METHODS[name])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def put(take, layer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of those that are old
        take(layer)


def refused(take, layer, name: str = "0") -> None:
    """A layer is told of by name, and is what it was, to its hooks."""
    before = [*layer.state_dict()], [*layer.named_parameters()], dict(layer._forward_pre_hooks)
    with pytest.raises(RuntimeError, match=f"layer '{name}' is adapted.*before adapting.*unload"):
        put(take, layer)
    after = [*layer.state_dict()], [*layer.named_parameters()], dict(layer._forward_pre_hooks)
    assert [*map(str, before)] == [*map(str, after)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("key", TAKES)
def test_who_would_take_over_a_parameter_is_refused_by_name(key, name):
    model = network()
    adapted = adapt(model, method(name))
    x = torch.randn(4, 8)
    before = model(x)
    refused(TAKES[key], model[0])
    assert torch.equal(model(x), before)
    adapted.unload()
    put(TAKES[key], model[0])  # the remedy helps
    assert model(x).shape == before.shape


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_refuse_as_well(again):
    model = again(adapt(network(), LoRA(rank=2)).model)
    refused(weight_norm, model[0])
    refused(parametrizations.weight_norm, model[2], "2")


def test_pruning_over_many_layers_changes_none_if_one_is_adapted():
    model = network()
    adapt(model, LoRA(rank=2), "2")
    both = [(model[0], "weight"), (model[2], "weight")]
    with pytest.raises(RuntimeError, match="layer '2' is adapted"):
        prune.global_unstructured(both, prune.L1Unstructured, amount=0.5)
    assert not prune.is_pruned(model)


def test_who_only_looks_is_answered():
    model = network()
    layer = adapt(model, LoRA(rank=2)).model[0]
    assert "weight" not in layer._parameters
    assert layer._parameters.get("weight") is None
    assert not parametrize.is_parametrized(model)
    assert not prune.is_pruned(model)
    with pytest.raises(KeyError):
        layer._parameters["nothing"]
    layer.own = nn.Parameter(torch.zeros(2))
    assert "own" in dict(layer.named_parameters())
    del layer.own
    assert "own" not in dict(layer.named_parameters())


@pytest.mark.parametrize("size", [8, 300])  # of large layers only few gradients are computed
@pytest.mark.parametrize("key", [k for k in TAKES if "bias" not in k and "mask" not in k])
@pytest.mark.parametrize("name", METHODS)
def test_below_the_adapter_it_acts_or_is_named(name, key, size):
    model = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 3))
    adapted = adapt(model, method(name), "0")
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, told = torch.randn(200, size), []
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    put(TAKES[key], model[0].base)
    for use in (
        lambda: model(x),
        lambda: adapted.attach(optimizer, total_steps=9),
        lambda: (model(x).sum().backward(), optimizer.step()),
        lambda: model[0].weight,
        adapted.merge,
    ):
        try:
            use()
        except RuntimeError as error:  # a KeyError would say nothing
            told.append(str(error))
    assert told
    assert all("layer '0'" in words and "remove" in words for words in told)
    assert adapted.state == "adapted"
