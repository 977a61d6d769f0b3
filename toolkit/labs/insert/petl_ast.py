"""What is measured about adapters of a spectrogram transformer, beside what they are compared with.

Spoken digits by two speakers whom the base has not heard (the shared bed of speech, three splits;
a seed belongs to one). Every arm trains the head and the final norm, as the paper's code does. A
family's size is chosen so that all train about as many numbers; every arm's rate is searched alike.
"""

from __future__ import annotations

from typing import Any

import torch

from toolkit.core.adapt.sites import Site
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.insert.petl_ast import ASTAdapter
from toolkit.insert.petl_ast.prefix import ASTPrefix
from toolkit.labs.insert.zoo.arms import FAMILIES, PLACES
from toolkit.labs.insert.zoo.runs import alive, run, untrained
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.lowrank.lora import LoRA

MAIN = ("linear", "prompts", "prefix", "lora", "adapter", "at attention", "conformer", "full")
WRONG = ("parallel, residual", "sequential", "sequential, residual")
"""Placements beside "adapter", which is parallel and has no residual."""
FEW, FEWER = ("linear", "prompts", "lora", "adapter"), 5
"""Arms with so many recordings of each digit and speaker, at the rates of ten."""
START = {
    "linear": 3e-2, "prompts": 2e-2, "prefix": 8e-2, "lora": 8e-3, "adapter": 1.2e-2,
    "at attention": 1.2e-2, "conformer": 1.2e-2, "full": 1e-3,
    "parallel, residual": 2.4e-2, "sequential": 2.4e-2, "sequential, residual": 1.2e-2,
}  # fmt: skip
"""Middle of the first rates tried."""


