"""What cannot be adapted: refused by name with a remedy, or listed as left out."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from toolkit import IA3, LoRA, Prompts, SparseMask, Train, adapt
from toolkit.core.adapt.layer import AdaptedLayer


class Int8(nn.Linear):
    def __init__(self, n, m):
        super().__init__(n, m)
        whole = (self.weight.data * 99).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 99, self.bias)


class Packed(torch.Tensor):
    """A tensor class of a library for quantisation."""


def packed():
    layer = nn.Linear(6, 4)
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Packed)
    return layer


def inferred():
    with torch.inference_mode():
        return nn.Linear(6, 4)


UNFIT = {
    "int8": (lambda: Int8(6, 4), "torch.int8.*convert it"),
    "float8": (lambda: nn.Linear(6, 4).to(torch.float8_e4m3fn), "float8.*convert it"),
    "complex": (lambda: nn.Linear(6, 4, dtype=torch.complex64), "complex64.*convert it"),
    "lazy": (lambda: nn.LazyLinear(4), "lazy.*run one batch"),
    "meta": (lambda: nn.Linear(6, 4, device="meta"), "meta.*Load the model whole"),
    "packed": (packed, "Packed.*full precision"),
    "inference": (inferred, "inference_mode.*deepcopy"),
}


def state(model):
    tensors = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return tensors, [(n, id(m)) for n, m in model.named_modules()]


@pytest.mark.parametrize("method", [LoRA(rank=2), IA3(), SparseMask(share=0.3)], ids=str)
@pytest.mark.parametrize("key", UNFIT)
def test_weights_that_take_no_difference_are_refused_and_nothing_changes(key, method):
    make, words = UNFIT[key]
    model = nn.Sequential(nn.Linear(6, 6), make())
    before = state(model)
    with pytest.raises(ValueError, match=f"layer '1'.*{words}"):
        adapt(model, method)
    assert state(model) == before


BESIDE = {
    "float8": (lambda: nn.Linear(6, 4).to(torch.float8_e4m3fn), "float8.*quantised"),
    "int8": (lambda: Int8(6, 4), "int8.*quantised"),
    "inference": (inferred, "inference_mode.*deepcopy"),
    "lazy": (lambda: nn.LazyLinear(4), "lazy.*run one batch"),
}


@pytest.mark.parametrize("train", ["1", ["1.weight"], lambda name: name.startswith("1.")])
@pytest.mark.parametrize("key", BESIDE)
def test_what_cannot_train_beside_is_refused_and_nothing_changes(key, train):
    make, words = BESIDE[key]
    model = nn.Sequential(nn.Linear(6, 6), make())
    before = state(model)
    with pytest.raises(ValueError, match=f"1.*{words}"):
        adapt(model, LoRA(rank=2), "0", train=train)
    assert state(model) == before


def test_lazy_layers_elsewhere_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(6, 6), nn.LazyBatchNorm1d())
    before = state(model)
    with pytest.raises(ValueError, match=r"layer '1' .LazyBatchNorm1d. has no .*lazy"):
        adapt(model, LoRA(rank=2), "0")
    assert state(model) == before
    model(torch.randn(4, 6))
    adapt(model, LoRA(rank=2), "0")


def test_the_remedies_help():
    model = nn.Sequential(copy.deepcopy(inferred()))
    adapt(model, LoRA(rank=2))
    model(torch.ones(1, 6)).sum().backward()
    model = nn.Sequential(nn.LazyLinear(4))
    model(torch.ones(1, 6))
    adapt(model, LoRA(rank=2))


def test_modules_of_no_numbers_are_refused_as_well():
    block = nn.TransformerEncoderLayer(8, 2, 16, device="meta")
    with pytest.raises(ValueError, match=r"layer '0'.*meta"):
        adapt(nn.Sequential(block), Prompts(tokens=2), "0")
    with pytest.raises(ValueError, match=r"layer '0'.*meta"):
        adapt(nn.Sequential(nn.LayerNorm(4, device="meta")), IA3(), "0")


def test_adapting_inside_inference_mode_gives_adapters_that_can_train():
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.inference_mode():
        adapted = adapt(model, LoRA(rank=2))
        want = model(torch.ones(1, 6))
    model(torch.ones(1, 6)).sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(adapted.merge()(torch.ones(1, 6)), want)
    assert not any(p.is_inference() for p in model.parameters())


# ---------------------------------------------------------------- wrappers
def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compiled", "parallel"])
def test_wrapped_models_are_refused_and_can_be_wrapped_afterwards(wrap):
    plain = nn.Sequential(nn.Linear(6, 4))
    model = wrap(plain)
    before = state(model)
    with pytest.raises(TypeError, match=r"(compiled|wrapped).*inside.*before"):
        adapt(model, LoRA(rank=2))
    assert state(model) == before
    adapted = adapt(plain, LoRA(rank=2))
    again = wrap(plain)
    again(torch.ones(1, 6)).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())


def test_a_layer_compiled_on_its_own_is_refused_and_a_compiled_block_is_not():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    model[0] = compiled(model[0])
    with pytest.raises(TypeError, match=r"'0._orig_mod'.*compiled"):
        adapt(model, LoRA(rank=2))
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    adapt(model, LoRA(rank=2), "1")
    model = nn.Sequential(compiled(nn.Sequential(nn.Linear(6, 4), nn.Tanh())))
    x = torch.randn(2, 6)
    before = model(x)  # compiled before there was an adapter
    adapted = adapt(model, LoRA(rank=2))
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        adapted.parameters()[1].normal_()
        y = model(x)
        assert not torch.allclose(y, before)
        torch.testing.assert_close(adapted.merge()(x), y)


# ---------------------------------------------------------------- left out
class Experts(nn.Module):
    """Experts as stacked matrices, the form of today's mixtures."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 6, 8))
        self.act = nn.SiLU()


