"""What is measured about HiPA: small adaptors that make a digit in one step.

Each seed draws its own pairs of noise and of what the frozen denoiser makes of it in many steps,
their order, and the adaptors' start. Every arm has the same steps, and its learning rate from the
same search. Judged are 1,000 noises that no arm has seen, the same for all: by the Fréchet distance
to the many-step images of other noise, and by the energy of high frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.sample.metrics import spectrum
from toolkit.core.scale import Scale
from toolkit.labs.generate.film import encode
from toolkit.labs.generate.onestep import runs as one
from toolkit.labs.generate.onestep import world as worlds
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks


@dataclass(frozen=True)
class Arm:
    """One way to train: rank (0 trains everything), terms of the loss, their weight, first rate."""

    rank: int
    loss: str
    weight: float
    start: float


HIGH = "spatial+fourier+edge"
WEIGHTS = (0.001, 0.01, 0.1)
"""Values of lambda that are tried on 8 x 8 digits at rank 4; other ranks take the middle one."""
HANDWRITTEN = 0.1
"""Lambda on handwriting, from a pilot on one seed of its own."""
RANKS = (2, 4, 8)
SHOWN_SEED, SHOWN = 0, 10
"""Whose images are kept, and how many."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

DIGITS = {
    "mse, rank 4": Arm(4, "mse", 0.0, 4e-2),
    **{f"spatial, rank {r}": Arm(r, "spatial", 0.0, 4e-2) for r in RANKS},
    **{f"high, rank {r}": Arm(r, HIGH, WEIGHTS[1], 4e-2) for r in RANKS},
    "high 0.001, rank 4": Arm(4, HIGH, WEIGHTS[0], 4e-2),
    "high 0.1, rank 4": Arm(4, HIGH, WEIGHTS[2], 4e-2),
    "power, rank 4": Arm(4, "spatial+power", 0.01, 4e-2),
    "full": Arm(0, "spatial", 0.0, 8e-3),
}
HANDWRITING = {
    "mse, rank 4": Arm(4, "mse", 0.0, 1e-2),
    "spatial, rank 4": Arm(4, "spatial", 0.0, 1e-2),
    "high, rank 4": Arm(4, HIGH, HANDWRITTEN, 1e-2),
    "full": Arm(0, "spatial", 0.0, 4e-3),
}
WORLDS = {"digits": DIGITS, "handwriting": HANDWRITING}


def tuning_run(
    arm: str, world: str, rank: int, loss: str, weight: float, rate: float, seed: int, scale: str
) -> dict[str, Any]:
    """One training at one rate: the Fréchet distance on validation noise, after ``validation``."""
    torch.set_num_threads(1)
    model, _ = one.trained(world, rank, loss, weight, rate, seed, scale)
    found = one.judged(one.made(model, world, scale, "validation"), world, scale, "validation")
    return {"validation": found["frechet"]}


def run(
    arm: str, world: str, rank: int, loss: str, weight: float, rate: float, seed: int, scale: str
) -> dict[str, Any]:
    """One training, judged on the test noise.

    Returns:
        ``frechet``, ``pixels``, ``energy``, ``psnr``, ``read``: see
        :func:`~toolkit.labs.generate.onestep.runs.judged`. ``spectrum``: power in rings. ``shown``
        and ``strengths``, of one seed: the first images, and those of handwriting at each of
        :data:`STRENGTHS`, as text; else empty.
    """
    torch.set_num_threads(1)
    model, adapted = one.trained(world, rank, loss, weight, rate, seed, scale)
    images = one.made(model, world, scale, "test")
    found: dict[str, Any] = one.judged(images, world, scale, "test")
    found |= {"spectrum": spectrum(images)[1].tolist(), "shown": "", "strengths": ""}
    if seed == SHOWN_SEED:
        found["shown"] = encode(images[:SHOWN])
        if adapted is not None and world == "handwriting":
            film = one.film(model, adapted, world, scale, STRENGTHS, SHOWN)
            found["strengths"] = encode(torch.cat(film))
    return found


