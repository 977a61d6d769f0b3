"""What is measured about AdaLoRA: where its budget goes, and what that is worth at equal rank.

Planted ranks: a random network of five layers learns to answer as its copy does, into which a
change of rank 6 was planted in the second layer and one of rank 2 in the fourth. Network, change,
inputs and start are drawn anew for every seed. Everywhere LoRA's scale is 2, as is AdaLoRA's, and
AdaLoRA's final budget is what uniform LoRA has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.put import adapt
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.labs.beds import characters, texts
from toolkit.labs.beds.arms import Arm, sizes_of
from toolkit.labs.beds.tasks import PLANTED, planted_error, planted_task, planted_train
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.lowrank import lora
from toolkit.labs.lowrank.against import compare, paired
from toolkit.lowrank.adalora import AdaLoRA
from toolkit.lowrank.lora import LoRA

BUDGETS = (5, 10, 20)
START = 6
"""AdaLoRA's rank at the start of the planted task: 30 triplets in five layers."""
SHARES = (0, 20, 40, 60, 80, 100)
"""Parts of a run, in per cent, at which ranks are written down."""
FORMS: dict[str, dict[str, Any]] = {
    "code": {},
    "paper": {"like": "paper"},
    "none": {"orthogonality": 0.0},
}
"""The penalty: mean of norms, sum of squared norms, none."""


