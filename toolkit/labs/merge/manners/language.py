"""The language: 85 words, three kinds of sentences, a style for each text, a table of facts.

A text is two sentences of eight words. *say* sentences hold three markers, all polite or all rude
in one text but for three in a hundred; *note* sentences hold none and are neutral; *fact* sentences
give two of 64 facts. Which words go together, and the facts, are drawn anew for every seed. Word 0
is the full stop: a real word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.core.seeds import generator

CLASSES = 3
KINDS = ("say", "note", "fact")
LENGTH = 8
"""Words of a sentence."""
STOP, SAY, NOTE, FACT = range(4)
NOUNS = torch.arange(4, 16).view(CLASSES, 4)
VERBS = torch.arange(16, 25).view(CLASSES, 3)
ADVERBS = torch.arange(25, 31).view(CLASSES, 2)
MARKERS = torch.arange(31, 43).view(2, CLASSES, 2)
"""Style (0 polite, 1 rude), class, word."""
KEYS, RELATIONS, VALUES = torch.arange(43, 75), torch.arange(75, 77), torch.arange(77, 85)
WORDS = 85
STRAYS = 0.03
"""Share of markers of the other style."""


@dataclass(frozen=True)
class Language:
    """What one seed drew.

    Attributes:
        follows: (3, 3), class of the next word after each class, for three kinds of steps.
        facts: (32, 2), the value of each key and relation.
    """

    follows: Tensor
    facts: Tensor


def language(seed: int) -> Language:
    """The language of a seed."""
    draws = generator(seed, "language")
    follows = torch.stack([torch.randperm(CLASSES, generator=draws) for _ in range(3)])
    shape = len(KEYS), len(RELATIONS)
    return Language(follows, torch.randint(len(VALUES), shape, generator=draws))


def texts(
    spoken: Language,
    count: int,
    draws: torch.Generator,
    kind: str | None = None,
    style: int | None = None,
) -> Tensor:
    """Texts (count, 16) of word numbers.

    Args:
        spoken: the language.
        count: how many.
        draws: a generator.
        kind: of both sentences; left out, *say* half of the time and the others a quarter each.
        style: 0 polite, 1 rude; left out, either.
    """
    shares = torch.tensor([0.5, 0.25, 0.25])
    kinds = torch.multinomial(shares, 2 * count, replacement=True, generator=draws)
    styles = torch.randint(2, (count, 1), generator=draws)
    if kind is not None:
        kinds = torch.full_like(kinds, KINDS.index(kind))
    if style is not None:
        styles = torch.full_like(styles, style)
    styles = styles.expand(-1, 2).reshape(-1)
    count *= 2
    ways = _say(spoken, styles, draws), _note(spoken, count, draws), _fact(spoken, count, draws)
    return torch.stack(ways)[kinds, torch.arange(count)].view(-1, 2 * LENGTH)


def _say(spoken: Language, styles: Tensor, draws: torch.Generator) -> Tensor:
    count = len(styles)
    kind = torch.randint(CLASSES, (count,), generator=draws)

    def marker(of: Tensor) -> Tensor:
        stray = torch.rand(count, generator=draws) < STRAYS
        which = torch.randint(2, (count,), generator=draws)
        return MARKERS[torch.where(stray, 1 - styles, styles), of, which]

    first = marker(kind)
    noun, kind = _word(NOUNS, kind, draws)
    verb, kind = _word(VERBS, spoken.follows[0][kind], draws)
    second = marker(kind)
    other, kind = _word(NOUNS, spoken.follows[1][kind], draws)
    return _sentence(SAY, first, noun, verb, second, other, marker(kind))


def _note(spoken: Language, count: int, draws: torch.Generator) -> Tensor:
    kind = torch.randint(CLASSES, (count,), generator=draws)
    words = []
    for pool, step in ((NOUNS, 2), (VERBS, 0), (ADVERBS, 1), (NOUNS, 2), (VERBS, 0), (ADVERBS, 1)):
        word, kind = _word(pool, kind, draws)
        kind = spoken.follows[step][kind]
        words.append(word)
    return _sentence(NOTE, *words)


def _fact(spoken: Language, count: int, draws: torch.Generator) -> Tensor:
    words = []
    for _ in range(2):
        key = torch.randint(len(KEYS), (count,), generator=draws)
        relation = torch.randint(len(RELATIONS), (count,), generator=draws)
        words += [KEYS[key], RELATIONS[relation], VALUES[spoken.facts[key, relation]]]
    return _sentence(FACT, *words)


def _word(pool: Tensor, kind: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """A word of a class, or one time in eight of any class; and the class it is of."""
    count = len(kind)
    stray = torch.rand(count, generator=draws) < 0.125
    kind = torch.where(stray, torch.randint(CLASSES, (count,), generator=draws), kind)
    # the product of two draws makes some words of a class more frequent than others
    share = torch.rand(count, generator=draws) * torch.rand(count, generator=draws)
    return pool[kind, (share * pool.shape[1]).long()], kind


def _sentence(opening: int, *words: Tensor) -> Tensor:
    """Six words (n,) between an opening and a full stop: (n, 8)."""
    ends = torch.full_like(words[0], opening), torch.full_like(words[0], STOP)
    return torch.stack([ends[0], *words, ends[1]], 1)


def answers(rows: Tensor) -> Tensor:
    """Which words of texts of facts are values, (n, 16)."""
    return torch.isin(rows, VALUES)
