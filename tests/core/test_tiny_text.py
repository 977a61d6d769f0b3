"""The stand-ins of scale ``ci``: the forms of the real texts and encoder, nothing downloaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from toolkit import AdaLoRA, LoRA
from toolkit.core import nets
from toolkit.core.nets import transformer
from toolkit.core.train.fit import dress
from toolkit.diagnose.longtail_bias.adaptformer import add_adaptformer
from toolkit.labs.beds import sentences as text_beds
from toolkit.labs.beds import tiny_text


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a quick test must not look for data or models")

    monkeypatch.setattr(text_beds.data, "load", refuse)
    monkeypatch.setattr(nets, "pretrained", refuse)


def test_forty_sentences_half_of_them_praise() -> None:
    tables = tiny_text.tables()
    assert len(tables["train"]) + len(tables["dev"]) == 40
    for part in tables.values():
        assert part.label.mean() == 0.5
        praise = part.sentence.str.contains("|".join(tiny_text.PRAISE))
        assert (praise == (part.label == 1)).all()


def test_the_encoder_is_small_random_and_the_same_every_time() -> None:
    model, tokenizer = tiny_text.encoder()
    assert sum(p.numel() for p in model.encoder.parameters()) < 15_000
    tiny_text.encoder.cache_clear()
    torch.rand(3)
    again, _ = tiny_text.encoder()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert tokenizer(["the film is good", "gnu"])["input_ids"][1] == [1, 3, 2]
    assert len(tokenizer(["the " * 90], max_length=10)["input_ids"][0]) == 10


def test_padding_changes_nothing() -> None:
    model, tokenizer = tiny_text.encoder()
    sentences = tiny_text.tables()["train"].sentence.tolist()[:6]
    tokens = nets.encode(tokenizer, sentences)
    with torch.no_grad():
        for batch in nets.batches(tokens, batch_size=6):
            together = model(batch.input_ids, batch.attention_mask).last_hidden_state
            for row, place in enumerate(batch.index.tolist()):
                ids = torch.tensor([tokens[place]])
                alone = model(ids, torch.ones_like(ids)).last_hidden_state[0]
                torch.testing.assert_close(together[row, : len(tokens[place])], alone)


def test_the_split_at_the_frozen_blocks_is_the_tiny_encoder_itself() -> None:
    model, tokenizer = tiny_text.encoder()
    tokens = nets.encode(tokenizer, ["the film is good and the cast too", "the plot is dull"])
    hidden = text_beds._lower(model, tokens)
    with torch.no_grad():
        for numbers, start in zip(tokens, hidden, strict=True):
            ids = torch.tensor([numbers])
            whole = model(ids, torch.ones_like(ids)).last_hidden_state
            mask = torch.ones(1, len(numbers), dtype=torch.bool)
            torch.testing.assert_close(text_beds.upper_blocks(tiny=True)(start[None], mask), whole)


def test_added_masks_do_as_true_and_false() -> None:
    layer = tiny_text.encoder()[0].encoder.layer[0]
    hidden = torch.randn(2, 5, tiny_text.WIDTH)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])[:, None, None, :]
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, mask.bool()), layer(hidden, (1.0 - mask) * -1e9))


@pytest.mark.parametrize("name", ["sst2", "cola"])
def test_every_arm_takes_the_code_path_of_the_real_texts(name: str) -> None:
    task = text_beds.text_task(name, train=20, validation=8, test=12, seed=0, tiny=True)
    for method in (None, LoRA(rank=2), AdaLoRA(rank=3, target_rank=2, warmup=1, final=2)):
        record = text_beds.text_train(task, method, 1e-2, 0, steps=6)[2]
        assert {"validation", "test", "trained"} <= set(record)
    model = text_beds.upper_blocks(tiny=True)
    handle, _ = dress(model, LoRA(rank=2), 0, ["blocks.*"])
    ends = [site.rsplit(".", 2)[-2:] for site in handle.sites]
    assert len(ends) == 2 * len(text_beds.KINDS)
    assert [e[-1] for e in ends[:3]] == ["query", "key", "value"]


def test_losses_and_the_head_alone_on_request() -> None:
    task = text_beds.text_task("sst2", train=20, validation=8, test=12, seed=0, tiny=True)
    model, _, record = text_beds.text_train(
        task, None, 1e-3, 0, steps=6, blocks=False, loss=True, head_rate=0.1
    )
    assert {"validation_loss", "test_loss"} <= set(record)
    assert record["trained"] == 0
    fresh = text_beds.upper_blocks(tiny=True)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="blocks"):
        text_beds.text_train(task, LoRA(rank=2), 1e-3, 0, steps=1, blocks=False)


def test_the_collection_has_ten_queries_with_their_abstracts() -> None:
    found = tiny_text.collection(documents=3, words=20)
    assert len(found.documents) == len(found.judgements) == 30
    assert found.documents.text.str.split().str.len().eq(20).all()
    for row in found.judgements.itertuples():
        text = found.documents.set_index("id").text[row.document].split()
        others = set(tiny_text.TOPICS) - {tiny_text.TOPICS[row.query - 1]}
        assert not others & set(text)


def test_adaptformers_fit_beside_the_tiny_blocks() -> None:
    model = copy.deepcopy(tiny_text.encoder()[0])
    assert len(add_adaptformer(model, 4, last=2)) == 2


def test_causal_attention_never_looks_ahead() -> None:
    block = nets.initialise(
        transformer.Block(8, 2, 16, causal=True), torch.Generator().manual_seed(0)
    )
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[0, 4:] += 1
    with torch.no_grad():
        one, other = block(x), block(changed)
    assert torch.equal(one[0, :4], other[0, :4])
    assert not torch.allclose(one[0, 4:], other[0, 4:])
    assert not any(isinstance(m, nn.Dropout) for m in block.modules())
