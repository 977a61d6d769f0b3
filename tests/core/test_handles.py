"""Tensors and modules replaced behind a handle's back, tied weights, sharded and empty ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import toolkit
from tests.pairs import run_pair
from toolkit import AdaLoRA, LoRA, adapt


class Tied(nn.Module):
    """A head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.fc = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.fc(self.words(tokens))))


def net() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    return nn.ModuleDict({"body": body, "fc": nn.Linear(8, 3)})


def handle(attached=True, method=None):
    adapted = adapt(net(), method or LoRA(rank=2), "body.0", train="fc")
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    if attached:
        adapted.attach(optimizer, total_steps=9)
    for p in adapted.parameters():
        p.grad = torch.ones_like(p)
    return adapted, optimizer


def uses(adapted, optimizer, path):
    yield lambda: adapted.save(path)
    yield lambda: adapted.save_peft(path)
    yield adapted.merge
    yield optimizer.step


@pytest.mark.parametrize("method", [LoRA(rank=2), AdaLoRA(rank=3, target_rank=2)])
def test_a_replaced_head_is_found_at_each_use(method, tmp_path):
    adapted, optimizer = handle(method=method)
    adapted.model["fc"] = nn.Linear(8, 3)
    for use in uses(adapted, optimizer, tmp_path / "a"):
        with pytest.raises(RuntimeError, match=r"fc\.weight"):
            use()
    assert adapted.extra["fc.weight"] is adapted.model["fc"].weight


def test_a_head_that_is_gone_is_named(tmp_path):
    adapted, _ = handle(attached=False)
    adapted.model["fc"] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        adapted.parameters()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_replaced_layer_is_found_at_each_use(attached, whole, tmp_path):
    adapted, optimizer = handle(attached)
    if whole:
        adapted.model["body"] = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    else:
        adapted.model["body"][0] = nn.Linear(6, 8)
    more = [adapted.parameters, adapted.unload, lambda: adapted.attach(optimizer)]
    for use in [*list(uses(adapted, optimizer, tmp_path / "a"))[: 4 if attached else 3], *more]:
        with pytest.raises(RuntimeError, match=r"'body\.0' is no longer"):
            use()


@pytest.mark.parametrize("method", [LoRA(rank=2), AdaLoRA(rank=3, target_rank=2)])
def test_assigned_tensors_are_followed_before_attach_and_named_after(method, tmp_path):
    adapted, _ = handle(attached=False, method=method)
    new = {k: v + 1 if v.is_floating_point() else v for k, v in adapted.model.state_dict().items()}
    adapted.model.load_state_dict(new, assign=True)
    trained = {id(p) for p in adapted.model.parameters() if p.requires_grad}
    assert {id(p) for p in adapted.parameters()} == trained
    with pytest.warns() if adapted._scheduled() else torch.no_grad():
        adapted.save(tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["train.fc.weight"], new["fc.weight"])
    adapted.unload()
    assert all(p.requires_grad for p in adapted.model.parameters())

    adapted, optimizer = handle(method=method)
    adapted.model.load_state_dict(
        {k: v.clone() for k, v in adapted.model.state_dict().items()}, assign=True
    )
    for use in uses(adapted, optimizer, tmp_path / "b"):
        with pytest.raises(RuntimeError, match=r"fc\.weight"):
            use()


def test_names_that_end_in_base_stay_apart(tmp_path):
    torch.manual_seed(0)
    inner = nn.ModuleDict({"norm": nn.BatchNorm1d(4)})
    model = nn.ModuleDict({"base": inner, "norm": nn.BatchNorm1d(4), "fc": nn.Linear(4, 4)})
    adapted = adapt(model, LoRA(rank=2), "fc")
    model["base"]["norm"](torch.randn(8, 4))
    assert all(name.startswith("base.norm.") for name in adapted.changed_buffers())


@pytest.mark.parametrize("name", ["head", "words"])
def test_a_tied_tensor_trains_as_one_and_says_so(name, tmp_path):
    model = Tied()
    with pytest.warns(UserWarning, match=r"head\.weight.*words\.weight|words.*head"):
        adapted = adapt(model, LoRA(rank=2), "fc", train=name)
    assert list(adapted.extra) == ["words.weight"]
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.3)
    adapted.save(tmp_path / "a")
    loaded, x = toolkit.load(Tied(), tmp_path / "a"), torch.tensor([[1, 2]])
    assert torch.equal(loaded.model(x), model(x))
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.words.weight.detach().clone())
    with pytest.raises(ValueError, match=r"'head\.weight' are not one tensor"):
        toolkit.load(untied, tmp_path / "a")
    with pytest.raises(TypeError, match="one tied tensor"):
        adapted.save_peft(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_both_names_of_a_tied_tensor_need_no_word(recwarn):
    adapt(Tied(), LoRA(rank=2), "fc", train=["head", "words"])
    assert not recwarn


def test_weights_tied_again_change_nothing_and_a_resized_one_is_named(tmp_path):
    model = Tied()
    adapted = adapt(model, LoRA(rank=2), ["head", "fc"])
    model.head.weight = model.words.weight
    assert model.head.base.weight is model.words.weight
    assert list(model.state_dict())[:1] == ["words.weight"]
    model.head.base.weight = nn.Parameter(torch.zeros(11, 6))
    with pytest.raises(RuntimeError, match=r"'head'.*\(9, 6\).*\(11, 6\)"):
        adapted.save(tmp_path / "a")
    for use in (lambda: model(torch.tensor([[1, 2]])), lambda: model.head.weight):
        with pytest.raises(RuntimeError, match=r"'head'.*\(9, 6\).*\(11, 6\).*resize before"):
            use()


def test_a_model_without_memory_is_refused_by_load(tmp_path):
    adapt(net(), LoRA(rank=2), "body.0").save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"body\.0\.weight.*meta"):
        toolkit.load(net().to("meta"), tmp_path / "a")


@pytest.mark.weekly  # one process, every run: the sharded tests of guards and checkpoints
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_model_sharded_over_two_processes_trains_and_saves_as_one(tmp_path):
    run_pair(Path(__file__).parent / "sharded_pair.py", tmp_path)


class Bank(nn.Module):
    """A layer beside buffers that are filled, or grow, when it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 3)
        self.register_buffer("late", None)
        self.register_buffer("rows", torch.zeros(1, 3))
        self.register_buffer("odd", torch.tensor([float("nan"), 1.0]))

    def forward(self, x):
        y = self.fc(x)
        if self.late is None:
            self.late = torch.full((3,), 2.0)
        return y + self.late + self.rows.mean(0)


def test_buffers_that_were_filled_or_put_anew_are_as_before_after_unload():
    model, x = Bank(), torch.randn(4, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = adapt(model, LoRA(rank=2))
    model(x)
    model.rows = torch.ones(5, 3)
    with torch.inference_mode():
        model.odd = torch.zeros(2)
    adapted.unload()
    assert model.late is None
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    model.odd.add_(1)  # no tensor of inference mode


def test_a_buffer_that_was_filled_is_saved_and_loaded_and_nan_is_no_change(tmp_path):
    model, x = Bank(), torch.randn(4, 6)
    adapted = adapt(model, LoRA(rank=2))
    assert adapted.changed_buffers() == {}
    want = model(x)
    model.late += 1
    want = model(x)
    assert [*adapted.changed_buffers()] == ["late"]
    adapted.save(tmp_path / "a.safetensors")
    fresh = Bank()
    toolkit.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(x), want)
