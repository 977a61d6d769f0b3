"""The weight of an adapted layer, which is computed when it is read, and merging it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from toolkit import IA3, DoRA, LoRA, SparseMask, adapt


def adapted_net(method=None, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    adapted = adapt(model, method or LoRA(rank=2))
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return adapted


def no_grad(write):
    def wrapped(layer):
        with torch.no_grad():
            write(layer)

    return wrapped


def add_in_place(layer):
    weight = layer.weight
    weight += 1


WRITES = {
    "data": lambda layer: layer.weight.data.add_(1),
    "data is set": lambda layer: setattr(layer.weight, "data", torch.zeros(6, 8)),
    "entry": no_grad(lambda layer: layer.weight.__setitem__(0, 1.0)),
    "view": no_grad(lambda layer: layer.weight.view(-1)[3:].fill_(1)),
    "transpose": no_grad(lambda layer: layer.weight.T.chunk(2)[0].zero_()),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "kaiming": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "copy": no_grad(lambda layer: layer.weight.copy_(torch.zeros(6, 8))),
    "augmented": no_grad(add_in_place),
    "out": no_grad(lambda layer: torch.add(layer.weight, 1, out=layer.weight)),
    "foreach": no_grad(lambda layer: torch._foreach_mul_([layer.weight], 2.0)),
    "inplace": lambda layer: nn.functional.relu(layer.weight.detach(), inplace=True),
    "numpy": lambda layer: layer.weight.detach().numpy().fill(1),
    "flag": lambda layer: layer.weight.detach().requires_grad_(True),
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(6, 8))),
    "bias assigned": lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(6))),
}


@pytest.mark.parametrize("key", WRITES)
def test_writes_that_would_be_lost_are_refused(key):
    adapted = adapted_net()
    with pytest.raises((RuntimeError, ValueError, AttributeError)) as refused:
        WRITES[key](adapted.model[0])
    named = ("'0'", "adapted layer", "read-only")
    assert any(word in str(refused.value) for word in named), refused.value


def test_writes_that_reach_the_base_go_through():
    adapted = adapted_net()
    layer, x = adapted.model[0], torch.randn(2, 8)
    before = adapted.model(x)
    layer.bias.data.add_(1)
    layer.base.weight.data.mul_(2)
    assert not torch.allclose(adapted.model(x), before)
    layer.base.register_buffer("seen", torch.zeros(2))
    layer.seen = torch.ones(2)
    assert torch.equal(layer.base.seen, torch.ones(2))


def test_reading_is_as_ever():
    adapted = adapted_net()
    layer = adapted.model[0]
    want = layer.adapter.merged(layer.base)["weight"]
    weight = layer.weight
    assert torch.equal(weight, want)
    assert (weight.dtype, weight.shape, weight.device) == (want.dtype, want.shape, want.device)
    for plain in (weight + 1, weight.sum(), weight.clone(), nn.functional.linear(want, weight)):
        assert type(plain) is torch.Tensor
    target = torch.zeros(6, 8)
    target.copy_(weight.detach())
    assert torch.equal(target, want)
    weight.square().sum().backward()
    assert all(p.grad is not None for p in layer.adapter.parameters())
    with torch.no_grad():
        for again in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
            assert type(again) is torch.Tensor
            assert torch.equal(again, want)
    assert layer.weight.detach().numpy().shape == (6, 8)
    assert layer.bias is layer.base.bias


# ---------------------------------------------------------------- merging
METHODS = {"lora": LoRA(rank=2), "dora": DoRA(rank=2), "mask": SparseMask(share=0.3), "ia3": IA3()}
CHANGES = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "normed": parametrizations.weight_norm,
    "normed as of old": torch.nn.utils.weight_norm,
    "spectral": parametrizations.spectral_norm,
    "sparse": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(3, 5))),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("key", CHANGES)
def test_merging_is_whole_or_not_at_all(key, method):
    adapted = adapted_net(method)
    model, first = adapted.model, adapted.model[0].base
    weight, bias = first.weight, first.bias
    old = weight.detach().clone()
    CHANGES[key](model[2].base)
    placed = [model[0], model[2]]
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=r"layer '2'"):
            adapted.merge()
        assert [model[0], model[2]] == placed
        assert adapted.state == "adapted"
        assert first.weight is weight
        assert torch.equal(weight, old)
    adapted.unload()
    assert model[0] is first
    assert first.bias is bias


def test_a_pruned_layer_goes_on_below_its_adapter_and_merges_once_that_is_final():
    adapted = adapted_net()
    model, x = adapted.model, torch.randn(4, 8)
    prune.l1_unstructured(model[0].base, "weight", 0.5)
    y = model(x)
    with pytest.raises(RuntimeError, match=r"layer '0'.*prune.remove"):
        adapted.merge()
    with pytest.raises(RuntimeError, match=r"layer '0'.*pruned"):
        _ = model[0].weight
    prune.remove(model[0].base, "weight")
    torch.testing.assert_close(adapted.merge()(x), y)


def test_unmerging_is_whole_or_not_at_all():
    adapted = adapted_net()
    model, x = adapted.merge(), torch.randn(4, 8)
    prune.l1_unstructured(model[2], "weight", 0.5)
    y = model(x)
    with pytest.raises(RuntimeError, match=r"layer '2'.*prune.remove"):
        adapted.unmerge()
    assert torch.equal(model(x), y)
    assert adapted.state == "merged"


def test_a_bias_that_is_computed_stops_a_shift_from_merging():
    adapted = adapted_net(IA3(shift=True))
    prune.l1_unstructured(adapted.model[2].base, "bias", 0.5)
    with pytest.raises(RuntimeError, match=r"layer '2'.*bias"):
        adapted.merge()


def test_an_error_while_merging_names_the_layer():
    adapted = adapted_net()
    broken = adapted.adapters["2"]
    broken.A = nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match=r"layer '2' cannot be merged, so none was"):
        adapted.merge()
    assert adapted.model[0] is adapted.sites["0"].layer


def put_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda _, args, y: 2 * y),
        lambda layer: layer.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        put_forward,
    ],
)
def test_what_was_put_on_an_adapted_layer_is_not_lost_by_merging(change):
    adapted = adapted_net()
    x = torch.randn(4, 8)
    change(adapted.model[2])
    y = adapted.model(x)
    with pytest.raises(RuntimeError, match=r"layer '2'.*put them on its base"):
        adapted.merge()
    assert torch.equal(adapted.model(x), y)
    change(adapted.sites["0"].layer.base)
    adapted.model[2]._forward_hooks.clear()
    adapted.model[2]._forward_pre_hooks.clear()
    adapted.model[2].__dict__.pop("forward", None)
    y = adapted.model(x)
    torch.testing.assert_close(adapted.merge()(x), y, rtol=1e-4, atol=1e-4)
