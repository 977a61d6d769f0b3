"""What is measured about PIE: classes whose score is known, and handwriting on its way to a digit.

Every seed edits sixteen test images of each of four digits towards another, 64 in all; no image is
used twice. The same noises serve all arms. A single edit is compared at equal confidence of a
classifier that had no part in training the denoiser. The classes with known scores tell what the
rounds are: where they lead, and at what rate.
"""

from __future__ import annotations

from typing import Any

import torch

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.generate.pie import PIE, ddim_factor, path_variance
from toolkit.labs.beds import denoiser
from toolkit.labs.generate import film
from toolkit.labs.generate.severity import arms, exact, world
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

SHOWN: dict[str, dict[str, tuple[float, ...]]] = {
    "ci": {"strength": (0.5,), "inside": (0.75, 1.0), "guidance": (1.0, 3.0)},
    "cpu": {"strength": (0.2, 0.5, 0.8), "inside": (0.5, 0.75, 1.0), "guidance": (1.0, 3.0)},
}
"""Settings of the explorer, of which all combinations are stored."""
EXACT = ((0.2, 1.0), (0.5, 1.0), (0.5, exact.BETA))
"""Strength and beta of the paths towards known classes."""
ONCE = {"masked": 0.6, "plain": 0.5}
"""Strength of the single edits whose pictures are stored."""


def exact_run(kind: str, strength: float, beta: float, seed: int, scale: str) -> dict[str, Any]:
    """Paths towards a class whose score is known; see :func:`exact.courses`."""
    torch.set_num_threads(1)
    return exact.courses(kind, strength, beta, seed, scale)


def direction_run(kind: str, seed: int, scale: str) -> dict[str, Any]:
    """Mean steps of a round; lists over :data:`exact.STRENGTHS`; see :func:`exact.direction`."""
    torch.set_num_threads(1)
    found = [exact.direction(kind, strength, seed, scale) for strength in exact.STRENGTHS]
    return dict(zip(("cosine", "langevin", "share"), map(list, zip(*found, strict=True)),
                    strict=True))  # fmt: skip


def main_run(seed: int, scale: str) -> dict[str, Any]:
    """PIE with its mask and without, and single edits of several strengths.

    Returns:
        Lists after the arm's name and a colon: of ``masked`` and ``plain`` over the rounds as
        :func:`arms.course` gives them, and ``own`` and ``real`` of the original and the last; of
        ``masked once``, ``plain once`` and ``blend`` over the strengths as :func:`arms.ends` gives
        them, the original first.
    """
    torch.set_num_threads(1)
    network, this = denoiser.network(scale), world.task(seed, arms.size(scale).each, scale)
    found: dict[str, Any] = {}
    for name, strength, grid in (
        ("masked", arms.BASE.strength, arms.MASKED_ONCE),
        ("plain", arms.PLAIN, arms.PLAIN_ONCE),
    ):
        masked = name == "masked"
        method = arms.rounds_of(arms.BASE, scale, strength=strength)
        made = arms.edited(network, this, method, masked, seed, scale)
        found |= _named(name, arms.course(made, this, scale))
        end = arms.ends([this.x, made.x], this, seed, scale)
        found |= {f"{name}: own": end["own"], f"{name}: real": end["real"]}
        single = [
            arms.edited(
                network, this, arms.rounds_of(arms.BASE, scale, strength=s, rounds=1), masked, seed,
                scale,
            ).x
            for s in grid
        ]  # fmt: skip
        found |= _named(f"{name} once", arms.ends([this.x, *single], this, seed, scale))
    return found | _named("blend", arms.ends([this.x, *arms.blend(this, scale)], this, seed, scale))


