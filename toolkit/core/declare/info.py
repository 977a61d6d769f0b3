"""The facts of a method that the book prints and the contract tests check."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = (
    "lowrank",
    "reparam",
    "select",
    "insert",
    "merge",
    "diagnose",
    "learn",
    "generate",
    "control",
    "core",
)
"""The parts; "core" holds the baselines, which have no chapters."""


def home(part: str) -> str:
    """The package in which a part's methods lie."""
    return "toolkit.core.baselines" if part == "core" else f"toolkit.{part}"


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a method is, in facts that the book prints and the contract tests check.

    Args:
        slug: short name, the same for module, chapter and test.
        part: one of :data:`PARTS`.
        title: the method's name as the field writes it.
        arxiv: arXiv identifier of the paper.
        year: year of the paper's first version.
        code: ``owner/name`` of the official repository, or None.
        equation: the method in one line of LaTeX.
        acts_on: what moves, in a few words.
        count: LaTeX formula of the numbers trained per layer of shape m x n.
        inference: extra work at inference, in a few words.
        colour: hex colour of the method in every figure of the book.
        zero_init: whether the adapted model equals its base before training.
        mergeable: whether the result is a plain weight again.
        kinds: layer kinds it accepts, of ``toolkit.core.adapt.sites.KINDS``.
        init_tolerance: largest relative output change at initialisation, 0 when it is exact.
        init_reason: why ``init_tolerance`` is not 0.
    """

    slug: str
    part: str
    title: str
    arxiv: str
    year: int
    equation: str
    acts_on: str
    count: str
    inference: str
    colour: str
    code: str | None = None
    zero_init: bool = True
    mergeable: bool = True
    kinds: tuple[str, ...] = ()
    init_tolerance: float = 0.0
    init_reason: str = ""
