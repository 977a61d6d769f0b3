"""What is measured about BlackVIP: hazy digits, a box that only answers, and equal queries.

Every seed draws sixteen labelled images a class, the haze, the start, batches and directions. Arms
that go in steps send as many images in each and as many in all. The rate that is searched is the
effective step a / (1 - beta), so that momentum is no larger step in disguise.
"""

from __future__ import annotations

from typing import Any

import torch

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.insert.blackvip import (
    SPSA,
    Coordinator,
    Frame,
    relative_error,
    segmented_uniform,
    two_sided,
)
from toolkit.labs.insert.hazy import arms, world
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

STARTS = {"gc": 0.015, "spsa": 0.015, "constant": 0.015, "frame": 0.1, "bar": 0.1, "white": 0.2,
          "probe": 3e-4}  # fmt: skip
"""Middle of the first rates: effective steps, and the probe's penalty."""
SAME = ("gc", "constant", "frame")
"""Arms that are also tried where the haze is the same for all images."""
TOO_LARGE = 4.0
"""How many times its best step an arm is given to see what it stands."""
SHOWN = 8


def run(
    arm: str, rate: float, seed: int, kind: str, part: str = "test", scale: str = "cpu"
) -> dict[str, Any]:
    """One arm; see :func:`arms.learned` and :func:`arms.probed`."""
    torch.set_num_threads(1)
    if arm == "probe":
        return arms.probed(rate, seed, kind, part, scale)
    return arms.learned(arm, rate, seed, kind, part, scale)


def aim_run(width: str, seed: int, scale: str) -> dict[str, Any]:
    """How well estimates aim; see :func:`arms.aimed`."""
    torch.set_num_threads(1)
    return arms.aimed(width, seed, scale)


