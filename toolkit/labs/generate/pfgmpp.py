"""What is measured about PFGM++: does a finite D buy robustness, and against what?

Small denoisers of digits are trained with five laws of noise, each at its own best rate, and tried
with noise between the steps, few steps and few bits. The same probes run on mixtures whose best
denoiser is known exactly, so that no training takes part.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.sample.metrics import frechet
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.generate.pfgmpp import PFGMpp, few_bits, field, posterior_mean
from toolkit.labs.generate import film
from toolkit.labs.generate.tails import exact, network
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4)
STEPS = (18, 9)
BITS = (6, 5, 4, 3)
MOST = ALPHAS[-1]
FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Real noise over what is told, where a denoiser is misled."""
TOLD = 0.5
"""Noise level that is told then."""
PICTURES = 20
LEVELS = 12
"""Of grey, in stored pictures."""
EXACT = ("4", "16", "64", "inf")


def tuning_run(arm: str, rate: float, seed: int, scale: str) -> dict[str, Any]:
    """Training at one rate: the distance of clean samples, all that a user without probes sees."""
    torch.set_num_threads(1)
    denoiser = network.train(arm, rate, seed, scale)
    made = network.samples(denoiser, arm, seed, network.size(scale).tuned)
    return {"clean": network.distance(made)}


def training(arm: str, rate: float, seed: int, scale: str) -> dict[str, Any]:
    """One denoiser, and how its samples stand every probe.

    Args:
        arm: of ``network.ARMS``.
        rate: learning rate.
        seed: of split, start, order and all noise.
        scale: of the sizes.

    Returns:
        Fréchet distances to all digits: lists ``steps 18`` and ``steps 9`` over the injections
        ``ALPHAS``; ``bits`` over ``BITS``, without injections; ``told``: at the strongest
        injection with the denoiser told what noise is left. ``misled``: squared errors of
        denoising over ``FACTORS``. ``real``: half of the digits from the other half.
        ``pictures``: for the first seed of all, digits at every setting in the order of the lists,
        then told.
    """
    torch.set_num_threads(1)
    denoiser, count = network.train(arm, rate, seed, scale), network.size(scale).samples

    def made(alpha: float = 0.0, steps: int = STEPS[0], told: bool = False) -> torch.Tensor:
        return network.samples(denoiser, arm, seed, count, alpha, steps, told)

    found: dict[str, Any] = {"pictures": []}

    def seen(samples: torch.Tensor) -> float:
        if seed == 0:
            images = samples[:PICTURES].view(-1, 1, 8, 8)
            found["pictures"].append(film.encode(images, LEVELS))
        return network.distance(samples)

    for steps in STEPS:
        found[f"steps {steps}"] = [seen(made(alpha, steps)) for alpha in ALPHAS]
    found["told"] = seen(made(MOST, told=True))
    found["bits"] = []
    for bits in BITS:
        with few_bits(denoiser, bits):
            found["bits"].append(network.distance(made()))
    order = torch.randperm(len(network.digits()), generator=generator(seed, "halves"))
    halves = network.digits()[order].chunk(2)
    return found | {
        "misled": network.misled(denoiser, seed, TOLD, FACTORS),
        "real": frechet(*halves),
    }


def exact_run(D: str, seed: int, scale: str) -> dict[str, Any]:
    """The exact denoiser of a mixture: variance left over after injections, 1 is right.

    Args:
        D: a number, or ``inf``, as text.
        seed: of mixture and noise.
        scale: of the sizes.

    Returns:
        ``left 0``, ``left 0.2``, ``left 0.4`` by injection, and ``told`` at the strongest.
    """
    torch.set_num_threads(1)
    count, components = (10, 3) if scale == "ci" else (100, 20)
    value = exact.number(D)
    found = {
        f"left {alpha:g}": exact.tried(value, seed, count, components, alpha, False)
        for alpha in (0.0, 0.2, MOST)
    }
    return found | {"told": exact.tried(value, seed, count, components, MOST, True)}


