"""What is measured about SPT: what its places, its modules and its entries are worth at one budget.

Turned digits: the bed's small ViT reads upright MNIST and is adapted to digits turned by 90
degrees. Every method trains as many numbers as LoRA of rank 1 on all linear layers of the blocks,
and the head beside it. Dropout and drop path are 0 in every arm, since runs are short. SPT scores
512 of the run's own 1,000 images.

Planted changes: a random network of four layers learns to answer as its copy does, in which layer 2
has a change of rank 3 and layer 3 a change of 16 single entries.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, images
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.lowrank.lora import LoRA
from toolkit.select.spt import SPT
from toolkit.select.spt.allocation import Ranking, allocate
from toolkit.select.spt.plan import Plan, candidates
from toolkit.select.spt.sensitivity import sensitivity

STILL = {"dropout": 0.0, "drop_path": 0.0}
RANK = 4
STEPS = {"ci": 6, "cpu": 120}
OPERATIONS = ("query", "key", "value", "output", "up", "down")
PASSES = (1, 2, 4, 8, 16)
ALPHAS = (1, 3, 10, 30)
SHARES = (0.5, 1.0, 2.0)
"""Budgets of the tables, as multiples of LoRA's numbers."""
SPTS = ("spt", "elsewhere", "modules", "entries")
HALVES = {"modules": "structured", "entries": "entries"}
FORMS = ("module", "whole vector", "entries")


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean log-loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of a batch."""
    return F.mse_loss(model(batch[0]), batch[1])


@functools.lru_cache(maxsize=2)
def even(scale: str) -> int:
    """Numbers of LoRA of rank 1 on every linear layer of the blocks."""
    adapted = adapt(images.network("vit", scale), LoRA(rank=1), targets=["blocks.*"])
    return adapted.costs()["trained"]


def elsewhere(scores: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same scores at other places: tensors of one shape trade theirs, entries are shuffled.

    So as many tensors of each shape get a module, and as many entries move.
    """
    draw = generator(seed, "elsewhere")
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, score in scores.items():
        shapes.setdefault(tuple(score.shape), []).append(name)
    found = {}
    for shape, names in shapes.items():
        for name, k in zip(names, torch.randperm(len(names), generator=draw).tolist(), strict=True):
            order = torch.randperm(scores[name].numel(), generator=draw)
            found[name] = scores[names[k]].reshape(-1)[order].view(shape)
    return {name: found[name] for name in scores}


def planned(
    arm: str, model: nn.Module, batches: Any, loss: Any, budget: int, rank: int, seed: int,
    train: tuple[str, ...], targets: Any,
) -> Plan:  # fmt: skip
    """The plan of SPT, of its modules or entries alone, or of the same decisions elsewhere."""
    half = HALVES.get(arm, "both")
    method = SPT(budget=budget, rank=rank, half=half, **STILL)  # type: ignore[arg-type]
    plan = method.plan(model, batches, loss, targets, train=train)
    if arm != "elsewhere":
        return plan
    moved = elsewhere(plan.scores, seed)
    return method.plan(model, targets=targets, train=train, scores=moved)


def forms(plan: Plan) -> dict[str, int]:
    """Numbers that train in modules, in whole vectors and as single entries."""
    table = plan.table().groupby("form")["cost"].sum()
    every = {"module": "lora", "whole vector": "whole", "entries": "entries"}
    return {name: int(table.get(form, 0)) for name, form in every.items()}


def examples(seed: int, scale: str, shift: str = "rotated") -> tuple[Tensor, Tensor]:
    """The images of one seed, and their labels."""
    x, y = images.load(scale).pool
    chosen = torch.randperm(len(y), generator=generator(seed, "examples"))
    chosen = chosen[: images.size(scale).examples]
    return images.shifted(x[chosen], shift), y[chosen]


def scored(x: Tensor, y: Tensor, count: int = 16) -> list[tuple[Tensor, Tensor]]:
    """The first batches of 32, for the scores."""
    return list(zip(x.split(32), y.split(32), strict=True))[:count]


