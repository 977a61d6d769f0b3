"""Checkpoints of other libraries while a model is adapted: base names stay, all comes back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from toolkit import AdaLoRA, Houlsby, LoRA, adapt

METHOD = AdaLoRA(rank=3, target_rank=1, warmup=1, final=1, interval=1)


def net(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def trained(steps=3):
    adapted = adapt(net(), METHOD, ["0"], train=["2", "0.bias"])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.attach(optimizer, total_steps=9)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    return adapted, optimizer


def fresh(seed=1):
    adapted = adapt(net(seed), METHOD, ["0"], train=["2", "0.bias"])
    adapted.attach(torch.optim.AdamW(adapted.parameters(), lr=1e-2), total_steps=9)
    return adapted


def equal(adapted, other):
    x = torch.randn(4, 6)
    assert torch.equal(adapted.model.eval()(x), other.model.eval()(x))
    assert other.controller is None or other.controller.step == adapted.controller.step


def test_the_base_keeps_its_names_and_order():
    adapted = adapt(net(), LoRA(rank=2), ["0"])
    keys = list(adapted.model.state_dict())
    assert keys[:4] == ["0.weight", "0.bias", "0.adapter.A", "0.adapter.B"]
    assert [k for k in keys if "adapter" not in k] == list(net().state_dict())
    assert next(iter(adapted.model.state_dict(prefix="m."))) == "m.0.weight"
    assert adapted.model.state_dict(keep_vars=True)["0.weight"] is adapted.model[0].base.weight


def test_a_plain_base_takes_its_weights_and_names_the_rest():
    adapted, _ = trained()
    plain = net(1)
    missing, unexpected = plain.load_state_dict(adapted.model.state_dict(), strict=False)
    assert not missing
    assert all(".adapter." in key or ".schedule." in key for key in unexpected)
    assert torch.equal(plain[0].weight, adapted.model[0].base.weight)


def test_an_adapted_model_takes_everything_and_older_names_too():
    adapted, _ = trained()
    state = adapted.model.state_dict()
    other = fresh()
    other.model.load_state_dict(state)
    equal(adapted, other)
    older = {k.replace("0.weight", "0.base.weight").replace("0.bias", "0.base.bias"): v
             for k, v in state.items()}  # fmt: skip
    other = fresh()
    other.model.load_state_dict(older)
    equal(adapted, other)
    other = fresh()
    missing, _ = other.model.load_state_dict(net().state_dict(), strict=False)
    assert {k.split(".")[1] for k in missing} == {"adapter", "schedule"}
    assert torch.equal(other.model[0].base.weight, net()[0].weight)


def test_a_wrapped_model_and_reports_use_the_base_names():
    adapted, _ = trained()
    outer = nn.ModuleDict({"model": adapted.model})
    state = outer.state_dict()
    outer.load_state_dict(state)
    state["model.0.foo"] = torch.zeros(1)
    state["model.0.weight"] = torch.zeros(2, 2)
    del state["model.0.bias"]
    with pytest.raises(RuntimeError) as caught:
        outer.load_state_dict(state)
    for words in ('"model.0.bias"', '"model.0.foo"', "size mismatch for model.0.weight"):
        assert words in str(caught.value)
    assert ".base." not in str(caught.value)


class Block(nn.Module):
    """A module with a part that is called as one of an adapted layer's own."""

    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(6, 6)

    def forward(self, x):
        return self.adapter(x)


def test_a_base_with_a_part_called_adapter_loses_nothing():
    def make():
        return adapt(nn.Sequential(Block(), nn.Linear(6, 6)), Houlsby(width=2), "0")

    adapted, other = make(), make()
    other.model.load_state_dict(adapted.model.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(adapted.model(x), other.model(x))


def test_safetensors_models_and_distributed_checkpoints(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    adapted, _ = trained()
    save_model(adapted.model, str(tmp_path / "m.safetensors"))
    other = fresh()
    assert load_model(other.model, str(tmp_path / "m.safetensors")) == (set(), [])
    equal(adapted, other)
    state = get_model_state_dict(adapted.model)
    assert state.keys() == adapted.model.state_dict().keys()
    other = fresh()
    set_model_state_dict(other.model, state)
    equal(adapted, other)


def test_versions_of_modules_travel():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)))
    adapted = adapt(model, Houlsby(width=2), lambda name, _: name == "0")
    versions = adapted.model.state_dict()._metadata
    assert versions["0.0"] == versions["0.base.0"] == {"version": 2}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_copy_of_an_attached_model_goes_on(copied):
    adapted, optimizer = trained()
    twin = copied(adapted)
    assert twin.controller is None
    assert twin.model.state_dict().keys() == adapted.model.state_dict().keys()
    again = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.attach(again, total_steps=9)
    assert twin.controller.step == 3
    x = torch.randn(8, 6)
    for one, steps in ((adapted, optimizer), (twin, again)):
        steps.zero_grad()
        one(x).square().mean().backward()
        steps.step()
    equal(adapted, twin)


def test_a_whole_model_saved_by_torch():
    adapted, _ = trained()
    buffer = io.BytesIO()
    torch.save(adapted.model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(4, 6)
    assert torch.equal(again.eval()(x), adapted.model.eval()(x))
    assert again.state_dict().keys() == adapted.model.state_dict().keys()
