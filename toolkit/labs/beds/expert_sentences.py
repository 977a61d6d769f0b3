"""Experts of one sentence encoder: film reviews, questions, abstracts that answer a query.

The third bed beside those of :mod:`toolkit.labs.beds.experts`. MiniLM's three upper blocks are
tuned on each task, whole; the three lower ones are frozen, so that what they make of a text is
computed once. A task's own head, linear on the mean over tokens, is trained with its expert and
stays apart: merged blocks are judged under each task's own. Retrieval has none. There the query
alone goes through the tuned blocks; Cranfield's abstracts are encoded once by the base.

Is a review praise (SST-2)? Is a sentence of Shakespeare, without its mark, a question? Which of
1,400 abstracts answer a query (Cranfield)? Scores are losses in nats, less is better: of the label,
or the mean over relevant abstracts. So that tasks count alike, each is given as a share of what an
expert gained there in one run of a seed that no report uses (100).
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import optimise, set_rate
from toolkit.labs.beds import arms, experts, tiny_text
from toolkit.labs.beds import sentences as text_beds

TASKS = ("reviews", "questions", "retrieval")
LOWER = 3
"""Blocks that stay frozen; MiniLM has six."""
HEAD_RATE = 1e-2
"""Learning rate of the heads at its highest."""
SHARP = 20.0
"""What cosines of query and abstract are multiplied by before the softmax."""
UNITS = {"reviews": 0.10, "questions": 0.29, "retrieval": 0.42}
"""Nats that an expert gained on its task in one run of seed 990."""


@dataclass(frozen=True)
class Size:
    """Steps of one expert and texts a step; tokens kept of a text and of an abstract; how many
    texts train, validate and test a task, and how many queries."""

    steps: int
    batch: int
    longest: int
    abstract: int
    texts: tuple[int, int, int]
    queries: tuple[int, int, int]


SIZES = {
    "ci": Size(6, 4, 12, 24, (16, 6, 8), (4, 3, 3)),
    "cpu": Size(60, 16, 32, 48, (800, 48, 600), (115, 30, 80)),
}
"""SST-2's test set is taken whole."""


class Texts(NamedTuple):
    """``hidden``: what the frozen blocks make of each text, (length, width). ``labels``: (n,), or
    of queries which abstracts are relevant (n, abstracts), bool."""

    hidden: list[Tensor]
    labels: Tensor

    def at(self, rows: Sequence[int]) -> Texts:
        """Some of the texts."""
        return Texts([self.hidden[i] for i in rows], self.labels[list(rows)])


