"""What is measured about inside and aside: a made language to search in, and Cranfield.

The made language draws all pairs of query and document anew in every step and every seed; a small
post-LN encoder, trained once to guess hidden words, is tuned on both sides. On Cranfield the upper
blocks of MiniLM are tuned on the query side. Losses are nats: of the right document among those
that do not answer, or of every relevant abstract among all 1,400.
"""

from __future__ import annotations

from typing import Any

import torch

from toolkit.core.adapt.put import adapt
from toolkit.core.adapt.sites import site_of
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.insert.connected_peft_ir import Connected
from toolkit.labs.insert.search import cranfield, made
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

MAIN = ("full", "plain", "wide", "layer")
"""Arms that are judged on the made language."""
OTHERS = ("stream", "sublayer")
"""Arms that are shown beside them, with fewer seeds."""
START = {
    "full": 4e-3, "plain": 4e-2, "wide": 4e-2, "layer": 4e-2, "stream": 2e-2, "sublayer": 4e-2,
}  # fmt: skip
REAL_START = {
    "full": 2e-4, "plain": 4e-3, "wide": 4e-3, "layer": 4e-3, "map": 8e-3,
}  # fmt: skip
STRAY = 4.0
"""How many times the tuned rate is taken to see how much it matters."""


def words_run(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """One arm on the made language; see :func:`made.tuned`."""
    torch.set_num_threads(1)
    return made.tuned(arm, rate, seed, scale, part)


def grid_run(arm: str, rate: float, depth: int, rank: int, seed: int, scale: str) -> dict[str, Any]:
    """One arm on the first blocks of the base, with asides of another rank."""
    torch.set_num_threads(1)
    try:
        found = made.tuned(arm, rate, seed, scale, "validation", depth, rank)
    except FloatingPointError:
        return {"loss": float("nan")}
    return {"loss": found["loss"], "trained": found["trained"]}


def turn_run(arm: str, depth: int, rate: float, seed: int, scale: str) -> dict[str, Any]:
    """Direction discrepancy of one step; see :func:`made.turned`."""
    torch.set_num_threads(1)
    return made.turned(arm, depth, seed, scale, rate)


def cranfield_run(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """One arm on Cranfield; see :func:`cranfield.tuned`."""
    torch.set_num_threads(1)
    return cranfield.tuned(arm, rate, seed, scale, part)


def depths(scale: str) -> tuple[int, ...]:
    """Numbers of blocks that are compared."""
    return (1, 2) if scale == "ci" else (1, 2, 4)


GRID = {
    "ci": {"rate": (1e-2, 4e-2), "depth": (2,), "rank": (2, 8)},
    "cpu": {"rate": (1e-2, 4e-2, 0.16), "depth": (2, 4), "rank": (2, 8)},
}
"""Places of the explorer, of which all combinations are run."""


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: each search for rates, then what is reported."""
    where = {"scale": scale.name}
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    few = [seed for block in blocks for seed in block[: scale.pick(ci=1, cpu=4, gpu=4)]]
    width = scale.pick(ci=1, cpu=3, gpu=3)
    search: dict[str, Any] = {
        "seeds": search_seeds(), "reported": seeds, "judged": "loss", "better": "min",
        "factor": 2.0, "width": width,
    }  # fmt: skip
    runs.blocks("words", blocks)
    runs.table("words", words_run, [
        {"arm": "nothing", "rate": 1.0, "seed": seed, "part": "test", **where} for seed in seeds
    ])  # fmt: skip
    part = {"part": "validation", **where}
    found = runs.tune(
        "words", words_run, dict.fromkeys((*MAIN, *OTHERS), part), START, **search
    )  # fmt: skip
    runs.table("words", words_run, [
        {"arm": arm, "rate": found[arm].rate, "seed": seed, "part": "test", **where}
        for arm in (*MAIN, *OTHERS) for seed in (seeds if arm in MAIN else few)
    ])  # fmt: skip
    runs.blocks("stray", blocks)
    runs.table("stray", words_run, [
        {"arm": arm, "rate": STRAY * found[arm].rate, "seed": seed, "part": "end", **where}
        for arm in ("wide", "layer") for seed in seeds
    ])  # fmt: skip
    places = GRID["ci" if scale.name == "ci" else "cpu"]
    runs.table("grid", grid_run, [
        {"arm": arm, "rate": rate, "depth": depth, "rank": rank, "seed": seed, **where}
        for arm in ("wide", "layer") for rate in places["rate"] for depth in places["depth"]
        for rank in places["rank"] for seed in few[:1]
    ])  # fmt: skip
    runs.table("turn", turn_run, [
        {"arm": arm, "depth": depth, "rate": START[arm], "seed": seed, **where}
        for arm in ("wide", "layer") for depth in depths(scale.name) for seed in few
    ])  # fmt: skip
    _measure_cranfield(runs, scale, search)


def _measure_cranfield(runs: Runs, scale: Scale, search: dict[str, Any]) -> None:
    blocks = two_blocks(scale.pick(ci=4, cpu=8, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    where = {"scale": scale.name}
    runs.blocks("cranfield", blocks)
    part = {"part": "validation", **where}
    found = runs.tune(
        "cranfield", cranfield_run, dict.fromkeys(REAL_START, part), REAL_START,
        **search | {"reported": seeds},
    )  # fmt: skip
    runs.table("cranfield", cranfield_run, [
        {"arm": arm, "rate": 1.0, "seed": seed, "part": "test", **where}
        for arm in ("nothing", "bm25") for seed in seeds
    ] + [
        {"arm": arm, "rate": found[arm].rate, "seed": seed, "part": "test", **where}
        for arm in REAL_START for seed in seeds
    ])  # fmt: skip


LOSS = "held-out loss in nats"
CLAIMS = (
    Claim(
        "below-full",
        "Adapters that are scattered stay below full training.",
        whose="paper", where="abstract", unit="nats", margin=0.1,
        better="less",
        quantity=f"{LOSS}, full training below plain adapters",
        reason="a tenth of a nat is a factor of 1.1 in the odds of the right document; less is not "
        "told apart by 20 seeds, which differ by 0.2",
        conditions=(
            Condition("made language", n=20, spread=0.2, decides=True),
            Condition("Cranfield", n=8, spread=0.05),
        ),
    ),
    Claim(
        "connected",
        "With asides added, adapters search better.",
        whose="paper", where="abstract", unit="nats", margin=0.08, better="less",
        quantity=f"{LOSS}, connected adapters below plain ones of the same hidden units inside",
        reason="a factor of 1.08 in the odds of the right document; seeds differ by as much",
        conditions=(
            Condition("made language, at the end", n=20, spread=0.08, decides=True),
            Condition("made language, after half the steps", n=20, spread=0.16),
            Condition("Cranfield, at the end", n=8, spread=0.05),
        ),
    ),
    Claim(
        "full",
        "Connected adapters are no worse than full training.",
        whose="paper", where="abstract", unit="nats", margin=0.1, than=-0.2,
        better="less",
        quantity=f"{LOSS}, connected adapters below full training, more than -0.2",
        reason="0.2 nats worse would be seen by who searches; half of that is what seeds differ by",
        conditions=(
            Condition("made language", n=20, spread=0.2, decides=True),
            Condition("Cranfield", n=8, spread=0.05),
        ),
    ),
    Claim(
        "equal-count",
        "Connected adapters beat wider plain ones that train as many numbers.",
        whose="ours", unit="nats", margin=0.08, better="less",
        quantity=f"{LOSS}, connected adapters below plain ones of as many numbers",
        reason="a factor of 1.08 in the odds of the right document; seeds differ by as much",
        conditions=(
            Condition("made language, at the end", n=20, spread=0.08, decides=True),
            Condition("made language, after half the steps", n=20, spread=0.16),
            Condition("Cranfield, at the end", n=8, spread=0.05),
        ),
    ),
    Claim(
        "stable",
        "A rate four times too high costs connected adapters less than wider plain ones.",
        whose="ours", unit="nats", margin=0.2, better="less",
        quantity=f"{LOSS} at four times the tuned rate minus at the tuned one, connected below "
        "plain adapters of as many numbers",
        reason="twice the margin of a plain difference, as it is a difference of two",
        conditions=(Condition("made language", n=20, spread=0.35, decides=True),),
    ),
    Claim(
        "map",
        "On Cranfield one linear map of the query's vector does better than connected adapters.",
        whose="ours", unit="nats", margin=0.05,
        better="less",
        quantity="loss of a relevant abstract in nats, the map below connected adapters",
        reason="half of what is asked of a method, as the map is the plainest there is",
        conditions=(Condition("Cranfield", n=8, spread=0.04, decides=True),),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""

    def of(name: str, arm: str, column: str = "loss") -> dict[int, float]:
        return found.values(name, column, arm=arm)

    def pair(name: str, ours: str, theirs: str, column: str = "loss") -> Measured:
        control = of(name, "map" if name == "cranfield" else "full")
        nothing = of(name, "nothing")
        if name == "words" and column == "early":
            control = of(name, "full", "early")
        return Measured(
            of(name, ours, column), of(name, theirs, column), control=control, nothing=nothing,
            blocks=found.blocks(name), tuning_seeds=search_seeds(),
        )  # fmt: skip

    def three(theirs: str) -> dict[str, Measured]:
        return {
            "made language, at the end": pair("words", "layer", theirs),
            "made language, after half the steps": pair("words", "layer", theirs, "early"),
            "Cranfield, at the end": pair("cranfield", "layer", theirs),
        }

    def two(ours: str, theirs: str) -> dict[str, Measured]:
        return {
            "made language": pair("words", ours, theirs),
            "Cranfield": pair("cranfield", ours, theirs),
        }

    def lost(arm: str) -> dict[int, float]:
        tuned, stray = of("words", arm), of("stray", arm)
        return {seed: stray[seed] - tuned[seed] for seed in tuned}

    return {
        "below-full": two("full", "plain"),
        "connected": three("plain"),
        "full": two("layer", "full"),
        "equal-count": three("wide"),
        "stable": {"made language": Measured(
            lost("layer"), lost("wide"), blocks=found.blocks("stray"),
            tuning_seeds=search_seeds(),
        )},
        "map": {"Cranfield": Measured(
            of("cranfield", "map"), of("cranfield", "layer"), blocks=found.blocks("cranfield"),
            tuning_seeds=search_seeds(),
        )},
    }  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    arms = ("plain", "wide", "layer", "stream", "sublayer")
    trained = {
        arm: sum(p.numel() for p in made.dressed(arm, "ci", 0)[1]) for arm in arms
    }  # fmt: skip
    model = made.encoder("ci")
    block = site_of(model.blocks[0], "blocks.0", ("module",))
    method = Connected(variant="layer", rank=made.RANK, inside_rank=made.INSIDE)
    formula = len(model.blocks) * method.count(block)
    words = torch.arange(8)[None]
    before = model.vectors(words)
    same = []
    for variant in ("layer", "sublayer", "stream", "none"):
        other = made.encoder("ci")
        adapt(other, Connected(variant=variant))
        same.append(torch.equal(other.vectors(words), before))
    table = found["words"].drop_duplicates("arm").set_index("arm")["trained"]
    share = 100 * abs(table["layer"] / table["wide"] - 1)
    return [
        Fact("start", "With every variant the encoder starts as its base, bit for bit.", all(same),
             sum(same), "of 4 variants"),
        Fact("count", "The formula gives the numbers that train.", formula == trained["layer"],
             trained["layer"], "numbers"),
        Fact("equal", "Connected and wider plain adapters train as many numbers, to 5 %.",
             share < 5, round(float(share), 2), "% apart"),
    ]  # fmt: skip


LAB = Lab(
    slug="connected_peft_ir",
    part="insert",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("cranfield", "minilm"),
)
