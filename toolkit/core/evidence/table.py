"""How judged claims look on a page: labels for verdicts, and one accessible table.

A verdict is told by word, by sign and by lightness, never by hue alone. On a phone each claim
becomes a card, in a narrow column a card of two columns (``book/_static/house.css``); the roles
keep it a table for screen readers.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toolkit.core.evidence.intervals import Interval
from toolkit.core.evidence.verdicts import UNSTABLE, decided

LOOK = {
    "holds": ("#a8cdee", "●"),
    "direction only": ("#d6e7f6", "◐"),
    "open": ("#f1f1f1", "○"),
    "not testable here": ("#dcdcdc", "–"),
    "no difference that matters": ("#fbeebb", "="),
    "refuted here": ("#f2b795", "✕"),
    "mixed": ("#e3d3ee", "±"),
    "unstable": ("#f6cfdc", "≈"),
    "true": ("#cfe9d6", "✓"),
    "not true": ("#f2b795", "✕"),
}
"""Tint and sign of each verdict, and of facts."""

OWNERS = {
    "paper": "the paper",
    "code": "the published code",
    "ours": "our own question",
}
DECIDES = "◆"
COLUMNS = ("Claim", "Whose", "Where", "Ours", "Margin", "Verdict")


def verdict_html(verdict: str, count: int | None = None) -> str:
    """Return a verdict as a small label: sign, words and tint.

    Args:
        verdict: One of the words for a claim, or of a fact.
        count: Number of claims that got it, shown before the words.
    """
    tint, sign = LOOK[verdict]
    words = verdict
    if count is not None:
        words = f'{count} <span class="verdict-words">{verdict}</span>'
    return (
        f'<span class="verdict verdict-{verdict.replace(" ", "-")}" style="background:{tint};'
        "color:#1a1a1a;padding:.1em .5em;border-radius:.6em;white-space:nowrap;"
        f'display:inline-block"><span aria-hidden="true">{sign}</span> {words}</span>'
    )


def found_text(part: Mapping[str, Any], unit: str, than: float = 0.0) -> str:
    """Return a condition's effect as text: ``5.6 [4.6, 6.5] points (n = 20)``.

    Args:
        part: A condition, as recorded.
        unit: Unit of the effect.
        than: Where the effect is counted from, in the claimed direction; the text counts from 0.
    """
    if part["estimate"] is None:
        return "no result"
    known = (part[field] for field in ("estimate", "low", "high"))
    ends = (None if end is None else end + than for end in known)
    text = Interval(*ends, *(part[field] for field in ("n", "level", "method"))).text(unit)
    return re.sub(r"-(0(?:\.0*)?)(?=[\],\s]|$)", r"\1", text)  # what rounds to 0 has no sign


def counted_from(claim: Mapping[str, Any]) -> float:
    """Where a claim's effect is counted from, in the claimed direction."""
    than = claim.get("than") or 0.0
    turned = claim.get("scale") == "log" and claim["unit"] == "%"  # the quotient itself is turned
    return -than if claim.get("better") == "less" and not turned else than


