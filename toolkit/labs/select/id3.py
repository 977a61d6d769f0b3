"""What is measured about ID3: does unmasking step by step beat one choice at the start?

Digits: a network (64, 96, 96, 10) that reads digits turned by 90 degrees is adapted to upright
ones; 16,320 weights may be chosen from, and budgets are 0.3 to 2.8 per cent of them. Abstracts: a
small transformer that read Shakespeare goes on with abstracts on aerodynamics, in 30 steps; the
budget there is the count of numbers that LoRA of rank 1 trains. Nothing trains beside.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.labs.beds import characters, tasks
from toolkit.labs.beds.arms import Arm
from toolkit.labs.beds.rates import RATES
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.lowrank.lora import LoRA
from toolkit.select.id3 import ID3, choice
from toolkit.select.id3.tensors import unmask

BUDGETS = (50, 150, 458)
"""Scalars unmasked on digits; 458 is what LoRA of rank 1 trains there."""
MIDDLE = 150
EQUAL = 5184
"""Scalars unmasked on abstracts: what LoRA of rank 1 trains there."""
RULES: dict[str, dict[str, Any]] = {
    "increment": {},
    "static": {"schedule": "once"},
    "renew": {"strategy": "renew"},
    "repeat": {"strategy": "repeat", "schedule": "every"},
    "random": {"score": "random"},
    "smallest": {"score": "magnitude"},
    "own clock": {"clock": "own"},
}
"""Arm -> how it differs from ID3 as it stands."""
SHARES = tuple(range(10, 101, 10))
"""Per cent of a run at which accuracy is read."""


def id3(arm: str, budget: int) -> ID3:
    """The method of an arm."""
    return ID3(budget=budget, **RULES[arm.split(",")[0]])


class Path:
    """Test accuracy on the way, at :data:`SHARES`."""

    def __init__(self, steps: int):
        self.found: list[float] = []
        self.at = {round(share / 100 * steps) - 1 for share in SHARES}

    def __call__(self, step: int, adapted: Any, model: nn.Module) -> None:
        if step in self.at:
            self.found.append(tasks.accuracy(model, test_images()))


@functools.lru_cache(maxsize=1)
def test_images() -> tuple[Tensor, Tensor]:
    """The 360 upright digits that every seed is judged on."""
    return tasks.digits_task(0, pretraining=1).test


def digits_nothing(arm: str, rate: float, seed: int) -> dict[str, Any]:
    """The network as it is."""
    task = tasks.digits_task(seed)
    return {
        part: tasks.accuracy(task.model, getattr(task, part)) for part in ("validation", "test")
    }


def digits_id3(arm: str, budget: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Entries of all three weights, by one of :data:`RULES`."""
    path = Path(steps)
    options = {"generator": generator(seed, "draws")} if arm.startswith("random") else {}
    _, adapted, record = tasks.digits_train(
        id3(arm, budget), rate, seed, steps=steps, watch=path, options=options
    )
    controller = adapted.controller
    joined = controller.joined()
    tenths = [part.sum(0).tolist() for part in joined.tensor_split(10)]
    return _plain(record) | {
        "updates": controller.updates, "path": path.found, "joined": tenths,
        "untouched": sum(not n for n in joined.sum(0).tolist()),
    }  # fmt: skip


