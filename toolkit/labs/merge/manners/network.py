"""A small decoder with gated feed-forwards, its pretraining, and what is read off it."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.nets.transformer import Attention, Position
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds.arms import warm
from toolkit.labs.beds.networks import Table, build
from toolkit.labs.merge.manners import language as words
from toolkit.labs.merge.manners.language import LENGTH, MARKERS, Language, language, texts


@dataclass(frozen=True)
class Size:
    """Numbers of one scale: of the network, its pretraining, the probe's texts, what is judged."""

    width: int
    depth: int
    inner: int
    steps: int
    batch: int
    probed: int
    validated: int
    tested: int


SIZES = {"ci": Size(16, 2, 32, 40, 32, 32, 16, 16), "cpu": Size(32, 3, 96, 250, 32, 384, 128, 384)}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES["ci" if scale == "ci" else "cpu"]


class Norm(nn.RMSNorm):
    """Divides by the root of the mean square, and scales."""

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Scale by 1."""
        nn.init.ones_(self.weight)


class GatedBlock(nn.Module):
    """A pre-norm block: attention, then down(SiLU(gate) * up), each on a residual path."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(width, eps=1e-6), Norm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal=True)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, words, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Speaker(nn.Module):
    """Scores of the next word at every place of a text; the last layer is `head`."""

    def __init__(self, width: int, depth: int, inner: int) -> None:
        super().__init__()
        self.table = Table(words.WORDS, width)
        self.position = Position(2 * LENGTH, width)
        self.blocks = nn.ModuleList(GatedBlock(width, 4, inner) for _ in range(depth))
        self.norm = Norm(width, eps=1e-6)
        self.head = nn.Linear(width, words.WORDS, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Word numbers (batch, words), 16 at most, to scores (batch, words, 85)."""
        x = self.table(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_word_loss(scores: Tensor, following: Tensor) -> Tensor:
    """Mean log-loss in nats of scores (batch, words, 85)."""
    return F.cross_entropy(scores.flatten(0, 1), following.flatten())


@functools.lru_cache(maxsize=4)
def _base(seed: int, scale: str) -> tuple[Language, Speaker]:
    this, spoken, draws = size(scale), language(seed), generator(seed, "pretraining")
    model = build(lambda: Speaker(this.width, this.depth, this.inner), draws)

    def batches():
        for _ in range(this.steps):
            rows = texts(spoken, this.batch, draws)
            yield rows[:, :-1], rows[:, 1:]

    fit(
        model, None, 5e-3, seed, batches(), next_word_loss, steps=this.steps,
        decay=lambda step, of: warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    return spoken, model


def base(seed: int, scale: str) -> tuple[Language, Speaker]:
    """The language of a seed, and a fresh copy of the network that learned it, half of its texts
    polite and half rude."""
    spoken, model = _base(seed, scale)
    return spoken, copy.deepcopy(model).requires_grad_(True)


class Judges(NamedTuple):
    """What one part of the data is: prompts (n, 9) that are rude so far, the draws (n, 7) of what
    follows, neutral texts (n, 16), and texts of facts (n, 16)."""

    prompts: Tensor
    uniform: Tensor
    neutral: Tensor
    facts: Tensor


def judges(spoken: Language, seed: int, scale: str, part: str) -> Judges:
    """The texts of "validation" or "test", the same for every arm of a seed."""
    this, draws = size(scale), generator(seed, part)
    count = this.validated if part == "validation" else this.tested
    rude = texts(spoken, count, draws, "say", 1)[:, : LENGTH + 1]
    uniform = torch.rand(count, LENGTH - 1, generator=draws)
    return Judges(
        rude, uniform, texts(spoken, count, draws, "note"), texts(spoken, count, draws, "fact")
    )


@torch.no_grad()
def continued(model: nn.Module, prompts: Tensor, uniform: Tensor) -> Tensor:
    """Words that a model says after prompts (n, t), one for each column of draws in [0, 1)."""
    text = prompts
    for draw in uniform.unbind(1):
        total = model(text)[:, -1].softmax(-1).cumsum(-1)
        # rounding may leave the last sum below 1
        word = (total < draw[:, None]).sum(-1, keepdim=True).clamp(max=total.shape[1] - 1)
        text = torch.cat([text, word], 1)
    return text[:, prompts.shape[1] :]


@torch.no_grad()
def neutral_loss(model: nn.Module, rows: Tensor) -> float:
    """Nats per word of neutral texts; which kind of sentence comes is not counted."""
    scores, following = model(rows[:, :-1]), rows[:, 1:]
    loss = F.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="none")
    kept = torch.arange(following.shape[1]) != LENGTH - 1
    return float(loss.view_as(following)[:, kept].double().mean())


@torch.no_grad()
def manners(model: nn.Module, told: Judges) -> dict[str, float]:
    """Rude and polite words in a hundred that follow rude prompts, and the neutral log-loss."""
    said = continued(model, told.prompts, told.uniform)
    shares = [100 * torch.isin(said, style).double().mean().item() for style in MARKERS]
    return {"rude": shares[1], "polite": shares[0], "neutral": neutral_loss(model, told.neutral)}


@torch.no_grad()
def facts_right(model: nn.Module, told: Judges) -> float:
    """Facts in a hundred that the model's likeliest word gets right."""
    right = model(told.facts[:, :-1]).argmax(-1) == told.facts[:, 1:]
    return 100 * right[words.answers(told.facts[:, 1:])].double().mean().item()


def labelled(
    spoken: Language, seed: int, scale: str, part: str
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Texts of markers for a probe: words (n, 16) and mask, and labels, half polite and half rude.

    Every second text is one sentence, padded with word 0.
    """
    this, draws = size(scale), generator(seed, "labelled", part)
    count = this.probed
    rows = torch.cat([texts(spoken, count, draws, "say", style) for style in (0, 1)])
    mask = torch.ones_like(rows)
    mask[::2, LENGTH:] = 0
    return (rows * mask, mask), torch.arange(2).repeat_interleave(count)
