"""A chapter's first screen: what the method is, the picture to remember, what was found."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.core.evidence.table import counted_from, found_text, needed_text, verdict_html
from toolkit.core.evidence.verdicts import UNSTABLE
from toolkit.core.show.figures import Html

MOST_LINES = 3


def card(
    claims: Mapping[str, Mapping[str, Any]],
    picture: Any,
    lines: Sequence[str] | Mapping[str, str],
    *,
    use: str,
    avoid: str,
) -> Html:
    """Return the card of a chapter: the picture beside what was found, and when to use the method.

    Each line is generated from a judged claim: the verdict, the claim in words, the effect of its
    deciding condition with interval and seeds, and what it needs to hold. Where another condition
    made the verdict, that one stands beside it.

    Args:
        claims: Judged claims by id, as a lab's results hold them; at scale ``ci`` not judged.
        picture: An explorer or figure whose first view makes the point.
        lines: Ids of three claims at most; with words for each where a claim's own, read without
            the rest of its table, would not be understood.
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
    said = {name: claims[name]["text"] for name in lines}
    if isinstance(lines, Mapping):
        said |= lines
    found = "".join(f"<li>{_line(claims[name], text)}</li>" for name, text in said.items())
    body = (
        '<section class="card-first" aria-label="What this chapter found">'
        f'<div class="card-picture">{picture._repr_html_()}</div>'
        f'<div class="card-found"><p class="card-head">We found</p><ul>{found}</ul>'
        f"<p><strong>Use it when</strong> {html.escape(use)}</p>"
        f"<p><strong>Not when</strong> {html.escape(avoid)}</p></div></section>"
    )
    words = "; ".join(f"{text} {claims[name]['verdict']}" for name, text in said.items())
    return Html(body, f"We found: {words}. Use it when {use} Not when {avoid}")


def _line(claim: Mapping[str, Any], text: str) -> str:
    number = html.escape(number_text(claim)).replace("(n = ", "(n\u00a0=\u00a0")
    return (
        f"{verdict_html(claim['verdict'])} {html.escape(text)}"
        f'<span class="card-number">{number}</span>'
    )


def number_text(claim: Mapping[str, Any]) -> str:
    """The number behind a verdict, in words: the effect, what it needs, and what else decided."""
    part = deciding(claim)
    several = len(claim["conditions"]) > 1
    words = _effect(part, claim, several) + f"; holds {needed_text(claim)}"
    if claim["verdict"] == UNSTABLE:
        return words + f"; halves of the seeds disagree, together: {claim['pooled']}"
    others = [p for p in claim["conditions"] if p["verdict"] == claim["verdict"]]
    if several and others and part not in others:
        words += "; but " + _effect(others[0], claim, several)
    return words


def _effect(part: Mapping[str, Any], claim: Mapping[str, Any], named: bool) -> str:
    effect = found_text(part, claim["unit"], counted_from(claim))
    return f"{part['name']}: {effect}" if named else effect


def deciding(claim: Mapping[str, Any]) -> Mapping[str, Any]:
    """The condition of a claim that decides; the first where none is marked."""
    parts = claim["conditions"]
    return next((part for part in parts if part["decides"]), parts[0])