def pictures_run(rate: float, scale: str) -> dict[str, Any]:
    """Hazy test images, the prompts that BlackVIP learned for them, and what is sent."""
    from toolkit.labs.generate import film

    torch.set_num_threads(1)
    seed = 0
    size, this = world.size(scale), world.task(seed, "own", "test", scale)
    tuner = arms.method("gc", rate).start(
        arms.prompter("gc", seed), lambda x: world.encode(x, scale),
        generator=generator(seed, "directions"),
    )  # fmt: skip
    box, draws = arms.BlackBox(world.answers(scale)), generator(seed, "batches")
    for _ in range(size.steps):
        rows = torch.randint(len(this.y), (arms.BATCH,), generator=draws)
        tuner.step(box, this.x[rows], this.y[rows])
    x = this.x_judged[torch.stack([(this.y_judged == c).nonzero()[0, 0] for c in range(SHOWN)])]
    made = {"hazy": x, "prompt": 0.5 + 0.5 * tuner.prompt(x), "sent": tuner.prompted(x)}
    return {name: film.encode(2 * images - 1, 16) for name, images in made.items()}


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab."""
    name = scale.name
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=40))
    seeds = [seed for block in blocks for seed in block]
    chosen: dict[str, Any] = {}
    for kind in world.KINDS:
        wanted = list(STARTS) if kind == "own" else list(SAME)
        bare = runs.table(f"bare box, {kind}", bare_run, [
            {"kind": kind, "seed": seed, "part": "validation", "scale": name}
            for seed in search_seeds()
        ])  # fmt: skip
        found = runs.tune(
            kind, run,
            {arm: {"kind": kind, "part": "validation", "scale": name} for arm in wanted},
            {arm: STARTS[arm] for arm in wanted},
            seeds=search_seeds(), reported=seeds, judged="accuracy", better="max",
            nothing=float(bare.accuracy.mean()) if name != "ci" else None,
            extensions=0 if name == "ci" else 4,
        )  # fmt: skip
        chosen[kind] = {arm: found[arm].rate for arm in wanted}
        runs.blocks(kind, blocks)
        runs.table(kind, run, [
            {"arm": arm, "rate": rate, "seed": seed, "kind": kind, "part": "test", "scale": name}
            for arm, rate in chosen[kind].items() for seed in seeds
        ])  # fmt: skip
    runs.blocks("too large", blocks)
    runs.table("too large", run, [
        {"arm": arm, "rate": TOO_LARGE * chosen["own"][arm], "seed": seed, "kind": "own",
         "part": "test", "scale": name}
        for arm in ("gc", "spsa") for seed in seeds
    ])  # fmt: skip
    few = scale.pick(ci=seeds[:2], cpu=seeds[:6], gpu=seeds[:6])
    runs.table("aim", aim_run, [
        {"width": width, "seed": seed, "scale": name} for width in arms.SHAPES for seed in few
    ])  # fmt: skip
    runs.table("pictures", pictures_run, [{"rate": chosen["own"]["gc"], "scale": name}])


def bare_run(kind: str, seed: int, part: str, scale: str) -> dict[str, float]:
    """``accuracy`` (%) of the bare box on the images of a seed that are judged."""
    torch.set_num_threads(1)
    this = world.task(seed, kind, part, scale)
    said = arms.BlackBox(world.answers(scale))(this.x_judged)
    return {"accuracy": arms.accuracy(said, this.y_judged)}


CLAIMS = (
    Claim(
        "queries",
        "Queries alone raise the black box's accuracy on images that it cannot read.",
        whose="paper",
        where="abstract",
        unit="points",
        margin=5.0,
        quantity="test accuracy, BlackVIP minus the bare box",
        reason="a twentieth of the images is what 6,000 queries should at least buy",
        conditions=(
            Condition("each image its own haze", n=20, spread=6.0, decides=True),
            Condition("the same haze for all", n=20, spread=10.0),
        ),
    ),
    Claim(
        "correction",
        "At equal queries and each at its best step, SPSA-GC beats plain SPSA.",
        whose="paper",
        unit="points",
        margin=3.0,
        quantity="test accuracy, SPSA-GC minus SPSA",
        reason="one seed's accuracy is off by 1.6 points from its 1,000 test images alone",
        conditions=(Condition("each image its own haze", n=20, spread=6.0, decides=True),),
    ),
    Claim(
        "stable",
        "At four times its best step, SPSA-GC loses less than plain SPSA at four times its.",
        whose="ours",
        unit="points",
        better="less",
        margin=5.0,
        quantity="accuracy lost by a step four times too large, SPSA-GC below SPSA",
        reason="five points are a third of what the best step gains over a poor one",
        conditions=(Condition("each image its own haze", n=20, spread=10.0, decides=True),),
    ),
    Claim(
        "universal",
        "Prompts written for each image beat a universal frame of as many numbers.",
        whose="paper",
        unit="points",
        margin=5.0,
        quantity="test accuracy, BlackVIP minus a frame trained by SPSA-GC",
        reason="the same margin as over the bare box",
        conditions=(
            Condition("each image its own haze", n=20, spread=7.0, decides=True),
            Condition("the same haze for all", n=20, spread=10.0),
        ),
    ),
    Claim(
        "encoder",
        "It is the encoder that helps: with constant features the gain is smaller.",
        whose="ours",
        unit="points",
        margin=3.0,
        quantity="test accuracy, BlackVIP minus the same with constant features",
        reason="one seed's accuracy is off by 1.6 points from its 1,000 test images alone",
        conditions=(Condition("each image its own haze", n=20, spread=6.0, decides=True),),
    ),
    Claim(
        "probe",
        "Prompting beats a linear probe on the box's answers to the same labelled images.",
        whose="ours",
        unit="points",
        margin=3.0,
        quantity="test accuracy, BlackVIP minus the probe, which sends each image once",
        reason="the probe costs no query beyond one an image; less would not pay for 5,840 more",
        conditions=(Condition("each image its own haze", n=20, spread=6.0, decides=True),),
    ),
)


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    names = {"own": "each image its own haze", "same": "the same haze for all"}

    def of(arm: str, kind: str = "own", column: str = "accuracy") -> dict[int, float]:
        return found.values(kind, column, arm=arm)

    def against(ours: Any, theirs: Any, kind: str = "own", **more: Any) -> Measured:
        return Measured(
            ours, theirs, blocks=found.blocks(kind), tuning_seeds=search_seeds(), **more
        )

    def lost(arm: str) -> dict[int, float]:
        best, large = of(arm), found.values("too large", "accuracy", arm=arm)
        return {seed: best[seed] - large[seed] for seed in best}

    own = names["own"]
    return {
        "queries": {
            own: against(of("gc"), of("gc", column="start"),
                         control=of("white"), nothing=of("white", column="start")),
            names["same"]: against(of("gc", "same"), of("gc", "same", "start"), "same"),
        },
        "correction": {own: against(of("gc"), of("spsa"))},
        "stable": {own: against(lost("gc"), lost("spsa"))},
        "universal": {
            names[kind]: against(of("gc", kind), of("frame", kind), kind) for kind in names
        },
        "encoder": {own: against(of("gc"), of("constant"))},
        "probe": {own: against(of("gc"), of("probe"))},
    }  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Counts, and what can be computed without a network."""
    counts = [Coordinator(src_dim=length).count for length in (784, 1568, 3136)]
    draws = 100_000
    g = torch.randn(20, dtype=torch.float64, generator=generator(0, "linear"))
    delta = segmented_uniform(draws, 20, generator(0, "delta"), torch.float64)
    each = (delta @ g)[:, None] / delta
    error = float((each - g).square().sum(1).mean() / g.square().sum())
    wanted = relative_error(20, 1)
    curved = (delta + g).pow(2).sum(1) - (delta - g).pow(2).sum(1)
    bias = float((curved / 2 - 2 * delta @ g).abs().max())
    start = torch.zeros(4, dtype=torch.float64)
    ends = []
    for lookahead in (False, True):
        one = SPSA(start, a=0.02, alpha=0.0, c=0.1, lookahead=lookahead,
                   generator=generator(0, "forms"))  # fmt: skip
        for _ in range(50):
            one.step(lambda rows: (rows - 1).square().sum(1))
        ends.append(one.phi + (one.beta * one.m if lookahead else 0))
    apart = float((ends[0] - ends[1]).abs().max())
    flat = torch.full((2,), 3.0, dtype=torch.float64)
    exact = two_sided(flat, -flat, torch.tensor([[0.5], [1.0]], dtype=torch.float64), 1.0)
    return [
        Fact("counts", "The official decoder trains 9,920 numbers, a frame of 30 pixels 69,840.",
             counts == [9136, 9920, 11488] and Frame().count == 69_840, counts[1], "numbers"),
        Fact("variance", "The squared error of one estimate is 7/6 (P - 1) times that of g.",
             abs(error / wanted - 1) < 0.03, error, f"times, formula {wanted:.3g}"),
        Fact("bias", "On a quadratic the difference is exact along its direction, whatever c.",
             bias < 1e-9, bias, "largest error"),
        Fact("forms", "With a constant step the coded and the look-ahead form are one iteration.",
             apart < 1e-9, apart, "largest difference"),
        Fact("division", "Dividing by the direction is not multiplying by it.",
             bool(abs(exact - 4.5) < 1e-12), float(exact), "slope, where multiplying gives 2.25"),
    ]  # fmt: skip


LAB = Lab(
    slug="blackvip",
    part="insert",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