def found_lines(claim: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return what was found, for each condition a line and remarks in smaller print.

    Args:
        claim: A judged claim, as recorded.
    """
    lines = []
    several = len(claim["conditions"]) > 1
    for part in claim["conditions"]:
        line = found_text(part, claim["unit"], counted_from(claim))
        if part["name"]:
            line = f"{part['name']}: {line}"
        if several:
            line += f" – {part['verdict']}"
        if part["decides"] and several:
            line = f"{DECIDES} {line}"
        lines.append((line, list(_remarks(part))))
    return lines


def _remarks(part: Mapping[str, Any]) -> Iterable[str]:
    if part["reason"]:
        yield part["reason"]
    failed = part["failed"] or {"ours": 0, "theirs": 0, "of": 0}
    for key, words in (("ours", "our arm"), ("theirs", "the other arm")):
        if failed[key]:
            yield f"{failed[key]} of {failed['of']} runs of {words} failed and are left out"
    if part["n_declared"] and part["n"] != part["n_declared"]:
        yield f"{part['n_declared']} repeats were declared"
    if part["fixed"]:
        best = part["fixed"]
        edge = ", at the edge of the grid" if best["on_edge"] else ""
        yield f"against the best of {best['of']} fixed values, {best['value']}{edge}"
    if len(set(filter(decided, part["blocks"]))) > 1:
        yield "blocks of seeds alone: " + ", ".join(part["blocks"])


def owner_text(claim: Mapping[str, Any]) -> str:
    """Return whose a claim is, in words."""
    return OWNERS[claim["whose"]]


def where_text(claim: Mapping[str, Any]) -> str:
    """Return where a claim is made and the source's own figure; "not read" for an unread paper."""
    where = claim["where"]
    if where is None and claim["whose"] == "paper":
        where = "not read"
    return "; ".join(filter(None, (where, claim["figure"])))


def margin_text(claim: Mapping[str, Any]) -> str:
    """Return a claim's margin with its unit."""
    first, *rest = claim["unit"].split(" ")
    if claim["margin"] == 1 and len(first) > 3 and first.endswith("s") and first[-2] not in "se":
        first = first[:-1]  # 1 point, 1 nat per character
    text = " ".join([f"{claim['margin']:g}", first, *rest]).strip()
    start = counted_from(claim)
    return f"{text} beyond {start:g}".replace("-", "\u2212") if start else text


def needed_text(claim: Mapping[str, Any]) -> str:
    """Return from where on a claim holds, as a reader can compare it: ``above 0.05``.

    It is the margin, counted from where the claim's effect is counted from.
    """
    start = counted_from(claim)
    text = f"above {start + claim['margin']:.6g}".replace("-", "\u2212")
    return f"{text} %" if claim["unit"] == "%" else text


def marks(claim: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know of how a claim was declared: late, or not committed."""
    found = ["late: added or changed after the first measurement"] if claim["late"] else []
    return found if claim["committed"] else [*found, "declared, not committed"]


def claim_cells(claim: Mapping[str, Any]) -> dict[str, str]:
    """Return one claim as HTML by column."""
    beside = (claim["quantity"], *marks(claim))
    text = _escape(claim["text"]) + _small(*beside)
    ours = []
    for line, remarks in found_lines(claim):
        shown = _escape(line)
        if line.startswith(DECIDES):
            mark = f'<abbr title="the condition that decides">{DECIDES}</abbr>'
            shown = mark + shown.removeprefix(DECIDES) + " (decides)"
        ours.append(f'<div class="found">{shown}{_small(*remarks)}</div>')
    margin = _escape(margin_text(claim)) + _small(claim["reason"])
    verdict = verdict_html(claim["verdict"])
    if claim["verdict"] == UNSTABLE:
        verdict += _small(f"blocks of seeds disagree; all together: {claim['pooled']}")
    return {
        "Claim": text,
        "Whose": _escape(owner_text(claim)),
        "Where": _escape(where_text(claim)) or '<span class="none">–</span>',
        "Ours": "".join(ours),
        "Margin": margin,
        "Verdict": verdict,
    }


def _escape(text: str) -> str:
    return html.escape(str(text)).replace("(n = ", "(n\u00a0=\u00a0")


def _small(*texts: str | None) -> str:
    return "".join(f"<br><small>{_escape(text)}</small>" for text in texts if text)


def claims_html(
    caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]
) -> str:
    """Return a table of claims that stays a table for screen readers and stacks on a phone.

    Args:
        caption: Heading of the table.
        columns: Column names. The first cell of a row is its heading, the last its verdict.
        rows: For each row, attributes of the row and one piece of HTML per column.
    """
    head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in columns)
    body = []
    for attributes, cells in rows:
        inner = f'<th scope="row" role="rowheader">{cells[0]}</th>'
        inner += "".join(
            f'<td role="cell" data-label="{name}">{cell}</td>'
            for name, cell in zip(columns[1:], cells[1:], strict=True)
        )
        body.append(f'<tr role="row" {attributes}>{inner}</tr>')
    name = html.escape(caption)
    return (
        f'<div class="table-scroll claims-box" role="region" tabindex="0" aria-label="{name}" '
        f'style="overflow-x:auto"><table class="claims" role="table"><caption>{name}</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table></div>'
    )


def facts_html(facts: Sequence[Mapping[str, Any]]) -> str:
    """Return facts as a list of their own; empty without any.

    Args:
        facts: As :meth:`toolkit.core.evidence.Fact.record`.
    """
    from toolkit.core.evidence.claims import Fact

    items = []
    for data in facts:
        fact = Fact(**data)
        words = f"{fact.text.rstrip('.')}: {fact.found()}" if fact.found() else fact.text
        items.append(f"<li>{verdict_html(fact.verdict)} {_escape(words)}</li>")
    if not items:
        return ""
    head = '<p class="facts-head">Facts, without randomness:</p>'
    return f'{head}<ul class="facts">{"".join(items)}</ul>'


class ClaimsTable:
    """The claims of a chapter as an accessible HTML table, or as text where there is no HTML.

    The paper's claims come first, then those of the published code, then our own.

    Args:
        claims: Judged claims, or their records.
        facts: Facts, or their records.
        caption: Heading of the table.
        note: What a reader must know of all of them.
        dropped: Ids of claims that were declared and then given up.
    """

    columns = COLUMNS

    def __init__(
        self,
        claims: Iterable[Any],
        facts: Iterable[Any] = (),
        caption: str = "Claims, tested",
        note: str = "",
        dropped: Iterable[str] = (),
    ) -> None:
        order = list(OWNERS)
        self.claims = sorted(map(_data, claims), key=lambda claim: order.index(claim["whose"]))
        self.facts = [_data(fact) for fact in facts]
        self.caption, self.note, self.dropped = caption, note, list(dropped)

    def _notes(self) -> list[str]:
        notes = [self.note] if self.note else []
        several = [claim for claim in self.claims if len(claim["conditions"]) > 1]
        if any(part["decides"] for claim in several for part in claim["conditions"]):
            notes.append(f"{DECIDES} marks the condition that decides; every condition counts.")
        if self.dropped:
            notes.append("Declared before measuring, then dropped: " + ", ".join(self.dropped))
        return notes

    def _repr_html_(self) -> str:
        rows = [
            (f'id="claim-{claim["id"]}"', list(claim_cells(claim).values()))
            for claim in self.claims
        ]
        made = claims_html(self.caption, self.columns, rows) if rows else ""
        notes = "".join(
            f'<p class="claims-note"><small>{_escape(n)}</small></p>' for n in self._notes()
        )
        return made + facts_html(self.facts) + notes

    def __repr__(self) -> str:
        lines = [self.caption]
        for claim in self.claims:
            lines.append(f"- {claim['text']}: {claim['verdict']}")
            if claim["verdict"] == UNSTABLE:
                lines.append(f"    all seeds together: {claim['pooled']}")
            source = "; ".join(filter(None, (owner_text(claim), where_text(claim))))
            lines.append(f"    source: {source}")
            if claim.get("quantity"):
                lines.append(f"    effect: {claim['quantity']}")
            lines.append(f"    margin: {margin_text(claim)}")
            lines += [f"    {mark}" for mark in marks(claim)]
            for line, remarks in found_lines(claim):
                lines.append(f"    ours: {line}")
                lines += [f"      {remark}" for remark in remarks]
        from toolkit.core.evidence.claims import Fact

        for fact in (Fact(**data) for data in self.facts):
            lines.append(f"- fact: {fact.text}: {fact.verdict}" + f" {fact.found()}".rstrip())
        return "\n".join(lines + self._notes())


def _data(thing: Any) -> Mapping[str, Any]:
    return thing if isinstance(thing, Mapping) else thing.record()
