"""What is measured on *Which weights, when?*: all choices at equal numbers of changed entries.

Three tasks. Turned MNIST: the bed's small ViT, which reads upright digits. Abstracts: the bed's
small transformer, which read Shakespeare. On both, one budget: as many entries of the blocks'
matrices as there are biases beside them, which is also what LoRA of rank 1 trains on query, value
and up. Small digits: a network (64, 96, 96, 10) that reads turned digits learns upright ones, at
three budgets. Runs are short, nothing trains beside, and rates fall along half a cosine. What was
known before, the source, is judged as well: forgetting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.select.choices.draws import draw
from toolkit.labs.select.choices.run import equal, run
from toolkit.labs.select.sara import source_at

DRAWN = ("random", "largest", "smallest")
"""Choices of single entries that no data is needed for."""
INFORMED = ("gradient", "fisher", "static", "id3")
"""Choices of single entries by gradients."""
ENTRIES = (*DRAWN, *INFORMED)
BUDGETS = (85, 255, 850)
"""Weights that may move on small digits, of 16,320: 0.5, 1.6 and 5.2 per cent."""
MIDDLE = 255
PAIR = ("images", "abstracts")
"""The tasks on which as many biases and numbers of LoRA can be compared."""


def _asked(*choices: str) -> dict[str, dict[str, Any]]:
    """Arms of one budget: arm -> further arguments."""
    return {choice: {"choice": choice, "budget": 0} for choice in choices}


ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "images": _asked(*ENTRIES, "biases", "head", "lora", "snella", "spt", "full"),
    "abstracts": _asked("random", "smallest", "fisher", "id3", "biases", "lora", "full"),
    "digits": {
        f"{choice}, {budget}": {"choice": choice, "budget": budget}
        for choice in ("random", "largest", "smallest", "fisher", "static", "id3")
        for budget in BUDGETS
    } | {"full": {"choice": "full", "budget": 0}},
}  # fmt: skip
"""Task -> arm -> further arguments, for arms that train."""
STARTS: dict[str, dict[str, float]] = {
    "images": dict.fromkeys(ARMS["images"], 0.064) | {
        "random": 0.128, "smallest": 0.128, "lora": 0.016, "spt": 0.016, "full": 4e-3},
    "abstracts": dict.fromkeys(ARMS["abstracts"], 0.032) | {
        "random": 0.128, "smallest": 0.128, "full": 4e-3},
    "digits": {
        arm: {85: 0.5, 255: 0.25, 850: 0.125}.get(more["budget"], 0.032)
        for arm, more in ARMS["digits"].items()
    },
}  # fmt: skip
"""Middles of the first rates tried."""


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the page: for each task the search for rates, then what is reported."""
    for task, every in ARMS.items():
        many = 20 if task == "digits" else 8
        blocks = two_blocks(scale.pick(ci=4, cpu=many, gpu=20))
        seeds = [seed for block in blocks for seed in block]
        where = {"task": task, "scale": scale.name}
        found = runs.tune(
            task, run,
            {arm: {**more, **where, "part": "validation"} for arm, more in every.items()},
            STARTS[task], seeds=search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3)), reported=seeds,
            judged="validation", better="min", factor=2.0, width=scale.pick(ci=1, cpu=3, gpu=3),
        )  # fmt: skip
        runs.blocks(task, blocks)
        where["part"] = "test"
        nothing = {"arm": "nothing", "choice": "nothing", "budget": 0, "rate": 1.0}
        runs.table(task, run, [{**nothing, "seed": seed, **where} for seed in seeds] + [
            {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **where}
            for arm, more in every.items() for seed in seeds
        ])  # fmt: skip


TITLES = {"images": "turned MNIST", "abstracts": "abstracts", "digits": "small digits"}
POINTS = "five points are a twentieth of what training everything gains"
TENTH = "ten points are a tenth of what full training forgets"
MNIST = Condition("turned MNIST", n=8, spread=5.0, decides=True)
ABSTRACTS = Condition("abstracts", n=8, spread=3.0)
DIGITS = Condition("small digits", n=20, spread=5.0)
LOST = (
    Condition("turned MNIST", n=8, spread=10.0, decides=True),
    Condition("abstracts", n=8, spread=10.0),
)
CLAIMS = (
    Claim(
        "data-random",
        "Entries chosen by data gain more than as many drawn at random.",
        whose="paper", unit="points", margin=5.0, reason=POINTS,
        quantity="share of full training's gain, the choice by data that validation prefers minus "
        "random",
        conditions=(MNIST, ABSTRACTS, DIGITS),
    ),
    Claim(
        "small-random",
        "The smallest entries gain more than as many drawn at random.",
        whose="paper", unit="points", margin=5.0, reason=POINTS,
        quantity="share of full training's gain, smallest minus random",
        conditions=(MNIST, ABSTRACTS, DIGITS),
    ),
    Claim(
        "again",
        "Choosing again at every step gains more than the same rule used once.",
        whose="paper", unit="points", margin=5.0, reason=POINTS,
        quantity="share of full training's gain, ID3 minus its rule used once, at equal numbers of "
        "entries ever changed",
        conditions=(MNIST, DIGITS),
    ),
    Claim(
        "entries-lora",
        "Single entries gain more than LoRA with as many trained numbers.",
        whose="paper", unit="points", margin=5.0, reason=POINTS,
        quantity="share of full training's gain, the choice of entries that validation prefers "
        "minus LoRA of rank 1 on query, value and up",
        conditions=(MNIST, ABSTRACTS),
    ),
    Claim(
        "entries-forget",
        "At equal gain single entries forget less than LoRA with as many trained numbers.",
        whose="paper", unit="points", margin=10.0, better="less", reason=TENTH,
        quantity="share of what full training forgets, at a target loss that both reach, the "
        "choice of entries that validation prefers below LoRA",
        conditions=LOST,
    ),
    Claim(
        "random-forgets",
        "At equal gain entries drawn at random forget less than those of largest squared gradient.",
        whose="ours", unit="points", margin=10.0, better="less", reason=TENTH,
        quantity="share of what full training forgets, at a target loss that both reach, random "
        "below Fisher",
        conditions=LOST,
    ),
)  # fmt: skip


