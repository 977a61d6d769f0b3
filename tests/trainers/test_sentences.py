"""Training under sentence-transformers gives the plain loop's tensors, and goes on after a break."""

from __future__ import annotations

import copy

import pytest
import torch

import toolkit
from tests.trainers.tasks import METHODS
from toolkit import adapt

pytest.importorskip("transformers", reason="transformers is not installed")
st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = "rain snow wind sun river hill sea tree stone road".split()
BATCH, EPOCHS = 4, 3
ROWS = [(WORDS[i % 10], WORDS[(3 * i + 1) % 10], (i % 5) / 4) for i in range(3 * BATCH)]
STEPS = 3 * EPOCHS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of 16 units with a vocabulary of its own: nothing is downloaded."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def encoder(folder) -> torch.nn.Module:
    from sentence_transformers import models

    words = models.Transformer(str(folder), max_seq_length=8)
    pooling = models.Pooling(16)
    return st.SentenceTransformer(modules=[words, pooling], device="cpu")


def adapted(name: str, folder):
    generator = torch.Generator().manual_seed(7)
    return adapt(encoder(folder), METHODS[name], ["*.query", "*.value"], generator=generator)


def driven(name: str, handle):
    kind = torch.optim.SGD if name == "lora_pro-full" else torch.optim.AdamW
    optimizer = kind(handle.parameters(), lr=0.01)
    handle.attach(optimizer, total_steps=STEPS)
    return optimizer


def fit(handle, optimizer, epochs: int) -> None:
    from sentence_transformers import InputExample, losses

    examples = [InputExample(texts=[a, b], label=y) for a, b, y in ROWS]
    rows = torch.utils.data.DataLoader(examples, batch_size=BATCH, shuffle=False)
    handle.model.old_fit(
        [(rows, losses.CosineSimilarityLoss(handle.model))],
        epochs=epochs,
        scheduler="constantlr",
        optimizer_class=lambda _: optimizer,
        optimizer_params={},
        max_grad_norm=0.5,
        show_progress_bar=False,
    )


def plain(name: str, folder) -> dict[str, torch.Tensor]:
    from sentence_transformers import losses

    handle = adapted(name, folder)
    optimizer, loss = driven(name, handle), losses.CosineSimilarityLoss(handle.model)
    handle.model.train()
    for _ in range(EPOCHS):
        for start in range(0, len(ROWS), BATCH):
            one, other, labels = zip(*ROWS[start : start + BATCH], strict=True)
            features = [handle.model.tokenize(list(texts)) for texts in (one, other)]
            loss(features, torch.tensor(labels)).backward()
            torch.nn.utils.clip_grad_norm_(handle.model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return {n: p.detach() for n, p in handle.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_sentence_transformers_gives_the_same_tensors(name, folder, tmp_path):
    expected = plain(name, folder)
    handle = adapted(name, folder)
    fit(handle, driven(name, handle), EPOCHS)
    found = {n: p.detach() for n, p in handle.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)

    handle = adapted(name, folder)
    optimizer = driven(name, handle)
    fit(handle, optimizer, 1)
    handle.save(tmp_path / "half.safetensors", resume=handle.controller is not None)
    state = copy.deepcopy(optimizer.state_dict())
    handle = toolkit.load(encoder(folder), tmp_path / "half.safetensors")
    optimizer = driven(name, handle)
    optimizer.load_state_dict(state)
    fit(handle, optimizer, EPOCHS - 1)
    found = {n: p.detach() for n, p in handle.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    if handle.controller is not None:
        assert handle.controller.step == STEPS
