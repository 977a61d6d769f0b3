"""What looks at an adapted model's operations: in-place work, forward derivatives, traces."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from toolkit import IA3, AdaLoRA, DoRA, IncreLoRA, LoRA, TriAdaptLoRA, adapt

METHODS = {
    "lora": LoRA(rank=2),
    "adalora": AdaLoRA(rank=2, target_rank=1),
    "increlora": IncreLoRA(),
    "triadaptlora": TriAdaptLoRA(),
    "scale": IA3(),
}
SHAPES = [(6,), (4, 6), (2, 3, 6)]


@pytest.fixture(params=METHODS)
def net(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    adapted = adapt(model, METHODS[request.param])
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_may_be_worked_on_in_place(net, shape):
    x = torch.randn(shape).double()
    y = net(x)
    kept = net[2](torch.relu(net[0](x)))
    torch.testing.assert_close(y, kept)
    ours = [p for p in net.parameters() if p.requires_grad]
    want = torch.autograd.grad(kept.square().sum(), ours)
    for one, other in zip(torch.autograd.grad(y.square().sum(), ours), want, strict=True):
        torch.testing.assert_close(one, other)
    y = net[0](x)
    y += 1
    y[..., 0] = 0
    y.sum().backward()


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_derivatives(net, shape):
    x, v = torch.randn(shape).double(), torch.randn(shape).double()
    want = torch.autograd.functional.jvp(net, x, v)[1]
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(net(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.jvp(net, (x,), (v,))[1], want)
    _, twice = torch.autograd.functional.hvp(lambda z: net(z).square().sum(), x, v)
    with forward_ad.dual_level():
        z = forward_ad.make_dual(x.clone().requires_grad_(), v)
        (gradient,) = torch.autograd.grad(net(z).square().sum(), z)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, twice)


def test_forward_derivatives_of_adapters(net):
    ours = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    steps = {n: torch.randn_like(p) for n, p in ours.items()}
    x = torch.randn(4, 6).double()

    def function(tensors):
        return torch.func.functional_call(net, tensors, (x,))

    want = torch.func.jvp(function, (ours,), (steps,))[1]
    with forward_ad.dual_level():
        dual = {n: forward_ad.make_dual(p, steps[n]) for n, p in ours.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(function(dual)).tangent, want)


@pytest.mark.parametrize("shape", SHAPES)
def test_traces_give_the_same_outputs(net, shape):
    x = torch.randn(shape).double()
    with torch.no_grad():
        want = net(x)
        assert torch.equal(torch.jit.trace(net, x)(x), want)
        assert torch.equal(fx.symbolic_trace(net)(x), want)
    torch.testing.assert_close(make_fx(net)(x)(x), want)
    ours = [p for p in net.parameters() if p.requires_grad]

    def gradients(z):
        return torch.autograd.grad(net(z).square().sum(), ours)

    for one, other in zip(make_fx(gradients)(x)(x), gradients(x), strict=True):
        torch.testing.assert_close(one, other)


def test_exported_and_traced_models_of_other_kinds():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", groups=2), nn.ReLU(inplace=True))
    linear = nn.Sequential(nn.Linear(5, 4))
    for model, targets in ((conv, nn.Conv2d), (linear, None)):
        adapted = adapt(model, LoRA(rank=2), targets)
        x = torch.randn(2, 4, 5, 5)
        with torch.no_grad():
            for p in adapted.parameters():
                p.normal_()
            want = model(x)
            for traced in (
                fx.symbolic_trace(model),
                torch.jit.trace(model, x),
                torch.export.export(model, (x,)).module(),
            ):
                torch.testing.assert_close(traced(x), want, rtol=1e-4, atol=1e-4)


def test_a_trace_that_would_lose_the_adapter_is_refused_with_the_remedy():
    hooked = nn.Sequential(nn.Linear(6, 4))
    hooked[0].register_forward_hook(lambda _, args, y: y + y)
    for model, method in ((hooked, LoRA(rank=2)), (nn.Sequential(nn.Linear(6, 4)), DoRA(rank=2))):
        adapted = adapt(model, method)
        for trace in (fx.symbolic_trace, lambda m: torch.jit.trace(m, torch.ones(2, 6))):
            with pytest.raises(TypeError, match=r"layer '0'.*merge\(\) first"):
                trace(model)
        fx.symbolic_trace(adapted.merge())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_and_vmap(net, reentrant):
    ours = [p for p in net.parameters() if p.requires_grad]
    x = torch.randn(2, 4, 6).double().requires_grad_()
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    kept = [p.grad for p in ours]
    want = torch.autograd.grad(net(x).square().sum(), ours)
    for one, other in zip(kept, want, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.vmap(net)(x), net(x))
