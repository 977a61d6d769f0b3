"""SST-2 and CoLA with the two upper blocks of MiniLM: a test bed that fits on a laptop.

The four lower blocks stay frozen for every arm, full fine-tuning included, so their outputs are
computed once and training starts from there. That makes a step about three times cheaper.

With ``tiny`` the same code runs on generated sentences and a random encoder
(:mod:`toolkit.labs.beds.tiny_text`), for scale ``ci``.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.seeds import generator
from toolkit.core.train.fit import dress, optimise, set_rate
from toolkit.labs.beds import tiny_text

LOWER = 4
"""Blocks that stay frozen; MiniLM has six."""
HEAD_RATE = 1e-3
"""Learning rate of the classification head, the same for every arm."""
METRIC = {"sst2": "accuracy (%)", "cola": "Matthews correlation"}
TITLE = {"sst2": "SST-2", "cola": "CoLA"}
KINDS = ("query", "key", "value", "attention out", "up", "down")
"""The six linear layers of a block, in the order in which layers are adapted."""


class Sentences(NamedTuple):
    """``hidden``: a (length, width) tensor of token vectors per sentence; ``labels``: (n,)."""

    hidden: list[Tensor]
    labels: Tensor


class TextTask(NamedTuple):
    """A task by name, with its parts; ``tiny``: made of generated sentences."""

    name: str
    train: Sentences
    validation: Sentences
    test: Sentences
    tiny: bool = False


class UpperBlocks(nn.Module):
    """The blocks above the frozen ones: (batch, length, width) and a mask to the same shape."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``mask``: (batch, length), true on tokens."""
        allowed = mask[:, None, None, :]
        for block in self.blocks:
            out = block(hidden, attention_mask=allowed)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


@functools.lru_cache(maxsize=2)
def encoder(tiny: bool = False) -> tuple[Any, Any]:
    """MiniLM without its pooler, or the tiny random encoder, with its tokenizer; shared, so copy
    it before changing it."""
    return tiny_text.encoder() if tiny else nets.pretrained("minilm", pooler=False)


def tables(name: str, tiny: bool = False) -> dict[str, Any]:
    """A task's tables by split, with columns sentence and label; generated ones with ``tiny``.

    Raises:
        ValueError: unknown name.
    """
    if name not in TITLE:
        raise ValueError(f"name: must be one of {sorted(TITLE)}, got {name!r}")
    return tiny_text.tables() if tiny else data.load(name)


def upper_blocks(tiny: bool = False) -> UpperBlocks:
    """A fresh copy of the two upper blocks with their weights."""
    return UpperBlocks(copy.deepcopy(list(encoder(tiny)[0].encoder.layer[LOWER:])))