def variant_run(arm: str, seed: int, scale: str) -> dict[str, Any]:
    """PIE with one thing changed, on fewer images: lists over the rounds, ``own`` and ``real``."""
    torch.set_num_threads(1)
    network, this = denoiser.network(scale), world.task(seed, arms.size(scale).few, scale)
    if arm == "walk":
        walked = arms.walk(network, this, seed, scale)
        return arms.ends([this.x, *walked], this, seed, scale)
    method = arms.rounds_of(arms.BASE, scale, **arms.VARIANTS[arm])
    made = arms.edited(network, this, method, True, seed, scale)
    end = arms.ends([this.x, made.x], this, seed, scale)
    return arms.course(made, this, scale) | {"own": end["own"], "real": end["real"]}


def pictures_run(strength: float, inside: float, guidance: float, scale: str) -> dict[str, Any]:
    """Pictures of one image of each pair, one row after the other, from the original to the last
    round, as :func:`film.encode` keeps them; ``read``: how many end as the target."""
    torch.set_num_threads(1)
    this = world.task(0, 1, scale)
    method = arms.rounds_of(arms.BASE, scale, strength=strength, inside=inside, guidance=guidance)
    made = arms.edited(denoiser.network(scale), this, method, True, 0, scale)
    shown = made.path[rounds_shown(scale)].transpose(0, 1).flatten(0, 1)
    odds = world.log_odds(made.x, this.target, scale)
    return {"pictures": film.encode(shown, 16), "read": int((odds > 0).sum())}


def sides_run(scale: str) -> dict[str, Any]:
    """Pictures of two images of each pair: the original and how each arm leaves it."""
    torch.set_num_threads(1)
    network, this = denoiser.network(scale), world.task(1, arms.size(scale).few, scale)
    made = {"original": this.x}
    for name, strength in (("masked", arms.BASE.strength), ("plain", arms.PLAIN)):
        rounds = arms.rounds_of(arms.BASE, scale, strength=strength)
        once = arms.rounds_of(arms.BASE, scale, strength=ONCE[name], rounds=1)
        made[name] = arms.edited(network, this, rounds, name == "masked", 1, scale).x
        made[f"{name} once"] = arms.edited(network, this, once, name == "masked", 1, scale).x
    made["mask"] = 2 * this.mask - 1
    return {name: film.encode(x, 16) for name, x in made.items()}


def rounds_shown(scale: str) -> list[int]:
    """Rounds of which pictures are stored."""
    return [0, 1, 2, 3, 5, 7, 10] if arms.size(scale).rounds == 10 else [0, 1, 2, 4]


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab. Nothing is tuned: all settings are the code's or from a pilot."""
    name, shown = scale.name, SHOWN["ci" if scale.name == "ci" else "cpu"]
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=40))
    seeds = [seed for block in blocks for seed in block]
    runs.blocks("exact", blocks)
    runs.table("exact", exact_run, [
        {"kind": k, "strength": s, "beta": b, "seed": seed, "scale": name}
        for k in exact.SPREADS for s, b in EXACT for seed in seeds
    ])  # fmt: skip
    runs.blocks("direction", blocks)
    runs.table("direction", direction_run, [
        {"kind": k, "seed": seed, "scale": name} for k in exact.SPREADS for seed in seeds
    ])  # fmt: skip
    blocks = two_blocks(scale.pick(ci=4, cpu=16, gpu=16))
    seeds = [seed for block in blocks for seed in block]
    runs.blocks("digits", blocks)
    runs.table("digits", main_run, [{"seed": seed, "scale": name} for seed in seeds])
    runs.blocks("variants", blocks)
    some = scale.pick(ci=seeds[::2], cpu=seeds, gpu=seeds)
    runs.table("variants", variant_run, [
        {"arm": arm, "seed": seed, "scale": name}
        for arm in (*arms.VARIANTS, "walk")
        for seed in (seeds if arm == "inversion" else some)
    ])  # fmt: skip
    runs.table("pictures", pictures_run, [
        {"strength": s, "inside": b, "guidance": w, "scale": name}
        for s in shown["strength"] for b in shown["inside"] for w in shown["guidance"]
    ])  # fmt: skip
    runs.table("sides", sides_run, [{"scale": name}])