def measure(runs: Runs, scale: Scale) -> None:
    """The search for rates, then all arms on every seed; and the exact denoisers."""
    blocks = two_blocks(scale.pick(ci=2, cpu=8, gpu=16))
    seeds = [seed for block in blocks for seed in block]
    tuned = runs.tune(
        "denoisers", tuning_run, {arm: {"scale": scale.name} for arm in network.ARMS},
        dict.fromkeys(network.ARMS, START), seeds=search_seeds(), reported=seeds, judged="clean",
        better="min", factor=2.0, width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("denoisers", blocks)
    runs.table("denoisers", training, [
        {"arm": arm, "rate": tuned[arm].rate, "seed": seed, "scale": scale.name}
        for seed in seeds for arm in network.ARMS
    ])  # fmt: skip
    mixed = two_blocks(scale.pick(ci=2, cpu=20, gpu=20))
    runs.blocks("exact", mixed)
    runs.table("exact", exact_run, [
        {"D": D, "seed": seed, "scale": scale.name} for block in mixed for seed in block
        for D in EXACT
    ])  # fmt: skip


START = 8e-3
"""Middle of the first rates tried."""


CLAIMS = (
    Claim(
        "noise",
        "Noise between the steps hurts less with a finite D than with D = ∞.",
        whose="paper",
        where="abstract",
        unit="%",
        scale="log",
        better="less",
        margin=10.0,
        quantity="Fréchet distance at injections of 0.4, of D = ∞ above that of the finite D",
        reason="two seeds of one arm differ by nearly as much",
        conditions=(
            Condition("D = 16", n=8, spread=8.0, decides=True),
            Condition("D = 64", n=8, spread=6.0),
        ),
    ),
    Claim(
        "bits",
        "Weights of few bits hurt less with D = 16 than with D = ∞.",
        whose="paper",
        unit="%",
        scale="log",
        better="less",
        margin=20.0,
        quantity="Fréchet distance, geometric mean of 5, 4 and 3 bits, of D = ∞ above that of 16",
        reason="one bit changes the distance by a factor of two or more",
        conditions=(Condition("5, 4 and 3 bits", n=8, spread=18.0, decides=True),),
    ),
    Claim(
        "steps",
        "Few steps hurt less with D = 16 than with D = ∞.",
        whose="paper",
        unit="%",
        scale="log",
        better="less",
        margin=10.0,
        quantity="Fréchet distance after 9 steps of Heun, of D = ∞ above that of D = 16",
        reason="two seeds of one arm differ by nearly as much",
        conditions=(Condition("9 steps", n=8, spread=10.0, decides=True),),
    ),
    Claim(
        "clean",
        "Where nothing disturbs, D = 16 keeps the quality of D = ∞.",
        whose="paper",
        where="abstract",
        figure="FID 1.91 with D = 2048, 1.98 for diffusion",
        unit="%",
        scale="log",
        better="less",
        than=-25.0,
        margin=10.0,
        quantity="distance of D = ∞ in % of that of D = 16, from 75 %",
        reason="two seeds of one arm differ by nearly as much",
        conditions=(Condition("18 steps", n=8, spread=10.0, decides=True),),
    ),
    Claim(
        "field",
        "The exact denoiser of D = 16, which nobody trained, stands noise better than that of "
        "D = ∞: the field itself is robust.",
        whose="ours",
        unit="%",
        scale="log",
        better="less",
        margin=20.0,
        quantity="variance left over at injections of 0.4, of D = ∞ above that of D = 16",
        reason="clean samples have 6 % more than is right",
        conditions=(Condition("mixture of 20 digits", n=20, spread=12.0, decides=True),),
    ),
    Claim(
        "law",
        "No field is needed: Gaussian noise whose scale is drawn per image, and not told, beats "
        "D = ∞ as well.",
        whose="ours",
        unit="%",
        scale="log",
        better="less",
        margin=10.0,
        quantity="Fréchet distance at injections of 0.4, of D = ∞ above that of the random scale",
        reason="two seeds of one arm differ by nearly as much",
        conditions=(Condition("log-normal scale", n=8, spread=8.0, decides=True),),
    ),
)


def column(found: Found, arm: str, name: str, at: int | None = None) -> dict[int, float]:
    """Seed -> one number of the denoisers of an arm: an entry of a list, or a plain column."""
    runs = found["denoisers"]
    runs = runs[runs.arm == arm]
    values = [value if at is None else value[at] for value in runs[name]]
    return dict(zip(runs.seed.tolist(), map(float, values), strict=True))


def distances(found: Found) -> Any:
    """One row for each arm, seed, number of steps and injection: ``distance``."""
    import pandas as pd

    return pd.DataFrame([
        {"arm": run["arm"], "seed": run["seed"], "steps": steps, "alpha": alpha, "distance": value}
        for run in found["denoisers"].to_dict("records") for steps in STEPS
        for alpha, value in zip(ALPHAS, run[f"steps {steps}"], strict=True)
    ])  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    search, full = search_seeds(), f"steps {STEPS[0]}"

    def blocks(name: str) -> Any:
        """None where a block is one seed, as in quick checks."""
        made = found.blocks(name)
        return made if len(made[0]) > 1 else None

    shared: dict[str, Any] = {"blocks": blocks("denoisers"), "tuning_seeds": search}

    def noisy(arm: str, at: int = -1) -> dict[int, float]:
        return column(found, arm, full, at)

    def few(arm: str) -> dict[int, float]:
        kept = [column(found, arm, "bits", BITS.index(bits)) for bits in (5, 4, 3)]
        return {seed: statistics.geometric_mean(one[seed] for one in kept) for seed in kept[0]}

    known: dict[str, Any] = {"control": column(found, "inf", "told"), "nothing": noisy("inf")}
    whole: dict[str, Any] = {"control": noisy("inf", 0), "nothing": few("inf")}
    finer: dict[str, Any] = {
        "control": noisy("inf", 0),
        "nothing": column(found, "inf", f"steps {STEPS[1]}", 0),
    }

    def left(D: str, name: str) -> dict[int, float]:
        return found.values("exact", name, D=D)

    return {
        "noise": {
            "D = 16": Measured(noisy("16"), noisy("inf"), **known, **shared),
            "D = 64": Measured(noisy("64"), noisy("inf"), **known, **shared),
        },
        "clean": {"18 steps": Measured(noisy("16", 0), noisy("inf", 0), **shared)},
        "bits": {"5, 4 and 3 bits": Measured(few("16"), few("inf"), **whole, **shared)},
        "steps": {"9 steps": Measured(
            column(found, "16", f"steps {STEPS[1]}", 0),
            column(found, "inf", f"steps {STEPS[1]}", 0), **finer, **shared)},
        "field": {"mixture of 20 digits": Measured(
            left("16", f"left {MOST:g}"), left("inf", f"left {MOST:g}"),
            control=left("inf", "told"), nothing=left("inf", f"left {MOST:g}"),
            blocks=blocks("exact"), tuning_seeds=search)},
        "law": {"log-normal scale": Measured(noisy("scale"), noisy("inf"), **known, **shared)},
    }  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Identities, checked by computing them."""
    draws = torch.Generator().manual_seed(0)
    data = torch.randn(30, 6, dtype=torch.float64, generator=draws)
    x = 2 * torch.randn(20, 6, dtype=torch.float64, generator=draws)
    method = PFGMpp(D=16.0)
    slope = field(x, method.r(0.7), data, 16.0).slope
    wanted = (x - posterior_mean(x, 0.7, data, 16.0)) / method.r(0.7)
    gap = float((slope - wanted).abs().max())
    normals, sigma = torch.randn(9, 6, generator=draws), torch.rand(9, generator=draws) + 0.1
    same = torch.equal(PFGMpp(D=float("inf")).offset(sigma, normals), sigma[:, None] * normals)
    return [
        Fact("field", "The field's slope, summed over charges, points from the posterior mean.",
             gap < 1e-12, gap, "largest difference"),
        Fact("infinite", "With an infinite D the noise is that of diffusion, bit for bit.", same),
    ]  # fmt: skip


LAB = Lab(
    slug="pfgmpp",
    part="generate",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
)
