"""Adapting whole models: attention, fast paths, tied weights, flags, costs."""

from __future__ import annotations

import copy
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import toolkit
from toolkit import AdaLoRA, LoRA, adapt
from toolkit.core.adapt.layer import AdaptedLayer

METHODS = [LoRA(rank=3), AdaLoRA(rank=3, target_rank=2)]
pytestmark = pytest.mark.parametrize("method", METHODS, ids=["lora", "adalora"])


def shake(adapted, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def slow(model, *args, **kwargs):
    """Output through the ordinary path: gradients on keep torch's fast path away."""
    with torch.enable_grad():
        return model(*args, **kwargs).detach()


def fast_path():
    """Counts the calls of torch's fused encoder layer."""
    name = "_transformer_encoder_layer_fwd"
    return mock.patch.object(torch, name, wraps=getattr(torch, name))


def encoder(layers: int = 2) -> nn.Module:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval()


@pytest.mark.parametrize("targets", [None, "*.linear?", "linear1", "out_proj", "self_attn"])
def test_encoder_fast_path_does_not_skip_the_adapter(method, targets):
    """In eval mode without gradients torch reads the weights instead of calling the layers."""
    model, x = encoder(), torch.randn(2, 5, 12)
    base = slow(model, x)
    adapted = adapt(model, method, targets)
    shake(adapted)
    expected = slow(model, x)
    assert not torch.allclose(expected, base, atol=1e-2)
    with torch.no_grad(), fast_path() as taken:
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert taken.call_count == 2, "the fast path was not taken, so nothing was tested"
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        fast = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(
        fast[0], slow(model, x, src_key_padding_mask=mask)[0], rtol=1e-5, atol=1e-5
    )
    adapted.merge()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_one_encoder_layer_fast_path(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    adapted = adapt(model, method)
    shake(adapted)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow(model, x), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_output_projection_of_attention_is_read_and_learns(method):
    model, x = Attention(), torch.randn(2, 3, 8)
    base = slow(model, x)
    adapted = adapt(model, method, "out_proj")
    shake(adapted)
    assert not torch.allclose(slow(model, x), base, atol=1e-2)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters())
    expected = slow(model, x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    adapted.unload()
    torch.testing.assert_close(slow(model, x), base)


def test_parameters_inside_an_adapted_layer_can_train_beside(method, tmp_path):
    """The projection inside attention trains in full while attention itself is adapted."""
    torch.manual_seed(1)
    model = Attention()
    twin = copy.deepcopy(model)
    adapted = adapt(model, method, "attention", train="out_proj")
    assert sorted(adapted.extra) == ["attention.out_proj.bias", "attention.out_proj.weight"]
    shake(adapted)
    adapted.save(tmp_path / "a.safetensors")
    loaded = toolkit.load(twin, tmp_path / "a.safetensors")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(slow(twin, x), slow(model, x))
    assert sorted(loaded.extra) == sorted(adapted.extra)
    assert adapted.costs()["trained"] == sum(p.numel() for p in adapted.parameters())


class Language(nn.Module):
    """A decoder that shares the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.decoder = nn.Linear(6, 9, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.embedding(tokens))


def test_tied_weights_are_parted_by_merging_with_a_warning(method):
    model, tokens = Language(), torch.arange(9)[None]
    adapted = adapt(model, method, "decoder")
    shake(adapted)
    expected = slow(model, tokens)
    old = model.embedding.weight.clone()
    with pytest.warns(UserWarning, match=r"decoder.*share their weight"):
        adapted.merge()
    torch.testing.assert_close(slow(model, tokens), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.embedding.weight, old)
    assert model.decoder.weight is not model.embedding.weight
    adapted.unmerge().unload()
    assert model.decoder.weight is model.embedding.weight


def test_both_ends_of_a_tie_can_be_adapted(method):
    model, tokens = Language(), torch.arange(9)[None]
    adapted = adapt(model, method, ["decoder", "embedding"])
    shake(adapted)
    expected = slow(model, tokens)
    with pytest.warns(UserWarning, match="decoder"):
        adapted.merge()
    torch.testing.assert_close(slow(model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_untied_models_merge_without_a_warning(method):
    adapted = adapt(encoder(1), method, "linear1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*nothing is attached")
        adapted.merge()


def test_a_layer_in_two_places_is_adapted_and_replaced_in_both(method):
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    adapted = adapt(model, method)
    assert list(adapted.sites) == ["0"]
    assert model[0] is model[2]
    assert isinstance(model[2], AdaptedLayer)
    adapted.merge()
    assert model[0] is layer
    assert model[2] is layer


def test_flags_of_the_base_return_after_merge_and_unload(method):
    for finish in ("merge", "unload"):
        model = encoder(1)
        model.layers[0].norm1.requires_grad_(False)
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        getattr(adapt(model, method), finish)()
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_merge_can_free_the_old_weights(method):
    model = nn.Sequential(nn.Linear(5, 5))
    adapted = adapt(model, method)
    shake(adapted)
    expected = slow(model, torch.ones(1, 5))
    adapted.merge(keep_original=False)
    torch.testing.assert_close(slow(model, torch.ones(1, 5)), expected)
    assert not adapted._originals
    with pytest.raises(RuntimeError, match="unmerge"):
        adapted.unmerge()
    adapt(model, method)  # plain again, so it can be adapted anew


def test_train_parameters_keep_what_they_learned(method):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2))
    adapted = adapt(model, method, train="1")
    shake(adapted)
    learned = model[1].weight.detach().clone()
    adapted.unload()
    assert torch.equal(model[1].weight, learned)


def test_report_and_the_four_costs(method):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    adapted = adapt(model, method, "0", train="2")
    row = adapted.report().iloc[0]
    per_layer = method.rank * (5 + 7 + isinstance(method, AdaLoRA))
    assert (row.layer, row.kind, row.rows, row.cols, row.weight) == ("0", "linear", 7, 5, 35)
    assert row.trained == per_layer
    assert row.share == per_layer / 35
    costs = adapted.costs()
    trained = per_layer + 7 * 2 + 2
    assert costs["trained"] == trained
    assert costs["changed"] == 35 + 7 * 2 + 2
    assert costs["stored_bytes"] == 4 * trained
    assert costs["training_bytes"] == 3 * 4 * trained
    adapted.attach(torch.optim.SGD(adapted.parameters()), total_steps=9)
    more = adapted.costs()["training_bytes"] - costs["training_bytes"]
    # two score tensors for every number of the triplets, and two counters
    assert more == (2 * 4 * per_layer + 16 if isinstance(method, AdaLoRA) else 0)


def test_repr_says_what_trains(method):
    adapted = adapt(nn.Sequential(nn.Linear(5, 5)), method)
    assert "1 layers" in repr(adapted)
    assert "adapted" in repr(adapted)
    adapted.unload()
    assert "unloaded" in repr(adapted)
