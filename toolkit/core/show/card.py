"""A chapter's first screen: what the method is, the picture to remember, what was found."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.core.evidence.table import counted_from, found_text, margin_text, verdict_html
from toolkit.core.evidence.verdicts import UNSTABLE
from toolkit.core.show.figures import Html

MOST_LINES = 3


def card(
    claims: Mapping[str, Mapping[str, Any]],
    picture: Any,
    lines: Sequence[str],
    *,
    use: str,
    avoid: str,
) -> Html:
    """Return the card of a chapter: the picture beside what was found, and when to use the method.

    Each line is generated from a judged claim: the verdict, the claim's own words, and the effect
    of its deciding condition with interval, margin and seeds.

    Args:
        claims: Judged claims by id, as a lab's results hold them; at scale ``ci`` not judged.
        picture: An explorer or figure whose first view makes the point.
        lines: Ids of three claims at most.
        use: When to use the method, after the words "Use it when".
        avoid: When not to, after the words "Not when".

    Raises:
        KeyError: No claim has one of the ids.
        ValueError: More than three lines, or none.
    """
    if not 1 <= len(lines) <= MOST_LINES:
        raise ValueError(f"lines names {len(lines)} claims: a card has one to {MOST_LINES}.")
    missing = [name for name in lines if name not in claims]
    if missing:
        raise KeyError(f"no claim {missing[0]!r}; there are {sorted(claims)}")
    found = "".join(f"<li>{_line(claims[name])}</li>" for name in lines)
    body = (
        '<section class="card-first" aria-label="What this chapter found">'
        f'<div class="card-picture">{picture._repr_html_()}</div>'
        f'<div class="card-found"><p class="card-head">We found</p><ul>{found}</ul>'
        f"<p><strong>Use it when</strong> {html.escape(use)}</p>"
        f"<p><strong>Not when</strong> {html.escape(avoid)}</p></div></section>"
    )
    words = "; ".join(f"{claims[name]['text']} {claims[name]['verdict']}" for name in lines)
    return Html(body, f"We found: {words}. Use it when {use} Not when {avoid}")


def _line(claim: Mapping[str, Any]) -> str:
    part = deciding(claim)
    number = found_text(part, claim["unit"], counted_from(claim))
    if len(claim["conditions"]) > 1:
        number = f"{part['name']}: {number}"
    words = f"{number}, margin {margin_text(claim)}"
    if claim["verdict"] == UNSTABLE:
        words += f"; blocks of seeds disagree, all together: {claim['pooled']}"
    return (
        f"{verdict_html(claim['verdict'])} {html.escape(claim['text'])}"
        f'<span class="card-number">{html.escape(words)}</span>'
    )


def deciding(claim: Mapping[str, Any]) -> Mapping[str, Any]:
    """The condition of a claim that decides; the first where none is marked."""
    parts = claim["conditions"]
    return next((part for part in parts if part["decides"]), parts[0])
