"""What is measured on *Beside, before or between?*: kinds of insertion at equal counts.

Turned MNIST: the bed's small ViT, which reads upright digits. Two budgets of trained numbers beside
the head's; runs are short, and rates fall along half a cosine. Two arms stay outside the network
and learn from its answers. Colour photographs, hazy or with exchanged colours: SSF, PVP, BlackVIP
and controls with 1 to 64 images a class, the head kept as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.labs.insert.kinds import arms, outside
from toolkit.labs.insert.photographs import arms as few
from toolkit.labs.insert.photographs import world
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

BESIDE = ("serial", "parallel")
"""Adapters, alone."""
TOKENS = ("deep", "shallow", "prefix")
ARMS = {
    "none": ("head", "full"),
    **{budget: tuple(kinds) for budget, kinds in arms.KINDS.items()},
}
"""Budget -> arms that train inside."""
OUTSIDE = ("map", "pair")
"""Arms that see answers only: a linear map of them, or a scale and a shift."""
STARTS = {
    "head": 0.032, "full": 4e-3, "ssf": 0.032, "serial": 0.032, "parallel": 0.032,
    "connected": 0.016, "deep": 0.032, "shallow": 0.032, "prefix": 0.032, "lora": 0.016,
    "map": 0.1, "pair": 0.1,
}  # fmt: skip
"""Middles of the first rates tried."""
REGIMES: dict[str, dict[int, tuple[int, ...]]] = {
    "ci": {1: (1,)},
    "cpu": {4: (1, 4), 16: (16, 64)},
}
"""Photographs of a class at a search, and the numbers of them where its rates are used: who has one
of a class cannot search."""
FEW_STARTS = {
    "head": 4e-3, "full": 5e-4, "ssf": 4e-3, "prompts": 0.02, "pvp": 0.02, "map": 4e-3,
    "blackvip": 5e-3,
}  # fmt: skip
"""The same for photographs."""


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the page: the search for rates, then what is reported."""
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    runs.blocks("inside", blocks)
    runs.blocks("outside", blocks)
    every = {
        f"{arm}, {budget}": {"budget": budget, "arm": arm}
        for budget, names in ARMS.items() for arm in names
    }  # fmt: skip
    search: dict[str, Any] = {
        "seeds": search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3)), "reported": seeds,
        "judged": "loss", "better": "min", "factor": 2.0, "width": scale.pick(ci=1, cpu=3, gpu=3),
    }  # fmt: skip
    where = {"scale": scale.name, "part": "validation"}
    found = runs.tune(
        "inside", arms.run, {name: {**more, **where} for name, more in every.items()},
        {name: STARTS[more["arm"]] for name, more in every.items()}, **search,
    )  # fmt: skip
    answers = runs.tune(
        "outside", outside.run, {arm: {"arm": arm, **where} for arm in OUTSIDE},
        {arm: STARTS[arm] for arm in OUTSIDE}, **search,
    )  # fmt: skip
    where["part"] = "test"
    nothing = {"budget": "none", "arm": "nothing", "rate": 1.0}
    runs.table("inside", arms.run, [{**nothing, "seed": seed, **where} for seed in seeds] + [
        {**more, "rate": found[name].rate, "seed": seed, **where}
        for name, more in every.items() for seed in seeds
    ])  # fmt: skip
    runs.table("outside", outside.run, [
        {"arm": arm, "rate": answers[arm].rate, "seed": seed, **where}
        for arm in OUTSIDE for seed in seeds
    ])  # fmt: skip
    photographs(runs, scale, blocks, search)


