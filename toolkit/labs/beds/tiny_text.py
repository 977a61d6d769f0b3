"""Sentences and an encoder small enough for a quick test: nothing is downloaded.

They take the places of SST-2, CoLA, Cranfield and MiniLM at scale ``ci``, so that the code of the
text experiments runs there as it does at ``cpu``. Their numbers mean nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.core.data.datasets import Retrieval
from toolkit.core.seeds import generator

NOTE = (
    "Scale ci: generated sentences and a random encoder of a few thousand numbers stand in for the "
    "texts and for MiniLM. The numbers mean nothing."
)
WIDTH, DEPTH, HEADS, HIDDEN, LONGEST = 16, 6, 2, 24, 64
NOUNS = ("film", "story", "cast", "music", "ending", "plot", "scene", "script")
PRAISE = ("good", "great", "warm", "sharp", "funny")
BLAME = ("bad", "dull", "flat", "cold", "weak")
TOPICS = (
    "wing", "shock", "heat", "jet", "plate", "cone", "flutter", "wake", "nozzle", "shell",
)  # fmt: skip


def tables() -> dict[str, Any]:
    """40 generated sentences in the form of SST-2 and CoLA: 28 ``train``, 12 ``dev`` and the same
    12 as ``test``, with columns sentence and label (1 for praise), half of them praise."""
    import pandas as pd

    draws, rows = generator(0, "tiny sentences"), []

    def pick(words: Sequence[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=draws))]

    for place in range(40):
        label = place % 2
        says, more = pick(PRAISE if label else BLAME), pick(NOUNS)
        tail = f" and the {more} too" if place % 3 else ""
        rows.append((f"the {pick(NOUNS)} is {says}{tail}", label))
    table = pd.DataFrame(rows, columns=["sentence", "label"])
    return {"train": table[:28], "dev": table[28:], "test": table[28:]}


def collection(documents: int = 12, words: int = 150) -> Retrieval:
    """A generated retrieval collection in the form of Cranfield: ten topics, each with a query and
    ``documents`` abstracts of ``words`` words that name the topic often."""
    import pandas as pd

    draws, texts, judged = generator(0, "tiny abstracts"), [], []
    filler = ("the", "flow", "of", "a", "at", "past", "is", "measured", "speed", "pressure")
    for query, topic in enumerate(TOPICS, start=1):
        for _ in range(documents):
            chosen = torch.randint(len(filler) + 4, (words,), generator=draws).tolist()
            texts.append(" ".join(filler[i] if i < len(filler) else topic for i in chosen))
            judged.append((query, len(texts), 1))
    ids = range(1, len(texts) + 1)
    return Retrieval(
        pd.DataFrame({"id": ids, "title": "", "author": "", "source": "", "text": texts}),
        pd.DataFrame({"id": range(1, 11), "text": [f"what is known of the {t}" for t in TOPICS]}),
        pd.DataFrame(judged, columns=["query", "document", "grade"]),
        "generated, no real abstracts",
    )


class WordTokenizer:
    """Numbers words by a list of its own; 0 pads, 1 starts, 2 ends, 3 is any other word."""

    pad_token_id = 0

    def __init__(self, words: Sequence[str]) -> None:
        self.numbers = {word: 4 + place for place, word in enumerate(dict.fromkeys(words))}
        self.size = 4 + len(self.numbers)

    def __call__(
        self, sentences: Sequence[str], truncation: bool = True, max_length: int = LONGEST
    ) -> dict[str, list[list[int]]]:
        """Word numbers of each sentence between start and end, cut to ``max_length``."""
        kept = max_length - 2 if truncation else None
        found = [[self.numbers.get(w, 3) for w in s.split()][:kept] for s in sentences]
        return {"input_ids": [[1, *numbers, 2] for numbers in found]}


class _Self(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            layer(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(-2)


class _Output(nn.Module):
    def __init__(self, inside: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inside, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, stream: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden) + stream)


class BertOutput(_Output):
    """The end of a block, which takes what the MLP widened and the stream, as in transformers."""


class Layer(nn.Module):
    """A post-LN block whose parts are named, ordered and called as those of BERT in transformers.

    ``attention_mask`` is true on tokens, or added to the scores, (batch, 1, 1, length).
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": _Self(), "output": _Output(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, HIDDEN)})
        self.output = BertOutput(HIDDEN)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(batch, length, width) to the same shape."""
        mixed = self.attention.self(hidden, attention_mask)
        hidden = self.attention.output(mixed, hidden)
        return self.output(F.gelu(self.intermediate.dense(hidden)), hidden)


class _Embeddings(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, WIDTH)
        self.position_embeddings = nn.Embedding(LONGEST, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(input_ids) + places)


class Encoder(nn.Module):
    """Random weights in the form of MiniLM's encoder: ``embeddings`` and ``encoder.layer``."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.embeddings = _Embeddings(words)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(DEPTH))})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """An object with ``last_hidden_state`` and, on request, ``hidden_states``."""
        hidden = self.embeddings(input_ids)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        states = [hidden]
        for layer in self.encoder.layer:
            states.append(layer(states[-1], attention_mask=mask))
        kept = tuple(states) if output_hidden_states else None
        return SimpleNamespace(last_hidden_state=states[-1], hidden_states=kept)


@functools.lru_cache(maxsize=1)
def encoder() -> tuple[Encoder, WordTokenizer]:
    """The random encoder in evaluation mode, and its tokenizer. Copy it before changing it."""
    words = " ".join([*tables()["train"].sentence, *tables()["dev"].sentence])
    found = collection()
    words += " " + " ".join([*found.documents.text, *found.queries.text])
    tokenizer = WordTokenizer(words.split())
    with torch.device("meta"):
        model = Encoder(tokenizer.size)
    model.to_empty(device="cpu")
    draws = generator(0, "tiny encoder")
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, nn.Linear | nn.Embedding):
            # wide enough that what a sentence says is not lost in six blocks
            nn.init.normal_(part.weight, std=WIDTH**-0.5, generator=draws)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
    return model.eval(), tokenizer