class Task(NamedTuple):
    """A seed's texts of one task."""

    name: str
    train: Texts
    validation: Texts
    test: Texts


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``.

    Raises:
        ValueError: an unknown scale.
    """
    return SIZES[arms.sizes_of(scale)]


def network(scale: str = "cpu") -> text_beds.UpperBlocks:
    """A fresh copy of the three upper blocks."""
    blocks = text_beds.encoder(scale == "ci")[0].encoder.layer[LOWER:]
    return text_beds.UpperBlocks(copy.deepcopy(list(blocks))).requires_grad_(True)


@functools.lru_cache(maxsize=2)
def _lower(scale: str) -> Any:
    """The encoder up to its third block."""
    model = copy.deepcopy(text_beds.encoder(scale == "ci")[0])
    model.encoder.layer = nn.ModuleList(list(model.encoder.layer)[:LOWER])
    return model


@torch.no_grad()
def _below(texts: Sequence[str], scale: str, longest: int) -> list[Tensor]:
    """What the frozen blocks make of texts, each (length, width)."""
    tokens = nets.encode(text_beds.encoder(scale == "ci")[1], texts, max_length=longest)
    found: list[Any] = [None] * len(tokens)
    for batch in nets.batches(tokens, batch_size=64):
        made = _lower(scale)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        lengths = batch.attention_mask.sum(1).tolist()
        for i, row, length in zip(
            batch.index.tolist(), made.last_hidden_state, lengths, strict=True
        ):
            found[i] = row[:length].clone()
    return found


def pooled(blocks: nn.Module, hidden: Sequence[Tensor]) -> Tensor:
    """The mean over the tokens of each text after the upper blocks (n, width)."""
    padded = nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)
    lengths = torch.tensor([len(one) for one in hidden])
    mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
    weight = mask[..., None].to(padded.dtype)
    return (blocks(padded, mask) * weight).sum(1) / weight.sum(1)


@torch.no_grad()
def embedded(blocks: nn.Module, hidden: Sequence[Tensor]) -> Tensor:
    """As :func:`pooled`, without gradients, batches of texts of like length at a time."""
    order = sorted(range(len(hidden)), key=lambda i: len(hidden[i]))
    made = [
        pooled(blocks, [hidden[i] for i in order[at : at + 64]]) for at in range(0, len(order), 64)
    ]
    found = torch.cat(made)
    return found[torch.tensor(order).argsort()]


def asked(text: str) -> list[tuple[str, int]]:
    """Sentences of Shakespeare and whether each is a question, in the order of the plays.

    In lower case and without the mark at their end; of 4 to 20 words, each sentence once.
    """
    found: dict[str, int] = {}
    for speech in re.split(r"\n\s*\n", text):
        said = " ".join(speech.strip().split("\n")[1:]).lower()
        for sentence, mark in re.findall(r"([^.!?:;]+)([.!?:;])", said):
            words = sentence.split()
            if mark in ".?" and 4 <= len(words) <= 20:
                found.setdefault(" ".join(words), int(mark == "?"))
    return list(found.items())


def list_loss(queries: Tensor, documents: Tensor, relevant: Tensor) -> Tensor:
    """Mean over relevant documents of their log-loss in nats, by query (n,).

    Args:
        queries: (n, width).
        documents: (documents, width), each of length 1.
        relevant: (n, documents), bool, at least one in each row.
    """
    losses = -torch.log_softmax(SHARP * F.normalize(queries, dim=1) @ documents.T, dim=1)
    return (losses * relevant).sum(1) / relevant.sum(1)


@torch.no_grad()
def ndcg(queries: Tensor, documents: Tensor, relevant: Tensor, most: int = 10) -> Tensor:
    """nDCG@10 by query (n,), in [0, 1]; every relevant document counts the same."""
    order = (F.normalize(queries, dim=1) @ documents.T).topk(most, dim=1).indices
    worth = 1 / torch.log2(torch.arange(most) + 2.0)
    ideal = worth.cumsum(0)[relevant.sum(1).clamp(max=most) - 1]
    return (relevant.gather(1, order) * worth).sum(1) / ideal


@functools.lru_cache(maxsize=2)
def _documents(scale: str) -> Tensor:
    """The abstracts as the base encodes them (documents, width), each of length 1."""
    found = _collection(scale).documents
    texts = found.title + ". " + found.text
    below = _below(texts, scale, size(scale).abstract)
    return F.normalize(embedded(network(scale), below), dim=1)


def _collection(scale: str) -> Any:
    return tiny_text.collection() if scale == "ci" else data.load("cranfield")


@functools.lru_cache(maxsize=2)
def _queries(scale: str) -> Texts:
    """All queries and which abstracts are relevant: those of a grade above 0."""
    found = _collection(scale)
    rows = {one: i for i, one in enumerate(found.queries.id)}
    columns = {one: i for i, one in enumerate(found.documents.id)}
    relevant = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for judged in found.judgements.itertuples():
        if judged.grade > 0:
            relevant[rows[judged.query], columns[judged.document]] = True
    return Texts(_below(found.queries.text, scale, 2 * size(scale).longest), relevant)


@functools.lru_cache(maxsize=2)
def _reviews(scale: str) -> tuple[Any, Any, Texts]:
    """SST-2's training and development sentences as tables, and its test set."""
    found = text_beds.tables("sst2", scale == "ci")
    last = found["test"]
    hidden = _below(last.sentence, scale, size(scale).longest)
    return found["train"], found["dev"], Texts(hidden, torch.tensor(last.label.tolist()))