def photographs(runs: Runs, scale: Scale, blocks: list[list[int]], search: dict[str, Any]) -> None:
    """Runs on photographs: every arm with every number of them after every shift."""
    runs.blocks("photographs", blocks)
    name, seeds = scale.name, [seed for block in blocks for seed in block]
    regimes, jobs = REGIMES["ci" if name == "ci" else "cpu"], []
    for shift in world.SHIFTS:
        where = {"shift": shift, "scale": name}
        bare = {"arm": "nothing", "rate": 1.0, "shots": 1, **where}
        still = runs.table(f"bare, {shift}", few.run, [
            {**bare, "seed": seed, "part": "validation"} for seed in search["seeds"]
        ])  # fmt: skip
        every: dict[str, dict[str, Any]] = {
            f"{arm}, {k}": {"arm": arm, "shots": k, **where}
            for k in regimes for arm in (*few.INSIDE, *few.OUTSIDE)
        }  # fmt: skip
        found = runs.tune(
            f"photographs, {shift}", few.run,
            {arm: {**more, "part": "validation"} for arm, more in every.items()},
            {arm: FEW_STARTS[more["arm"]] for arm, more in every.items()},
            **search | {"judged": "accuracy", "better": "max", "extensions": 6},
            nothing=float(still.accuracy.mean()) if name != "ci" else None,
        )  # fmt: skip
        jobs += [{**bare, "seed": seed, "part": "test"} for seed in seeds] + [
            {**more, "shots": shots, "rate": found[arm].rate, "seed": seed, "part": "test"}
            for arm, more in every.items() for shots in regimes[more["shots"]] for seed in seeds
        ]  # fmt: skip
    runs.table("photographs", few.run, jobs)


TENTH = "a tenth of what full training gains beyond the head alone"
MANY = Condition("many numbers", n=20, spread=20.0, decides=True)
FEW = Condition("few numbers", n=20, spread=20.0)
SHIFTED = {"hazy": "hazy photographs", "exchanged": "exchanged colours"}
TITLES = {"many": "many numbers", "few": "few numbers"}
SHARE = "share of what full training gains beyond the head alone"
CLAIMS = (
    Claim(
        "adapters", "Adapters beside the layers gain more than as many numbers in tokens.",
        whose="paper", unit="points", margin=10.0, reason=TENTH,
        quantity=f"{SHARE}, the adapter that validation prefers minus the prompts or prefix "
        "that it prefers",
        conditions=(MANY, FEW),
    ),
    Claim(
        "deep", "Prompts in every block gain more than as many numbers before the first.",
        whose="paper", unit="points", margin=10.0, reason=TENTH,
        quantity=f"{SHARE}, deep prompts minus shallow ones",
        conditions=(Condition("few numbers", n=20, spread=20.0, decides=True),),
    ),
    Claim(
        "connected", "Adapters connected around the blocks gain more than as many numbers without.",
        whose="paper", unit="points", margin=10.0, reason=TENTH,
        quantity=f"{SHARE}, connected adapters minus the adapter that validation prefers",
        conditions=(MANY,),
    ),
    Claim(
        "merged", "What merges away loses at most ten points to what stays.",
        whose="ours", unit="points", than=-10.0, margin=10.0, reason=TENTH,
        quantity=f"{SHARE}, SSF or LoRA, as validation prefers, minus the best of what stays, from "
        "ten below",
        conditions=(MANY, FEW),
    ),
    Claim(
        "pairs", "A scale and a shift gain more than LoRA with as many numbers.",
        whose="ours", unit="points", margin=10.0, reason=TENTH,
        quantity=f"{SHARE}, SSF minus LoRA",
        conditions=(MANY, FEW),
    ),
    Claim(
        "outside", "A map of the answers loses at most ten points to a head trained inside.",
        whose="ours", unit="% right", than=-10.0, margin=2.0,
        reason="a fifth of the ten points",
        quantity="test images read right, the map minus the head alone, from ten below; of "
        "photographs, 16 of a class",
        conditions=(
            Condition("turned MNIST", n=20, spread=2.0, decides=True),
            Condition("hazy photographs", n=20, spread=3.0),
            Condition("exchanged colours", n=20, spread=3.0),
        ),
    ),
)  # fmt: skip


