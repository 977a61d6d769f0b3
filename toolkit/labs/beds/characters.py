"""A small transformer that read Shakespeare, adapted to abstracts on aerodynamics.

Judged by the next-character log-loss in nats, on abstracts that no arm has seen. It is the text bed
of scale ``cpu``: 12 s a run on one core, 100,352 characters to judge.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, bases
from toolkit.labs.beds.arms import Arm
from toolkit.labs.beds.networks import Characters, build

ALPHABET = "\n !$&'()*+,-./0123456789:;=?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The 80 characters of both texts."""
JUDGED = "log-loss of the next character (nats)"
TARGETS = "blocks.*"
"""A method sits on every linear layer of the blocks."""
START = {"head": 2e-2, "lora": 1.6e-2, "full": 4e-3, "full_twice": 4e-3}
"""Middle of the first rates tried."""
SPLITS = (0,)


@dataclass(frozen=True)
class Size:
    """Numbers of one scale: of the network, a run and the windows that are judged."""

    width: int
    depth: int
    heads: int
    context: int
    batch: int
    steps: int
    pretraining: int
    validation: int
    test: int


SIZES = {
    "ci": Size(32, 1, 2, 32, 8, 10, 40, 8, 16),
    "cpu": Size(96, 3, 4, 128, 16, 150, 1500, 392, 784),
}


