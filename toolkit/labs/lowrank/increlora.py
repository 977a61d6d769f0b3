"""What is measured about IncreLoRA: does rank grow where it is needed, and does that help?

Planted ranks: a random network of five layers, and a teacher that differs from it by a change of
rank 6 in layer 2 and one of rank 2 in layer 4. Teacher, inputs and start are drawn anew for every
seed. Every method ends with ten ranks; IncreLoRA's growth begins and ends at the same shares of a
run as on real texts, see :func:`pace`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

from toolkit.core.adapt.put import adapt
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.labs.beds import characters, tasks, texts
from toolkit.labs.beds.arms import Arm
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.lowrank.against import compare, paired
from toolkit.labs.lowrank.lora import (
    ABSTRACTS_START,
    REVIEWS_START,
    abstracts_lora,
    abstracts_plain,
    reviews_lora,
    reviews_plain,
)
from toolkit.lowrank.adalora import AdaLoRA
from toolkit.lowrank.increlora import IncreLoRA
from toolkit.lowrank.lora import LoRA

LAYERS, TOTAL = 5, 10
NEEDED = tuple(k for k, rank in enumerate(tasks.PLANTED) if rank)
"""Layers with a planted rank, counted from 0."""
RAW: dict[str, Any] = {"orthogonality": 0.0, "advance": False, "restart": False}
"""Growth without its three remedies."""


def pace(steps: int, layers: int, target: int) -> dict[str, Any]:
    """When and how much to grow: in about six rounds, the first after an eighth of the run.

    A layer gets ``target / 2`` ranks at a time, as in the official scripts; how many layers grow
    in a round follows from the six rounds.

    Args:
        steps: of the run.
        layers: that are adapted.
        target: average rank at the end.
    """
    interval, growth = max(1, steps // 15), max(1, target // 2)
    rounds = min(6, (steps - 1) // interval - 1)
    return {
        "target_rank": target, "growth": growth, "interval": interval, "warmup": interval,
        "restart_warmup": max(1, steps // 20),
        "top": math.ceil(layers * (target - 1) / (growth * rounds)),
    }  # fmt: skip


def planted_method(arm: str, steps: int) -> Any:
    """The method of an arm on planted ranks; None for full training."""
    shrink: dict[str, Any] = {
        "total_rank": TOTAL, "warmup": steps // 15, "final": steps // 3,
        "interval": max(1, steps // 150),
    }  # fmt: skip
    grow = pace(steps, LAYERS, TOTAL // LAYERS) | {"total_rank": TOTAL, "top": 1}
    return {
        "full": lambda: None,
        "lora": lambda: LoRA(rank=TOTAL // LAYERS),
        "adalora": lambda: AdaLoRA(rank=3, **shrink),
        "adalora 3x": lambda: AdaLoRA(rank=6, **shrink),
        "raw": lambda: IncreLoRA(**grow, **RAW),
        "lot": lambda: IncreLoRA(**grow),
        "increlora": lambda: IncreLoRA(**grow),
    }[arm]()


def by_lot(seed: int) -> Any:
    """A scorer that draws lots."""
    draws = generator(seed, "lots")
    return lambda controller: torch.rand(LAYERS, generator=draws)


def planted_nothing(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """The student as it is."""
    student, teacher = tasks.planted_task(seed)
    return {"test": tasks.planted_error(student, teacher, seed), "trained": 0}


def planted(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One arm on planted ranks.

    Its record holds ``ranks`` at the end and ``needed``, those of them in layers that need rank;
    ``grown``, the layers that grew in their order; and ``work``, the trained numbers summed over
    the steps, in millions, reserves included.
    """
    method = planted_method(arm, steps)
    options = {"scorer": by_lot(seed)} if arm == "lot" else {}
    adapted, record = tasks.planted_train(method, rate, seed, steps=steps, options=options)
    ranks = record.pop("ranks", [TOTAL // LAYERS] * LAYERS if arm == "lora" else [])
    work, grown = record["trained"] * steps, []
    if isinstance(method, IncreLoRA):
        seen = [(h.step, list(h.ranks.values())) for h in adapted.controller.history]
        sizes = [a + b for a, b in zip(tasks.WIDTHS, tasks.WIDTHS[1:], strict=False)]
        ahead = int(method.advance)
        work = 0
        for (start, now), (end, _) in zip(seen, [*seen[1:], (steps, [])], strict=True):
            numbers = sum((r + ahead) * size + r for r, size in zip(now, sizes, strict=True))
            work += (end - start) * numbers
        for (_, before), (_, after) in itertools.pairwise(seen):
            grown += [k + 1 for k in range(LAYERS) for _ in range(after[k] - before[k])]
    needed = sum(ranks[k] for k in NEEDED) if ranks else 0
    more = {"ranks": ranks, "grown": grown, "needed": needed, "work": work / 1e6}
    return record | more


def first_growth(divisor: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """By what the error is multiplied in the step of the first growth.

    Args:
        divisor: "own rank", as in the official code, or "target", as in the toolkit.
        rate, seed, steps: of the run that begins so; it ends soon after its first growth.
    """
    grow = pace(steps, LAYERS, TOTAL // LAYERS) | {"total_rank": LAYERS + 1, "top": 1}
    teacher = tasks.planted_task(seed)[1]
    errors = []

    def watch(step: int, adapted: Any, model: Any) -> None:
        if 2 * grow["interval"] - 1 <= step <= 2 * grow["interval"]:
            errors.append(tasks.planted_error(model, teacher, seed))

    method = IncreLoRA(**grow, rescale=divisor == "own rank")
    tasks.planted_train(method, rate, seed, steps=4 * grow["interval"], watch=watch)
    return {"factor": errors[1] / errors[0]}


def divided(like: Any, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Ranks by the paper's score, a mean, or the code's, a sum over the root; no penalty."""
    grow = pace(steps, LAYERS, TOTAL // LAYERS) | {"total_rank": TOTAL, "top": 1}
    method = IncreLoRA(**grow, like=like, orthogonality=0.0)
    ranks = tasks.planted_train(method, rate, seed, steps=steps)[1]["ranks"]
    return {"ranks": ranks, "needed": sum(ranks[k] for k in NEEDED)}


def turned_apart(form: str, seed: int, steps: int) -> dict[str, Any]:
    """Mean absolute cosine of four rows that start alike, after descent on a penalty.

    Args:
        form: "stacked", as in the official trainer, or "one by one", as in its library helper.
        seed, steps: of the descent.
    """
    draws = generator(seed, "rows")
    A = 0.1 * (torch.randn(1, 32, generator=draws) + torch.randn(4, 32, generator=draws))
    A.requires_grad_()
    for _ in range(steps):
        gap = A @ A.T - torch.eye(4)
        value = gap.norm() if form == "stacked" else gap.diagonal().abs().sum()
        (slope,) = torch.autograd.grad(value, A)
        with torch.no_grad():
            A -= 0.02 * slope
    unit = F.normalize(A.detach(), dim=1)
    return {"cosine": (unit @ unit.T)[~torch.eye(4, dtype=torch.bool)].abs().mean().item()}


def past_budget(overshoot: bool) -> dict[str, Any]:
    """Ranks in all when two layers grow by two at a time, from five to a budget of ten."""
    method = IncreLoRA(total_rank=TOTAL, growth=2, top=2, interval=1, warmup=0, restart_warmup=1,
                       overshoot=overshoot)  # fmt: skip
    model = tasks.planted_task(0)[0]
    adapted: Any = adapt(model, method, generator=generator(0, "init"))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=1e-3)
    adapted.attach(optimizer, total_steps=10, scorer=lambda controller: torch.arange(5.0))
    for _ in range(6):
        optimizer.zero_grad()
        adapted(torch.ones(2, 32)).sum().backward()
        optimizer.step()
    return {"totals": [h.total for h in adapted.controller.history]}


def _read(bed: Any, target: int, steps: int, layers: int, *run: Any) -> dict[str, Any]:
    rate, seed, scale, part = run
    method = IncreLoRA(**pace(steps, layers, target))
    arm = Arm("method", method)
    _, adapted, record = bed.train(arm, rate, seed, scale=scale, parts=(part,))
    ranks = {name: a.rank for name, a in adapted.adapters.items()}
    sizes = [site.site.rows + site.site.cols for site in adapted.sites.values()]
    kept = sum(r * (size + 1) for r, size in zip(ranks.values(), sizes, strict=True))
    costs = dict(adapted.costs())
    for adapter in adapted.adapters.values():
        adapter.compact()
    costs["stored_bytes"] = adapted.costs()["stored_bytes"]
    return record | {
        "layers": list(ranks), "ranks": list(ranks.values()), "kept": kept,
        **{f"cost {name}": value for name, value in costs.items()},
    }  # fmt: skip


def abstracts_increlora(
    arm: str, target: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """IncreLoRA on every linear layer of the blocks, and nothing beside it."""
    steps, layers = characters.size(scale).steps, 6 * characters.size(scale).depth
    return _read(characters, target, steps, layers, rate, seed, scale, part)


def reviews_increlora(
    arm: str, target: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """IncreLoRA on the twelve linear layers of the upper blocks, and the head."""
    steps = texts.STEPS["ci" if scale == "ci" else "cpu"]
    return _read(texts, target, steps, 12, rate, seed, scale, part)


PLANTED = ("lora", "adalora", "adalora 3x", "raw", "lot", "increlora", "full")
PLANTED_START = {
    "lora": 1e-2, "adalora": 3.2e-2, "adalora 3x": 6.4e-2, "raw": 6.4e-3, "lot": 1.6e-2,
    "increlora": 6.4e-3, "full": 8e-3,
}  # fmt: skip
ABSTRACTS = {"nothing": abstracts_plain, "head": abstracts_plain, "full": abstracts_plain,
             "rank 2": abstracts_lora, "increlora": abstracts_increlora}  # fmt: skip
REVIEWS = {"nothing": reviews_plain, "head": reviews_plain, "full": reviews_plain,
           "rank 8": reviews_lora, "increlora": reviews_increlora}  # fmt: skip
STEPS = {"ci": 16, "cpu": 1200, "gpu": 1200}


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    few = scale.pick(ci=4, cpu=8, gpu=20)
    _planted(runs, scale, few)
    arms = {"head": {}, "full": {}, "rank 2": {"rank": 2}, "increlora": {"target": 2}}
    starts = ABSTRACTS_START | {"increlora": 1.6e-2}
    compare(runs, scale, "abstracts", ABSTRACTS, arms, starts, few)
    arms = {"head": {}, "full": {}, "rank 8": {"rank": 8}, "increlora": {"target": 8}}
    starts = REVIEWS_START | {"increlora": 4e-3}
    compare(runs, scale, "reviews", REVIEWS, arms, starts, few)


def _planted(runs: Runs, scale: Scale, n: int) -> None:
    blocks, steps = two_blocks(n), {"steps": STEPS[scale.name]}
    seeds = [seed for block in blocks for seed in block]
    found = runs.tune(
        "planted", planted, dict.fromkeys(PLANTED, steps), PLANTED_START,
        seeds=search_seeds(), reported=seeds, judged="validation", better="min", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3), extensions=scale.pick(ci=0, cpu=4, gpu=4),
    )  # fmt: skip
    runs.blocks("planted", blocks)
    runs.table("planted as it is", planted_nothing, grid(arm="nothing", seed=seeds, **steps))
    runs.table("planted", planted, [
        {"arm": arm, "rate": found[arm].rate, "seed": seed, **steps}
        for arm in PLANTED for seed in seeds
    ])  # fmt: skip
    rate = {"rate": found["increlora"].rate}
    some = {"seed": seeds[: scale.pick(ci=1, cpu=4, gpu=4)]}
    runs.table("first growth", first_growth, grid(divisor=["own rank", "target"], **rate, **some,
                                                  **steps))  # fmt: skip
    short = {"steps": scale.pick(ci=16, cpu=300, gpu=300)}
    runs.table("score divided", divided, grid(like=["paper", "code"], **rate, **some, **short))
    runs.table("turned apart", turned_apart, grid(
        form=["stacked", "one by one"], seed=some["seed"], steps=scale.pick(ci=50, cpu=600, gpu=600)
    ))  # fmt: skip
    runs.table("past the budget", past_budget, grid(overshoot=[True, False]))


TWICE = "errors of two teachers differ by as much"
CLAIMS = (
    Claim(
        "uniform",
        "Where two of five layers need rank, it ends with a lower error than LoRA of equal "
        "final rank.",
        whose="paper", unit="%", margin=50.0, better="less", scale="log", reason=TWICE,
        quantity="test error of uniform LoRA over IncreLoRA's, minus one",
        conditions=(Condition("planted ranks", n=8, spread=45.0, decides=True),),
    ),
    Claim(
        "pruning",
        "It ends with a lower error than AdaLoRA of equal final rank, whose start caps every "
        "layer.",
        whose="paper", unit="%", margin=50.0, better="less", scale="log", reason=TWICE,
        quantity="test error of AdaLoRA over IncreLoRA's, minus one",
        conditions=(
            Condition("AdaLoRA from 1.5 times", n=8, spread=45.0, decides=True),
            Condition("AdaLoRA from 3 times", n=8, spread=45.0),
        ),
    ),
    Claim(
        "remedies",
        "Penalty, advance learning and restarted rates together lower the error of raw growth.",
        whose="paper", unit="%", margin=20.0, better="less", scale="log",
        quantity="test error of raw growth over IncreLoRA's, minus one",
        reason="a fifth is less than another first draw changes",
        conditions=(Condition("planted ranks", n=8, spread=20.0, decides=True),),
    ),
    Claim(
        "abstracts",
        "On new text it ends with a lower log-loss than LoRA of equal final rank.",
        whose="paper", unit="nats per character", margin=0.02, better="less",
        quantity="log-loss on abstracts, IncreLoRA of average rank 2 below LoRA of rank 2",
        reason="0.02 nats are two per cent of a character's probability",
        conditions=(Condition("abstracts", n=8, spread=0.01, decides=True),),
    ),
    Claim(
        "reviews",
        "On film reviews it is right more often than LoRA of equal final rank, and than full "
        "training.",
        whose="paper", unit="points", margin=1.0,
        quantity="test accuracy, IncreLoRA of average rank 8 minus the other arm",
        reason="one point is less than the spread over test sets of this size",
        conditions=(
            Condition("LoRA, rank 8", n=8, spread=1.0, support=(-100.0, 100.0), decides=True),
            Condition("full training", n=8, spread=1.0, support=(-100.0, 100.0)),
        ),
    ),
    Claim(
        "lot",
        "Growth by score ends with a lower error than growth by lot.",
        whose="ours", unit="%", margin=50.0, better="less", scale="log", reason=TWICE,
        quantity="test error of growth by lot over growth by score, minus one",
        conditions=(Condition("planted ranks", n=8, spread=45.0, decides=True),),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    asis = found.values("planted as it is", "test")
    full = found.values("planted", "test", arm="full")

    def against(other: str) -> Measured:
        return Measured(
            found.values("planted", "test", arm="increlora"),
            found.values("planted", "test", arm=other),
            control=full, nothing=asis, blocks=found.blocks("planted"),
            tuning_seeds=search_seeds(),
        )  # fmt: skip

    accuracy = "test_accuracy"
    return {
        "uniform": {"planted ranks": against("lora")},
        "pruning": {
            "AdaLoRA from 1.5 times": against("adalora"),
            "AdaLoRA from 3 times": against("adalora 3x"),
        },
        "remedies": {"planted ranks": against("raw")},
        "abstracts": {"abstracts": paired(found, "abstracts", "test", "increlora", "rank 2")},
        "reviews": {
            "LoRA, rank 8": paired(found, "reviews", accuracy, "increlora", "rank 8"),
            "full training": paired(found, "reviews", accuracy, "increlora", "full"),
        },
        "lot": {"planted ranks": against("lot")},
    }


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    runs = found["planted"]
    grown = runs[runs.arm.isin(["increlora", "raw", "lot"])].ranks
    totals = {sum(ranks) for ranks in grown}
    adapted = adapt(tasks.planted_task(0)[0], IncreLoRA(), generator=generator(0, "init"))
    counted = sum(p.numel() for p in adapted.parameters())
    formula = sum(2 * (a + b) + 1 for a, b in zip(tasks.WIDTHS, tasks.WIDTHS[1:], strict=False))
    gap = 0.0
    x = torch.randn(256, 32, generator=generator(0, "x"))
    for adapter in adapted.adapters.values():
        with torch.no_grad():
            adapter.E0.fill_(0.1)
            before = adapted(x)
            adapter.grow(1)
            gap = max(gap, (adapted(x) - before).abs().max().item())
    return [
        Fact("budget", "Every run that grew ended with exactly ten ranks.", totals == {TOTAL},
             max(totals), "ranks, at most"),
        Fact("start", "At the start it trains 2(m + n) + 1 numbers a layer: one rank, one reserve.",
             counted == formula, counted, "numbers"),
        Fact("kept", "With the fixed scale growing moves no output by more than 1e-4.", gap < 1e-4,
             gap, "largest difference"),
    ]  # fmt: skip


LAB = Lab(
    slug="increlora",
    part="lowrank",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("sst2", "minilm", "tinyshakespeare", "cranfield"),
)