def _named(arm: str, lists: dict[str, list[float]]) -> dict[str, list[float]]:
    return {f"{arm}: {name}": values for name, values in lists.items()}


CLAIMS = (
    Claim(
        "alignment",
        "The rounds raise a classifier's confidence in the target.",
        whose="paper",
        where="abstract",
        unit="points",
        margin=10.0,
        quantity="mean confidence in the target in percent, after the last round minus before",
        reason="at less most images would still be read as the digit they were",
        conditions=(Condition("four pairs of digits", n=16, spread=5.0, decides=True),),
    ),
    Claim(
        "gradual",
        "Confidence grows over the rounds: the first one brings less than half of the gain.",
        whose="paper",
        unit="% of the gain",
        better="less",
        than=50.0,
        margin=10.0,
        quantity="gain of the first round in % of the gain of all, below 50",
        reason="a tenth of the gain is what one round brings if all bring the same",
        conditions=(Condition("four pairs of digits", n=16, spread=5.0, decides=True),),
    ),
    Claim(
        "shrinks",
        "The change from round to round shrinks: at the end it is below half of the first.",
        whose="paper",
        unit="% of the first",
        better="less",
        than=50.0,
        margin=10.0,
        quantity="change per round inside the mask, mean of the last three rounds in % of the "
        "first, below 50",
        reason="geometric shrinking would leave far less; a tenth of the first change is not seen",
        conditions=(
            Condition("random noise, as the code", n=16, spread=3.0, decides=True),
            Condition("deterministic inversion", n=16, spread=14.0),
        ),
    ),
    Claim(
        "identity",
        "At equal confidence an image has changed less after the rounds than after one edit.",
        whose="paper",
        unit="%",
        better="less",
        scale="log",
        margin=5.0,
        quantity="root mean square change of an image from its original, rounds below one edit",
        reason="a twentieth is less than two grey levels, which nobody sees",
        conditions=(
            Condition("both with the mask", n=16, spread=6.0, decides=True),
            Condition("both without", n=16, spread=6.0),
        ),
    ),
    Claim(
        "descent",
        "A round goes, in the mean over its noise, along the gradient of the class's log density.",
        whose="paper",
        unit="cosine",
        than=0.9,
        margin=0.02,
        quantity="cosine of the mean step and the gradient, above 0.9",
        reason="0.9 is an angle of 26 degrees, 0.02 three degrees of it",
        conditions=(Condition("four Gaussians", n=20, spread=0.02, decides=True),),
    ),
    Claim(
        "forgets",
        "Without a mask ten rounds forget the patient: what comes out is a draw of the class.",
        whose="ours",
        unit="% of the start's",
        better="less",
        than=10.0,
        margin=5.0,
        quantity="energy distance to draws of the class, after the last round in % of before, "
        "below 10",
        reason="a twentieth of the distance is near what draws of a class have among themselves",
        conditions=(
            Condition("four Gaussians", n=20, spread=2.5, decides=True),
            Condition("one Gaussian", n=20, spread=0.2),
        ),
    ),
)


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    digits, search = found["digits"].set_index("seed"), search_seeds()
    blocks = {name: found.blocks(name) for name in ("exact", "direction", "digits", "variants")}

    def measured(name: str, ours: Any, theirs: Any = None) -> Measured:
        return Measured(dict(ours), None if theirs is None else dict(theirs),
                        blocks=blocks[name], tuning_seeds=search)  # fmt: skip

    sure = digits["masked: confidence"]
    first, last, gain = sure.str[0], sure.str[-1], sure.str[-1] - sure.str[0]
    inverted = found["variants"].query("arm == 'inversion'").set_index("seed")["change"]
    turned = found["direction"].query("kind == 'four Gaussians'").set_index("seed")["cosine"]
    at = list(exact.STRENGTHS).index(arms.BASE.strength)
    return {
        "alignment": {"four pairs of digits": measured("digits", last, first)},
        "gradual": {"four pairs of digits": measured("digits", 100 * (sure.str[1] - first) / gain)},
        "shrinks": {
            "random noise, as the code": measured("digits", digits["masked: change"].map(kept)),
            "deterministic inversion": measured("variants", inverted.map(kept)),
        },
        "identity": {
            name: measured("digits", digits[f"{arm}: total"].str[-1], equal(digits, arm, "total"))
            for name, arm in (("both with the mask", "masked"), ("both without", "plain"))
        },
        "descent": {"four Gaussians": measured("direction", turned.str[at])},
        "forgets": {kind: measured("exact", left(found, kind)) for kind in exact.SPREADS},
    }


