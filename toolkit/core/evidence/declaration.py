"""What was declared, when, and whether it was changed after measuring.

A claim's hash covers every word and number of its declaration. The results file keeps the hashes of
the first measurement at scale ``cpu`` and the commit that held them. Later a claim that is new, or
whose hash differs, is *late*, and stays so.

Somebody might delete the results and measure again, or edit the stored hashes. Therefore the first
results file *committed* for the chapter is looked up in git's history and counts as well: whichever
of the two says "late" is believed. What this cannot see: claims changed before the first results
were ever committed, and a history that was rewritten.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolkit.core.evidence.claims import Claim, check_set

SCHEMA = 2


@dataclass(frozen=True)
class Declaration:
    """Hashes of a chapter's claims.

    Args:
        claims: Hash of each claim by its id, in order.
        hash: Hash over all of them.
    """

    claims: dict[str, str]
    hash: str


def declare(claims: Sequence[Claim]) -> Declaration:
    """Return the hashes of a chapter's claims.

    Raises:
        ValueError: If there are more than six, or an id stands twice.
    """
    check_set(claims)
    found = {claim.id: _hash(asdict(claim)) for claim in claims}
    return Declaration(found, _hash(found))


def _hash(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class First:
    """The declaration that git's history holds as the first.

    Args:
        claims: Hash of each claim of the first committed results; ``None`` if unknown.
        commit: Commit that added those results.
        declared: Commit that the results name as the one that held each claim.
        note: Why it is unknown, in words; empty if it is known, or nothing was ever committed.
    """

    claims: dict[str, str] | None = None
    commit: str = ""
    declared: dict[str, str] = field(default_factory=dict)
    note: str = ""


def first_declaration(root: str | Path, slug: str) -> First:
    """Look up a chapter's first committed results at scale ``cpu`` in git's history.

    Args:
        root: Folder of the project.
        slug: The chapter's slug.

    Returns:
        Its claims' hashes. Where there is no git, no repository or only part of the history,
        nothing is known and the note says so.
    """
    if _git(root, "rev-parse", "--git-dir") is None:
        return First(note="no git history here: only the results file itself tells what was first")
    path = f"book/results/{slug}.cpu.json"
    log = _git(
        root, "log", "--full-history", "--topo-order", "--reverse", "--format=%H", "--", path
    )
    for commit in (log or "").split():
        record = _declared(_git(root, "show", f"{commit}:./{path}"))
        if record is not None:
            hashes = {name: entry["hash"] for name, entry in record.items()}
            commits = {name: entry.get("commit", "") for name, entry in record.items()}
            note = ""
            if _shallow(root):
                note = "git holds only part of the history here: an earlier declaration may exist"
            return First(hashes, commit, commits, note)
    if _shallow(root):
        return First(note="git holds only part of the history here: the first may lie before it")
    return First()


def _declared(text: str | None) -> dict[str, dict[str, Any]] | None:
    """The declared claims of a committed file; None if it is deleted, damaged or of schema 1.

    Results that declare nothing were measured before anything was declared, so all is late.
    """
    try:
        record = json.loads(text or "")
        if record["schema"] != SCHEMA:
            return None
        claims = record.get("declaration", {}).get("claims", {})
        return {name: dict(entry) for name, entry in claims.items() if entry["hash"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _shallow(root: str | Path) -> bool:
    return (_git(root, "rev-parse", "--is-shallow-repository") or "").strip() == "true"


def committed(root: str | Path, path: str | Path) -> str:
    """Return the commit at HEAD if it holds a file just as it lies there, else ``""``.

    Args:
        root: Folder of the project.
        path: The file that declares the claims, below ``root``.
    """
    name = str(path)
    head = _git(root, "rev-parse", "--verify", "HEAD")
    if head is None or _git(root, "cat-file", "-e", f"HEAD:./{name}") is None:
        return ""
    return head.strip() if _git(root, "diff", "--quiet", "HEAD", "--", name) is not None else ""


def _git(root: str | Path, *arguments: str) -> str | None:
    """Output of a git command that changes nothing; None if it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def register(
    declared: Declaration,
    stored: Mapping[str, Any] | None = None,
    first: First | None = None,
    commit: str = "",
) -> dict[str, Any]:
    """Return the part ``declaration`` of a results file at scale ``cpu``.

    Args:
        declared: What the lab declares now.
        stored: That part of the results file that is there already; ``None`` before the first.
        first: What git's history holds as the first; from :func:`first_declaration`.
        commit: Commit that holds the declaring file, from :func:`committed`; ``""`` if it is not
            committed as it is.

    Returns:
        ``{"hash", "commit", "claims": {id: {"hash", "commit", "late"}}, "dropped": [id], "note"}``.
        A claim keeps the commit it was first declared in; ``""`` means declared, not committed.
        ``dropped`` names claims that were declared before the first measurement and are gone.

    Raises:
        ValueError: If ``stored`` is no such part.
    """
    known = _checked(stored)
    before = None if first is None else first.claims
    claims = {}
    for name, mark in declared.claims.items():
        late = before is not None and before.get(name) != mark
        if known is not None:
            entry = known.get(name)
            late = late or entry is None or entry["hash"] != mark or bool(entry["late"])
        made = commit
        if not late and before is not None:
            made = first.declared.get(name, "")
        elif not late and known is not None:
            made = known[name]["commit"]
        claims[name] = {"hash": mark, "commit": made, "late": late}
    gone = [name for name in {**(before or {}), **(known or {})} if name not in claims]
    gone += [name for name in (stored or {}).get("dropped", []) if name not in claims]
    return {
        "hash": declared.hash,
        "commit": commit,
        "claims": claims,
        "dropped": sorted(set(gone)),
        "note": first.note if first is not None else "",
    }


def _checked(stored: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
    if stored is None:
        return None
    try:
        return {
            name: {key: entry[key] for key in ("hash", "commit", "late")}
            for name, entry in stored["claims"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "the results file's declaration is damaged: every claim needs hash, commit and late. "
            "Restore the file from git."
        ) from error