class Texts(NamedTuple):
    """Symbol numbers: ``before`` (what the base read) and ``before_rest``, each (n,); ``train``
    (n,); ``validation`` and ``test``: (windows, context + 1)."""

    before: Tensor
    before_rest: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``.

    Raises:
        ValueError: an unknown scale.
    """
    return SIZES[arms.sizes_of(scale)]


def numbers(text: str) -> Tensor:
    """The text as places in :data:`ALPHABET`, (n,) int64.

    Raises:
        ValueError: a character that the alphabet does not hold.
    """
    unknown = sorted(set(text) - set(ALPHABET))
    if unknown:
        raise ValueError(f"text: the alphabet has no {unknown}")
    place = {symbol: at for at, symbol in enumerate(ALPHABET)}
    return torch.tensor([place[symbol] for symbol in text])


def generated() -> tuple[str, list[str]]:
    """Stand-ins for scale ``ci``: shouted two-word lines, and 40 short texts in lower case."""
    draws = generator(0, "generated sentences")

    def words(pool: list[str], count: int) -> list[str]:
        return [pool[i] for i in torch.randint(len(pool), (count,), generator=draws).tolist()]

    shout = words(["THOU", "ART", "KING", "NIGHT", "LOVE", "WAR"], 1600)
    before = "".join(f"{a} {b}!\n" for a, b in zip(shout[::2], shout[1::2], strict=True))
    pool = ["the", "flow", "of", "air", "past", "a", "thin", "wing", "at", "low", "speed"]
    return before, [" ".join(words(pool, 40)) + " ." for _ in range(40)]


@functools.lru_cache(maxsize=2)
def load(scale: str = "cpu") -> Texts:
    """Shakespeare, and the abstracts in parts: first 85 % to train, 5 % validation, 10 % test.

    Raises:
        ValueError: an unknown scale.
        toolkit.core.data.DataError: a text is nowhere to be found.
    """
    this = size(scale)
    if scale == "ci":
        before, abstracts = generated()
    else:
        before, documents = data.load("tinyshakespeare"), data.load("cranfield").documents
        abstracts = [re.sub(r"\s+", " ", text).strip() for text in documents.text]
    cuts = [round(0.85 * len(abstracts)), round(0.9 * len(abstracts))]
    parts = abstracts[: cuts[0]], abstracts[cuts[0] : cuts[1]], abstracts[cuts[1] :]
    train, validation, test = (numbers("\n".join(part)) for part in parts)
    edge = round(0.9 * len(before))
    return Texts(
        numbers(before[:edge]), numbers(before[edge:]), train,
        windows(validation, this.context, this.validation), windows(test, this.context, this.test),
    )  # fmt: skip


def windows(text: Tensor, context: int, most: int) -> Tensor:
    """Windows side by side (n, context + 1), each sharing its first symbol with the last of the
    one before: n * context predictions, each symbol predicted once."""
    count = min(most, (len(text) - 1) // context)
    return text[: count * context + 1].unfold(0, context + 1, context)


def batches(text: Tensor, steps: int, batch: int, context: int, draws: torch.Generator) -> Any:
    """``steps`` pairs of symbols and the symbols that follow, each (batch, context)."""
    for _ in range(steps):
        starts = torch.randint(len(text) - context, (batch,), generator=draws)
        rows = text[starts[:, None] + torch.arange(context + 1)]
        yield rows[:, :-1], rows[:, 1:]


def loss(outputs: Tensor, following: Tensor) -> Tensor:
    """Mean log-loss in nats of scores (batch, context, symbols)."""
    return F.cross_entropy(outputs.flatten(0, 1), following.flatten())


@torch.no_grad()
def nats(model: nn.Module, rows: Tensor, batch: int = 56) -> float:
    """Log-loss in nats per character of windows (n, context + 1)."""
    model.eval()
    sums = [
        len(part) * loss(model(part[:, :-1]), part[:, 1:]).double() for part in rows.split(batch)
    ]
    return (torch.stack(sums).sum() / len(rows)).item()


def pretrain(scale: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The base: Adam on Shakespeare's first 90 %, rate 2e-3 falling along half a cosine."""
    this, texts = size(scale), load(scale)
    draws = bases.seeded()
    model = build(
        lambda: Characters(len(ALPHABET), this.width, this.depth, this.heads, this.context), draws
    )
    steps = batches(texts.before, this.pretraining, this.batch, this.context, draws)
    fit(
        model, None, 2e-3, 0, steps, loss, steps=this.pretraining,
        decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    rest = windows(texts.before_rest, this.context, 784)
    reached = nats(bases.restored(model), rest)
    return model, {"quantity": "nats per character on Shakespeare's last 10 %", "reached": reached}


@functools.lru_cache(maxsize=2)
def _base(scale: str) -> nn.Module:
    if scale == "ci":
        return pretrain("ci")[0].eval()
    this = size(scale)
    empty = Characters(len(ALPHABET), this.width, this.depth, this.heads, this.context)
    return bases.fill(empty, "characters")


def network(scale: str = "cpu") -> Any:
    """A fresh copy of the base."""
    return arms.fresh(_base(scale))


def train(
    arm: str | Arm,
    rate: float,
    seed: int,
    *,
    scale: str = "cpu",
    rank: int = 8,
    steps: int | None = None,
    beside: tuple[str, ...] = (),
    parts: tuple[str, ...] = ("validation", "test"),
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Adapt the base to the abstracts.

    Windows are drawn anew for every seed; the rate falls linearly to 0 after the warm-up.

    Args:
        arm: a reference arm by name, or :class:`~toolkit.labs.beds.arms.Arm` with any method.
        rate: learning rate at its highest.
        seed: of the windows and the method's start.
        scale: "ci", "cpu" or "gpu".
        rank: of LoRA.
        steps: instead of the scale's.
        beside: parameters that train beside a method; nothing, so LoRA stands alone here.
        parts: which of "validation" and "test" to judge.

    Returns:
        The network, the method's handle or None, and a record: a log-loss in nats per part and
        ``trained``, the count of trained numbers.
    """
    torch.set_num_threads(1)
    arm, this, texts, model = arms.named(arm, rank), size(scale), load(scale), network(scale)

    def draw(count: int) -> Any:
        return batches(texts.train, count, this.batch, this.context, generator(seed, "windows"))

    adapted, trained = arms.learn(
        model, arm, rate, seed, draw, loss, steps=steps or this.steps, decay=rates.linear,
        targets=TARGETS, beside=beside,
    )  # fmt: skip
    record: dict[str, Any] = {part: nats(model, getattr(texts, part)) for part in parts}
    return model, adapted, record | {"trained": trained}


def adapt(
    arm: str, rate: float, seed: int, scale: str = "cpu", rank: int = 8, split: int = 0,
    parts: tuple[str, ...] = ("validation", "test"),
) -> dict[str, Any]:  # fmt: skip
    """A reference arm as a job; see :func:`train`. There is one split, 0."""
    return train(arm, rate, seed, scale=scale, rank=rank, parts=tuple(parts))[2]
