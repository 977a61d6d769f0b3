"""How judged claims look on a page: labels for verdicts, and one accessible table."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.core.intervals import Interval

if TYPE_CHECKING:
    from toolkit.core.claims import Claim

# tint and sign per verdict: told apart by word, by sign and by lightness, never by hue alone
LOOK = {
    "holds": ("#cfe3f5", "●"),
    "holds in part": ("#fdf0c3", "◐"),
    "not seen here": ("#ededed", "○"),
    "refuted here": ("#f6cdb5", "✕"),
}


def verdict_html(verdict: str) -> str:
    """Return a verdict as a small label: sign, words and tint."""
    tint, sign = LOOK[verdict]
    return (
        f'<span class="verdict verdict-{verdict.replace(" ", "-")}" style="background:{tint};'
        "color:#1a1a1a;padding:.1em .5em;border-radius:.6em;white-space:nowrap;"
        f'display:inline-block"><span aria-hidden="true">{sign}</span> {verdict}</span>'
    )


def found_lines(conditions: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    """Return what was found as text, one line per condition.

    Args:
        conditions: As in the results file.
        unit: Unit of the numbers.
    """
    lines = []
    for part in conditions:
        fields = ("estimate", "low", "high", "n", "level", "method")
        shown = Interval(*(part[field] for field in fields)).text(unit)
        lines.append(f"{part['name']}: {shown}" if part["name"] else shown)
    return lines


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
        f'<div class="table-scroll" role="region" tabindex="0" aria-label="{name}" '
        f'style="overflow-x:auto"><table class="claims" role="table"><caption>{name}</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table></div>'
    )


class ClaimsTable:
    """The claims of a chapter as an accessible HTML table, or as text where there is no HTML."""

    columns = ("Claim", "Paper", "Ours", "Verdict")

    def __init__(self, claims: Sequence[Claim], caption: str) -> None:
        self.claims, self.caption = list(claims), caption

    def _repr_html_(self) -> str:
        rows = []
        for claim in self.claims:
            lines = found_lines(claim.conditions, claim.unit)
            ours = "<br>".join(html.escape(line) for line in lines)
            rules = "; ".join(dict.fromkeys(part["rule_text"] for part in claim.conditions))
            ours += f"<br><small>rule: {html.escape(rules)}</small>"
            if claim.note:
                ours += f"<br><small>{html.escape(claim.note)}</small>"
            paper = html.escape(claim.paper) if claim.paper else "gives no figure"
            rows.append(
                (
                    f'id="claim-{claim.id}"',
                    (html.escape(claim.text), paper, ours, verdict_html(claim.verdict)),
                )
            )
        return claims_html(self.caption, self.columns, rows)

    def __repr__(self) -> str:
        lines = [self.caption]
        for claim in self.claims:
            lines.append(f"- {claim.text}: {claim.verdict}")
            lines.append(f"    paper: {claim.paper or 'gives no figure'}")
            lines += [f"    ours: {line}" for line in found_lines(claim.conditions, claim.unit)]
        return "\n".join(lines)