class Fused(nn.Module):
    """Attention of another library."""

    def __init__(self):
        super().__init__()
        self.qkv_weight = nn.Parameter(torch.randn(18, 6))
        self.out = nn.Linear(6, 6)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 6))
        self.patch = nn.Linear(6, 6)


class Packs(nn.Module):
    """A linear layer of four bits, as libraries for quantisation keep it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(6, 3, dtype=torch.uint8))


Packs.__name__ = "QuantLinear"


def mixed():
    return nn.ModuleDict(
        {
            "experts": Experts(),
            "attention": Fused(),
            "embed": Positions(),
            "quant": Packs(),
            "script": torch.jit.script(nn.Linear(6, 6)),
            "norm": nn.LayerNorm(6),
            "conv": nn.Conv2d(1, 2, 3),
            "head": nn.Linear(6, 2),
        }
    )


LEFT = {"experts", "attention", "quant", "script"}


def test_what_multiplies_and_is_not_adapted_is_listed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = adapt(mixed(), LoRA(rank=2))
    assert set(adapted.sites) == {"attention.out", "embed.patch", "head"}
    assert set(adapted.left_out) == LEFT
    assert "up_proj (3, 6, 8)" in adapted.left_out["experts"]
    assert "TorchScript" in adapted.left_out["script"]
    assert all(name in repr(adapted) for name in LEFT)
    report = adapted.report()
    rest = report[report["left out"].notna()]
    assert set(rest["layer"]) == LEFT
    assert report["trained"].sum() == adapted.costs()["trained"]


def test_a_pattern_leaves_nothing_out_in_silence():
    adapted = adapt(mixed(), {"*": LoRA(rank=2), "norm.bias": Train()})
    assert set(adapted.sites) == {"attention.out", "embed.patch", "conv", "head"}
    assert set(adapted.left_out) == LEFT | {"embed"}
    adapted = adapt(mixed(), IA3(), ["head", "exp*"])
    assert set(adapted.left_out) == {"experts"}
    embedding = nn.ModuleDict({"a": nn.Embedding(9, 6), "b": nn.Linear(6, 6)})
    adapted = adapt(embedding, IA3(), "*")
    assert "kind embedding" in adapted.left_out["a"]


def test_names_and_models_of_nothing_else_are_refused_with_the_reason():
    with pytest.raises(TypeError, match=r"experts.*up_proj \(3, 6, 8\)"):
        adapt(mixed(), LoRA(rank=2), "experts")
    model = nn.Sequential(nn.ParameterDict({"gate": nn.Parameter(torch.ones(4, 4))}))
    with pytest.raises(ValueError, match=r"'0' is left out: .*gate"):
        adapt(model, LoRA(rank=2))
    adapted = adapt(nn.Sequential(nn.Linear(6, 4)), LoRA(rank=2))
    assert not adapted.left_out
    assert "left out" not in repr(adapted)
    assert "left out" not in adapted.report()
    again = adapt(nn.Sequential(adapted.model, nn.Linear(4, 4)), LoRA(rank=2), "1")
    assert not again.left_out


def test_torchs_quantised_layers_are_listed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4)))
        quantise = torch.ao.quantization.quantize_dynamic
        model[0] = quantise(nn.Sequential(model[0]), {nn.Linear}, dtype=torch.qint8)[0]
    adapted = adapt(model, LoRA(rank=2))
    assert list(adapted.sites) == ["1.0"]
    assert "quantised" in adapted.left_out["0"]
