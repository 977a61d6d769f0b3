"""What was declared before measuring, and the verdict of each block of seeds alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from motion_book.notes.parts import (
    Section,
    anchor,
    code,
    commit,
    counted,
    paragraph,
    table,
    terms,
)
from toolkit.core.evidence.table import (
    counted_from,
    facts_html,
    found_text,
    margin_text,
    marks,
    owner_text,
    verdict_html,
    where_text,
)

SCALES = {"identity": "", "log": ", on a logarithmic scale", "bounded": ", within its bounds"}


def declared(document: Mapping[str, Any]) -> Section:
    """The claims as they were declared, those that were dropped, and the facts."""
    claims, declaration = document["claims"], document["declaration"]
    late = sum(claim["late"] for claim in claims)
    told = [
        f"{counted(len(claims), 'claim')}: what each says, how it is measured, and how large an "
        "effect must be to matter.",
        f"{late} came or changed after the first measurement, and say so below; the others were"
        if late
        else "All of them were",
        "declared before anything was measured.",
    ]
    body = paragraph(*told) + Markup("").join(_claim(claim, declaration) for claim in claims)
    if declaration["dropped"]:
        names = ", ".join(name.replace("-", " ") for name in declaration["dropped"])
        body += paragraph(f"Declared before measuring, then dropped: {names}.")
    body += paragraph(declaration["note"]) if declaration["note"] else Markup("")
    line = Markup("<p><small>All of them together: declaration {}, in commit {}.</small></p>")
    body += line.format(code(declaration["hash"]), commit(declaration["commit"]))
    return Section("declared", "What was declared", body + Markup(facts_html(document["facts"])))


def _claim(claim: Mapping[str, Any], declaration: Mapping[str, Any]) -> Markup:
    """One claim: its sentence, and below it what was laid down."""
    sense = "less is better" if claim["better"] == "less" else "more is better"
    measured = f"{claim['quantity']}, in {claim['unit']}{SCALES[claim['scale']]}; {sense}"
    origin = declaration["claims"][claim["id"]]
    where = Markup("{}, in commit {}").format(code(origin["hash"]), commit(origin["commit"]))
    facts = [
        ("Whose", "; ".join(filter(None, (owner_text(claim), where_text(claim))))),
        ("Measured", measured),
        ("Margin", "; ".join(filter(None, (margin_text(claim), claim["reason"])))),
        ("Conditions", "; ".join(_condition(claim, part) for part in claim["conditions"])),
        ("Declared as", where),
        ("Mind", "; ".join(marks(claim))),
    ]
    whole = Markup('<section class="notes-claim" id="{}"><h3>{}</h3>{}</section>')
    return whole.format(anchor("declared", claim["id"]), claim["text"], terms(facts))


def _condition(claim: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    n = part["n_declared"] or part["n"]
    decides = " (decides)" if part["decides"] and len(claim["conditions"]) > 1 else ""
    return ", ".join(filter(None, (part["name"], counted(n, "repeat")))) + decides


def blocks(document: Mapping[str, Any]) -> Section:
    """Each condition of each claim: all seeds together, and every block of seeds alone."""
    title = "Verdicts by block of seeds"
    if not document["claims"]:
        return Section("blocks", title, paragraph("No claim was judged."))
    said = paragraph(
        "Every claim was measured on separate blocks of seeds. The verdict is that of all seeds "
        "together; here is what each block would have said alone, with fewer repeats."
    )
    return Section("blocks", title, said + Markup("").join(map(_blocks, document["claims"])))


def _blocks(claim: Mapping[str, Any]) -> Markup:
    """One claim: a row for each of its conditions."""
    most = max(len(part["blocks"]) for part in claim["conditions"])
    names = [f"block {number + 1} alone" for number in range(most)]
    rows = [
        [
            part["name"] or "all runs",
            found_text(part, claim["unit"], counted_from(claim)).replace("n = ", "n\u00a0=\u00a0"),
            Markup(verdict_html(part["verdict"])),
            *part["blocks"],
            *[None] * (most - len(part["blocks"])),
        ]
        for part in claim["conditions"]
    ]
    link = Markup('<a href="#{}">{}</a>').format(anchor("declared", claim["id"]), claim["text"])
    columns = ["condition", "effect, 95 % interval", "all seeds", *names]
    return paragraph(link) + table(f"Blocks of seeds: {claim['text']}", columns, rows)
