"""A made language in which word and query never meet: every concept has four words.

Topics hold concepts. A document takes four concepts of one or two topics and names each twice by
the first two of its words; a query asks for three concepts of one document by the other two words.
So a search by words finds nothing. The base has read texts of the one kind of words and of the
other, few that mix them: which words mean the same is for tuning to learn.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import set_rate

TOPICS, CONCEPTS, WORDS = 8, 8, 4
ABOUT, ASKED = 4, 3
"""Concepts of a document, and of a query."""
LENGTH = 8
"""Words of a document, and of a query."""
MASK = TOPICS * CONCEPTS * WORDS
"""The number of the word that hides another."""
MIXED = 0.1
"""Share of the texts that the base has read in all words."""
RATE = 4e-3
"""Of reading, at its highest."""


@dataclass(frozen=True)
class Size:
    """The encoder: width, blocks, heads; steps of its training, texts a step. Pairs a step of
    tuning, steps; queries and documents held out."""

    width: int
    depth: int
    heads: int
    reading: int
    texts: int
    batch: int
    steps: int
    held: int


SIZES = {
    "ci": Size(16, 4, 2, 4, 8, 8, 6, 40),
    "cpu": Size(32, 4, 4, 500, 48, 32, 40, 1000),
}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES["ci" if scale == "ci" else "cpu"]


class Pairs(NamedTuple):
    """``queries`` and ``documents`` (n, length): numbers of words. ``relevant`` (n, n):
    document j holds all that query i asks for. ``shared`` (n, n): how many of these concepts."""

    queries: Tensor
    documents: Tensor
    relevant: Tensor
    shared: Tensor


def concepts(n: int, draws: torch.Generator) -> Tensor:
    """What n documents are about, (n, about): concepts of two topics, or of one."""
    topics = torch.rand(n, TOPICS, generator=draws).topk(2, dim=1).indices
    both = torch.rand(n, 1, generator=draws) < 0.5
    weight = torch.zeros(n, TOPICS).scatter(1, topics[:, :1], 1.0)
    weight = weight.scatter(1, topics[:, 1:], both.float())
    return torch.multinomial(weight.repeat_interleave(CONCEPTS, 1), ABOUT, generator=draws)


def written(about: Tensor, low: int, high: int, draws: torch.Generator) -> Tensor:
    """Texts (n, length) about concepts (n, about), each word one of those from low to high."""
    n = len(about)
    twice = about.repeat(1, math.ceil(LENGTH / about.shape[1]))[:, :LENGTH]
    order = torch.rand(n, LENGTH, generator=draws).argsort(1)
    word = torch.randint(low, high, (n, LENGTH), generator=draws)
    return twice.gather(1, order) * WORDS + word


def read(n: int, draws: torch.Generator) -> Tensor:
    """Texts that the base reads (n, length): a share of :data:`MIXED` in all four words, the others
    half in the words of documents, half in those of queries."""
    about = concepts(n, draws)
    mixed = round(MIXED * n)
    ends = mixed, (mixed + n) // 2
    return torch.cat([
        written(about[: ends[0]], 0, WORDS, draws),
        written(about[ends[0] : ends[1]], 0, 2, draws),
        written(about[ends[1] :], 2, WORDS, draws),
    ])  # fmt: skip


def pairs(n: int, draws: torch.Generator) -> Pairs:
    """Queries, each with the document that it was made from."""
    about = concepts(n, draws)
    documents = written(about, 0, 2, draws)
    asked = about.gather(1, torch.rand(n, ABOUT, generator=draws).topk(ASKED, dim=1).indices)
    queries = written(asked, 2, 4, draws)
    holds = torch.zeros(n, TOPICS * CONCEPTS).scatter(1, about, 1.0)
    wants = torch.zeros_like(holds).scatter(1, asked, 1.0)
    shared = wants @ holds.T
    return Pairs(queries, documents, shared == ASKED, shared)


class Attention(nn.Module):
    """Self-attention without its output layer, as BERT keeps it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(-2)


class Output(nn.Module):
    """The end of a sub-layer: add the stream, then normalise."""

    def __init__(self, inside: int, width: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(inside, width), nn.LayerNorm(width)

    def forward(self, hidden: Tensor, input_tensor: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + input_tensor)


class Block(nn.Module):
    """A post-LN block whose parts stand as in BERT."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": Attention(width, heads), "output": Output(width, width)}
        )
        self.up = nn.Linear(width, 2 * width)
        self.output = Output(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, length, width) to the same shape."""
        x = self.attention["output"](self.attention["self"](x), x)
        return self.output(F.gelu(self.up(x)), x)


class Encoder(nn.Module):
    """Numbers of words (n, length) to token vectors; no positions, as order says nothing here."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.words, self.norm = nn.Embedding(MASK + 1, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.words(words))
        for block in self.blocks:
            x = block(x)
        return x

    def vectors(self, words: Tensor) -> Tensor:
        """Mean token vectors of length 1, (n, width)."""
        return F.normalize(self(words).mean(1), dim=1)


def fresh(scale: str, depth: int, seed: int = 0) -> Encoder:
    """An encoder with random weights."""
    this, draws = size(scale), generator(seed, "encoder")
    with torch.random.fork_rng(devices=[]):  # the layers' own start, all drawn anew below
        model = Encoder(this.width, depth, this.heads)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.5 if name.startswith("words") else parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=draws)
        elif not name.endswith("norm.weight"):
            nn.init.zeros_(parameter)
    return model


@functools.lru_cache(maxsize=2)
def base(scale: str) -> Encoder:
    """The encoder that has learned to guess hidden words of texts in all four words.

    Copy it before changing it.
    """
    this, draws = size(scale), generator(0, "reading")
    model = fresh(scale, this.depth)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    for step in range(this.reading):
        warm = min(1.0, (step + 1) / (0.1 * this.reading))
        set_rate(optimizer, RATE * warm * rates.cosine(step, this.reading))
        texts = read(this.texts, draws)
        hidden = torch.rand(texts.shape, generator=draws) < 0.25
        hidden[:, 0] = True
        states = model(texts.masked_fill(hidden, MASK))
        scores = states[hidden] @ model.words.weight[:MASK].T / math.sqrt(this.width)
        optimizer.zero_grad()
        F.cross_entropy(scores, texts[hidden]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