def kept(changes: list[float]) -> float:
    """The mean of the last three changes in per cent of the first."""
    return 100 * sum(changes[-3:]) / 3 / changes[0]


def equal(digits: Any, arm: str, column: str, reference: str | None = None) -> Any:
    """What single edits have at the confidence that an arm ends with, by seed.

    Args:
        digits: the runs, by seed.
        arm: ``masked`` or ``plain``, whose single edits are meant.
        column: of :func:`arms.ends`.
        reference: the arm whose confidence counts; left out, ``arm``.
    """
    import pandas as pd

    wanted = digits[f"{reference or arm}: confidence"].str[-1]
    rows = zip(digits[f"{arm} once: confidence"], digits[f"{arm} once: {column}"], wanted,
               strict=True)  # fmt: skip
    return pd.Series([arms.at_equal(*row) for row in rows], digits.index)


def left(found: Found, kind: str, strength: float = arms.BASE.strength, beta: float = 1.0) -> Any:
    """Energy distance to the class after the rounds in per cent of before, by seed."""
    runs = found["exact"]
    runs = runs[(runs.kind == kind) & (runs.strength == strength) & (runs.beta == beta)]
    runs = runs.set_index("seed")
    return 100 * runs["end"] / runs["start"]


def facts(found: Found) -> list[Fact]:
    """Identities, checked by computing them where the score is known."""
    mix, x = exact.world("one Gaussian", 0), exact.patients(4, 0)
    centre, spread = exact.moments(mix)
    schedule, none = exact.schedule(found.scale), torch.zeros_like(x)
    method = PIE(rounds=8, inside=exact.BETA, guidance=1.0, known="none")
    made = method.edit(mix.denoise, schedule, x, mask=torch.ones(exact.DIMENSIONS), noise=none)
    part = method.part(schedule)
    # the last level keeps a little noise, and its states a factor, which the formula leaves out
    factor, end = ddim_factor(part, spread), part.levels[-1].alpha
    offset = centre[None] * (end - part.levels[0].alpha * factor)
    rate, said = part.levels[0].alpha * factor, [x]
    for _ in range(method.rounds):
        said.append(x + exact.BETA * (offset + rate * said[-1] - x))
    off = float((made.path - torch.stack(said)).abs().max())
    frozen = PIE(rounds=3, outside=0.0, guidance=1.0)
    kept = frozen.edit(mix.denoise, schedule, x, mask=torch.zeros(exact.DIMENSIONS), noise=none,
                       known_noise=none)  # fmt: skip
    wide = path_variance(part.levels[0], spread, 1.0, 400)[-1]
    return [
        Fact("formula", "Without noise the path is the formula's.",
             off < 1e-9, off, "largest difference"),
        Fact("frozen", "Empty mask, outside = 0: the original, to the bit.",
             all(torch.equal(image, x) for image in kept.path)),
        Fact("spread", "Without a mask noises spread as wide as the class.",
             abs(wide - spread**2) < 1e-12, wide / spread**2, "of its variance"),
    ]  # fmt: skip


LAB = Lab(
    slug="pie",
    part="generate",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
