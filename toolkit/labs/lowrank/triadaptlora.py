"""What is measured about TriAdaptLoRA: where its score puts the ranks, and what the split is worth.

Planted ranks: a random network of five layers learns to answer as its copy does, into which a
change of rank 6 was planted in the second layer and one of rank 2 in the fourth. Network, change,
inputs and start are drawn anew for every seed. The budget is the sum of the five ranks at the end.
Everywhere the scale is 2.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.put import adapt
from toolkit.core.adapt.steps.growth import block_generator
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.labs.beds import characters, texts
from toolkit.labs.beds.arms import Arm, sizes_of
from toolkit.labs.beds.tasks import PLANTED, WIDTHS, planted_error, planted_task, planted_train
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.lowrank import lora
from toolkit.labs.lowrank.against import compare, paired
from toolkit.lowrank.lora import LoRA
from toolkit.lowrank.triadaptlora import TriAdaptLoRA
from toolkit.lowrank.triadaptlora.layer import TriAdaptLoRALayer, assemble
from toolkit.lowrank.triadaptlora.triangular import planned

LAYERS = len(PLANTED)
SHARES = tuple(range(0, 101, 10))
"""Parts of a run, in per cent, at which ranks are written down."""
STARTS = {"zero core": "zero_core", "main file": "identity", "single": "gaussian", "dead": ""}
"""How the author's files start: see :func:`first_steps`."""
GROWTHS: dict[str, dict[str, Any]] = {
    "fixed scale": {},
    "current rank": {"rescale": "rank"},
    "main file": {"init": "identity", "rescale": "constant"},
    "single": {"init": "gaussian", "rescale": "rank"},
}
"""Files that differ in what a growth does to the output: see :func:`thrown`."""


