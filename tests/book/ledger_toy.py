"""Invented results of forty methods, to see what a full ledger looks like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from toolkit.core.evidence import Claim, Condition, Fact, Judged, Measured, judge

METHODS = {
    "lowrank": "lora adalora increlora triadaptlora lora_pro lora_ggpo which_rank",
    "reparam": "hut flora transformed_lora loldu sketchtune colora",
    "select": "sara spt id3 snella",
    "insert": "ssf pvp blackvip petl_ast connected_peft_ir",
    "merge": "darex pcb_merging m2n2 model_surgery",
    "diagnose": "three_regime longtail_bias",
    "learn": "ps_kd lightweight_cnn remax psr",
    "generate": "pfgmpp dc_solver hipa diffusehigh pie",
    "control": "three_body_rl event_vpr_bias",
    "overview": "peft_survey",
}
"""Forty slugs by part."""

# effect, standard deviation and repeats that lead to each word
CASES = {
    "holds": (3.0, 0.5, 20),
    "direction only": (0.9, 0.5, 20),
    "open": (0.5, 3.0, 20),
    "no difference that matters": (0.1, 0.5, 20),
    "refuted here": (-3.0, 0.5, 20),
    "not testable here": (0.0, 0.0, 20),
}
SOURCES = (
    {"whose": "paper", "where": "section 4.2, table 3", "figure": "88.3 on GLUE, 0.4 above"},
    {"whose": "paper"},
    {"whose": "code", "where": "layers.py, forward"},
    {"whose": "ours"},
)


def _measured(effect: float, sd: float, n: int, seed: int) -> Measured:
    rng = np.random.default_rng(seed)
    base, noise = rng.normal(70, 3, n), rng.normal(size=n)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    ours = base + effect + sd * noise
    return Measured(dict(enumerate(ours.tolist())), dict(enumerate(base.tolist())))


def judged(word: str, seed: int, names: tuple[str, ...] = ("digits",), **source) -> Judged:
    """A claim that gets a verdict; "mixed" and "unstable" too.

    Args:
        word: The verdict.
        seed: Makes numbers and id its own.
        names: Conditions; the first one decides.
        source: Fields of the claim, such as ``whose``.
    """
    parts = tuple(
        Condition(name, n=20, spread=1.0, support=(-100, 100), decides=not number)
        for number, name in enumerate(names)
    )
    claim = Claim(
        id=f"c{seed}",
        text=f"Sentence {seed} says what the method is claimed to do better, and where.",
        quantity="test accuracy, the method minus LoRA",
        unit="points",
        margin=1.0,
        reason="two recordings of a page differ by less",
        conditions=parts,
        **(source or {"whose": "ours"}),
    )
    if word == "unstable":
        whole = _measured(3.0, 0.5, 20, seed)
        ours = {s: v - 7 * (s > 9) for s, v in whole.ours.items()}
        blocks = (range(10), range(10, 20))
        runs = {names[0]: Measured(ours, whole.theirs, blocks=blocks)}
        words = ["holds"] * (len(names) - 1)
    else:
        runs = {}
        words = [word] * len(names) if word != "mixed" else ["holds", "refuted here"]
    for number, (name, each) in enumerate(zip(names[len(runs) :], words, strict=True)):
        runs[name] = _measured(*CASES[each], seed=seed + 1000 * (number + 1))
    made = judge(claim, runs, late=seed % 17 == 3, committed=seed % 23 != 5)
    if made.verdict != word:
        raise ValueError(f"{word!r} was wanted, {made.verdict!r} came out")
    return made


def record(slug: str, number: int, scale: str = "cpu", claims: int = 6) -> dict:
    """A results file of schema 2 with claims of all kinds."""
    words = [*CASES, "mixed", "unstable"]
    made = []
    for k in range(claims):
        seed = 10 * number + k
        word = words[(number + 3 * k) % len(words)]
        names = ("digits", "letters") if word == "mixed" or k == 1 else ("digits",)
        made.append(judged(word, seed, names, **SOURCES[(number + k) % len(SOURCES)]))
    fact = Fact("count", "It trains as many numbers as its formula says.", True, 384 + number)
    return {
        "schema": 2,
        "slug": slug,
        "scale": scale,
        "claims": [one.record() for one in made],
        "facts": [fact.record()],
        "declaration": {"dropped": ["gone"] if number == 4 else [], "note": ""},
    }


def write(results: Path, chapters: Path) -> int:
    """Write forty results files and the sources that say to which part each belongs.

    Args:
        results: Folder of the results.
        chapters: Folder of the chapters' sources.

    Returns:
        How many claims they hold.
    """
    results.mkdir(parents=True, exist_ok=True)
    total = number = 0
    for part, slugs in METHODS.items():
        (chapters / part).mkdir(parents=True, exist_ok=True)
        for slug in slugs.split():
            source = f"# The method called {slug}\n"
            (chapters / part / f"{slug}.md").write_text(source, encoding="utf-8")
            made = record(slug, number)
            total += len(made["claims"])
            number += 1
            (results / f"{slug}.cpu.json").write_text(json.dumps(made), encoding="utf-8")
    return total