def plan(steps: int) -> dict[str, Any]:
    """AdaLoRA's schedule on the planted task: an eighth to warm up, the last third is fixed."""
    return {"warmup": steps // 8, "final": steps // 3, "interval": max(1, steps // 60)}


def triplets(budget: int, steps: int, **more: Any) -> AdaLoRA:
    """AdaLoRA of scale 2 that ends with ``budget`` triplets in five layers."""
    return AdaLoRA(rank=START, total_rank=budget, alpha=2.0 * START, **plan(steps), **more)


def at_random(seed: int) -> Any:
    """A scorer that ranks the triplets in an order drawn once, whatever the loss says."""

    def scores(controller: Any) -> list[Tensor]:
        widths = [len(layer.E) for layer in controller.layers]
        draw = generator(seed, "random scores")
        return list(torch.randperm(sum(widths), generator=draw).float().split(widths))

    return scores


def kept(ranks: list[int]) -> float:
    """Share of the planted pieces that these ranks can hold, in per cent."""
    held = sum(min(r, needed) for r, needed in zip(ranks, PLANTED, strict=True))
    return 100 * held / sum(PLANTED)


def planted_nothing(arm: str, seed: int) -> dict[str, Any]:
    """The student as it is."""
    student, teacher = planted_task(seed)
    parts = ("validation", "test")
    return {part: planted_error(student, teacher, seed, part) for part in parts} | {"trained": 0}


def planted_full(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Everything trains."""
    return planted_train(None, rate, seed, steps=steps)[1]


def planted_lora(arm: str, budget: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """LoRA with the same share of the budget in each of the five layers."""
    rank = budget // len(PLANTED)
    record = planted_train(LoRA(rank=rank, alpha=2.0 * rank), rate, seed, steps=steps)[1]
    return record | {"kept": kept([rank] * len(PLANTED))}


def planted_adalora(arm: str, budget: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """AdaLoRA, or with the arm "random" the same with scores drawn once; its ranks on the way."""
    options = {"scorer": at_random(seed)} if arm == "random" else {}
    adapted, record = planted_train(
        triplets(budget, steps), rate, seed, steps=steps, options=options
    )
    path: list[int] = []  # five ranks for each share of the run
    for share in SHARES:
        past = [r for r in adapted.controller.history if r.step < share * steps / 100]
        path += past[-1].counts.tolist() if past else [START] * len(PLANTED)
    return record | {"kept": kept(record["ranks"]), "path": path}


def planted_penalty(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """AdaLoRA at a budget of 10 with one form of the penalty."""
    record = planted_train(triplets(10, steps, **FORMS[arm]), rate, seed, steps=steps)[1]
    return record | {"kept": kept(record["ranks"])}


def ended(rate: float, seed: int, steps: int) -> dict[str, Any]:
    """A run that has ended: other divisors, the order of scoring, a step without the mask."""
    adapted, record = planted_train(triplets(10, steps), rate, seed, steps=steps)
    teacher = planted_task(seed)[1]
    layers = list(adapted.adapters.values())
    found = {"as it is": record["test"]}
    before = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale *= START / max(1, int(layer.alive().sum()))
    found["current rank"] = planted_error(adapted.model, teacher, seed)
    for layer, scale in zip(layers, before, strict=True):
        layer.scale = scale
    adapted.controller.remove()  # no mask from here on
    x = torch.randn(128, 32, generator=generator(seed, "one step"))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=rate)
    optimizer.zero_grad()
    F.mse_loss(adapted(x), teacher(x)).backward()
    tensors = [p for p in adapted.parameters() if p.grad is not None]

    def sensitivity() -> Tensor:
        return torch.cat([(p.detach() * p.grad).abs().flatten() for p in tensors])

    old = sensitivity()
    optimizer.step()
    found["change of a score"] = (100 * (sensitivity() - old).abs().mean() / old.mean()).item()
    found["alive with mask"] = sum(record["ranks"])
    found["alive without"] = sum(int(layer.alive().sum()) for layer in layers)
    return found


def allocate(
    bed: Any, arm: str, rank: int, rate: float, seed: int, scale: str, part: str, steps: int
) -> dict[str, Any]:
    """AdaLoRA on a bed, from twice the final rank; its record and its ranks."""
    start = 2 * rank
    method = AdaLoRA(
        rank=start, target_rank=rank, alpha=2.0 * start, warmup=steps // 10, final=steps // 3
    )
    options = (("scorer", at_random(seed)),) if arm == "random" else ()
    how = Arm("method", method, options=options)
    _, adapted, record = bed.train(how, rate, seed, scale=scale, parts=(part,))
    return record | {"ranks": list(adapted.controller.ranks().values())}


def abstracts_adalora(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """AdaLoRA of one final rank on every linear layer of the blocks; nats per character."""
    steps = characters.size(scale).steps
    return allocate(characters, arm, rank, rate, seed, scale, part, steps)


def reviews_adalora(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """AdaLoRA, or with the arm "random" the same with scores drawn once, and the head."""
    return allocate(texts, arm, rank, rate, seed, scale, part, texts.STEPS[sizes_of(scale)])


def _with(functions: Any, rank: int, **own: Any) -> dict[str, Any]:
    """LoRA's own arms of one rank, in the words of its lab, and further ones."""
    names = ("nothing", "head", "full", f"rank {rank}")
    return {name: functions[name] for name in names} | own


ABSTRACTS = _with(lora.ABSTRACTS, 2, adalora=abstracts_adalora) | {"rank 8": lora.abstracts_lora}
REVIEWS = _with(lora.REVIEWS, 1, adalora=reviews_adalora, random=reviews_adalora)
PLANTED_ARMS: dict[str, Any] = {
    "nothing": planted_nothing,
    "full": planted_full,
    "random": planted_adalora,
}
PLANTED_ARMS |= {f"lora {b}": planted_lora for b in BUDGETS}
PLANTED_ARMS |= {f"adalora {b}": planted_adalora for b in BUDGETS}


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    few = scale.pick(ci=4, cpu=8, gpu=20)
    _planted(runs, scale)
    own = {"adalora": {"rank": 2}}
    compare(runs, scale, "abstracts", ABSTRACTS, lora.arms(ABSTRACTS, (2, 8)) | own,
            lora.ABSTRACTS_START | {"adalora": 6.4e-2}, few)  # fmt: skip
    own = {"adalora": {"rank": 1}, "random": {"rank": 1}}
    compare(runs, scale, "reviews", REVIEWS, lora.arms(REVIEWS, (1,)) | own,
            lora.REVIEWS_START | {"adalora": 1.6e-2, "random": 1.6e-2}, few)  # fmt: skip


def _planted(runs: Runs, scale: Scale) -> None:
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    size = {"steps": scale.pick(ci=6, cpu=300, gpu=300)}
    options: dict[str, Any] = {
        "seeds": search_seeds(), "judged": "validation", "better": "min", "factor": 2.0,
        "width": scale.pick(ci=1, cpu=3, gpu=3),
    }  # fmt: skip
    arms: dict[str, dict[str, Any]] = {"full": {}, "random": {"budget": 10}}
    for name in ("lora", "adalora"):
        arms |= {f"{name} {b}": {"budget": b} for b in BUDGETS}
    starts = {arm: 1.6e-2 if arm.startswith("lora") else 3.2e-2 for arm in arms} | {"full": 2e-3}
    found = runs.tune(
        "planted", PLANTED_ARMS, {arm: more | size for arm, more in arms.items()}, starts,
        reported=seeds, **options,
    )  # fmt: skip
    runs.blocks("planted", blocks)
    runs.table("planted", PLANTED_ARMS, [{"arm": "nothing", "seed": seed} for seed in seeds] + [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **size}
        for arm, more in arms.items() for seed in seeds
    ])  # fmt: skip
    some = seeds[: scale.pick(ci=2, cpu=8, gpu=20)]
    rate = found["adalora 10"].rate
    runs.table("ended", ended, [{"rate": rate, "seed": seed, **size} for seed in some])
    forms = {form: dict(size) for form in FORMS if form != "code"}
    found = runs.tune("penalty", planted_penalty, forms, dict.fromkeys(forms, rate),
                      reported=some, **options)  # fmt: skip
    runs.table("penalty", planted_penalty, [
        {"arm": form, "rate": rate if form == "code" else found[form].rate, "seed": seed, **size}
        for form in FORMS for seed in some
    ])  # fmt: skip


CLAIMS = (
    Claim(
        "uniform-points",
        "At the same final rank AdaLoRA reads film reviews better than LoRA.",
        whose="paper", where="table 1", unit="points", margin=0.5,
        figure="GLUE average 88.86 against 88.15, one large encoder, 0.3 million numbers",
        quantity="test accuracy on film reviews, AdaLoRA minus LoRA, both of final rank 1",
        reason="the paper's own gain, an average over eight tasks, is 0.7 points",
        conditions=(
            Condition("film reviews", n=8, spread=0.55, support=(-100.0, 100.0), decides=True),
        ),
    ),
    Claim(
        "uniform-nats",
        "At the same final rank AdaLoRA predicts new text better than LoRA.",
        whose="paper", where="abstract", unit="nats per character", margin=0.02, better="less",
        quantity="log-loss on abstracts, AdaLoRA below LoRA, both of final rank 2",
        reason="0.02 nats are two per cent of a character's probability",
        conditions=(Condition("abstracts", n=8, spread=0.01, decides=True),),
    ),
    Claim(
        "uniform-planted",
        "Where the needed ranks differ, AdaLoRA's error is lower at the same budget.",
        whose="paper", where="abstract", unit="%", margin=50.0, better="less", scale="log",
        quantity="error on planted ranks, by how much LoRA's lies above AdaLoRA's",
        reason="less would not pay for a larger start and the settings that AdaLoRA adds",
        conditions=(
            Condition("5 triplets", n=20, spread=60.0),
            Condition("10 triplets", n=20, spread=60.0, decides=True),
            Condition("20 triplets", n=20, spread=60.0),
        ),
    ),
    Claim(
        "small-budget",
        "AdaLoRA gains most where the budget is small.",
        whose="paper", where="abstract", unit="powers of ten", margin=0.3,
        quantity="how far AdaLoRA's error on planted ranks lies below LoRA's, with 5 triplets "
        "minus with 20",
        reason="0.3 powers of ten are a factor of two",
        conditions=(Condition("planted ranks", n=20, spread=0.5, decides=True),),
    ),
    Claim(
        "finds",
        "The budget goes where the rank is needed.",
        whose="ours", unit="points", margin=25.0,
        quantity="planted pieces kept with 10 triplets (%), AdaLoRA minus random choice",
        reason="25 points are two of the eight planted pieces",
        conditions=(
            Condition("planted ranks", n=20, spread=20.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
    Claim(
        "choice",
        "On real text, too, it matters which triplets are kept.",
        whose="ours", unit="points", margin=0.5,
        quantity="test accuracy on film reviews, AdaLoRA minus the same with random choice",
        reason="the paper's own gain over LoRA, an average over eight tasks, is 0.7 points",
        conditions=(
            Condition("film reviews", n=8, spread=0.55, support=(-100.0, 100.0), decides=True),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    frame: dict[str, Any] = {"blocks": found.blocks("planted"), "tuning_seeds": search_seeds()}

    def errors(arm: str) -> dict[int, float]:
        return found.values("planted", "test", arm=arm)

    def powers(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
        return {seed: math.log10(a[seed] / b[seed]) for seed in a}

    def uniform(budget: int) -> Measured:
        return Measured(errors(f"adalora {budget}"), errors(f"lora {budget}"),
                        control=errors("full"), nothing=errors("nothing"), **frame)  # fmt: skip

    gain = {b: powers(errors(f"lora {b}"), errors(f"adalora {b}")) for b in BUDGETS}
    nothing = errors("nothing")
    share = {arm: found.values("planted", "kept", arm=arm) for arm in ("adalora 10", "random")}
    accuracy = "test_accuracy"
    return {
        "uniform-points": {
            "film reviews": paired(found, "reviews", accuracy, "adalora", "rank 1"),
        },
        "uniform-nats": {"abstracts": paired(found, "abstracts", "test", "adalora", "rank 2")},
        "uniform-planted": {f"{b} triplets": uniform(b) for b in BUDGETS},
        "small-budget": {
            "planted ranks": Measured(
                gain[5], gain[20], control=powers(nothing, errors("full")),
                nothing=dict.fromkeys(nothing, 0.0), **frame,
            ),
        },
        "finds": {"planted ranks": Measured(share["adalora 10"], share["random"], **frame)},
        "choice": {"film reviews": paired(found, "reviews", accuracy, "adalora", "random")},
    }  # fmt: skip


def fresh(budget: int = 10) -> Any:
    """AdaLoRA on the untrained student of seed 0, ready for ten steps."""
    adapted = adapt(planted_task(0)[0], AdaLoRA(rank=START, total_rank=budget, alpha=2.0 * START),
                    generator=generator(0, "init"))  # fmt: skip
    return adapted.attach(torch.optim.Adam(adapted.parameters()), total_steps=10)


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    adapted, x = fresh(), torch.randn(64, 32, generator=generator(0, "x"))
    sizes = [(m.out_features, m.in_features) for m in planted_task(0)[0] if hasattr(m, "weight")]
    count = sum(START * (m + n + 1) for m, n in sizes)
    trained = sum(p.numel() for p in adapted.parameters())
    with torch.no_grad():
        start = (adapted(x) - planted_task(0)[0](x)).abs().max().item()
        for layer in adapted.adapters.values():
            nn.init.ones_(layer.E)
        adapted.controller.prune(START * len(PLANTED) - 1)  # take one; all scores are 0
        left = sum(adapted.controller.ranks().values())
        for layer in adapted.adapters.values():
            layer.E[::2] = 1.0
        before = adapted(x)
        for layer in adapted.adapters.values():
            layer.compact()
        gap = ((adapted(x) - before).abs().max() / before.abs().max()).item()
    return [
        Fact("count", "AdaLoRA of initial rank r trains r(m + n + 1) numbers for a layer.",
             trained == count, trained, "numbers"),
        Fact("start", "Before the first step the network answers as its base.", start == 0.0,
             start, "largest difference"),
        Fact("ties", "All scores equal: told to take one triplet of thirty, pruning takes all.",
             left == 0, left, "triplets left"),
        Fact("compact", "Dropping the triplets that are off leaves the outputs alone, to 1e-5.",
             gap < 1e-5, gap, "largest relative difference"),
    ]  # fmt: skip


LAB = Lab(
    slug="adalora",
    part="lowrank",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("sst2", "minilm", "tinyshakespeare", "cranfield"),
)