@functools.lru_cache(maxsize=2)
def _sentences(scale: str) -> tuple[list[tuple[str, int]], Texts]:
    """Sentences to train and validate on, and as many questions as others to test on: of the plays
    in the last quarter, which nothing else is taken from."""
    if scale == "ci":
        table = tiny_text.tables()["train"]
        every = [(text, int(text.endswith("too"))) for text in table.sentence]
    else:
        every = asked(data.load("tinyshakespeare"))
    cut = round(0.75 * len(every))
    draws, half = generator(0, "test sentences"), size(scale).texts[2] // 2
    return every[:cut], _encoded(_balanced(every[cut:], half, draws), scale)


def _balanced(
    pairs: Sequence[tuple[str, int]], most: int, draws: torch.Generator
) -> list[tuple[str, int]]:
    """At most so many texts of each label, drawn."""
    mixed = [pairs[i] for i in torch.randperm(len(pairs), generator=draws).tolist()]
    kept = [[pair for pair in mixed if pair[1] == label][:most] for label in (0, 1)]
    return kept[0] + kept[1]


def _encoded(pairs: Sequence[tuple[str, int]], scale: str) -> Texts:
    hidden = _below([text for text, _ in pairs], scale, size(scale).longest)
    return Texts(hidden, torch.tensor([label for _, label in pairs]))


