"""What is measured about SSF: what a pair undoes, few labels, and each half of the pair alone.

Digits: a network of two hidden layers is warped, by channel or by mixing channels, and repaired
with ten images per class; the head stays. MNIST: a small vision transformer that read upright
digits gets 4, 16 or 64 images per class of turned or inverted ones; the head trains in every arm.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.insert.ssf import SSF, pairs, places, put_pairs, vit_count
from toolkit.labs.beds import images
from toolkit.labs.insert.channels import shots, warped
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

SHOTS = (4, 16, 64)
"""Images per class."""
TEST = 2500
"""Test images of MNIST that every run is judged on."""
WALK = tuple(round(0.25 * k, 2) for k in range(7))
"""Shares of the way from (1, 0) to the learned pairs."""
WAY = [round(0.1 * k, 1) for k in range(11)]
"""The same, to the pair that undoes inverted grey."""


def digits(
    arm: str, how: str, warp: str, rate: float, seed: int, steps: int, pretraining: int
) -> dict[str, Any]:
    """A warped network repaired by one arm."""
    found = warped.task(warp, seed, pretraining)
    model, _, trained = warped.repaired(found, how, rate, seed, steps)
    parts = {"validation": found.validation, "test": found.test}
    record = {name: warped.accuracy(model, part) for name, part in parts.items()}
    return record | {"trained": trained, "unwarped": warped.accuracy(found.base, found.test)}


def channels(rate: float, seed: int, steps: int, pretraining: int) -> dict[str, Any]:
    """Mean and spread of each channel after the second layer, on test images: in the network
    before the warp, after it, and after SSF."""
    found, site = warped.task("channels", seed, pretraining), warped.SITES[1]
    model, _, _ = warped.repaired(found, "ssf", rate, seed, steps)
    record: dict[str, Any] = {}
    for name, network in {"source": found.base, "before": found.warped, "after": model}.items():
        for what, values in warped.channels(network, found.test[0], site).items():
            record[f"{name} {what}"] = values
    return record


def mnist(
    arm: str, how: str, number: int, shift: str, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """The transformer after one arm, with so many images per class."""
    model, adapted, trained = shots.learn(how, rate, seed, number, shift, scale)
    found = shots.judged(model, shift, scale, part, TEST)
    record: dict[str, Any] = {
        part: found["accuracy"],
        f"{part} loss": found["loss"],
        "trained": trained,
    }
    if how == "ssf" and part == "test":
        record |= shots.kept_sizes(adapted)
    return record


def apart(
    arm: str, how: str, shift: str, rate: float, head_rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """The transformer after one arm whose head has a rate of its own."""
    model, _, _ = shots.learn(how, rate, seed, shots.FEW, shift, scale, head_rate)
    found = shots.judged(model, shift, scale, part, TEST)
    return {part: found["accuracy"], f"{part} loss": found["loss"]}


def walk(number: int, rate: float, seed: int, scale: str, count: int) -> dict[str, Any]:
    """Accuracy on turned digits with the learned pairs of each group applied in part, for every
    share of :data:`WALK`."""
    model, adapted, _ = shots.learn("ssf", rate, seed, number, "rotated", scale)
    kept = pairs(adapted)
    record: dict[str, Any] = {}
    for group in shots.GROUPS:
        record[group] = []
        for t in WALK:
            put_pairs(adapted, shots.partly(adapted, group, t))
            found = shots.judged(model, "rotated", scale, "test", count)
            record[group].append(found["accuracy"])
            put_pairs(adapted, kept)
    return record


def towards(scale: str, count: int) -> dict[str, Any]:
    """Accuracy on inverted digits on the way to the pair that undoes the inversion."""
    return {"accuracy": shots.towards(scale, WAY, count)}


DIGITS: dict[str, dict[str, Any]] = {
    f"{how} {warp}": {"how": how, "warp": warp}
    for warp in warped.WARPS
    for how in ("ssf", "scale", "shift", "lora", "head", "full")
}
"""Arm -> its arguments."""
DIGITS_START = {"ssf": 0.1, "scale": 0.15, "shift": 0.15, "lora": 0.03, "head": 0.05, "full": 0.006}
TURNED = ("head", "ssf", "full")
EXTRA = ("scale", "shift", "norms", "lora", "noisy")
MNIST: dict[str, dict[str, Any]] = {
    **{
        f"{how} {number}": {"how": how, "number": number, "shift": "rotated"}
        for number in SHOTS
        for how in (TURNED + EXTRA if number == shots.FEW else TURNED)
    },
    **{
        f"{how} inverted": {"how": how, "number": shots.FEW, "shift": "inverted"}
        for how in TURNED
    },
}  # fmt: skip
APART = {
    f"{how} {end}": {"how": how, "shift": shift}
    for end, shift in ((str(shots.FEW), "rotated"), ("inverted", "inverted"))
    for how in ("ssf", "full")
}
"""Arms again whose head takes the rate that suits it alone: an afterthought, without a claim."""
MNIST_START = {
    "head": 0.06, "ssf": 0.04, "full": 0.004, "scale": 0.06, "shift": 0.04, "norms": 0.04,
    "lora": 0.015, "noisy": 0.04,
}  # fmt: skip


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    n, width = scale.pick(ci=4, cpu=20, gpu=20), scale.pick(ci=1, cpu=3, gpu=3)
    blocks = two_blocks(n)
    seeds = [seed for block in blocks for seed in block]
    search: dict[str, Any] = {
        "seeds": search_seeds(), "reported": seeds, "judged": "validation", "better": "max",
        "factor": 2.0, "width": width,
    }  # fmt: skip
    size = scale.pick(ci={"steps": 3, "pretraining": 20}, cpu={"steps": 100, "pretraining": 200},
                      gpu={"steps": 100, "pretraining": 200})  # fmt: skip
    found = runs.tune(
        "digits", digits, {arm: more | size for arm, more in DIGITS.items()},
        {arm: DIGITS_START[more["how"]] for arm, more in DIGITS.items()}, **search,
    )  # fmt: skip
    runs.blocks("digits", blocks)
    nothing = [
        {"arm": f"nothing {warp}", "how": "nothing", "warp": warp, "rate": 1.0, "seed": seed,
         **size}
        for warp in warped.WARPS for seed in seeds
    ]  # fmt: skip
    runs.table("digits", digits, nothing + [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **size}
        for arm, more in DIGITS.items() for seed in seeds
    ])  # fmt: skip
    runs.table("channels", channels, [
        {"rate": found["ssf channels"].rate, "seed": seeds[0], **size}
    ])  # fmt: skip
    where: dict[str, Any] = {"scale": scale.name, "part": "validation"}
    tuned = runs.tune(
        "mnist", mnist, {arm: more | where for arm, more in MNIST.items()},
        {arm: MNIST_START[more["how"]] for arm, more in MNIST.items()}, **search,
    )  # fmt: skip
    runs.blocks("mnist", blocks)
    where["part"] = "test"
    untouched = [
        {"arm": f"nothing {shift}", "how": "nothing", "number": 0, "shift": shift, "rate": 1.0,
         "seed": seed, **where}
        for shift in ("rotated", "inverted") for seed in seeds
    ]  # fmt: skip
    runs.table("mnist", mnist, untouched + [
        {"arm": arm, **more, "rate": tuned[arm].rate, "seed": seed, **where}
        for arm, more in MNIST.items() for seed in seeds
    ])  # fmt: skip
    own = {
        arm: more | {"head_rate": tuned[f"head {arm.split()[1]}"].rate, "scale": scale.name}
        for arm, more in APART.items()
    }  # fmt: skip
    again = runs.tune(
        "two rates", apart, {arm: more | {"part": "validation"} for arm, more in own.items()},
        {arm: tuned[arm].rate for arm in APART}, **search,
    )  # fmt: skip
    runs.blocks("two rates", blocks)
    runs.table("two rates", apart, [
        {"arm": arm, **more, "rate": again[arm].rate, "seed": seed, "part": "test"}
        for arm, more in own.items() for seed in seeds
    ])  # fmt: skip
    few = scale.pick(ci=50, cpu=500, gpu=500)
    runs.table("walk", walk, [
        {"number": number, "rate": tuned[f"ssf {number}"].rate, "seed": seed,
         "scale": scale.name, "count": few}
        for number in SHOTS for seed in seeds[: scale.pick(ci=1, cpu=3, gpu=3)]
    ])  # fmt: skip
    runs.table("towards", towards, [{"scale": scale.name, "count": few}])


POINTS = (-100.0, 100.0)
FIGURE = "mean top-1 90.72 against 88.54 (FGVC) and 73.10 against 65.57 (VTAB-1k)"
CLAIMS = (
    Claim(
        "head",
        "With few labels SSF reads better than a new head alone.",
        whose="paper", unit="points", margin=2.0,
        quantity="test accuracy, SSF minus head, 16 images per class",
        reason="the smaller of the paper's gains over full training is 2.2 points",
        conditions=(
            Condition("turned", n=20, spread=2.5, support=POINTS, decides=True),
            Condition("inverted", n=20, spread=4.0, support=POINTS),
        ),
    ),
    Claim(
        "full",
        "With few labels SSF reads better than full training.",
        whose="paper", where="abstract and headline results", figure=FIGURE, unit="points",
        margin=2.0,
        quantity="test accuracy, SSF minus full training, 16 images per class",
        reason="the smaller of the paper's gains is 2.2 points",
        conditions=(
            Condition("turned", n=20, spread=2.5, support=POINTS, decides=True),
            Condition("inverted", n=20, spread=4.0, support=POINTS),
        ),
    ),
    Claim(
        "catches-up",
        "The more labels, the better full training stands beside SSF.",
        whose="ours", unit="points", margin=2.0,
        quantity="SSF minus full training at 4 images per class, minus the same at 64",
        reason="the same margin as for the two differences that it compares",
        conditions=(Condition("turned", n=20, spread=3.5, support=(-200.0, 200.0), decides=True),),
    ),
    Claim(
        "scale",
        "Scale and shift together read better than the shift alone.",
        whose="ours", unit="points", margin=1.0,
        quantity="test accuracy, SSF minus its shifts alone",
        reason="one point is less than one image in a hundred",
        conditions=(
            Condition("turned", n=20, spread=2.0, support=POINTS, decides=True),
            Condition("warped by channel", n=20, spread=2.0, support=POINTS),
        ),
    ),
    Claim(
        "shift",
        "Scale and shift together read better than the scale alone.",
        whose="ours", unit="points", margin=1.0,
        quantity="test accuracy, SSF minus its scales alone",
        reason="one point is less than one image in a hundred",
        conditions=(
            Condition("turned", n=20, spread=2.0, support=POINTS, decides=True),
            Condition("warped by channel", n=20, spread=2.0, support=POINTS),
        ),
    ),
    Claim(
        "lora",
        "SSF reads better than LoRA with as many numbers.",
        whose="ours", unit="points", margin=1.0,
        quantity="test accuracy, SSF minus LoRA of equal count",
        reason="one point is less than one image in a hundred",
        conditions=(
            Condition("turned", n=20, spread=2.0, support=POINTS, decides=True),
            Condition("warped by channel", n=20, spread=2.0, support=POINTS),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""

    def beside(name: str, ours: str, theirs: str, control: str, nothing: str) -> Measured:
        values = {
            arm: found.values(name, "test", arm=arm)
            for arm in dict.fromkeys((ours, theirs, control, nothing))
        }
        return Measured(
            values[ours], values[theirs], control=values[control], nothing=values[nothing],
            blocks=found.blocks(name), tuning_seeds=search_seeds(),
        )  # fmt: skip

    turned = functools.partial(_few, beside, "16", "rotated")
    inverted = functools.partial(_few, beside, "inverted", "inverted")

    def channel(theirs: str) -> Measured:
        names = [f"{how} channels" for how in ("ssf", theirs, "full", "nothing")]
        return beside("digits", names[0], names[1], names[2], names[3])

    gaps = [_gap(found, number) for number in (SHOTS[0], SHOTS[-1])]
    return {
        "head": {"turned": turned("head"), "inverted": inverted("head")},
        "full": {"turned": turned("full"), "inverted": inverted("full")},
        "catches-up": {
            "turned": Measured(gaps[0], gaps[1], blocks=found.blocks("mnist"),
                               tuning_seeds=search_seeds())
        },
        "scale": {"turned": turned("shift"), "warped by channel": channel("shift")},
        "shift": {"turned": turned("scale"), "warped by channel": channel("scale")},
        "lora": {"turned": turned("lora"), "warped by channel": channel("lora")},
    }  # fmt: skip


def _few(beside: Any, end: str, shift: str, theirs: str) -> Measured:
    return beside("mnist", f"ssf {end}", f"{theirs} {end}", f"full {end}", f"nothing {shift}")


def _gap(found: Found, number: int) -> dict[int, float]:
    """SSF minus full training, by seed."""
    ours, full = (found.values("mnist", "test", arm=f"{how} {number}") for how in ("ssf", "full"))
    return {seed: value - full[seed] for seed, value in ours.items()}


@torch.no_grad()
def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    width, depth = 16, 2
    model = nets.digits_transformer(
        width, depth, 4, 10, 2, generator=generator(0, "facts")
    ).double()
    base, x = copy.deepcopy(model), torch.rand(40, 8, 8, generator=generator(0, "x")).double()
    adapted = adapt(model, SSF(noise=0.3), places(model), generator=generator(0, "pairs"))
    count, before = sum(p.numel() for p in adapted.parameters()), model(x)
    merged = (adapted.merge()(x) - before).abs().max().item()
    moved = (before - base(x)).abs().max().item()
    low = adapt(copy.deepcopy(base), shots.rank_one(base))
    rank_one = sum(p.numel() for p in low.parameters())
    with torch.enable_grad():  # both are trained, unless this process has run jobs that did
        task = warped.task("channels", 0, 20 if found.scale == "ci" else 200)
        network = shots.network(found.scale)
    mended = adapt(copy.deepcopy(task.warped), SSF(), warped.SITES)
    put_pairs(mended, {name: pair.inverse() for name, pair in task.pairs.items()})
    left = (mended(task.test[0]) - task.base(task.test[0])).abs().max().item()
    seen = images.load(found.scale).test[0][:200]
    flipped = adapt(shots.network(found.scale), SSF(), ["embed"])
    put_pairs(flipped, {"embed": shots.upright_again(network)})
    apart = (flipped(1 - seen) - network(seen)).abs().max().item()
    return [
        Fact("count", "SSF trains (22 L + 4) d numbers in a vision transformer.",
             count == vit_count(width, depth), count, "numbers"),
        Fact("equal", "LoRA beside it trains as many.", rank_one == count, rank_one, "numbers"),
        Fact("merge", "Merging changes no output of a network that the pairs have changed.",
             merged < 1e-12 < moved, merged, "largest difference"),
        Fact("undone", "The inverse pairs undo a warp by channel.", left < 1e-3, left,
             "largest difference of scores"),
        Fact("inverted", "One pair after the projection of patches undoes inverted grey.",
             apart < 1e-3, apart, "largest difference of scores"),
    ]  # fmt: skip


LAB = Lab(
    slug="ssf",
    part="insert",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("digits", "mnist"),
)