def measure(runs: Runs, scale: Scale) -> None:
    """All experiments."""
    blocks, where = two_blocks(scale.pick(ci=4, cpu=20, gpu=20)), {"scale": scale.name}
    seeds, search = [seed for block in blocks for seed in block], search_seeds()
    idle = [{"arm": "nothing", "rate": 1.0, "seed": s, **where} for s in search]
    asis = runs.table("as it is", run, [{**job, "judged": "validation"} for job in idle])
    found = runs.tune(
        "speech", run, {arm: {**where, "judged": "validation"} for arm in (*MAIN, *WRONG)},
        {arm: START[arm] for arm in (*MAIN, *WRONG)}, seeds=search, reported=seeds,
        judged="loss", better="min", nothing=float(asis["loss"].mean()), factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("speech", blocks)

    def jobs(arms: Any, chosen: list[int], **more: Any) -> list[dict[str, Any]]:
        return [
            {"arm": arm, "rate": found[arm].rate if arm in found else 1.0, "seed": seed,
             "judged": "test", **where, **more}
            for arm in arms for seed in chosen
        ]  # fmt: skip

    runs.table("speech", run, jobs(("nothing", *MAIN, *WRONG), seeds))
    runs.table("few", run, jobs(FEW, seeds, few=scale.pick(ci=1, cpu=FEWER, gpu=FEWER)))
    runs.blocks("few", blocks)
    some = [seed for block in blocks for seed in block[: scale.pick(ci=1, cpu=3, gpu=3)]]
    splits = scale.pick(ci=(0, 1), cpu=(0, 1, 2), gpu=(0, 1, 2))
    for budget in ("small", "large"):
        runs.table("budgets", run, jobs(FAMILIES, some, budget=budget))
    runs.table("code", run, jobs(("adapter",), some, start="redrawn"))
    runs.table("code", run, jobs(("conformer",), some, like="code"))
    runs.table("start", untrained, [
        {"arm": arm, "place": place, "seed": split, **where}
        for arm in ("nothing", *PLACES) for place in ("mhsa", "ffn") for split in splits
    ])  # fmt: skip
    runs.table("alive", alive, [
        {"arm": start, "inner": "bottleneck", "seed": 0, **where}
        for start in ("identity", "zero", "redrawn")
    ])  # fmt: skip


NATS = "0.03 nats are three per cent of the probability of the digit that was said"
QUANTITY = "test log-loss of unheard speakers, at equal numbers trained: "
FIRST, FINAL = "abstract, first version", "abstract, final version"


def _claim(name: str, text: str, quantity: str, *conditions: Condition, **more: Any) -> Claim:
    """A claim about log-loss, where less is better."""
    return Claim(
        name, text, quantity=QUANTITY + quantity, unit="nats", margin=0.03, better="less",
        reason=NATS, conditions=conditions, **more,
    )  # fmt: skip


CLAIMS = (
    _claim(
        "families",
        "A bottleneck adapter ends below a prefix, prompts, and the head alone.",
        "bottleneck adapter below the other",
        Condition("prefix", n=20, spread=0.05, decides=True),
        Condition("deep prompts", n=20, spread=0.05),
        Condition("head and final norm", n=20, spread=0.05),
        whose="paper", where=FIRST,
    ),
    _claim(
        "conformer",
        "The Conformer adapter ends below LoRA and the bottleneck adapter.",
        "Conformer adapter below the other",
        Condition("LoRA", n=20, spread=0.04, decides=True),
        Condition("bottleneck adapter", n=20, spread=0.04),
        whose="paper", where=FINAL,
    ),
    _claim(
        "full",
        "The Conformer adapter is at most 0.03 nats behind full training.",
        "Conformer adapter below full training (which trains all), from 0.06 above",
        Condition("ten of each digit", n=20, spread=0.04, decides=True),
        whose="paper", where=FINAL, than=-0.06,
    ),
    _claim(
        "few",
        "With five recordings of each digit and speaker, too, adapters end below prompts and the "
        "head alone.",
        "with half the recordings, bottleneck adapter below the other",
        Condition("deep prompts", n=20, spread=0.06, decides=True),
        Condition("head and final norm", n=20, spread=0.06),
        whose="paper", where=FIRST,
    ),
    _claim(
        "residual",
        "A parallel adapter is better without a residual of its own, a sequential one with it.",
        "after training, the recommended form below the other",
        Condition("parallel", n=20, spread=0.05, decides=True),
        Condition("sequential", n=20, spread=0.05),
        whose="paper", where="README of the code: as reported in the paper",
    ),
    _claim(
        "lora",
        "A bottleneck adapter ends below LoRA.",
        "bottleneck adapter below LoRA",
        Condition("ten of each digit", n=20, spread=0.04, decides=True),
        Condition("five of each digit", n=20, spread=0.05),
        whose="ours",
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""

    def pair(ours: str, theirs: str, name: str = "speech") -> Measured:
        control, nothing = (found.values("speech", "loss", arm=arm) for arm in ("full", "nothing"))
        return Measured(
            found.values(name, "loss", arm=ours), found.values(name, "loss", arm=theirs),
            control=control, nothing=nothing, blocks=found.blocks(name),
            tuning_seeds=search_seeds(),
        )  # fmt: skip

    return {
        "families": {
            "prefix": pair("adapter", "prefix"),
            "deep prompts": pair("adapter", "prompts"),
            "head and final norm": pair("adapter", "linear"),
        },
        "conformer": {
            "LoRA": pair("conformer", "lora"),
            "bottleneck adapter": pair("conformer", "adapter"),
        },
        "full": {"ten of each digit": pair("conformer", "full")},
        "few": {
            "deep prompts": pair("adapter", "prompts", "few"),
            "head and final norm": pair("adapter", "linear", "few"),
        },
        "residual": {
            "parallel": pair("adapter", "parallel, residual"),
            "sequential": pair("sequential, residual", "sequential"),
        },
        "lora": {
            "ten of each digit": pair("adapter", "lora"),
            "five of each digit": pair("adapter", "lora", "few"),
        },
    }


def large_counts() -> dict[str, int]:
    """Numbers of four parts in 12 blocks of width 768, without the norms and the head."""
    dtype, device = torch.float32, torch.device("meta")
    site = Site("block", "module", 768, 0, "", (), 1, dtype, device)
    query = Site("query", "linear", 768, 768, "weight", (768, 768), 1, dtype, device)
    return {
        "bottleneck": 12 * ASTAdapter("bottleneck", 64).count(site),
        "conformer": 12 * ASTAdapter("conformer", 96, kernel=8).count(site),
        "prefix": 12 * ASTPrefix(24).count(site),
        "lora": 12 * 2 * LoRA(rank=6).count(query),
    }


def facts(found: Found) -> list[Fact]:
    """Counts, and what holds exactly before and after training."""
    counts, start, moved = large_counts(), found["start"], found["alive"].set_index("arm").moved
    loss = start.pivot_table(index=["place", "seed"], columns="arm", values="loss")
    kept = [loss[arm] - loss["nothing"] for arm in ("parallel", "sequential, residual")]
    broken = [loss[arm] - loss["nothing"] for arm in ("parallel, residual", "sequential")]
    return [
        Fact("count", "A bottleneck adapter of rate 64 trains 230,544 numbers in AST.",
             counts["bottleneck"] == 230_544, counts["bottleneck"], "numbers"),
        Fact("count-conformer", "A Conformer adapter of rate 96 and kernel 8 trains 250,080.",
             counts["conformer"] == 250_080, counts["conformer"], "numbers"),
        Fact("start", "Parallel without and sequential with a residual start at the base's loss; "
             "the other two do not.",
             bool(max(k.abs().max() for k in kept) < 1e-6 < min(b.abs().min() for b in broken)),
             float(min(b.abs().min() for b in broken)), "nats, smallest change of the others"),
        Fact("dead", "With both matrices at zero only the last bias ever moves.",
             list(moved["zero"]) == ["at.ffn.up_bias"], len(moved["zero"]), "of 4 tensors moved"),
        Fact("alive", "With one of them at zero all four tensors move.",
             len(moved["identity"]) == 4, len(moved["identity"]), "of 4 tensors moved"),
    ]  # fmt: skip


LAB = Lab(
    "petl_ast", "insert", measure=measure, judge=judge, claims=CLAIMS, facts=facts, data=("fsdd",)
)