def task(name: str, seed: int, scale: str = "cpu") -> Task:
    """The texts that a seed draws for a task.

    Reviews: as many of either label from SST-2's training set, validation from its development
    set, its whole test set. Questions: as many as others, see :func:`asked`. Retrieval: queries
    that are all dealt anew.

    Raises:
        ValueError: an unknown task or scale.
        toolkit.core.data.DataError, PretrainedError: data or model are nowhere to be found.
    """
    this, draws = size(scale), generator(seed, f"texts of {name}")
    if name == "retrieval":
        every = _queries(scale)
        order = torch.randperm(len(every.labels), generator=draws).tolist()
        ends = this.queries[0], this.queries[0] + this.queries[1], sum(this.queries)
        return Task(
            name, every.at(order[: ends[0]]), every.at(order[ends[0] : ends[1]]),
            every.at(order[ends[1] : ends[2]]),
        )  # fmt: skip
    train, validation, _ = this.texts
    if name == "reviews":
        first, held, test = _reviews(scale)
        pools = [
            [(text, int(label)) for text, label in zip(table.sentence, table.label, strict=True)]
            for table in (first, held)
        ]
    elif name == "questions":
        known, test = _sentences(scale)
        order = torch.randperm(len(known), generator=draws).tolist()
        cut = round(0.9 * len(order))
        pools = [[known[i] for i in order[:cut]], [known[i] for i in order[cut:]]]
    else:
        raise ValueError(f"name: choose one of {', '.join(TASKS)}, got {name!r}")
    parts = [
        _encoded(_balanced(pool, count // 2, draws), scale)
        for pool, count in zip(pools, (train, validation), strict=True)
    ]
    return Task(name, parts[0], parts[1], test)


def _losses(queries: Tensor, head: Any, labels: Tensor, scale: str) -> Tensor:
    """Losses in nats by text (n,) of what the blocks made of them (n, width)."""
    if head is None:
        return list_loss(queries, _documents(scale), labels)
    return F.cross_entropy(head(queries), labels, reduction="none")


def tuned(this: Task, rate: float, seed: int, scale: str = "cpu") -> tuple[nn.Module, Any]:
    """One expert: the blocks, and its head or None. Adam; both rates rise over the first twentieth
    of the steps and fall along half a cosine. No dropout."""
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: must be positive and finite, got {rate}")
    sizes, blocks, head = size(scale), network(scale).eval(), None
    optimizers = [(optimise(list(blocks.parameters()), rate), rate)]
    if this.name != "retrieval":
        head = nn.Linear(this.train.hidden[0].shape[1], 2)
        nn.init.normal_(head.weight, std=0.02, generator=generator(seed, f"head of {this.name}"))
        nn.init.zeros_(head.bias)
        optimizers.append((optimise(list(head.parameters()), HEAD_RATE), HEAD_RATE))
    draws = generator(seed, "batches")
    for step in range(sizes.steps):
        rows = torch.randint(len(this.train.labels), (sizes.batch,), generator=draws).tolist()
        part = this.train.at(rows)
        share = arms.warm(step, sizes.steps) * rates.cosine(step, sizes.steps)
        for optimizer, highest in optimizers:
            set_rate(optimizer, highest * share)
            optimizer.zero_grad()
        _losses(pooled(blocks, part.hidden), head, part.labels, scale).mean().backward()
        for optimizer, _ in optimizers:
            optimizer.step()
    return blocks, head


@dataclass(frozen=True)
class Judging:
    """What judges a seed's experts: its tasks, each with its expert's head."""

    tasks: tuple[Task, ...]
    heads: tuple[Any, ...]
    scale: str

    def __call__(self, blocks: nn.Module, part: str, place: int) -> float:
        """The score of blocks on one task: mean loss in units of :data:`UNITS`, less is better."""
        losses, _ = self._judged(blocks, part, place)
        return 100 * losses.double().mean().item() / UNITS[self.tasks[place].name]

    def both(self, blocks: nn.Module, part: str, place: int) -> tuple[float, float]:
        """The mean loss in nats, and labels found or mean nDCG@10, in per cent."""
        losses, plain = self._judged(blocks, part, place)
        return losses.double().mean().item(), 100 * plain.double().mean().item()

    def plain(self, blocks: nn.Module, part: str, place: int) -> Tensor:
        """By text (n,): whether the label is found, or nDCG@10 of a query; more is better."""
        return self._judged(blocks, part, place)[1]

    @torch.no_grad()
    def _judged(self, blocks: nn.Module, part: str, place: int) -> tuple[Tensor, Tensor]:
        texts: Texts = getattr(self.tasks[place], part)
        made, head = embedded(blocks, texts.hidden), self.heads[place]
        losses = _losses(made, head, texts.labels, self.scale)
        if head is None:
            return losses, ndcg(made, _documents(self.scale), texts.labels)
        return losses, (head(made).argmax(1) == texts.labels).to(made.dtype)


def load(rate: float, seed: int, scale: str = "cpu", count: int | None = None) -> experts.Experts:
    """Train the experts of a seed; see :func:`toolkit.labs.beds.experts.load`.

    Args:
        rate: learning rate of the blocks at its highest, of all experts.
        seed: of everything that is drawn.
        scale: "ci", "cpu" or "gpu".
        count: of experts; left out, one per task. Only their tasks can be judged.

    Returns:
        Experts whose ``judge`` is a :class:`Judging`.
    """
    torch.set_num_threads(1)
    order = torch.randperm(len(TASKS), generator=generator(seed, "order of the tasks"))
    tasks = tuple(task(TASKS[i], seed, scale) for i in order.tolist()[:count])
    made = [tuned(this, rate, seed, scale) for this in tasks]
    judging = Judging(tasks, tuple(head for _, head in made), scale)
    models = tuple(experts._flat(blocks) for blocks, _ in made)
    base = network(scale)
    return experts.Experts(
        tuple(this.name for this in tasks), base, experts._flat(base), models, judging
    )


def first(arm: str, rate: float, seed: int, scale: str = "cpu") -> dict[str, float]:
    """What the seed's first expert scores on its own task, as a job; ``arm`` is a label."""
    return {"validation": load(rate, seed, scale, count=1).own("validation")[0]}