def still(world: str, scale: str) -> dict[str, Any]:
    """What does not depend on a seed: the frozen model in one step, in two, in four, in many.

    Returns:
        After ``one: ``, ``two: ``, ``four: `` and ``many: `` what :func:`run` gives; ``numbers`` of
        the network.
    """
    torch.set_num_threads(1)
    network = one.frozen(world, scale)
    found: dict[str, Any] = {"numbers": sum(p.numel() for p in network.parameters())}
    count = worlds.size(world, scale).judged
    for name, images in (
        ("one", one.made(network, world, scale, "test")),
        ("two", worlds.in_steps(world, scale, "test", count, 2).wanted),
        ("four", worlds.in_steps(world, scale, "test", count, 4).wanted),
        ("many", worlds.pairs(world, scale, "test").wanted),
    ):
        judged: dict[str, Any] = one.judged(images, world, scale, "test")
        judged |= {"spectrum": spectrum(images)[1].tolist(), "shown": encode(images[:SHOWN])}
        found |= {f"{name}: {key}": value for key, value in judged.items()}
    return found


def measure(runs: Runs, scale: Scale) -> None:
    """For each world: the search for rates, then every arm on each seed."""
    for world, named in WORLDS.items():
        blocks = two_blocks(scale.pick(ci=4, cpu=20 if world == "digits" else 8, gpu=20))
        seeds = [seed for block in blocks for seed in block]
        runs.table(f"{world}, still", still, [{"world": world, "scale": scale.name}])
        plain = {
            name: {"world": world, "rank": arm.rank, "loss": arm.loss, "weight": arm.weight,
                   "scale": scale.name}
            for name, arm in named.items()
        }  # fmt: skip
        tuned = runs.tune(
            world, tuning_run, plain, {name: arm.start for name, arm in named.items()},
            seeds=search_seeds(), reported=seeds, judged="validation", better="min", factor=2.0,
            width=scale.pick(ci=1, cpu=3, gpu=3),
        )  # fmt: skip
        runs.blocks(world, blocks)
        runs.table(world, run, [
            {"arm": name, **more, "rate": tuned[name].rate, "seed": seed}
            for name, more in plain.items() for seed in seeds
        ])  # fmt: skip


def _both(spread: float, small: float, *more: Condition) -> tuple[Condition, ...]:
    """Handwriting, which decides, and digits, both at rank 4."""
    return (
        Condition("handwriting, rank 4", n=8, spread=spread, decides=True),
        Condition("8 x 8, rank 4", n=20, spread=small),
        *more,
    )


CLAIMS = (
    Claim(
        "one-step",
        "With adaptors, one step comes at least half as near to many steps as it was.",
        whose="paper",
        unit="%",
        better="less",
        scale="log",
        margin=50.0,
        quantity="Fréchet distance, all terms of the loss below the frozen model in one step",
        reason="a ghost at half the distance is a ghost",
        conditions=_both(12.0, 15.0),
    ),
    Claim(
        "high",
        "The terms of high frequencies make one step better than the spatial term alone.",
        whose="paper",
        unit="%",
        better="less",
        scale="log",
        margin=10.0,
        quantity="Fréchet distance, all terms below spatial alone, at equal rank",
        reason="seeds of one arm differ by about as much",
        conditions=_both(10.0, 18.0),
    ),
    Claim(
        "energy",
        "They bring back energy of high frequencies that the spatial term alone leaves out.",
        whose="paper",
        unit="points",
        margin=3.0,
        quantity="energy above a quarter of a cycle per pixel in per cent of the many-step "
        "images', all terms minus spatial alone",
        reason="a twentieth or less of what one step lacks",
        conditions=_both(3.0, 3.0),
    ),
    Claim(
        "mse",
        "Adaptors that are trained by squared error alone stay blurrier.",
        whose="paper",
        unit="points",
        margin=3.0,
        quantity="energy above a quarter of a cycle per pixel in per cent of the many-step "
        "images', all terms minus squared error",
        reason="a twentieth or less of what one step lacks",
        conditions=_both(3.0, 3.0),
    ),
    Claim(
        "rank",
        "Twice the rank does more than the terms of high frequencies.",
        whose="ours",
        unit="%",
        better="less",
        scale="log",
        margin=10.0,
        quantity="Fréchet distance, spatial alone at twice the rank below all terms",
        reason="seeds of one arm differ by about as much",
        conditions=(
            Condition("8 x 8, rank 4 against 2", n=20, spread=18.0, decides=True),
            Condition("8 x 8, rank 8 against 4", n=20, spread=18.0),
        ),
    ),
    Claim(
        "power",
        "A term on the logarithm of the spectrum brings back more energy than the linear terms.",
        whose="ours",
        unit="points",
        margin=3.0,
        quantity="energy above a quarter of a cycle per pixel in per cent of the many-step "
        "images', log spectrum minus Fourier and edges",
        reason="a twentieth or less of what one step lacks",
        conditions=(Condition("8 x 8, rank 4", n=20, spread=3.0, decides=True),),
    ),
)