def digits_other(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Full training, or LoRA of rank 1 on the three layers."""
    method = None if arm == "full" else LoRA(rank=1, alpha=2.0)
    return _plain(tasks.digits_train(method, rate, seed, steps=steps)[2])


def digits_factors(
    arm: str, budget: int, rank: int, rate: float, seed: int, steps: int
) -> dict[str, Any]:
    """LoRA on the three layers, of whose factors ID3 unmasks some entries."""
    rules: list[Any] = []

    def step(loss: Any, optimizer: torch.optim.Optimizer, adapted: Any) -> Tensor:
        if not rules:
            named = adapted.named_parameters()
            rules.append(unmask(ID3(budget=budget), named, optimizer, steps))
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    method = LoRA(rank=rank, alpha=2.0 * rank)
    record = tasks.digits_train(method, rate, seed, steps=steps, step=step)[2]
    return _plain(record) | {"trained": rules[0].chosen, "updates": rules[0].updates}


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "losses"}


def abstracts_other(
    arm: str, rate: float, seed: int, scale: str, steps: int, part: str
) -> dict[str, Any]:
    """The base as it is, full training, or LoRA of rank 1; nats per character."""
    every = {"nothing": Arm("nothing"), "full": Arm("all")}
    lora = Arm("method", LoRA(rank=1, alpha=2.0))
    train = characters.train
    return train(every.get(arm, lora), rate, seed, scale=scale, steps=steps, parts=(part,))[2]


def abstracts_id3(
    arm: str, budget: int, rate: float, seed: int, scale: str, steps: int, part: str
) -> dict[str, Any]:
    """Entries of every linear layer of the blocks."""
    _, adapted, record = characters.train(
        Arm("method", id3(arm, budget)), rate, seed, scale=scale, steps=steps, parts=(part,)
    )
    joined = adapted.controller.joined().sum(0).tolist()
    return record | {"updates": adapted.controller.updates, "joined": joined}


DIGITS: dict[str, Any] = {"nothing": digits_nothing, "full": digits_other, "lora": digits_other,
          "factors": digits_factors}  # fmt: skip
ABSTRACTS: dict[str, Any] = {"nothing": abstracts_other, "full": abstracts_other,
             "lora": abstracts_other,
             "increment": abstracts_id3, "static": abstracts_id3}  # fmt: skip
DIGITS_START = {"full": 4e-3, "lora": 3.2e-2, "factors": 3.2e-2}
ABSTRACTS_START = {"lora": 3.2e-2, "increment": 6.4e-2, "static": 6.4e-2}
"""Middles of the first rates tried."""
START = {"increment": 0.5, "own clock": 0.5, "repeat": 0.125}
"""The same for ID3 on digits, where it is not 1."""


def digits_arms() -> dict[str, dict[str, Any]]:
    """Further arguments of each arm that trains."""
    wide = {
        f"{arm}, {budget}": {"budget": budget} for arm in ("increment", "static")
        for budget in BUDGETS
    }  # fmt: skip
    others = {arm: {"budget": MIDDLE} for arm in RULES if arm not in ("increment", "static")}
    factors = {"budget": MIDDLE, "rank": 8}
    return {**wide, **others, "full": {}, "lora": {}, "factors": factors}


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    _digits(runs, scale)
    _abstracts(runs, scale)


def _digits(runs: Runs, scale: Scale) -> None:
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    size = {"steps": scale.pick(ci=5, cpu=150, gpu=150)}
    every = digits_arms()
    functions = {arm: DIGITS.get(arm, digits_id3) for arm in [*every, "nothing"]}
    found = runs.tune(
        "digits", functions, {arm: more | size for arm, more in every.items()},
        {arm: DIGITS_START.get(arm, START.get(arm.split(",")[0], 1.0)) for arm in every},
        seeds=search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3)), reported=seeds,
        judged="validation", better="max", factor=2.0, width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("digits", blocks)
    runs.table("digits", functions, [
        {"arm": "nothing", "rate": 1.0, "seed": seed} for seed in seeds
    ] + [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **size}
        for arm, more in every.items() for seed in seeds
    ])  # fmt: skip


def _abstracts(runs: Runs, scale: Scale) -> None:
    blocks = two_blocks(scale.pick(ci=4, cpu=8, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    size = {"scale": scale.name, "steps": scale.pick(ci=3, cpu=30, gpu=150)}
    chosen = {"budget": scale.pick(ci=200, cpu=EQUAL, gpu=EQUAL)}
    every = {arm: chosen if ABSTRACTS[arm] is abstracts_id3 else {} for arm in ABSTRACTS_START}
    full = RATES["characters"]["full"]  # found by the bed's own search, which is the same
    found = runs.tune(
        "abstracts", ABSTRACTS,
        {arm: more | size | {"part": "validation"} for arm, more in every.items()},
        ABSTRACTS_START, seeds=search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3)), reported=seeds,
        judged="validation", better="min", factor=2.0, width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("abstracts", blocks)
    size["part"] = "test"
    runs.table("abstracts", ABSTRACTS, [
        {"arm": arm, "rate": rate, "seed": seed, **size}
        for arm, rate in (("nothing", 1.0), ("full", full)) for seed in seeds
    ] + [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **size}
        for arm, more in every.items() for seed in seeds
    ])  # fmt: skip


POINTS = "two points are seven of the 360 images, less than two networks differ by"
NATS = "0.02 nats are two per cent of a character's probability"
CLAIMS = (
    Claim(
        "step-points",
        "Unmasking step by step beats choosing as many weights at once.",
        whose="paper", unit="points", margin=2.0, reason=POINTS,
        quantity="test accuracy on digits, ID3 minus the same rule used once",
        conditions=tuple(
            Condition(f"{budget} weights", n=20, spread=3.5, support=(-100.0, 100.0),
                      decides=budget == MIDDLE)
            for budget in BUDGETS
        ),
    ),
    Claim(
        "step-nats",
        "On texts, too, unmasking step by step beats choosing as many weights at once.",
        whose="paper", unit="nats per character", margin=0.02, better="less", reason=NATS,
        quantity="log-loss on abstracts, ID3 below the same rule used once",
        conditions=(Condition("abstracts", n=8, spread=0.01, decides=True),),
    ),
    Claim(
        "score-points",
        "Gradient over magnitude is a better rank than smallness alone, both step by step.",
        whose="paper", unit="points", margin=2.0, reason=POINTS,
        quantity="test accuracy on digits, ID3 minus unmasking the smallest weights",
        conditions=(
            Condition("150 weights", n=20, spread=4.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
    Claim(
        "lora-nats",
        "ID3 does better than LoRA with as many trained numbers.",
        whose="paper", unit="nats per character", margin=0.02, better="less", reason=NATS,
        quantity="log-loss on abstracts, ID3 with 5,184 weights below LoRA of rank 1",
        conditions=(Condition("abstracts", n=8, spread=0.012, decides=True),),
    ),
    Claim(
        "keep-points",
        "Keeping what was unmasked in training beats freezing it again after one step.",
        whose="ours", unit="points", margin=2.0, reason=POINTS,
        quantity="test accuracy on digits, ID3 minus as many new weights a step, trained once each",
        conditions=(
            Condition("150 weights", n=20, spread=4.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""

    def pair(name: str, ours: str, theirs: str) -> Measured:
        arms = dict.fromkeys((ours, theirs, "full", "nothing"))
        values = {arm: found.values(name, "test", arm=arm) for arm in arms}
        return Measured(
            values[ours], values[theirs], control=values["full"], nothing=values["nothing"],
            blocks=found.blocks(name), tuning_seeds=search_seeds(),
        )  # fmt: skip

    middle = f"increment, {MIDDLE}"
    return {
        "step-points": {
            f"{b} weights": pair("digits", f"increment, {b}", f"static, {b}") for b in BUDGETS
        },
        "step-nats": {"abstracts": pair("abstracts", "increment", "static")},
        "score-points": {"150 weights": pair("digits", middle, "smallest")},
        "lora-nats": {"abstracts": pair("abstracts", "increment", "lora")},
        "keep-points": {"150 weights": pair("digits", middle, "renew")},
    }


def drift(steps: int = 10) -> tuple[int, int]:
    """A replay of the code's step, and the toolkit's, with AdamW and weight decay.

    Returns:
        How many weights never chosen moved where the gradient of masked weights is set to 0 before
        AdamW; and how many moved in the toolkit.
    """
    task, method = tasks.digits_task(0, pretraining=1), ID3(budget=20)
    plain = [
        layer for layer in tasks.digits_task(0, pretraining=1).model if hasattr(layer, "weight")
    ]
    start = [layer.weight.detach().clone() for layer in plain]
    masks = [torch.zeros_like(w, dtype=torch.bool) for w in start]
    optimizer = torch.optim.AdamW([layer.weight for layer in plain], weight_decay=0.1)
    draws = generator(0, "gradients")
    for _ in range(steps):
        for layer, mask in zip(plain, masks, strict=True):
            layer.weight.grad = torch.randn(mask.shape, generator=draws)
        scores = [
            choice.importance(layer.weight.grad, layer.weight.detach(), 1.0, 1.0)
            .masked_fill(mask, choice.LEFT_OUT).view(-1)
            for layer, mask in zip(plain, masks, strict=True)
        ]  # fmt: skip
        found = choice.highest(scores, 2)
        for layer, mask, index in zip(plain, masks, found, strict=True):
            mask.view(-1)[index] = True
            layer.weight.grad *= mask
        optimizer.step()
    gaps = [
        (layer.weight.detach() - old).abs()[~mask]
        for layer, old, mask in zip(plain, start, masks, strict=True)
    ]
    moved = torch.cat(gaps)
    weights = {n: p for n, p in task.model.named_parameters() if n.endswith("weight")}
    for p in weights.values():
        p.requires_grad_(True)
    ours = torch.optim.AdamW(weights.values(), weight_decay=0.1)
    rule = unmask(method, weights, ours, steps)
    for _ in range(steps):
        for p in weights.values():
            p.grad = torch.randn(p.shape, generator=draws)
        ours.step()
    pairs = zip(weights.values(), start, rule.masks().values(), strict=True)
    held = sum(int((p.detach() != old)[~mask].sum()) for p, old, mask in pairs)
    return int((moved > 0).sum()), held


def first_moves(steps: int = 400) -> dict[str, float]:
    """Clock -> first move of a weight that joins at the last step, in learning rates of Adam."""
    moves = {}
    for clock in ("run", "own"):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = torch.optim.Adam([p], lr=1e-3)
        rule = unmask(ID3(budget=2, clock=clock), {"p": p}, optimizer, steps,
                      schedule=[1, *[0] * (steps - 2), 1])  # fmt: skip
        for _ in range(steps):
            late = (rule.pools["p"].born == 0).nonzero()[:, 0]
            before = p.detach().clone()
            p.grad = torch.tensor([2.0, 1.0], dtype=torch.float64)
            optimizer.step()
        moves[clock] = float((p.detach() - before)[late].abs().max()) / 1e-3
    return moves


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    table = found["digits"]
    runs = table[table.arm == f"increment, {MIDDLE}"]
    once = table[table.arm == f"static, {MIDDLE}"]
    updates, static = int(runs.updates.iloc[0]), int(once.updates.iloc[0])
    steps = int(runs.steps.iloc[0])
    wanted = sum(sum(choice.planned("uniform", MIDDLE, steps)[: t + 1]) for t in range(steps))
    moved, held = drift()
    moves = first_moves()
    trained = {int(n) for n in table[table.arm.str.startswith("increment")].trained}
    return [
        Fact("updates", "ID3 makes as many updates of single weights as its schedule says; one "
             "choice at the start makes T times B.",
             updates == wanted and static == steps * MIDDLE, round(updates / static, 3),
             "of the static choice"),
        Fact("budget", "Every budget is spent to the last weight.", trained == set(BUDGETS),
             max(trained), "weights at most"),
        Fact("drift", "Setting gradients to 0 does not hold masked weights under AdamW's decay.",
             moved > 0, moved, "weights never chosen that moved"),
        Fact("held", "In the toolkit none of them moves.", held == 0, held, "weights"),
        Fact("clock", "Under Adam a weight that joins late makes a first move above the learning "
             "rate; with its own count it is the rate.",
             moves["run"] > 1.5 and abs(moves["own"] - 1) < 1e-3, round(moves["run"], 2),
             "learning rates"),
    ]  # fmt: skip


LAB = Lab(
    slug="id3",
    part="select",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("digits", "tinyshakespeare", "cranfield"),
)