def chosen(found: Found, budget: str, among: Iterable[str]) -> str:
    """The arm of a budget that the search found best, on seeds that no report uses."""
    tuned = found.tuned("inside")
    known = [arm for arm in among if f"{arm}, {budget}" in tuned]
    return min(
        known,
        key=lambda arm: min(
            s for s in tuned[f"{arm}, {budget}"]["scores"].values() if s is not None
        ),
    )


def gains(found: Found) -> dict[tuple[str, str], dict[int, float]]:
    """(budget, arm) -> seed -> how far it comes from the head alone (0) to full training (100)."""
    keys = [("none", "nothing"), *((b, arm) for b, names in ARMS.items() for arm in names)]
    values = {(b, arm): found.values("inside", "loss", budget=b, arm=arm) for b, arm in keys}
    start, end = values["none", "head"], values["none", "full"]
    whole = sum(start[seed] - end[seed] for seed in start) / len(start)
    return {
        key: {seed: 100 * (start[seed] - value) / whole for seed, value in row.items()}
        for key, row in values.items()
    }


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    share = gains(found)

    def gain(budget: str, ours: str, theirs: str) -> Measured:
        return Measured(
            share[budget, ours], share[budget, theirs], control=share["none", "full"],
            nothing=share["none", "head"], blocks=found.blocks("inside"),
            tuning_seeds=search_seeds(),
        )  # fmt: skip

    def best(budget: str, among: Iterable[str]) -> str:
        return chosen(found, budget, among)

    stays = ("serial", "parallel", "connected", *TOKENS)
    right = found.values("outside", "accuracy", arm="map")
    inside = {
        arm: found.values("inside", "accuracy", budget="none", arm=arm)
        for arm in ("nothing", "head", "full")
    }
    outer = Measured(
        right, inside["head"], control=inside["full"], nothing=inside["nothing"],
        blocks=found.blocks("outside"), tuning_seeds=search_seeds(),
    )  # fmt: skip
    return {
        "adapters": {TITLES[b]: gain(b, best(b, BESIDE), best(b, TOKENS)) for b in ("many", "few")},
        "deep": {"few numbers": gain("few", "deep", "shallow")},
        "connected": {"many numbers": gain("many", "connected", best("many", BESIDE))},
        "merged": {
            TITLES[b]: gain(b, best(b, ("ssf", "lora")), best(b, stays)) for b in ("many", "few")
        },
        "pairs": {TITLES[b]: gain(b, "ssf", "lora") for b in ("many", "few")},
        "outside": {"turned MNIST": outer}
        | {name: _photographs(found, shift) for shift, name in SHIFTED.items()},
    }


def _photographs(found: Found, shift: str) -> Measured:
    """A map of the answers beside the head alone, with 16 photographs of a class."""
    shots = 1 if found.scale == "ci" else 16

    def right(arm: str, shots: int = shots) -> dict[int, float]:
        return found.values("photographs", "accuracy", arm=arm, shift=shift, shots=shots)

    return Measured(
        right("map"), right("head"), control=right("full"), nothing=right("nothing", 1),
        blocks=found.blocks("photographs"), tuning_seeds=search_seeds(),
    )  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Counts are nearly equal where arms are compared."""
    table = found["inside"]
    head = int(table[table.arm == "head"].trained.iloc[0])
    apart = {}
    for budget in arms.KINDS:
        counts = table[table.budget == budget].trained - head
        apart[budget] = float(counts.max() / counts.min() - 1)
    worst = round(100 * max(apart.values()), 1)
    small = found.scale == "ci"  # with 16 features widths of one hidden unit are far apart
    return [
        Fact("equal", "The most numbers of a budget are at most a tenth more than its fewest.",
             worst <= 10 or small, worst, "% more"),
    ]  # fmt: skip


LAB = Lab(
    slug="which_insert",
    part="insert",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist", "digits", "cifar10"),
)
