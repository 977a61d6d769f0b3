"""What is measured about DC-Solver: how far samples end from a fine run of the same noises.

Each seed draws a mixture of Gaussians in 16 dimensions, whose guided denoiser is exact, or new
noises for the base of digits. Ratios are searched on ten noises of their own; what is told is
measured on others. Errors are mean squared distances per number; claims count them in halvings, so
one halving less is half the error.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.sample.plans import DPMpp2M, Plan, UniPC
from toolkit.core.scale import Scale
from toolkit.generate.dc_solver import cpr_ratios, fit_cpr
from toolkit.labs.beds import denoiser as bed
from toolkit.labs.generate import film
from toolkit.labs.generate.compensation import arms, worlds
from toolkit.labs.lab import Found, Lab, two_blocks

FITTED = (5, 7, 10), (1.0, 4.0, 7.5)
"""Calls and guidance at which the polynomials are fitted."""
STATIC = (0.9, 1.0, 1.1, 1.2, 1.3)
"""Static ratios that are measured on the held-out noises; 1 is UniPC."""
TRIED = tuple(round(0.4 + 0.1 * n, 1) for n in range(17))
"""Ratios of one step in the explorer."""
GUIDED = (1.0, 4.0)
"""Guidance on digits."""
CALLS = 6
"""Calls on digits."""
NOISES = 10
"""Of a search, as published."""
RIDGE = 1e-6


def settings(scale: str) -> list[tuple[float, int]]:
    """Guidance and calls on mixtures, in the order of the lists in records."""
    if scale == "ci":
        return [(1.0, 5), (1.0, 6), (7.5, 5)]
    return [(w, m) for w in (1.0, 2.0, 4.0, 7.5) for m in (5, 6, 7, 8, 10)]


def sizes(scale: str) -> tuple[int, int, int]:
    """Held-out noises of a mixture, of digits, and iterations of a search."""
    return (32, 8, 2) if scale == "ci" else (512, 64, 40)


def mixture_run(kind: str, seed: int, scale: str) -> dict[str, Any]:
    """All arms on one mixture.

    Returns:
        Lists over :func:`settings` of mean squared distances from the fine run: ``unipc``,
        ``unipc 3``, ``predictor``, ``heun`` (None at odd calls), ``doubled`` (UniPC with twice the
        calls), ``static`` (the ratio that is best on the search's noises), ``static 0.9`` ...,
        ``dc``, ``dc 3`` and ``dc predictor`` (None but at 5 calls), ``cpr``; ``middle``: the median
        over samples for ``dc``, and ``middle unipc``; ``chosen``: the static ratio; ``ratios``: of
        ``dc``, one setting after the other.
    """
    torch.set_num_threads(1)
    world, (count, _, rounds) = worlds.mixtures(kind, seed, scale), sizes(scale)
    x, labels = world.noise(count, "held out")
    grid, steps = (arms.STATIC[::10], 30) if scale == "ci" else (arms.STATIC, arms.FINE)
    found: dict[str, list[Any]] = {}
    searched = []

    def put(name: str, value: float | None) -> None:
        found.setdefault(name, []).append(value if value is None else float(f"{value:.4g}"))

    truths = {w: world.truth(x, labels, w) for w in sorted({w for w, _ in settings(scale)})}
    for weight, calls in settings(scale):

        def off(plan: Any, steps: int, weight: float = weight) -> float:
            return arms.distance(world.run(plan, steps, x, labels, weight), truths[weight])

        for name in ("unipc", "unipc 3", "predictor"):
            put(name, off(arms.RIVALS[name], calls))
        for ratio in STATIC:
            put(f"static {ratio:g}", off(arms.OURS.given([ratio]), calls))
        end = None if calls % 2 else arms.heun(world, calls, x, labels, weight)
        put("heun", None if end is None else arms.distance(end, truths[weight]))
        put("doubled", off(UniPC(2), 2 * calls))
        put("chosen", arms.best_static(world, arms.OURS, calls, weight, NOISES, grid))
        put("static", off(arms.OURS.given([found["chosen"][-1]]), calls))
        for name, plan in (("dc", arms.OURS), ("dc 3", arms.THIRD), ("dc predictor", arms.ALONE)):
            if name != "dc" and calls != 5:
                put(name, None)
                continue
            made = arms.searched(world, plan, calls, weight, NOISES, steps, iterations=rounds)
            ratios = made.ratios.tolist()
            put(name, off(plan.given(ratios), calls))
            if name == "dc":
                searched.append((weight, calls, ratios))
        medians: dict[str, Plan] = {
            "middle": arms.OURS.given(searched[-1][2]), "middle unipc": UniPC(2),
        }  # fmt: skip
        for name, solver in medians.items():
            ends = world.run(solver, calls, x, labels, weight) - truths[weight]
            put(name, float(ends.square().mean(1).median()))
    told = [s for s in searched if s[1] in FITTED[0] and s[0] in FITTED[1]]
    phi = fit_cpr(told, ridge=RIDGE)
    for weight, calls in settings(scale):
        plan = arms.OURS.given(cpr_ratios(phi, weight, calls))
        put("cpr", arms.distance(world.run(plan, calls, x, labels, weight), truths[weight]))
    return found | {"ratios": [round(r, 3) for s in searched for r in s[2]]}


def counts_run(seed: int, scale: str) -> dict[str, Any]:
    """One guidance and number of calls, other searches: noises and degrees, and the misalignment.

    Returns:
        ``noises 5`` ... ``noises 50``, ``degree 1`` ... ``degree 3``: mean squared distances on
        held-out noises; ``seen 5`` ...: on the search's own; ``apart unipc``, ``apart dc``: lists
        over steps, how far predictions that are used lie from those at the
        corrected states.
    """
    torch.set_num_threads(1)
    world, (count, _, rounds) = worlds.mixtures("round", seed, scale), sizes(scale)
    weight, calls = 4.0, CALLS
    found: dict[str, Any] = {}
    x, labels = world.noise(count, "held out")
    goal = world.truth(x, labels, weight)
    for noises in (5, 10, 50):
        made = arms.searched(world, arms.OURS, calls, weight, noises, iterations=rounds)
        plan = arms.OURS.given(made.ratios.tolist())
        found[f"noises {noises}"] = arms.distance(world.run(plan, calls, x, labels, weight), goal)
        own, told = world.noise(noises, "search")
        end = world.run(plan, calls, own, told, weight)
        found[f"seen {noises}"] = arms.distance(end, world.truth(own, told, weight))
        if noises == NOISES:
            apart = arms.alignment(world, plan, calls, weight, x, labels)
    for degree in (1, 2, 3):
        plan = arms.DCSolver(degree=degree)
        made = arms.searched(world, plan, calls, weight, NOISES, iterations=rounds)
        plan = plan.given(made.ratios.tolist())
        found[f"degree {degree}"] = arms.distance(world.run(plan, calls, x, labels, weight), goal)
    found["unipc"] = arms.distance(world.run(UniPC(2), calls, x, labels, weight), goal)
    found["apart unipc"] = arms.alignment(world, UniPC(2), calls, weight, x, labels)
    return found | {"apart dc": apart}


def along_run(weight: float, calls: int, seed: int, scale: str) -> dict[str, Any]:
    """Distances while one step's ratio moves: ``third``, ``last but one`` and ``last``, each a list
    over :data:`TRIED`, the other steps as searched."""
    torch.set_num_threads(1)
    world, (count, _, rounds) = worlds.mixtures("round", seed, scale), sizes(scale)
    ratios = arms.searched(world, arms.OURS, calls, weight, NOISES, iterations=rounds).ratios
    x, labels = world.noise(count, "held out")
    goal = world.truth(x, labels, weight)
    places = {"third": 2, "last but one": calls - 2, "last": calls - 1}
    found = {
        name: arms.along(world, ratios.tolist(), calls, weight, at, TRIED, x, labels, goal)
        for name, at in places.items()
    }
    return {name: [float(f"{v:.4g}") for v in values] for name, values in found.items()}


def digits_run(weight: float, seed: int, scale: str) -> dict[str, Any]:
    """All arms on the base of digits, at one guidance.

    Returns:
        For ``unipc``, ``dc``, ``heun``, ``doubled`` (UniPC with twice the calls) ``unipc 3``,
        ``predictor``, ``static 0.9`` ... (at ``ci`` these at guidance 4 only) the mean squared
        distance from the fine run; ``frechet: unipc``, ``read: unipc``, and so for ``dc`` and
        ``fine``; ``ratios``; ``calls`` of the network in the search, for all its noises; ``show:
        unipc`` and so on: eight images each, as text.
    """
    torch.set_num_threads(1)
    world, (_, count, rounds) = worlds.digits(seed, scale), sizes(scale)
    x, labels = world.noise(count, "held out")
    fine = world.truth(x, labels, weight)
    fine_steps = 6 if scale == "ci" else 48
    made = arms.searched(world, arms.OURS, CALLS, weight, NOISES, fine_steps, iterations=rounds)
    ratios = made.ratios.tolist()
    plans = {"unipc": arms.RIVALS["unipc"], "dc": arms.OURS.given(ratios)}
    if weight == 4.0 or scale != "ci":
        plans |= {name: arms.RIVALS[name] for name in ("unipc 3", "predictor")}
        plans |= {f"static {r:g}": arms.OURS.given([r]) for r in STATIC if r != 1}
    ends = {name: world.run(plan, CALLS, x, labels, weight) for name, plan in plans.items()}
    ends["heun"] = arms.heun(world, CALLS, x, labels, weight)
    ends["doubled"] = world.run(UniPC(2), 2 * CALLS, x, labels, weight)
    found: dict[str, Any] = {name: arms.distance(end, fine) for name, end in ends.items()}
    found["static 1"] = found["unipc"]
    for name in ("unipc", "dc", "fine"):
        images = worlds.clean(ends.get(name, fine))
        judged = bed.quality(images, labels, scale)
        found |= {f"{word}: {name}": value for word, value in judged.items()}
        found[f"show: {name}"] = film.encode(images[:8], 16)
    return found | {"ratios": ratios, "calls": made.calls}


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab."""
    mixed = two_blocks(scale.pick(ci=4, cpu=20, gpu=40))
    drawn = two_blocks(scale.pick(ci=4, cpu=12, gpu=40))
    runs.blocks("mixtures", mixed)
    runs.blocks("digits", drawn)
    jobs: list[dict[str, Any]] = [{"scale": scale.name, "seed": s} for b in mixed for s in b]
    for kind in worlds.KINDS:
        runs.table("mixtures", mixture_run, [{"kind": kind, **job} for job in jobs])
    runs.table("searches", counts_run, jobs)
    where = [(w, m) for w in scale.pick(ci=(1.0, 7.5), cpu=(1.0, 2.0, 4.0, 7.5), gpu=(1.0, 4.0))
             for m in scale.pick(ci=(5,), cpu=(5, 6, 8), gpu=(5, 8))]  # fmt: skip
    few = jobs[: scale.pick(ci=1, cpu=5, gpu=5)]
    runs.table("along", along_run, [{"weight": w, "calls": m, **job}
                                    for w, m in where for job in few])  # fmt: skip
    runs.table("digits", digits_run, [{"weight": w, "seed": s, "scale": scale.name}
                                      for w in GUIDED for b in drawn for s in b])  # fmt: skip


UNIT = "halvings"
CLAIMS = (
    Claim(
        "effect",
        "With as many calls, samples of digits end nearer to a fine run than UniPC's.",
        whose="paper",
        where="table of Stable Diffusion 2.1, as a summary gives it",
        figure="mean squared error 0.394 against 0.434 with 5 calls at guidance 7.5",
        unit=UNIT,
        better="less",
        margin=0.14,
        quantity="halvings of the mean squared distance from a fine run of the same noises, "
        "DC-Solver below UniPC, 6 calls",
        reason="what the paper reports with 5 calls at guidance 7.5",
        conditions=(
            Condition("guidance 1", n=12, spread=0.15),
            Condition("guidance 4", n=12, spread=0.15, decides=True),
        ),
    ),
    Claim(
        "alignment",
        "Compensated predictions lie nearer to what the network says at the corrected states.",
        whose="paper",
        where="the misalignment that the method is built on, as a summary gives it",
        unit=UNIT,
        better="less",
        margin=0.5,
        quantity="halvings of the mean squared distance between the predictions that steps use and "
        "those at the states that they start at, DC-Solver below UniPC, wide mixtures, guidance 4, "
        "6 calls",
        reason="a repair of what the method is built on should be larger than a factor of 1.4",
        conditions=(Condition("wide mixtures", n=20, spread=1.0, decides=True),),
    ),
    Claim(
        "guidance",
        "The gain over UniPC grows with guidance.",
        whose="paper",
        unit=UNIT,
        margin=0.5,
        quantity="halvings gained on UniPC at high guidance, minus those at guidance 1",
        reason="less than what UniPC gains by one call more",
        conditions=(
            Condition("digits, 4, 6 calls", n=12, spread=0.3, decides=True),
            Condition("wide, 7.5, 5 calls", n=20, spread=1.0),
        ),
    ),
    Claim(
        "static",
        "A ratio for each step does better than the best ratio that is the same for all.",
        whose="paper",
        where="ablations, as a summary gives them",
        unit=UNIT,
        better="less",
        margin=0.14,
        quantity="halvings of the mean squared distance, searched ratios below the best static one",
        reason="what the paper reports for the whole method with 5 calls at guidance 7.5",
        conditions=(
            Condition("digits, guidance 4", n=12, spread=0.15, grid=STATIC, decides=True),
            Condition("wide, guidance 1, 6 calls", n=20, spread=0.25, grid=STATIC),
        ),
    ),
    Claim(
        "polynomials",
        "Ratios that polynomials give for calls or guidance not searched still beat UniPC.",
        whose="paper",
        where="cascade polynomial regression, as a summary gives it",
        unit=UNIT,
        better="less",
        margin=0.5,
        quantity="halvings of the mean squared distance on wide mixtures, DC-Solver with fitted "
        "ratios below UniPC, mean of settings",
        reason="less than what UniPC gains by one call more",
        conditions=(
            Condition("calls not searched", n=20, spread=1.0, decides=True),
            Condition("guidance not searched", n=20, spread=0.6),
        ),
    ),
    Claim(
        "quality",
        "Nearer to the fine run is also nearer to real digits.",
        whose="ours",
        unit="Fréchet distance",
        better="less",
        margin=0.2,
        quantity="Fréchet distance of 64 samples to 64 test images in the CNN's features, "
        "DC-Solver below UniPC, 6 calls",
        reason="less than a tenth of what 64 samples of the fine run have",
        conditions=(
            Condition("guidance 1", n=12, spread=0.2, decides=True),
            Condition("guidance 4", n=12, spread=0.2),
        ),
    ),
)


def errors(found: Found, kind: str) -> Any:
    """One row for each seed, guidance, calls and arm of a kind of mixture: ``error``."""
    import pandas as pd

    table, rows = found["mixtures"], []
    for run in table[table.kind == kind].to_dict("records"):
        for arm, values in run.items():
            if isinstance(values, list) and len(values) == len(settings(found.scale)):
                for (weight, calls), error in zip(settings(found.scale), values, strict=True):
                    rows.append({"seed": run["seed"], "guidance": weight, "calls": calls,
                                 "arm": arm, "error": error})  # fmt: skip
    return pd.DataFrame(rows)


def ratios(found: Found) -> Any:
    """One row for each seed and step of the searches on wide mixtures: ``ratio``."""
    import pandas as pd

    table, rows = found["mixtures"], []
    for run in table[table.kind == "round"].to_dict("records"):
        values = iter(run["ratios"])
        for weight, calls in settings(found.scale):
            for step in range(1, calls + 1):
                rows.append({"seed": run["seed"], "guidance": weight, "calls": calls,
                             "step": step, "ratio": next(values)})  # fmt: skip
    return pd.DataFrame(rows)


def along(found: Found) -> Any:
    """One row for each guidance, calls, step and ratio tried: the geometric mean ``error``."""
    import pandas as pd

    rows = []
    for (weight, calls), part in found["along"].groupby(["weight", "calls"]):
        for step in ("third", "last but one", "last"):
            means = np.exp(np.log(np.array(part[step].tolist())).mean(0)).tolist()
            place = {"guidance": weight, "calls": calls, "step": step}
            rows += [place | {"ratio": r, "error": e} for r, e in zip(TRIED, means, strict=True)]
    return pd.DataFrame(rows)


def halvings(found: Found, kind: str, arm: str, weight: float, calls: int) -> dict[int, float]:
    """Seed -> the base-2 logarithm of an arm's error, on digits or on a kind of mixture."""
    if kind == "digits":
        values = found.values("digits", arm, weight=weight)
        return {seed: math.log2(v) for seed, v in values.items()}
    table = errors(found, kind)
    part = table[(table.arm == arm) & (table.guidance == weight) & (table.calls == calls)]
    return {int(s): math.log2(e) for s, e in zip(part.seed, part.error, strict=True)}


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    blocks = {"digits": found.blocks("digits"), "mixtures": found.blocks("mixtures")}

    def arm(kind: str, name: str, weight: float, calls: int = CALLS) -> dict[int, float]:
        return halvings(found, kind, name, weight, calls)

    def below(kind: str, weight: float, calls: int = CALLS, theirs: Any = None) -> Measured:
        plain = arm(kind, "unipc", weight, calls)
        return Measured(
            arm(kind, "dc", weight, calls), plain if theirs is None else theirs,
            control=arm(kind, "doubled", weight, calls), nothing=plain,
            blocks=blocks["digits" if kind == "digits" else "mixtures"],
        )  # fmt: skip

    def gain(kind: str, weight: float, calls: int) -> dict[int, float]:
        ours, theirs = (arm(kind, name, weight, calls) for name in ("dc", "unipc"))
        return {seed: theirs[seed] - ours[seed] for seed in ours}

    def statics(kind: str, weight: float) -> dict[float, dict[int, float]]:
        return {ratio: arm(kind, f"static {ratio:g}", weight) for ratio in STATIC}

    def mean(name: str, places: list[tuple[float, int]]) -> dict[int, float]:
        each = [arm("round", name, *place) for place in places]
        return {seed: sum(one[seed] for one in each) / len(each) for seed in each[0]}

    def fitted(places: list[tuple[float, int]]) -> Measured:
        plain = mean("unipc", places)
        return Measured(mean("cpr", places), plain, control=mean("doubled", places),
                        nothing=plain, blocks=blocks["mixtures"])  # fmt: skip

    def apart(name: str) -> dict[int, float]:
        table = found["searches"]
        means = table[f"apart {name}"].map(lambda steps: math.log2(sum(steps) / len(steps)))
        return dict(zip(table.seed.tolist(), means.tolist(), strict=True))

    there = settings(found.scale)
    between = [(w, m) for w, m in there if w in FITTED[1] and m not in FITTED[0]]
    # at ci no guidance lies between: there the first setting stands in, and nothing is judged
    beside = [(w, m) for w, m in there if w not in FITTED[1] and m in FITTED[0]] or there[:1]
    return {
        "effect": {f"guidance {w:g}": below("digits", w) for w in GUIDED},
        "alignment": {"wide mixtures": Measured(
            apart("dc"), apart("unipc"), blocks=blocks["mixtures"])},
        "guidance": {
            "digits, 4, 6 calls": Measured(
                gain("digits", 4.0, CALLS), gain("digits", 1.0, CALLS), blocks=blocks["digits"]),
            "wide, 7.5, 5 calls": Measured(
                gain("round", 7.5, 5), gain("round", 1.0, 5), blocks=blocks["mixtures"]),
        },
        "static": {
            "digits, guidance 4": below("digits", 4.0, theirs=statics("digits", 4.0)),
            "wide, guidance 1, 6 calls": below("round", 1.0, theirs=statics("round", 1.0)),
        },
        "polynomials": {"calls not searched": fitted(between),
                        "guidance not searched": fitted(beside)},
        "quality": {
            f"guidance {w:g}": Measured(
                found.values("digits", "frechet: dc", weight=w),
                found.values("digits", "frechet: unipc", weight=w), blocks=blocks["digits"])
            for w in (1.0, 4.0)
        },
    }  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them on the mixture of one seed."""
    world = worlds.mixtures("round", 0, found.scale)
    x, labels = world.noise(16, "facts")
    ends = {
        name: world.run(plan, CALLS, x, labels, 4.0)
        for name, plan in {
            "one": arms.OURS.given([1.0] * CALLS), "unipc": UniPC(2), "dpmpp": DPMpp2M(),
            "predictor": UniPC(2, corrector=False),
        }.items()
    }  # fmt: skip
    asked = found["digits"].calls.iloc[0]
    return [
        Fact("one", "With all ratios 1 the samples are UniPC's, to the bit.",
             torch.equal(ends["one"], ends["unipc"])),
        Fact("predictor", "UniPC of order 2 (bh2) without its corrector is DPM-Solver++ 2M.",
             bool(torch.allclose(ends["predictor"], ends["dpmpp"], atol=1e-12))),
        Fact("calls", "A search for 6 calls asks the network so often, without its reference.",
             bool((found["digits"].calls == asked).all()), int(asked), "calls for ten noises"),
    ]  # fmt: skip


LAB = Lab(
    slug="dc_solver",
    part="generate",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
