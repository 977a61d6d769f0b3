"""Inside and aside on BERT and ViT of transformers, and its measures beside torchmetrics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit import Connected, adapt, load
from toolkit.insert.connected_peft_ir.measures import measured

transformers = pytest.importorskip("transformers")
WIDTH = 16
IDS = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0))
VARIANTS = ("layer", "sublayer", "stream", "none")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertModel(config, add_pooling_layer=False).eval()


def out(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state


def shaken(adapted):
    draw = seeded(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return adapted


@pytest.mark.parametrize("variant", VARIANTS)
def test_bert_starts_at_its_base_and_saves(variant, tmp_path):
    model, before = bert(), out(bert())
    adapted = adapt(model, Connected(variant=variant, rank=3))
    assert torch.equal(out(model), before)
    after = out(shaken(adapted).model)
    assert (after - before).abs().max() > 1e-3
    adapted.save(tmp_path / "a.safetensors")
    assert torch.equal(out(load(bert(), tmp_path / "a.safetensors").model), after)
    adapted.unload()
    assert torch.equal(out(model), before)


def test_learns_through_autocast_half_precision_and_checkpoints():
    model = bert()
    adapted = adapt(model, Connected(variant="stream", rank=3))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    asleep = {n for n, _ in adapted.named_parameters()}
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    adapted.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = out(model).float().square().mean() + out(model).float()[:, 0].sum()
        loss.backward()
        asleep -= {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert not asleep
    half = adapt(bert().bfloat16(), Connected(variant="sublayer", rank=3))
    assert half.parameters()[0].dtype == torch.float32
    assert out(half.model).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_vit(variant):
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    x = torch.rand(1, 3, 8, 8, generator=seeded())
    vit = transformers.ViTModel(config, add_pooling_layer=False).eval()
    before = vit(x).last_hidden_state
    adapted = adapt(vit, Connected(variant=variant, rank=2))
    assert torch.equal(vit(x).last_hidden_state, before)
    shaken(adapted)
    assert (vit(x).last_hidden_state - before).abs().max() > 1e-3


def test_measures_agree_with_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    draw = seeded()
    # above 0: its average precision takes a score of 0 or less for "not found"
    scores, grades = torch.rand(6, 30, generator=draw), torch.randint(2, (6, 30), generator=draw)
    found = measured(scores, grades)
    for s, g, *mine in zip(scores, grades, *found.values(), strict=True):
        theirs = (
            retrieval.retrieval_normalized_dcg(s, g, top_k=10),
            retrieval.retrieval_reciprocal_rank(s, g, top_k=10),
            retrieval.retrieval_recall(s, g, top_k=10),
            retrieval.retrieval_average_precision(s, g),
        )
        assert [m.item() for m in mine] == pytest.approx([t.item() for t in theirs], abs=1e-6)
