"""Text into padded batches, and a classifier on top of a text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_POOL = 32  # batches that are sorted by length together; larger pads less and mixes less


class Batch(NamedTuple):
    """One padded batch of sentences.

    `input_ids`, `attention_mask`: (batch, length) int64, mask 1 on tokens and 0 on padding.
    `labels`: (batch,) int64, or None. `index`: (batch,) places in the list of sentences.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    index: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(None if item is None else item.to(device) for item in self))


class TextClassifier(nn.Module):
    """A text encoder, the mean over its token vectors, and a linear layer named `head`.

    Args:
        encoder: called with input_ids and attention_mask; returns a tensor (batch, length,
            width) or an object with that tensor as `last_hidden_state`.
        classes: number of scores.
        width: width of the token vectors; left out, `encoder.config.hidden_size`.
        generator: draws the head, normal with standard deviation 0.02; its bias starts at 0.

    Raises:
        ValueError: no width is given and the encoder does not tell it; classes below 1.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: int,
        width: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes: must be at least 1, got {classes}")
        if width is None:
            width = getattr(getattr(encoder, "config", None), "hidden_size", None)
        if width is None:
            raise ValueError("width: the encoder has no config.hidden_size, so name its width")
        self.encoder = encoder
        head = nn.Linear(width, classes, device="meta").to_empty(device="cpu")
        nn.init.normal_(head.weight, std=0.02, generator=generator)
        nn.init.zeros_(head.bias)
        like = next(encoder.parameters(), head.weight)
        self.head = head.to(device=like.device, dtype=like.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token numbers and mask, both (batch, length), to scores (batch, classes)."""
        return self.head(self.embed(input_ids, attention_mask))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One vector (batch, width) per sentence: the mean over its tokens without padding."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        tokens = getattr(output, "last_hidden_state", output)
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)


def encode(tokenizer: Any, sentences: Iterable[str], max_length: int = 128) -> list[list[int]]:
    """Token numbers of each sentence, cut to `max_length` tokens and not padded.

    Raises:
        ValueError: no sentence, or max_length below 1.
    """
    sentences = list(sentences)
    if not sentences:
        raise ValueError("sentences: there is none")
    if max_length < 1:
        raise ValueError(f"max_length: must be at least 1 token, got {max_length}")
    return tokenizer(sentences, truncation=True, max_length=max_length)["input_ids"]


def batches(
    tokens: Sequence[Sequence[int]],
    labels: Sequence[int] | None = None,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    pad: int = 0,
) -> list[Batch]:
    """Batches of sentences of like length, each padded to its own longest.

    With a generator: shuffled, then sorted by length within pools of 32 batches, and the
    batches shuffled again; every sentence comes once. Without one: all sorted by length,
    the same at every call, which is right for evaluation.

    Args:
        tokens: token numbers of each sentence, as `encode` gives them.
        labels: one whole number per sentence, if there are any.
        batch_size: sentences per batch; one batch may be smaller.
        generator: a CPU generator.
        pad: the number that fills up short sentences.

    Raises:
        ValueError: batch_size below 1, or labels and sentences differ in number.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    if labels is not None and len(labels) != len(tokens):
        raise ValueError(f"labels: {len(labels)} for {len(tokens)} sentences")
    count = len(tokens)
    order = list(range(count))
    pool = max(count, 1)
    if generator is not None:
        order = torch.randperm(count, generator=generator).tolist()
        pool = batch_size * _POOL
    groups = []
    for start in range(0, count, pool):
        ranked = sorted(order[start : start + pool], key=lambda place: len(tokens[place]))
        groups += [ranked[at : at + batch_size] for at in range(0, len(ranked), batch_size)]
    if generator is not None:
        groups = [groups[at] for at in torch.randperm(len(groups), generator=generator).tolist()]
    known = None if labels is None else torch.as_tensor(list(labels), dtype=torch.int64)
    made = []
    for group in groups:
        length = max(len(tokens[place]) for place in group)
        ids = torch.full((len(group), length), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(group):
            ids[row, : len(tokens[place])] = torch.as_tensor(tokens[place])
            mask[row, : len(tokens[place])] = 1
        index = torch.tensor(group)
        made.append(Batch(ids, mask, None if known is None else known[index], index))
    return made


def encode_batches(
    tokenizer: Any,
    sentences: Iterable[str],
    labels: Sequence[int] | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    generator: torch.Generator | None = None,
) -> list[Batch]:
    """`encode`, then `batches` with the tokenizer's padding. For several epochs, encode once
    and call `batches` for each.

    Raises:
        ValueError: see `encode` and `batches`.
    """
    tokens = encode(tokenizer, sentences, max_length)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return batches(tokens, labels, batch_size, generator, pad)
