"""Layers whose call is more than the plain map of their kind: adapted through their own forward."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit import IA3, AdaLoRA, DoRA, IncreLoRA, LoRA, SparseMask, adapt
from toolkit.core.adapt.forwards import has_own_forward


class Scaled(nn.Embedding):
    def forward(self, tokens):
        return 3 * super().forward(tokens)


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.weight / self.weight.std() - mean, self.bias)


class Convolves(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Pads(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.weight, self.bias)


class Quantised(nn.Linear):
    def forward(self, x):
        rounded = (self.weight / 0.05).round() * 0.05
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Calls(nn.Linear):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) + 1


class ByForm(nn.Module):
    """A linear layer of another library, as torch_geometric has one."""

    def __init__(self, n, m):
        super().__init__()
        self.in_channels, self.out_channels = n, m
        self.weight = nn.Parameter(torch.randn(m, n))
        self.bias = nn.Parameter(torch.randn(m))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias).tanh()


def patched(layer):
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1
    return layer


def partial(layer):
    layer.forward = functools.partial(lambda self, x: 2 * nn.Linear.forward(self, x), layer)
    return layer


def compiled(layer):
    layer.compile(backend="eager")
    return layer


def hooked(layer):
    layer.register_forward_pre_hook(lambda _, args: (args[0] + args[0],))
    layer.register_forward_hook(lambda _, args, y: y * y)
    return layer


def accelerated(layer):
    hooks = pytest.importorskip("accelerate.hooks")

    class Twice(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    return hooks.add_hook_to_module(layer, Twice())


DRAW = torch.Generator().manual_seed(0)
FLOATS, IMAGES = torch.randn(3, 6, generator=DRAW), torch.randn(2, 4, 5, 5, generator=DRAW)
TOKENS = torch.tensor([[0, 3, 8], [1, 4, 2]])
LAYERS = {
    "scaled": (lambda: Scaled(9, 4), TOKENS),
    "hooked_embedding": (lambda: hooked(nn.Embedding(9, 4)), TOKENS[1:]),
    "sparse": (lambda: Scaled(9, 4, sparse=True), TOKENS),
    "by_frequency": (lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), TOKENS),
    "standardised": (lambda: Standardised(4, 6, 3), IMAGES),
    "convolves": (lambda: Convolves(4, 6, 3), IMAGES),
    "pads": (lambda: Pads(4, 6, 2), IMAGES),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGES),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), IMAGES),
    "hooked_conv": (lambda: hooked(nn.Conv2d(4, 6, 3)), IMAGES / 9),
    "quantised": (lambda: Quantised(6, 4), FLOATS),
    "calls": (lambda: Calls(6, 4), FLOATS),
    "by_form": (lambda: ByForm(6, 4), FLOATS),
    "patched": (lambda: patched(nn.Linear(6, 4)), FLOATS),
    "partial": (lambda: partial(nn.Linear(6, 4)), FLOATS),
    "compiled": (lambda: compiled(nn.Linear(6, 4)), FLOATS),
    "hooked": (lambda: hooked(nn.Linear(6, 4)), FLOATS),
    "accelerated": (lambda: accelerated(nn.Linear(6, 4)), FLOATS),
}
METHODS = {
    "lora": LoRA(rank=2),
    "adalora": AdaLoRA(rank=2, target_rank=1),
    "dora": DoRA(rank=2),
    "scale_shift": IA3(shift=True),
    "mask": SparseMask(share=0.3),
}


def shake(adapted) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("key", LAYERS)
def test_start_gradients_and_merging_are_those_of_the_layers_own_map(key, method):
    torch.manual_seed(0)
    make, x = LAYERS[key]
    layer = make()
    if isinstance(layer, nn.Embedding) and "embedding" not in method.info.kinds:
        pytest.skip("another kind")
    model = nn.Sequential(layer)
    before = model(x).detach()
    adapted = adapt(model, method, "0")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    shake(adapted)
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters())
    # to the layer's map with the new weight, gradients included
    ours = [p.grad.clone() for p in adapted.parameters()]
    for p in adapted.parameters():
        p.grad = None
    model[0].base.sparse = False
    model[0].materialised(x).square().sum().backward()
    for one, p in zip(ours, adapted.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(y, before, atol=1e-3)
    torch.testing.assert_close(adapted.merge()(x), y, rtol=1e-4, atol=1e-4)
    adapted.unmerge().unload()
    assert model[0] is layer
    torch.testing.assert_close(model(x), before)


def test_which_layers_have_a_forward_of_their_own():
    own = {"scaled", "sparse", "standardised", "convolves", "pads", "quantised", "calls", "by_form"}
    own |= {"patched", "partial", "compiled", "accelerated"}
    assert {key for key, (make, _) in LAYERS.items() if has_own_forward(make())} == own
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert not has_own_forward(conv1d(4, 6))
    sub = type("Conv1D", (conv1d,), {"forward": lambda self, x: 2 * conv1d.forward(self, x)})
    assert has_own_forward(sub(4, 6))


def test_dropout_stands_between_hooks_and_is_refused_by_name_in_a_forward_of_its_own():
    model = nn.Sequential(hooked(nn.Linear(6, 4)), patched(nn.Linear(4, 4)))
    adapted = adapt(model, LoRA(rank=2, dropout=0.5))
    shake(adapted)
    assert not torch.equal(model[0](FLOATS), model[0](FLOATS))
    with pytest.raises(ValueError, match=r"dropout=0.5 cannot act on linear layer '1'.*dropout=0"):
        model(FLOATS)
    model.eval()
    y = model(FLOATS)
    torch.testing.assert_close(adapted.merge()(FLOATS), y, rtol=1e-4, atol=1e-4)


def test_a_forward_that_does_not_read_its_weight_is_refused_when_called():
    layer = nn.Linear(6, 4)
    weight = layer.weight.detach().clone()
    layer.forward = lambda x: x @ weight.T
    model = nn.Sequential(layer)
    adapt(model, LoRA(rank=2))
    with pytest.raises(RuntimeError, match=r"layer '0'.*does not use its weight"):
        model(FLOATS)


def test_the_score_of_a_growing_method_is_that_of_the_layers_own_map():
    """Under hooks the product of input and output gradient is taken between them."""
    scores = []
    for wrap in (hooked, lambda layer: layer):
        torch.manual_seed(0)
        model = nn.Sequential(wrap(nn.Linear(6, 4)))
        adapted = adapt(model, IncreLoRA(), generator=torch.Generator().manual_seed(1))
        adapter = adapted.adapters["0"]
        shake(adapted)
        adapter.listening = True
        y = model(FLOATS) if wrap is hooked else model(2 * FLOATS) ** 2
        y.sum().backward()
        scores.append(adapter.score)
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_input_may_be_given_by_name(method):
    model = nn.Sequential(nn.Linear(6, 4))
    shake(adapt(model, method))
    assert torch.equal(model[0](input=FLOATS), model[0](FLOATS))
    for wrong in ({"other": FLOATS}, {}):
        with pytest.raises(TypeError):
            model[0](**wrong)


def offloads(model, accelerate, folder):
    yield lambda: accelerate.cpu_offload(model, execution_device="cpu")
    yield lambda: accelerate.disk_offload(model, folder, execution_device="cpu")
    for part in ("adapter", "base"):
        hook = accelerate.hooks.AlignDevicesHook("cpu", offload=True)
        layer = getattr(model[0], part)
        yield lambda layer=layer, h=hook: accelerate.hooks.add_hook_to_module(layer, h)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_offloaded_after_it_was_adapted_is_named(method, number, tmp_path):
    """Its numbers are elsewhere between calls, so nothing would train and nonsense be merged."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(6, 4))
    adapted = adapt(model, method)
    list(offloads(model, accelerate, tmp_path))[number]()
    uses = [lambda: model(FLOATS), adapted.merge]
    uses += [lambda: adapted.save(tmp_path / "a")] * (number != 3)
    for use in uses:
        with pytest.raises(RuntimeError, match=r"layer '0' was offloaded.*merge\(\) before"):
            use()
    assert adapted.state == "adapted"