def turned(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """One arm on turned digits, judged on "validation" (2,000 images) or "test" (10,000)."""
    torch.set_num_threads(1)
    model, this = images.network("vit", scale), images.size(scale)
    x, y = examples(seed, scale)
    method: Any = None
    more: dict[str, int] = {}
    if arm == "lora":
        method = LoRA(rank=1, alpha=2.0)
    elif arm in SPTS:
        method = planned(
            arm,
            model,
            scored(x, y),
            cross_entropy,
            even(scale),
            RANK,
            seed,
            ("head",),
            ["blocks.*"],
        )
        more = {"planned": method.total} | forms(method)
    steps = STEPS[arms.sizes_of(scale)]

    def draw() -> Iterator[tuple[Tensor, Tensor]]:
        order = generator(seed, "order")
        for _ in range(steps):
            rows = torch.randint(len(y), (this.batch,), generator=order)
            yield x[rows], y[rows]

    if arm != "nothing":
        fit(
            model, method, rate, seed, draw(), F.cross_entropy, steps=steps,
            decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
            targets=["blocks.*"] if arm == "lora" else None,
            train=() if arm == "full" else ("head",),
        )  # fmt: skip
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = 2000 if part == "validation" else 10_000
    shown, labels = (t[:count] for t in getattr(images.load(scale), part))
    found = arms.judged(arms.scores(model, images.shifted(shown, "rotated")), labels)
    return {
        part: found["loss"], "accuracy": found["accuracy"],
        "trained": 0 if arm == "nothing" else trained, **more,
    }  # fmt: skip


def profile(scores: Mapping[str, Tensor], scale: str) -> tuple[list[float], list[float]]:
    """Share of the most sensitive 1 % that lies in each operation, and in each block, in %."""
    ranking = Ranking(scores)
    tau = max(1, len(ranking) // 100)
    counts = dict(zip(scores, ranking.counts([tau])[0].tolist(), strict=True))
    depth = images.size(scale).depth
    kinds = [sum(c for n, c in counts.items() if f".{o}.weight" in n) for o in OPERATIONS]
    blocks = [sum(c for n, c in counts.items() if f"blocks.{k}." in n) for k in range(depth)]
    whole = max(1, sum(kinds))
    return [100 * k / whole for k in kinds], [100 * b / tau for b in blocks]


def apart(one: list[float], other: list[float]) -> float:
    """Half the sum of absolute differences of two profiles: what would have to move, in points."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def places(seed: int, scale: str) -> dict[str, Any]:
    """Where the sensitive entries lie, on two tasks; and how many batches it takes to find them.

    The choice from few batches is compared with one from 16 batches of other images.
    """
    torch.set_num_threads(1)
    model = images.network("vit", scale)
    names = list(_shapes(model))
    found: dict[str, Any] = {}
    for shift in images.SHIFTS:
        x, y = examples(seed, scale, shift)
        scores = sensitivity(model, names, scored(x, y), cross_entropy)
        kinds, blocks = profile(scores, scale)
        found |= {f"{shift} operations": kinds, f"{shift} blocks": blocks}
    for what in ("operations", "blocks"):
        found[f"{what} apart"] = apart(found[f"rotated {what}"], found[f"inverted {what}"])
    x, y = examples(seed, scale)
    others = sensitivity(model, names, scored(*examples(seed + 5000, scale)), cross_entropy)
    chosen = _most(others)
    for count in PASSES:
        few = _most(sensitivity(model, names, scored(x, y, count), cross_entropy))
        found[f"{count} batches"] = 100 * len(few & chosen) / len(chosen)
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Candidates of the bed's blocks, and their shapes."""
    own = {}
    for name in candidates(model, ["blocks.*"], {}):
        for key, p in model.get_submodule(name).named_parameters():
            own[f"{name}.{key}"] = tuple(p.shape)
    return own


def _most(scores: Mapping[str, Tensor]) -> set[int]:
    ranking = Ranking(scores)
    return set(ranking.order[: max(1, len(ranking) // 100)].tolist())


def tables(seed: int, scale: str) -> dict[str, Any]:
    """Share of the numbers, in %, by easiness, budget, operation and form; vectors come last."""
    model = images.network("vit", scale)
    shapes = _shapes(model)
    scores = sensitivity(model, shapes, scored(*examples(seed, scale)), cross_entropy)
    rows: list[float] = []
    for alpha in ALPHAS:
        for share in SHARES:
            method = SPT(budget=round(share * even(scale)), rank=RANK, alpha=float(alpha))
            spent = allocate(method, scores, shapes=shapes)
            for operation in (*OPERATIONS, "vectors"):
                for form in FORMS:
                    cost = sum(
                        d.cost for n, d in spent.decisions.items()
                        if _operation(n) == operation and _form(d.form) == form
                    )  # fmt: skip
                    rows.append(100 * cost / spent.total)
    return {"shares": rows}


def _operation(name: str) -> str:
    layer, _, key = name.rpartition(".")
    kind = layer.rpartition(".")[2]
    return kind if key == "weight" and kind in OPERATIONS else "vectors"


def _form(form: str) -> str:
    return {"lora": "module", "adapter": "module", "whole": "whole vector"}.get(form, form)


WIDTH, ENTRIES, BUDGET = 32, 16, 256
"""Of the planted task; 256 numbers are LoRA of rank 1 on its four layers."""


@functools.lru_cache(maxsize=64)
def planted(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A network, and its copy with a change of rank 3 in layer 2 and 16 changed entries in 3."""
    draw = generator(seed, "planted")
    base, teacher = nets.planted_teacher([0, 3, 0, 0], [WIDTH] * 5, 1.5, generator=draw)
    layers = [m for m in teacher if isinstance(m, nn.Linear)]
    with torch.no_grad():
        where = torch.randperm(WIDTH * WIDTH, generator=draw)[:ENTRIES]
        signs = 2.0 * torch.randint(2, (ENTRIES,), generator=draw) - 1
        layers[2].weight.view(-1)[where] += 1.5 * signs
    return base, teacher


def answer(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One arm on the planted task: its error, and the share of its numbers in changed layers."""
    torch.set_num_threads(1)
    base, teacher = planted(seed)
    model = arms.fresh(base)
    draws = {what: generator(seed, what) for what in ("validation", "test", "scores", "inputs")}

    def batch(what: str, count: int = 64) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, WIDTH, generator=draws[what])
        with torch.no_grad():
            return x, teacher(x)

    held = {part: batch(part, 1000) for part in ("validation", "test")}
    method: Any = LoRA(rank=1, alpha=2.0) if arm == "lora" else None
    more: dict[str, Any] = {}
    if arm in SPTS:
        data = [batch("scores") for _ in range(16)]
        method = planned(arm, model, data, squared, BUDGET, 3, seed, (), None)
        table = method.table()
        inside = table.parameter.str.match(r"[24]\.weight")
        more = {"right": 100 * table[inside].cost.sum() / method.total} | forms(method)
    if arm != "nothing":
        fit(
            model, method, rate, seed, (batch("inputs") for _ in range(steps)), F.mse_loss,
            steps=steps, decay=lambda step, of: arms.warm(step, of) * rates.linear(step, of),
        )  # fmt: skip
    with torch.no_grad():
        errors = {part: F.mse_loss(model(x), y).item() for part, (x, y) in held.items()}
    return errors | more


TURNED = dict.fromkeys(("nothing", "head", "lora", *SPTS, "full"), turned)
PLANTED = dict.fromkeys(("nothing", "lora", *SPTS, "full"), answer)
TURNED_START = {"head": 3e-2, "lora": 1.6e-2, "full": 2e-3, "entries": 1.6e-2} | dict.fromkeys(
    ("spt", "elsewhere", "modules"), 1.6e-2
)
PLANTED_START = dict.fromkeys(PLANTED, 1e-2)
"""Middles of the first rates tried."""


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: searches for rates first, then the runs that are reported."""
    few, many = scale.pick(ci=4, cpu=8, gpu=20), scale.pick(ci=4, cpu=20, gpu=20)
    blocks = two_blocks(many)
    seeds = [seed for block in blocks for seed in block]
    runs.blocks("places", blocks)
    runs.table("places", places, grid(seed=seeds, scale=scale.name))
    runs.table("tables", tables, grid(seed=[0], scale=scale.name))
    steps = {"steps": scale.pick(ci=6, cpu=250, gpu=250)}
    _run(runs, scale, "planted", PLANTED, PLANTED_START, many, steps, steps)
    where = {"scale": scale.name}
    judged = ({**where, "part": "validation"}, {**where, "part": "test"})
    _run(runs, scale, "turned", TURNED, TURNED_START, few, *judged)


def _run(
    runs: Runs, scale: Scale, name: str, functions: Any, starts: Any, n: int,
    search: dict[str, Any], report: dict[str, Any],
) -> None:  # fmt: skip
    blocks = two_blocks(n)
    seeds = [seed for block in blocks for seed in block]
    trains = [arm for arm in functions if arm != "nothing"]
    found = runs.tune(
        name, functions, dict.fromkeys(trains, search), {arm: starts[arm] for arm in trains},
        seeds=search_seeds(), reported=seeds, judged="validation", better="min", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks(name, blocks)
    rates_of = {"nothing": 1.0} | {arm: found[arm].rate for arm in trains}
    runs.table(name, functions, [
        {"arm": arm, "rate": rates_of[arm], "seed": seed, **report}
        for arm in functions for seed in seeds
    ])  # fmt: skip


NATS = "0.02 nats are two per cent of the probability of the right answer"
CLAIMS = (
    Claim(
        "uniform",
        "At equal numbers SPT reads better than LoRA on every layer.",
        whose="paper", unit="nats", margin=0.02, better="less", reason=NATS,
        quantity="log-loss on turned digits, SPT below LoRA of rank 1",
        conditions=(Condition("turned digits", n=8, spread=0.015, decides=True),),
    ),
    Claim(
        "mix",
        "Modules and single entries together read better than either alone.",
        whose="paper", unit="nats", margin=0.02, better="less", reason=NATS,
        quantity="log-loss on turned digits, SPT below one half of it",
        conditions=(
            Condition("modules alone", n=8, spread=0.015, decides=True),
            Condition("entries alone", n=8, spread=0.015),
        ),
    ),
    Claim(
        "places",
        "The same modules and entries at places drawn at random read worse.",
        whose="ours", unit="nats", margin=0.02, better="less", reason=NATS,
        quantity="log-loss on turned digits, SPT below the same decisions elsewhere",
        conditions=(Condition("turned digits", n=8, spread=0.015, decides=True),),
    ),
    Claim(
        "profiles",
        "Which operations are sensitive is alike from task to task; which depth is not.",
        whose="paper", unit="points", margin=5.0,
        quantity="share of the most sensitive 1 % that lies elsewhere on inverted digits than on "
        "turned ones, by depth minus by operation",
        reason="five points are a twentieth of what is chosen",
        conditions=(
            Condition("turned against inverted", n=20, spread=5.0, support=(-100.0, 100.0),
                      decides=True),
        ),
    ),
    Claim(
        "few",
        "Four batches choose nearly what sixteen choose.",
        whose="ours", unit="points", margin=5.0, than=-15.0,
        quantity="overlap with the choice from 16 batches of other images, 4 batches minus 16, "
        "from 15 points below",
        reason="five points are a twentieth of what is chosen",
        conditions=(
            Condition("turned digits", n=20, spread=4.0, support=(-85.0, 115.0), decides=True),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    search = search_seeds()
    loss = {arm: found.values("turned", "test", arm=arm) for arm in TURNED}

    def below(other: str) -> Measured:
        return Measured(
            loss["spt"], loss[other], control=loss["full"], nothing=loss["nothing"],
            blocks=found.blocks("turned"), tuning_seeds=search,
        )  # fmt: skip

    def seen(ours: str, theirs: str) -> Measured:
        return Measured(
            found.values("places", ours), found.values("places", theirs),
            blocks=found.blocks("places"), tuning_seeds=search,
        )  # fmt: skip

    return {
        "uniform": {"turned digits": below("lora")},
        "mix": {"modules alone": below("modules"), "entries alone": below("entries")},
        "places": {"turned digits": below("elsewhere")},
        "profiles": {"turned against inverted": seen("blocks apart", "operations apart")},
        "few": {"turned digits": seen("4 batches", "16 batches")},
    }


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    base = planted(0)[0].double()
    x = torch.randn(64, WIDTH, generator=generator(0, "x"), dtype=torch.float64)
    y = torch.randn(64, WIDTH, generator=generator(0, "y"), dtype=torch.float64)
    model = arms.fresh(base)
    plan = planned("spt", model, [(x, y)], squared, BUDGET, 3, 0, (), None)
    moved = method_total(plan, 1)
    adapted = adapt(model, plan, generator=generator(0, "init"))
    trained = adapted.costs()["trained"]
    with torch.no_grad():
        for p in adapted.parameters():
            p.normal_(generator=generator(0, "numbers"))
        beside = model(x)
        adapted.merge()
        gap = (model(x) - beside).abs().max().item()
    return [
        Fact("count", "The numbers that train are those that the plan counted.",
             trained == plan.total, trained, "numbers"),
        Fact("merge", "Merged and unmerged outputs agree to 1e-12 in double precision.",
             gap < 1e-12, gap, "largest difference"),
        Fact("elsewhere", "The same decisions elsewhere cost as many numbers.",
             moved == plan.total, moved, "numbers"),
    ]  # fmt: skip


def method_total(plan: Plan, seed: int) -> int:
    """What the decisions of a plan cost with its scores at other places."""
    method = SPT(budget=BUDGET, rank=3, **STILL)  # type: ignore[arg-type]
    return allocate(method, elsewhere(plan.scores, seed)).total


LAB = Lab(
    slug="spt",
    part="select",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