def chosen(found: Found, task: str, among: Iterable[str]) -> str:
    """The arm that the search found best, on validation data of seeds that no report uses."""
    tuned = found.tuned(task)
    known = [arm for arm in among if arm in tuned]
    return min(
        known, key=lambda arm: min(s for s in tuned[arm]["scores"].values() if s is not None)
    )


def gains(found: Found, task: str, column: str = "test") -> dict[str, dict[int, float]]:
    """Arm -> seed -> how far it comes from doing nothing (0) to full training (100, on average).

    With ``column="source"``: how much it forgets, as a share of what full training forgets.
    """
    values = {arm: found.values(task, column, arm=arm) for arm in ("nothing", *ARMS[task])}
    start, end = values["nothing"], values["full"]
    whole = sum(start[seed] - end[seed] for seed in start) / len(start)
    return {
        arm: {seed: 100 * (start[seed] - value) / whole for seed, value in row.items()}
        for arm, row in values.items()
    }


def forgotten(found: Found, task: str, *pair: str) -> list[dict[int, float]]:
    """For two arms, seed -> what is forgotten where the target loss is one that both reach.

    The rise of the source loss, 100 being the mean rise at the end of full training.
    """
    table = found[task].set_index(["arm", "seed"])
    targets, sources = table.targets, table.sources
    seeds = [seed for block in found.blocks(task) for seed in block]
    level = {seed: max(min(targets[arm, seed]) for arm in pair) for seed in seeds}
    whole = sum(sources["full", s][-1] - sources["full", s][0] for s in seeds) / len(seeds)

    def at(arm: str, seed: int) -> float:
        then = source_at(targets[arm, seed], sources[arm, seed], level[seed])
        return 100 * (then - sources[arm, seed][0]) / whole

    return [{seed: at(arm, seed) for seed in seeds} for arm in pair]


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    share = {task: gains(found, task) for task in ARMS}

    def gain(task: str, ours: str, theirs: str) -> Measured:
        values = share[task]
        return Measured(
            values[ours], values[theirs], control=values["full"], nothing=values["nothing"],
            blocks=found.blocks(task), tuning_seeds=search_seeds(),
        )  # fmt: skip

    def lost(task: str, ours: str, theirs: str) -> Measured:
        one, other = forgotten(found, task, ours, theirs)
        return Measured(one, other, blocks=found.blocks(task), tuning_seeds=search_seeds())

    def at(task: str, arm: str) -> str:
        return f"{arm}, {MIDDLE}" if task == "digits" else arm

    def best(task: str, among: Iterable[str]) -> str:
        return chosen(found, task, [at(task, arm) for arm in among])

    return {
        "data-random": {TITLES[t]: gain(t, best(t, INFORMED), at(t, "random")) for t in ARMS},
        "small-random": {TITLES[t]: gain(t, at(t, "smallest"), at(t, "random")) for t in ARMS},
        "again": {
            TITLES[t]: gain(t, at(t, "id3"), at(t, "static")) for t in ("images", "digits")
        },
        "entries-lora": {TITLES[t]: gain(t, best(t, ENTRIES), "lora") for t in PAIR},
        "entries-forget": {TITLES[t]: lost(t, best(t, ENTRIES), "lora") for t in PAIR},
        "random-forgets": {TITLES[t]: lost(t, "random", "fisher") for t in PAIR},
    }  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Counts are equal where arms are compared."""
    tables = {task: found[task] for task in ARMS}
    single = [table[table.choice.isin(ENTRIES)] for table in tables.values()]
    wanted = {task: equal(draw(task, 0, found.scale)) for task in ("images", "abstracts")}
    budgets = [
        [row.budget or wanted[row.task] for row in table.itertuples()] for table in single
    ]  # fmt: skip
    trained = all(list(t.trained) == b for t, b in zip(single, budgets, strict=True))
    changed = all((t.changed <= b).all() for t, b in zip(single, budgets, strict=True))
    same = all(
        set(tables[task][tables[task].choice.isin(("biases", "lora"))].trained) == {count}
        for task, count in wanted.items()
    )
    return [
        Fact("entries", "Every choice of single entries trains exactly its budget, in every run.",
             trained),
        Fact("changed", "None of them changes an entry more than that.", changed),
        Fact("equal", "There are as many biases, and as many numbers in LoRA.", same,
             wanted["images"], "numbers on turned MNIST"),
    ]  # fmt: skip


LAB = Lab(
    slug="which_weights",
    part="select",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist", "digits", "tinyshakespeare", "cranfield"),
)
