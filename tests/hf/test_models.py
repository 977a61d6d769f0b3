"""Whole models as a client has them: BERT, GPT-2 with tied embeddings, a convolutional net."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import toolkit
from tests.contracts.rooms import ADAPTING, small
from tests.hf.models import begin, bert, convnet, gpt2, images, logits, shake, tokens
from toolkit import LoRA, adapt
from toolkit.core.declare.catalogue import catalogue

pytest.importorskip("transformers", reason="transformers is not installed")

ENTRIES = {e.slug: e for e in catalogue() if e.part in ADAPTING and e.part != "core"}
METHODS = {slug: small(e.method) for slug, e in ENTRIES.items() if "linear" in e.kinds}
BLOCKS = {slug: small(e.method) for slug, e in ENTRIES.items() if e.kinds == ("module",)}
BERT_LINEARS = 2 * 6 + 2  # six in each layer, the pooler, the classifier
# model, input, targets, number of layers that must match
MODELS = {
    "bert": (bert, tokens(), None, BERT_LINEARS),
    "bert embeddings": (bert, tokens(), ["word_embeddings", "position_embeddings"], 2),
    "gpt2": (gpt2, tokens(), ["c_attn", "c_proj", "c_fc"], 2 * 4),
    "convnet": (convnet, images(), [nn.Conv2d, nn.Linear], 4),
}
KINDS = {"bert": "linear", "bert embeddings": "embedding", "gpt2": "hf_conv1d", "convnet": "conv"}
ROUNDS = [(n, s) for n in MODELS for s, e in ENTRIES.items() if KINDS[n] in e.kinds]


@pytest.mark.parametrize(("name", "slug"), ROUNDS)
def test_a_round_through_every_state(name, slug, tmp_path):
    make, x, targets, layers = MODELS[name]
    model = make()
    base, plain = logits(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    adapted = adapt(model, METHODS[slug], targets)
    assert len(adapted.sites) == layers
    if ENTRIES[slug].zero_init:
        torch.testing.assert_close(logits(model, x), base, rtol=1e-6, atol=1e-6)
    begin(adapted, x)
    shake(adapted.parameters())
    expected = logits(model, x)
    assert not torch.allclose(expected, base, atol=1e-3)

    adapted.save(tmp_path / "a.safetensors")
    loaded = toolkit.load(make(), tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(loaded.model, x), expected, rtol=0, atol=0)

    adapted.merge()
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == plain.keys()
    adapted.unmerge().unload()
    torch.testing.assert_close(logits(model, x), base, rtol=0, atol=0)
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("slug", [*METHODS, *BLOCKS])
def test_every_adapter_of_a_model_learns(slug):
    method, targets = (METHODS | BLOCKS)[slug], ["c_attn", "c_fc"] if slug in METHODS else None
    adapted = adapt(gpt2(), method, targets)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    adapted.attach(optimizer, total_steps=10)
    x, losses = tokens(), []
    for _ in range(6):
        optimizer.zero_grad()
        there = adapted.parameters()  # a step may let layers grow, and what is born has no gradient
        loss = adapted.model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in there)


def test_tied_head_of_gpt2_parts_with_a_warning_and_survives_a_save(tmp_path):
    model, x = gpt2(), tokens()
    assert model.lm_head.weight is model.transformer.wte.weight
    adapted = adapt(model, LoRA(rank=3), "lm_head")
    shake(adapted.parameters())
    expected = logits(model, x)
    with pytest.warns(UserWarning, match=r"lm_head.*share their weight"):
        adapted.merge()
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is not model.transformer.wte.weight
    # transformers ties again on loading unless told otherwise, which would drop the adapter
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slug", METHODS)
def test_merged_models_are_saved_and_loaded_by_transformers_alone(slug, tmp_path):
    model, x = bert(), tokens()
    adapted = adapt(model, METHODS[slug], ["query", "dense"], train="classifier")
    shake(adapted.parameters())
    expected = logits(model, x)
    adapted.merge().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, x), expected, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_uses_the_adapter():
    model = gpt2()
    adapted = adapt(model, LoRA(rank=3), ["c_attn", "c_fc"])
    shake(adapted.parameters(), size=0.5)
    model.eval()
    start = tokens()[:1, :3]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    adaptive = model.generate(start, **options)
    adapted.merge()
    assert torch.equal(model.generate(start, **options), adaptive)
