"""Cranfield with the three upper blocks of MiniLM on the query side: all 225 queries, cross-fit.

Abstracts are encoded once by the base and stay. A run deals the queries into two halves; each is
judged by what was tuned on the other, so that every relevant pair of query and abstract counts
once. With ``ci`` the generated collection and the random encoder of the beds stand in.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.adapt.put import adapt
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import optimise, set_rate
from toolkit.insert.connected_peft_ir.measures import measured
from toolkit.labs.beds import expert_sentences as experts
from toolkit.labs.beds import sentences, tiny_text
from toolkit.labs.beds.arms import warm
from toolkit.labs.insert.search import made

STEPS, BATCH = {"ci": 2, "cpu": 12}, {"ci": 4, "cpu": 8}
TOKENS = {"ci": 24, "cpu": 48}
"""Tokens that are kept of an abstract; of a query half as many."""
SMALL = {"ci": (2, 4, 5), "cpu": (8, 16, 17)}
"""Hidden units inside and aside, and the rank of LoRA at as many numbers."""


class Collection(NamedTuple):
    """``documents`` (n, width), each of length 1; ``queries``: token vectors below the upper
    blocks; ``relevant`` (queries, documents); ``texts``: words of documents and queries."""

    documents: Tensor
    queries: list[Tensor]
    relevant: Tensor
    texts: tuple[list[str], list[str]]


@torch.no_grad()
def below(texts: list[str], scale: str, longest: int) -> list[Tensor]:
    """What the embeddings and the lower blocks make of texts, each (length, width)."""
    model, tokenizer = sentences.encoder(scale == "ci")
    tokens = nets.encode(tokenizer, texts, max_length=longest)
    found: list[Any] = [None] * len(tokens)
    for batch in nets.batches(tokens, batch_size=64):
        hidden = model.embeddings(input_ids=batch.input_ids)
        allowed = batch.attention_mask.bool()[:, None, None, :]
        for block in model.encoder.layer[: experts.LOWER]:
            out = block(hidden, attention_mask=allowed)
            hidden = out[0] if isinstance(out, tuple) else out
        lengths = batch.attention_mask.sum(1).tolist()
        for i, row, length in zip(batch.index.tolist(), hidden, lengths, strict=True):
            found[i] = row[:length].clone()
    return found


@functools.lru_cache(maxsize=2)
def collection(scale: str) -> Collection:
    """Abstracts and queries, and which abstracts answer: those of a grade above 0."""
    found = tiny_text.collection() if scale == "ci" else data.load("cranfield")
    rows = {one: i for i, one in enumerate(found.queries.id)}
    columns = {one: i for i, one in enumerate(found.documents.id)}
    relevant = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for judged in found.judgements.itertuples():
        if judged.grade > 0:
            relevant[rows[judged.query], columns[judged.document]] = True
    texts = [*(found.documents.title + ". " + found.documents.text)]
    blocks = experts.network(scale).eval()
    made_of = experts.embedded(blocks, below(texts, scale, TOKENS[_size(scale)]))
    queries = [*found.queries.text]
    return Collection(
        F.normalize(made_of, dim=1), below(queries, scale, TOKENS[_size(scale)] // 2), relevant,
        (texts, queries),
    )  # fmt: skip


def _size(scale: str) -> str:
    return "ci" if scale == "ci" else "cpu"


class LinearMap(nn.Module):
    """q + Wq on the base's own vectors of queries, W = 0 at the start."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors + vectors @ self.weight.T


def dressed(arm: str, scale: str, seed: int) -> tuple[nn.Module, list[Tensor]]:
    """The upper blocks with an arm's modules, and what trains."""
    blocks = experts.network(scale).eval()
    if arm == "full":
        return blocks, list(blocks.parameters())
    blocks.requires_grad_(False)
    if arm == "nothing":
        return blocks, []
    inside, rank, lora = SMALL[_size(scale)]
    targets = ["*.query", "*.value"] if arm == "lora" else None
    put = made.method(arm, inside, rank, lora)
    adapted = adapt(blocks, put, targets, generator=generator(seed, "modules"))
    return blocks, adapted.parameters()