def test_hooks_that_move_nothing_are_kept():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(6, 4))
    adapted = adapt(model, LoRA(rank=2))
    shake(adapted)
    y = model(FLOATS)
    hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
    for layer in model.modules():
        accelerate.hooks.add_hook_to_module(layer, hook)
    torch.testing.assert_close(model(FLOATS), y)
    model(FLOATS).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())


CALLS = {
    "hook of all modules": lambda layer: nn.modules.module.register_module_forward_hook(
        lambda m, _, y: 2 * y + 1 if type(m) is nn.Linear else None
    ),
    "hook of all modules before": lambda layer: nn.modules.module.register_module_forward_pre_hook(
        lambda m, given: (given[0] + 1,) if type(m) is nn.Linear else None
    ),
    "call of its own": lambda layer: setattr(
        layer, "_call_impl", lambda x: 3 * F.linear(x, layer.weight, layer.bias)
    ),
}


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), IA3(), SparseMask(share=0.3)])
@pytest.mark.parametrize("key", CALLS)
def test_what_stands_around_a_call_stays_there(key, method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), torch.randn(4, 8)
    handle = CALLS[key](model[0])
    try:
        before = model(x)
        adapted = adapt(model, method, "0")
        torch.testing.assert_close(model(x), before)
        with torch.no_grad():
            for p in adapted.parameters():
                p.add_(0.3 * torch.randn_like(p))
            apart = model(x)
            assert not torch.equal(apart, before)
            torch.testing.assert_close(adapted.merge()(x), apart)
    finally:
        if handle is not None:
            handle.remove()


def test_a_layer_compiled_after_it_was_adapted_is_taken_out_first():
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), torch.randn(4, 8)
    adapted = adapt(model, LoRA(rank=2))
    nn.init.normal_(adapted.parameters()[1])
    layer, apart = model[0], model(x)
    model[0] = torch.compile(layer, backend="eager")
    for verb in (adapted.merge, adapted.unload):
        with pytest.raises(RuntimeError, match=r"layer '0' was compiled on its own.*_orig_mod"):
            verb()
    assert adapted.state == "adapted"
    model[0] = model[0]._orig_mod
    torch.testing.assert_close(adapted.merge()(x), apart)


def test_hooks_of_accelerate_come_off_the_frozen_layer():
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), torch.randn(4, 8)
    before = model(x)
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu"))
    adapted = adapt(model, LoRA(rank=2))
    hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(x), before)
    nn.init.normal_(adapted.parameters()[1])
    apart = model(x)
    assert not torch.equal(apart, before)
    torch.testing.assert_close(adapted.merge()(x), apart)
