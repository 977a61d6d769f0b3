"""Gradients of few entries alone: equal to the dense route, in every case that may call them."""

import copy

import pytest
import torch
from torch import nn

from toolkit import SparseMask, adapt
from toolkit.core.adapt import sampled

DOUBLE = torch.float64
WIDE = 300  # 300 x 300 is large enough for the sampled route


class Conv1D(nn.Module):
    """transformers' layer of this name, by its form."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = (
            nn.Parameter(torch.randn(nx, nf) / 17),
            nn.Parameter(torch.ones(nf)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def network(layer=None) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.Linear(WIDE, 2 * WIDE) if layer is None else layer
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh(), middle).to(DOUBLE)


def masked(model: nn.Module, share: float = 0.01, **options):
    method = SparseMask(share=share, by="random")
    return adapt(model, method, generator=torch.Generator().manual_seed(1), **options)


def inputs(*shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(*shape, WIDE, generator=draw, dtype=DOUBLE)


def dense(monkeypatch) -> None:
    monkeypatch.setattr(sampled, "pays", lambda *_: False)


def counted(monkeypatch) -> list:
    """A list that gets an entry for every call of the sampled product."""
    calls, plain = [], sampled.products
    monkeypatch.setattr(sampled, "products", lambda *a: calls.append(1) or plain(*a))
    return calls


@pytest.mark.parametrize("shape", [(200,), (7, 43), (128,), (2, 3, 64)])
@pytest.mark.parametrize("layer", ["linear", "no bias", "conv1d"])
def test_output_and_gradients_are_those_of_the_dense_route(shape, layer, monkeypatch):
    made = {
        "linear": None,
        "no bias": nn.Linear(WIDE, WIDE, bias=False),
        "conv1d": Conv1D(400, WIDE),
    }
    model = network(made[layer])
    adapted = masked(model, train="*.bias")
    x = inputs(*shape).requires_grad_()
    calls = counted(monkeypatch)
    found = torch.autograd.grad(model(x).square().sum(), [x, *adapted.parameters()])
    y = model(x)
    assert len(calls) == 2  # both layers: else the test compares the dense route with itself
    dense(monkeypatch)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *adapted.parameters()])
    assert torch.equal(y, model(x))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_training_is_the_masked_dense_update(monkeypatch):
    model, calls = network(), counted(monkeypatch)
    plain = copy.deepcopy(model)
    adapted = masked(model)
    masks = {}
    for name, layer in adapted.adapters.items():
        mask = torch.zeros(layer.site.shape, dtype=torch.bool)
        mask.view(-1)[layer.index] = True
        masks[f"{name}.weight"] = mask
    weights = {n: p for n, p in plain.named_parameters() if n in masks}
    optimizers = torch.optim.Adam(adapted.parameters()), torch.optim.Adam(weights.values())
    for step in range(4):
        x = inputs(150) + step
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if net is plain:
                for n, p in weights.items():
                    p.grad.mul_(masks[n])
            optimizer.step()
    assert len(calls) == 8
    for name, placed in adapted.sites.items():
        new, old = placed.merged()["weight"], weights[f"{name}.weight"]
        torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)
        assert torch.equal(new[~masks[f"{name}.weight"]], old[~masks[f"{name}.weight"]])


def test_second_derivatives(monkeypatch):
    model = network()
    adapted = masked(model)
    x = inputs(128).requires_grad_()

    def second():
        first = torch.autograd.grad(
            model(x).tanh().sum(), [x, *adapted.parameters()], create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *adapted.parameters()])

    found = second()
    dense(monkeypatch)
    for one, other in zip(found, second(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_values_may_change_between_forward_and_backward(monkeypatch):
    found = []
    for _ in range(2):
        model = network()
        adapted = masked(model)
        y = model(inputs(128)).square().sum()
        with torch.no_grad():
            for p in adapted.parameters():
                p.add_(1.0)
        found.append(torch.autograd.grad(y, adapted.parameters()))
        dense(monkeypatch)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_places_in_any_order_and_changed_in_place():
    left, right = inputs(130)[:, :40], inputs(130)[:, 40:100]
    index = torch.randperm(40 * 60, generator=torch.Generator().manual_seed(3))[:50]
    whole = (left.T @ right).reshape(-1)
    for _ in range(2):
        torch.testing.assert_close(sampled.products(left, right, index), whole[index])
        torch.testing.assert_close(sampled.products(left, right, index.int()), whole[index])
        index.copy_(torch.randperm(40 * 60, generator=torch.Generator().manual_seed(4))[:50])


@pytest.mark.parametrize("why", ["share", "few tokens", "dtype", "hook", "keyword", "no gradient"])
def test_what_it_does_not_pay_for_goes_the_dense_way(why, monkeypatch):
    model, calls = network(), counted(monkeypatch)
    adapted = masked(model, share=0.2 if why == "share" else 0.01)
    x = inputs(127 if why == "few tokens" else 128).requires_grad_()
    if why == "dtype":
        model, x = model.to(torch.bfloat16), x.detach().bfloat16().requires_grad_()
    if why == "hook":
        for placed in adapted.sites.values():
            placed.layer.base.register_forward_hook(lambda *_: None)
    if why == "no gradient":
        for p in adapted.parameters():
            p.requires_grad_(False)
    y = model[2](input=model[1](model[0](input=x))) if why == "keyword" else model(x)
    y.sum().backward()
    assert not calls


def test_a_copy_goes_on_by_itself():
    model = network()
    adapted = masked(model)
    model(inputs(128)).sum().backward()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.5)
    assert not torch.equal(copied(inputs(128)), model(inputs(128)))
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(inputs(128)), model(inputs(128)))


def test_threads_agree():
    left, right = inputs(512), inputs(512) + 1
    index = torch.arange(0, WIDE * WIDE, 97)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(sampled.products(left, right, index))
    torch.set_num_threads(before)
    assert torch.equal(*found)