def scored(vectors: Tensor, found: Collection) -> Tensor:
    """Cosines of queries and all abstracts, times the sharpness."""
    return experts.SHARP * F.normalize(vectors, dim=1) @ found.documents.T


def tuned(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """Tune on each half of the queries and judge the other.

    Args:
        arm: as in :func:`made.method`, or "full", "nothing", "map", "bm25" (which ranks by words
            and has no loss).
        rate: of Adam at its highest.
        seed: of the halves, the batches and the modules.
        scale: "ci" or "cpu".
        part: "validation" tunes on a third of the queries and judges a second one; "test" as above.

    Returns:
        ``loss``: the mean over all relevant pairs in nats; ``ndcg`` and ``map`` in per cent, means
        over queries; ``pairs``; ``trained``.
    """
    found = collection(scale)
    count = len(found.queries)
    order = torch.randperm(count, generator=generator(seed, "halves")).tolist()
    if part == "validation":
        folds = [(order[: count // 3], order[count // 3 : 2 * count // 3])]
    else:
        one, two = order[: count // 2], order[count // 2 :]
        folds = [(one, two), (two, one)]
    scores = torch.zeros(count, found.relevant.shape[1])
    trained, judged = 0, []
    for number, (learn, test) in enumerate(folds):
        judged += test
        if arm == "bm25":
            scores[test] = by_words(scale)[test]
        else:
            vectors, trained = _fold(arm, rate, seed, scale, number, learn, test)
            scores[test] = scored(vectors, found)
    scores, relevant = scores[judged], found.relevant[judged]
    record = {"trained": trained, "pairs": int(relevant.sum())} | rankings(scores, relevant)
    if arm != "bm25":
        record["loss"] = -torch.log_softmax(scores, 1)[relevant].double().mean().item()
    return record


def _fold(
    arm: str, rate: float, seed: int, scale: str, number: int, learn: list[int], test: list[int]
) -> tuple[Tensor, int]:
    """Vectors of the queries to be judged, and how many numbers were trained."""
    found, steps = collection(scale), STEPS[_size(scale)]
    blocks, parameters = dressed("nothing" if arm == "map" else arm, scale, seed)
    model: nn.Module = blocks
    plain = None
    if arm == "map":
        plain = experts.embedded(blocks, found.queries)
        model = LinearMap(plain.shape[1])
        parameters = list(model.parameters())

    def vectors(rows: list[int]) -> Tensor:
        if plain is not None:
            return model(plain[rows])
        return experts.pooled(blocks, [found.queries[i] for i in rows])

    if parameters:
        optimizer, draws = optimise(parameters, rate), generator(seed, "batches", number)
        for step in range(steps):
            pick = torch.randint(len(learn), (BATCH[_size(scale)],), generator=draws).tolist()
            rows = [learn[i] for i in pick]
            set_rate(optimizer, rate * warm(step, steps) * rates.cosine(step, steps))
            optimizer.zero_grad()
            logs = -torch.log_softmax(scored(vectors(rows), found), 1)
            wanted = found.relevant[rows]
            loss = ((logs * wanted).sum(1) / wanted.sum(1)).mean()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss {loss.item()} at step {step}")
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return vectors(test), sum(p.numel() for p in parameters)


def rankings(scores: Tensor, relevant: Tensor) -> dict[str, float]:
    """Mean nDCG@10 and average precision over queries in per cent."""
    found = measured(scores, relevant)
    return {name: 100 * found[name].mean().item() for name in ("ndcg", "map")}


@functools.lru_cache(maxsize=2)
def by_words(scale: str) -> Tensor:
    """BM25 scores of all documents for all queries, whole texts, (queries, documents)."""
    import bm25s

    documents, queries = collection(scale).texts
    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents, stopwords="en", show_progress=False), show_progress=False)
    asked = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)
    return torch.stack([torch.as_tensor(index.get_scores(words)) for words in asked])
