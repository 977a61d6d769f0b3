r"""Losses and encoders of search: one vector per text, or one score per pair of texts.

.. math:: \mathcal L_i = -\log\frac{e^{s(q_i, p_i)/\tau}}{\sum_p e^{s(q_i, p)/\tau}}
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pooled(hidden: Tensor, mask: Tensor, how: Literal["mean", "cls"] = "mean") -> Tensor:
    """One vector per text: the mean over its tokens, or its first token's.

    Args:
        hidden: (n, length, width).
        mask: (n, length), 1 or true on tokens.
        how: "mean" or "cls".

    Returns:
        (n, width).

    Raises:
        ValueError: a text without a token, which is named; shapes that do not belong together;
            another ``how``.
    """
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"mask: {tuple(mask.shape)} beside hidden {tuple(hidden.shape)}; give (n, length) "
            "beside (n, length, width)"
        )
    _some(mask)
    if how == "cls":
        return hidden[:, 0]
    if how != "mean":
        raise ValueError(f"how={how!r}: choose 'mean' or 'cls'")
    weight = mask.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1)


def _some(mask: Tensor) -> None:
    if not len(mask):
        raise ValueError("mask: there is no text; give one row or more")
    empty = (mask.sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"mask: text {empty[0]} has no token, so it has no vector; leave empty queries and "
            "documents out"
        )


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    relevant: Tensor | None = None,
    temperature: float = 1.0,
    in_batch: bool = True,
    shared: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The contrastive loss of a bi-encoder.

    Args:
        queries: (n, width).
        positives: (n, width), the right document of each query.
        negatives: (n, k, width), wrong documents of each query, if any.
        relevant: (n, n), bool; true where the positive of query j answers query i as well. Those
            are left out of the sum, as they are no negatives. The diagonal does not matter.
        temperature: what inner products are divided by, above 0.
        in_batch: other queries' positives are negatives.
        shared: negatives of all queries count for each.
        reduction: the mean, or (n,).

    Returns:
        Nats: a number, or (n,).

    Raises:
        ValueError: no query; shapes that do not belong together; a temperature that is not above 0.
    """
    n = len(queries)
    if n == 0:
        raise ValueError("queries: there is none; give one or more")
    if positives.shape != queries.shape or queries.dim() != 2:
        raise ValueError(
            f"positives: {tuple(positives.shape)} beside queries {tuple(queries.shape)}; give one "
            "document for each query, both (n, width)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    own = (queries * positives).sum(1, keepdim=True)
    parts = [own]
    if in_batch:
        out = torch.eye(n, dtype=torch.bool, device=queries.device)
        if relevant is not None:
            if relevant.shape != (n, n):
                raise ValueError(f"relevant: {tuple(relevant.shape)}, must be ({n}, {n})")
            out = out | relevant.bool()
        parts.append((queries @ positives.T).masked_fill(out, -torch.inf))
    if negatives is not None:
        if negatives.dim() != 3 or negatives.shape[::2] != queries.shape:
            raise ValueError(
                f"negatives: {tuple(negatives.shape)} beside queries {tuple(queries.shape)}; give "
                "(n, k, width)"
            )
        parts.append(
            queries @ negatives.flatten(0, 1).T
            if shared
            else torch.einsum("nd,nkd->nk", queries, negatives)
        )
    return rerank_loss(torch.cat(parts, 1) / temperature, reduction=reduction)


def rerank_loss(
    scores: Tensor, positive: Tensor | int = 0, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Softmax over the candidates of each query.

    Args:
        scores: (n, candidates).
        positive: place of the right one, for all queries or (n,).
        reduction: the mean, or (n,).

    Returns:
        Nats: a number, or (n,).

    Raises:
        ValueError: no query or no candidate; a place that there is not.
    """
    if scores.dim() != 2 or 0 in scores.shape:
        raise ValueError(
            f"scores: {tuple(scores.shape)}; give (n, candidates), one query and one candidate or "
            "more"
        )
    place = torch.as_tensor(positive, device=scores.device).expand(len(scores))
    if place.min() < 0 or place.max() >= scores.shape[1]:
        raise ValueError(f"positive={positive}: there are {scores.shape[1]} candidates, from 0 on")
    return F.cross_entropy(scores, place, reduction=reduction)


def tokens_of(output: Any) -> Tensor:
    """Token vectors of an encoder's output: a tensor, or an object with ``last_hidden_state``."""
    found = getattr(output, "last_hidden_state", output)
    return found[0] if isinstance(found, tuple) else found


class BiEncoder(nn.Module):
    """A text encoder and one vector per text; queries and documents share it.

    Args:
        encoder: called with ``input_ids`` and ``attention_mask``, as those of transformers.
        how: "mean" or "cls".
        unit: scale vectors to length 1.
    """

    def __init__(self, encoder: nn.Module, how: Literal["mean", "cls"] = "mean", unit: bool = True):
        super().__init__()
        self.encoder, self.how, self.unit = encoder, how, unit

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens and mask, both (n, length), to vectors (n, width)."""
        _some(attention_mask)
        hidden = tokens_of(self.encoder(input_ids=input_ids, attention_mask=attention_mask))
        vectors = pooled(hidden, attention_mask, self.how)
        return F.normalize(vectors, dim=1) if self.unit else vectors


class CrossEncoder(nn.Module):
    """A text encoder that reads query and document together, and ``head``, linear on the first
    token.

    Args:
        encoder: as for :class:`BiEncoder`.
        width: of its token vectors.
        generator: draws the head, normal with deviation 0.02; its bias starts at 0.
    """

    def __init__(
        self, encoder: nn.Module, width: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Tensor:
        """Pairs (n, candidates, length) to scores (n, candidates); ``more``: to the encoder.

        Raises:
            ValueError: a query without candidates, or a pair without a token.
        """
        if input_ids.dim() != 3 or 0 in input_ids.shape[:2]:
            raise ValueError(
                f"input_ids: {tuple(input_ids.shape)}; give (n, candidates, length), one candidate "
                "or more for each query"
            )
        n, candidates = input_ids.shape[:2]
        mask = attention_mask.flatten(0, 1)
        _some(mask)
        more = {name: value.flatten(0, 1) for name, value in more.items()}
        out = self.encoder(input_ids=input_ids.flatten(0, 1), attention_mask=mask, **more)
        return self.head(pooled(tokens_of(out), mask, "cls")).view(n, candidates)