@functools.lru_cache(maxsize=8)
def text_task(
    name: str,
    *,
    train: int,
    validation: int,
    test: int,
    seed: int,
    max_length: int = 48,
    tiny: bool = False,
) -> TextTask:
    """Part of SST-2 or CoLA, with the outputs of the frozen blocks.

    Training sentences hold as many of each label. Validation sentences come from the training
    set, test sentences from SST-2's test set and CoLA's in-domain development set.

    Args:
        name: "sst2" or "cola".
        train, validation, test: sentences in each part, at most.
        seed: of the choice.
        max_length: tokens of a sentence that are kept.
        tiny: generated sentences (40 in all) and the random encoder instead.

    Raises:
        ValueError: unknown name.
        toolkit.core.data.DataError, PretrainedError: data or model are nowhere to be found.
    """
    found = tables(name, tiny)
    rest = found["train"].sample(frac=1, random_state=seed)
    held, rest = rest[:validation], rest[validation:]
    rest = rest.groupby("label").head(train // 2)
    last = found["test" if name == "sst2" else "dev"].sample(frac=1, random_state=seed)[:test]
    first, second, third = (below(part, max_length, tiny) for part in (rest, held, last))
    return TextTask(name, first, second, third, tiny)


def below(table: Any, max_length: int = 48, tiny: bool = False) -> Sentences:
    """What the frozen blocks make of a table of sentences and labels."""
    model, tokenizer = encoder(tiny)
    tokens = nets.encode(tokenizer, table.sentence, max_length=max_length)
    return Sentences(_lower(model, tokens), torch.tensor(table.label.tolist()))


@torch.no_grad()
def _lower(model: Any, tokens: list[list[int]]) -> list[Tensor]:
    found: list[Any] = [None] * len(tokens)
    for batch in nets.batches(tokens, batch_size=64):
        hidden = model.embeddings(input_ids=batch.input_ids)
        allowed = batch.attention_mask.bool()[:, None, None, :]
        for block in model.encoder.layer[:LOWER]:
            out = block(hidden, attention_mask=allowed)
            hidden = out[0] if isinstance(out, tuple) else out
        for place, row, length in zip(
            batch.index.tolist(), hidden, batch.attention_mask.sum(1).tolist(), strict=True
        ):
            found[place] = row[:length].clone()
    return found


def _padded(part: Sentences, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token vectors (batch, length, width), mask (batch, length) and labels (batch,)."""
    chosen = [part.hidden[i] for i in rows]
    hidden = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    lengths = torch.tensor([len(h) for h in chosen])
    mask = torch.arange(hidden.shape[1])[None, :] < lengths[:, None]
    return hidden, mask, part.labels[list(rows)]


def _groups(part: Sentences, size: int, draws: torch.Generator | None) -> list[list[int]]:
    """Batches of sentences of like length; in random order when there is a generator."""
    tokens = [range(len(h)) for h in part.hidden]
    return [b.index.tolist() for b in nets.batches(tokens, batch_size=size, generator=draws)]


def _scores(model: nn.Module, head: nn.Linear, hidden: Tensor, mask: Tensor) -> Tensor:
    out, weight = model(hidden, mask), mask[..., None].to(hidden.dtype)
    return head((out * weight).sum(1) / weight.sum(1))


@torch.no_grad()
def outputs(model: nn.Module, head: nn.Linear, part: Sentences) -> Tensor:
    """Scores of all sentences in their order, (n, 2), on the CPU."""
    model.eval()
    found = torch.empty(len(part.labels), head.out_features)
    device = head.weight.device
    for rows in _groups(part, 64, None):
        hidden, mask, _ = _padded(part, rows)
        found[rows] = _scores(model, head, hidden.to(device), mask.to(device)).cpu()
    return found


def judge(scores: Tensor, labels: Tensor, name: str) -> float:
    """Accuracy in percent for SST-2, Matthews correlation for CoLA, of scores (n, 2)."""
    said = scores.argmax(1)
    if name == "sst2":
        return 100 * float(np.mean(np.equal(said.tolist(), labels.tolist())))
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels.tolist(), said.tolist()))


def text_train(
    task: TextTask,
    method: Any,
    rate: float,
    seed: int,
    *,
    steps: int,
    batch: int = 16,
    sgd: bool = False,
    options: Mapping[str, Any] | None = None,
    parts: Sequence[str] = ("validation", "test"),
    device: torch.device | str = "cpu",
    head_rate: float = HEAD_RATE,
    blocks: bool = True,
    loss: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Adapt the two upper blocks to one task.

    Adam for the method's tensors (12 linear layers), Adam at :data:`HEAD_RATE` for the head. Both
    rates rise over the first tenth of the steps and then fall linearly to 0. No dropout.

    Args:
        task: from :func:`text_task`.
        method: a method, or None for full fine-tuning of the two blocks.
        rate: learning rate at its highest.
        seed: of head, method and order.
        steps: optimizer steps; ``batch``: sentences a step.
        sgd: plain gradient descent for the method's tensors instead of Adam.
        options: passed to ``adapted.attach``.
        parts: which parts to judge at the end.
        device: where to train.
        head_rate: learning rate of the head at its highest.
        blocks: False leaves the blocks as they are, so that the head trains alone.
        loss: add the mean log-loss in nats of each part as ``<part>_loss``.

    Returns:
        The model, the handle (None for full fine-tuning) and a record: a result per part,
        ``trained`` numbers at the end without the head, ``ranks`` where the controller tells them.

    Raises:
        ValueError: a method with ``blocks=False``.
    """
    if method is not None and not blocks:
        raise ValueError("method: give none with blocks=False, where the head trains alone")
    torch.set_num_threads(1)
    model = upper_blocks(task.tiny)
    targets = [f"blocks.{i}.*" for i in range(len(model.blocks))]
    adapted, parameters = dress(model, method, seed, None if method is None else targets)
    model.to(device).eval()
    draws, width = generator(seed, "head"), task.train.hidden[0].shape[1]
    head = nn.Linear(width, 2)
    nn.init.normal_(head.weight, std=0.02, generator=draws)
    nn.init.zeros_(head.bias)
    head.to(device)
    if not blocks:
        model.requires_grad_(False)
    optimizer = optimise(parameters, rate, sgd)
    beside = optimise(list(head.parameters()), head_rate)
    if adapted is not None:
        adapted.attach(optimizer, total_steps=steps, **(options or {}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()  # some methods act in training mode only
    order, step = generator(seed, "order"), 0
    while step < steps:
        for rows in _groups(task.train, batch, order)[: steps - step]:
            share = min((step + 1) / math.ceil(0.1 * steps), 1 - step / steps)
            set_rate(optimizer, rate * share)
            set_rate(beside, head_rate * share)
            hidden, mask, labels = (t.to(device) for t in _padded(task.train, rows))
            optimizer.zero_grad()
            beside.zero_grad()
            F.cross_entropy(_scores(model, head, hidden, mask), labels).backward()
            optimizer.step()
            beside.step()
            step += 1
    record: dict[str, Any] = {}
    for part in parts:
        scores, labels = outputs(model, head, getattr(task, part)), getattr(task, part).labels
        record[part] = judge(scores, labels, task.name)
        if loss:
            record[f"{part}_loss"] = F.cross_entropy(scores, labels).item()
    told = getattr(getattr(adapted, "controller", None), "ranks", None)
    if told:
        record["ranks"] = list(told().values())
    # asked anew, because some methods grow
    trained = parameters if adapted is None else adapted.parameters()
    record["trained"] = sum(p.numel() for p in trained if p.requires_grad)
    return model, adapted, record