def grown(steps: int, target: int, looks: int = 20, **more: Any) -> TriAdaptLoRA:
    """TriAdaptLoRA of scale 2: from rank 1 to ``target`` on average, after a tenth to warm up.

    A layer gains half the target at a time, as in the author's files.
    """
    pace = {"warmup": steps // 10, "interval": max(1, steps // looks)}
    return TriAdaptLoRA(target_rank=target, alpha=2.0 * target, **pace | more)


class SquareLayer(TriAdaptLoRALayer):
    """The core as one square matrix: U's diagonal blocks count no more, so nothing counts twice.

    U keeps these r numbers, which then have no gradient. For an optimizer that goes entry by entry
    this is a single trained matrix of shape (r, r).
    """

    def core(self) -> Tensor:
        lower, upper = self.blocks("L"), []
        for c, block in zip(self.widths, self.blocks("U"), strict=True):
            upper.append(torch.cat([block[:-c], torch.zeros_like(block[-c:])]))
        return assemble(lower, upper, self.where)


@dataclass(frozen=True)
class SquareCore(TriAdaptLoRA):
    """TriAdaptLoRA without the split."""

    def layer(self, site: Any, generator: torch.Generator | None) -> TriAdaptLoRALayer:
        return SquareLayer(self, site, generator)


@dataclass(frozen=True)
class WiderLast:
    """LoRA of rank 2, and 3 in the last of five layers: no fewer numbers than a core of rank 2."""

    info = LoRA.info

    def build(self, spec: Any, generator: torch.Generator | None = None) -> Any:
        rank = 3 if spec.rows == WIDTHS[-1] else 2
        return LoRA(rank=rank, alpha=2.0 * rank).build(spec, generator)


def by_lot(controller: Any) -> Tensor:
    """Scores drawn anew at each look, from the run's own seed."""
    source = block_generator(controller.layers[0].seed.cpu(), 10_000 + controller.step)
    return torch.rand(len(controller.layers), generator=source)


def by_need(controller: Any) -> Tensor:
    """What each of five layers still lacks: nobody knows this but who planted it."""
    ranks = [layer.rank for layer in controller.layers]
    return torch.tensor([float(p - r) for p, r in zip(PLANTED, ranks, strict=True)])


def alike(controller: Any) -> Tensor:
    """The same score for all, so that all grow at once."""
    return torch.ones(LAYERS)


def without_brake(controller: Any) -> Tensor:
    """The rise of the core's norm itself, not divided by its number of blocks."""
    blocks = torch.tensor([float(len(layer.widths)) for layer in controller.layers])
    now = controller.norms * blocks
    before = getattr(controller, "plain", torch.zeros_like(now))
    controller.plain = now
    return now - before


SCORERS = {"lot": by_lot, "right": by_need, "everywhere": alike, "no brake": without_brake}


def held(ranks: Any) -> float:
    """Share of the planted pieces that these ranks can hold, in per cent."""
    return 100 * sum(map(min, ranks, PLANTED)) / sum(PLANTED)


def planted_nothing(arm: str, seed: int) -> dict[str, Any]:
    """The student as it is."""
    student, teacher = planted_task(seed)
    parts = ("validation", "test")
    return {part: planted_error(student, teacher, seed, part) for part in parts} | {"trained": 0}


def planted_full(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Everything trains."""
    return planted_train(None, rate, seed, steps=steps)[1]


def planted_lora(arm: str, budget: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """LoRA of one rank in all layers, or with the arm "more" one rank more in the last."""
    rank = budget // LAYERS
    method = WiderLast() if arm == "more" else LoRA(rank=rank, alpha=2.0 * rank)
    return planted_train(method, rate, seed, steps=steps)[1] | {"held": held([rank] * LAYERS)}


def planted_grown(arm: str, budget: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Growth by the score, by lot, to the right places, all at once, or without split or brake.

    ``path``: five ranks at each of :data:`SHARES`; ``counted``: trained numbers that act.
    """
    target = budget // LAYERS
    method = grown(steps, target, 10 * (1 + (target == 2)), block=1)
    if arm == "exponential":
        method = replace(method, growth="exponential")
    if arm == "square":
        method = SquareCore(**vars(method))
    if arm == "everywhere":
        method = replace(method, interval=1, warmup=0, block=target - 1)
    options = {"scorer": SCORERS[arm]} if arm in SCORERS else {}
    adapted, record = planted_train(method, rate, seed, steps=steps, options=options)
    history, path = adapted.controller.history, []
    for share in SHARES:
        past = [h for h in history if h.step <= share * steps / 100]
        path += (past or history[:1])[-1].ranks.values()
    spare = budget if arm == "square" else 0
    more = {"path": path, "held": held(record["ranks"]), "counted": record["trained"] - spare}
    return record | more


def first_steps(start: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Loss of the last of some first steps over that of the first, at rank 1 without a penalty.

    "dead" is the start of two files in which both B and C are 0.
    """
    student, teacher = planted_task(seed)
    init: Any = STARTS[start] or "zero_core"
    method = TriAdaptLoRA(total_rank=LAYERS, target_rank=2, alpha=4.0, init=init, orthogonality=0.0)
    adapted = adapt(student, method, generator=generator(seed, "init"))
    if start == "dead":
        for layer in adapted.adapters.values():
            nn.init.zeros_(layer.get_parameter("B0"))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=rate)
    adapted.attach(optimizer, total_steps=steps)
    losses = []
    for x in torch.randn(steps, 128, 32, generator=generator(seed, "train")):
        optimizer.zero_grad()
        loss = F.mse_loss(adapted(x), teacher(x))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    few = max(1, steps // 10)
    return {"left": 100 * sum(losses[-few:]) / sum(losses[:few])}


def thrown(file: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Change of the output when every layer grows by one, in per cent of what was learned."""
    method = grown(steps, 2, block=1, total_rank=5, **GROWTHS[file])
    adapted, _ = planted_train(method, rate, seed, steps=steps)
    x = torch.randn(512, 32, generator=generator(seed, "thrown"))
    with torch.no_grad():
        before = adapted(x)
        learned = before - planted_task(seed)[0](x)
        for layer in adapted.adapters.values():
            layer.grow(1)
        return {"thrown": (100 * (adapted(x) - before).norm() / learned.norm()).item()}


def _read(bed: Any, arm: str, target: int, steps: int, *run: Any) -> dict[str, Any]:
    rate, seed, scale, part = run
    options = (("scorer", by_lot),) if arm == "lot" else ()
    how = Arm("method", grown(steps, target), options=options)
    _, adapted, record = bed.train(how, rate, seed, scale=scale, parts=(part,))
    ranks = adapted.controller.ranks()
    return record | {"layers": list(ranks), "ranks": list(ranks.values())}


def abstracts_triadaptlora(
    arm: str, target: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """TriAdaptLoRA, or the same with growth by lot, on every linear layer of the blocks."""
    return _read(characters, arm, target, characters.size(scale).steps, rate, seed, scale, part)


def reviews_triadaptlora(
    arm: str, target: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """TriAdaptLoRA on the twelve linear layers of the upper blocks, and the head."""
    return _read(texts, arm, target, texts.STEPS[sizes_of(scale)], rate, seed, scale, part)


def _with(functions: Any, rank: int, **own: Any) -> dict[str, Any]:
    """LoRA's own arms of one rank, in the words of its lab, and further ones."""
    names = ("nothing", "head", "full", f"rank {rank}")
    return {name: functions[name] for name in names} | own


ABSTRACTS = _with(lora.ABSTRACTS, 2, triadaptlora=abstracts_triadaptlora,
                  lot=abstracts_triadaptlora)  # fmt: skip
REVIEWS = _with(lora.REVIEWS, 8, triadaptlora=reviews_triadaptlora)
TEN = {"nothing": planted_nothing, "full": planted_full, "lora": planted_lora,
       "more": planted_lora}  # fmt: skip
TEN |= dict.fromkeys(("everywhere", "triadaptlora", "lot", "right", "square"), planted_grown)
TWENTY = {"lora": planted_lora}
TWENTY |= dict.fromkeys(("triadaptlora", "lot", "exponential"), planted_grown)


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    few = scale.pick(ci=4, cpu=8, gpu=20)
    steps = {"steps": scale.pick(ci=10, cpu=240, gpu=240)}
    rate = _planted(runs, scale, "ten ranks", TEN, {"budget": 10} | steps)
    _planted(runs, scale, "twenty ranks", TWENTY, {"budget": 20} | steps)
    seeds = [seed for block in two_blocks(few) for seed in block]
    some = {"rate": [rate], "seed": seeds[: scale.pick(ci=1, cpu=8, gpu=20)]}
    short = some | {"steps": [scale.pick(ci=10, cpu=100, gpu=100)]}
    runs.table("first steps", first_steps, grid(start=list(STARTS), **short | {"rate": [1e-2]}))
    runs.table("thrown", thrown, grid(file=list(GROWTHS), **short))
    runs.table("no brake", planted_grown, grid(
        arm=["no brake"], budget=[10], steps=[steps["steps"]], **some
    ))  # fmt: skip
    own = {"triadaptlora": {"target": 2}, "lot": {"target": 2}}
    compare(runs, scale, "abstracts", ABSTRACTS, lora.arms(ABSTRACTS, (2,)) | own,
            lora.ABSTRACTS_START | dict.fromkeys(own, 6.4e-2), few)  # fmt: skip
    own = {"triadaptlora": {"target": 8}}
    compare(runs, scale, "reviews", REVIEWS, lora.arms(REVIEWS, (8,)) | own,
            lora.REVIEWS_START | {"triadaptlora": 1.6e-2}, few)  # fmt: skip


def _planted(runs: Runs, scale: Scale, name: str, functions: Any, size: Any) -> float:
    """One budget on planted ranks; returns the rate of growth by the score."""
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    arms = {arm: dict(size) for arm in functions if arm != "nothing"}
    arms |= {"full": {"steps": size["steps"]}} if "full" in arms else {}
    starts = {arm: 3.2e-2 if functions[arm] is planted_lora else 0.128 for arm in arms}
    found = runs.tune(
        name, functions, arms, starts | ({"full": 4e-3} if "full" in arms else {}),
        seeds=search_seeds(), reported=seeds, judged="validation", better="min", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks(name, blocks)
    nothing = [{"arm": "nothing", "seed": seed} for seed in seeds if "nothing" in functions]
    runs.table(name, functions, nothing + [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed}
        for arm, more in arms.items() for seed in seeds
    ])  # fmt: skip
    return found["triadaptlora"].rate


ERRORS: dict[str, Any] = {"unit": "%", "better": "less", "scale": "log"}
NATS: dict[str, Any] = {
    "unit": "nats per character",
    "margin": 0.02,
    "better": "less",
    "reason": "0.02 nats are two per cent of a character's probability",
}
CLAIMS = (
    Claim(
        "uniform-nats",
        "At the same final rank it predicts new text better than LoRA.",
        whose="paper", where="abstract", **NATS,
        quantity="log-loss on abstracts, TriAdaptLoRA below LoRA, both of final rank 2 on average",
        conditions=(Condition("abstracts", n=8, spread=0.01, decides=True),),
    ),
    Claim(
        "uniform-points",
        "At the same final rank it reads film reviews better than LoRA.",
        whose="paper", where="abstract", unit="points", margin=1.0,
        quantity="test accuracy on film reviews, TriAdaptLoRA minus LoRA, both of final rank 8 on "
        "average",
        reason="one point is less than the spread over test sets of this size",
        conditions=(
            Condition("film reviews", n=8, spread=1.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
    Claim(
        "schedule",
        "Linear growth ends with a lower error than exponential growth.",
        whose="paper", where="abstract", margin=20.0, **ERRORS,
        quantity="error on planted ranks, by how much exponential growth lies above linear growth",
        reason="another first draw changes the error by as much",
        conditions=(Condition("20 ranks", n=20, spread=30.0, decides=True),),
    ),
    Claim(
        "places-nats",
        "On real text the score puts the ranks in better places than lots do.",
        whose="ours", **NATS,
        quantity="log-loss on abstracts, growth by score below growth by lot",
        conditions=(Condition("abstracts", n=8, spread=0.01, decides=True),),
    ),
    Claim(
        "places",
        "Where few layers need rank, growth by score ends with a lower error than the same core "
        "with its ranks elsewhere.",
        whose="ours", margin=25.0, **ERRORS,
        quantity="error on planted ranks, by how much the other places lie above the score's",
        reason="a quarter is the least that would pay for looking",
        conditions=(
            Condition("random places", n=20, spread=40.0, decides=True),
            Condition("the same rank everywhere", n=20, spread=40.0),
            Condition("random places, 20 ranks", n=20, spread=40.0),
        ),
    ),
    Claim(
        "split",
        "With as many numbers trained, the split core ends with a lower error.",
        whose="ours", margin=25.0, **ERRORS,
        quantity="error on planted ranks, by how much the other arm lies above the split core",
        reason="a quarter is more than a few per cent of numbers more or less explain",
        conditions=(
            Condition("one square core", n=20, spread=40.0, decides=True),
            Condition("LoRA, no core", n=20, spread=40.0),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    nothing = found.values("ten ranks", "test", arm="nothing")
    full = found.values("ten ranks", "test", arm="full")

    def against(other: str, ours: str = "triadaptlora", name: str = "ten ranks") -> Measured:
        """The error of one arm and of another; seeds are those of the ten ranks."""
        return Measured(
            found.values(name, "test", arm=ours), found.values(name, "test", arm=other),
            control=full, nothing=nothing, blocks=found.blocks(name), tuning_seeds=search_seeds(),
        )  # fmt: skip

    return {
        "uniform-nats": {"abstracts": paired(found, "abstracts", "test", "triadaptlora", "rank 2")},
        "uniform-points": {
            "film reviews": paired(found, "reviews", "test_accuracy", "triadaptlora", "rank 8"),
        },
        "schedule": {"20 ranks": against("exponential", name="twenty ranks")},
        "places-nats": {"abstracts": paired(found, "abstracts", "test", "triadaptlora", "lot")},
        "places": {
            "random places": against("lot"),
            "the same rank everywhere": against("everywhere"),
            "random places, 20 ranks": against("lot", name="twenty ranks"),
        },
        "split": {
            "one square core": against("square"),
            "LoRA, no core": against("more", "everywhere"),
        },
    }


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    totals = {sum(ranks) for ranks in found["ten ranks"].ranks if isinstance(ranks, list)}
    model = planted_task(0)[0].double()
    adapted = adapt(model, TriAdaptLoRA(block=1), generator=generator(0, "init"))
    x = torch.randn(64, 32, generator=generator(0, "x"), dtype=torch.float64)
    with torch.no_grad():
        for layer in adapted.adapters.values():
            layer.L0.fill_(0.5)
        before = adapted(x)
        for layer in adapted.adapters.values():
            layer.grow(1)
            layer.grow(2)
        gap = (adapted(x) - before).abs().max().item()
    sizes = [m + n for m, n in itertools.pairwise(WIDTHS)]
    formula = sum(4 * size + 2 * (1 * 1 + 1 * 2 + 2 * 4) for size in sizes)
    trained = sum(p.numel() for p in adapted.parameters())
    plan: dict[str, Any] = {
        "block": 8,
        "growth": "linear",
        "warmup": 0,
        "interval": 10,
        "total_steps": 100,
    }
    past = planned(12, 51, 12, overshoot=True, **plan)[-1]
    return [
        Fact("budget", "Every run that grew to ten ranks ended with exactly ten.", totals == {10},
             max(totals), "ranks, at most"),
        Fact("growth", "With the default start a growth changes no output, to 1e-12.", gap < 1e-12,
             gap, "largest difference"),
        Fact("count", "Blocks of 1, 1 and 2 ranks hold r(m + n) + 2(1 + 2 + 8) numbers a layer.",
             trained == formula, trained, "numbers"),
        Fact("past", "By the author's rule blocks of 8 pass a target of 51 ranks.",
             past > 51, past, "ranks"),
    ]  # fmt: skip


LAB = Lab(
    slug="triadaptlora",
    part="lowrank",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("sst2", "minilm", "tinyshakespeare", "cranfield"),
)