def best_weight(found: Found) -> str:
    """The arm of digits at rank 4 whose lambda did best in the search, on seeds of its own."""
    arms = ("high 0.001, rank 4", "high, rank 4", "high 0.1, rank 4")
    tuned = found.tuned("digits")
    return min(arms, key=lambda arm: min(tuned[arm]["scores"].values()))


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    chosen = {"handwriting": "high, rank 4", "digits": best_weight(found)}
    title = {"handwriting": "handwriting, rank 4", "digits": "8 x 8, rank 4"}

    def arm(world: str, name: str, column: str) -> dict[int, float]:
        return found.values(world, column, arm=name)

    def frozen(world: str, column: str) -> dict[int, float]:
        value = float(found[f"{world}, still"][f"one: {column}"].iloc[0])
        return dict.fromkeys(arm(world, "full", column), value)

    def beside(world: str, column: str, ours: str, theirs: str | None) -> Measured:
        nothing = frozen(world, column)
        return Measured(
            arm(world, ours, column), nothing if theirs is None else arm(world, theirs, column),
            control=arm(world, "full", column), nothing=nothing, blocks=found.blocks(world),
            tuning_seeds=search_seeds())  # fmt: skip

    def both(column: str, theirs: str | None) -> dict[str, Measured]:
        return {title[w]: beside(w, column, chosen[w], theirs) for w in title}

    return {
        "one-step": both("frechet", None),
        "high": both("frechet", "spatial, rank 4"),
        "energy": both("energy", "spatial, rank 4"),
        "mse": both("energy", "mse, rank 4"),
        "rank": {
            "8 x 8, rank 4 against 2": beside(
                "digits", "frechet", "spatial, rank 4", "high, rank 2"
            ),
            "8 x 8, rank 8 against 4": beside(
                "digits", "frechet", "spatial, rank 8", chosen["digits"]
            ),
        },
        "power": {"8 x 8, rank 4": beside("digits", "energy", "power, rank 4", chosen["digits"])},
    }


def facts(found: Found) -> list[Fact]:
    """What does not vary with seeds: what the frozen model's one step lacks, and identities."""
    rows = {world: found[f"{world}, still"].iloc[0] for world in WORLDS}
    made, lacks = [], {world: float(row["one: energy"]) for world, row in rows.items()}
    for world, name in (("handwriting", "Handwriting"), ("digits", "8 x 8 digits")):
        made.append(
            Fact(f"ghost-{world}", f"{name}: one frozen step has less than half of the fine "
                 "detail.", lacks[world] < 50,
                 lacks[world], "per cent")
        )  # fmt: skip
    model, adapted = one.dressed("digits", found.scale, rank=4)
    same = torch.equal(
        one.made(model, "digits", found.scale, "validation"),
        one.made(one.frozen("digits", found.scale), "digits", found.scale, "validation"),
    )
    numbers = sum(p.numel() for p in adapted.parameters())
    return [
        *made,
        Fact("start", "Before training it is the frozen model, to the bit.", same),
        Fact("count", "It trains as many numbers as the formula says.",
             numbers == one.counted(adapted), numbers, "numbers"),
    ]  # fmt: skip


LAB = Lab(
    slug="hipa",
    part="generate",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
