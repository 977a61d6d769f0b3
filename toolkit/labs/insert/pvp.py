"""What is measured about PVP: what pre-trained modules are worth at 1 to 16 images of a class.

Source are the MNIST digits 0 to 4 with labels, target the digits 5 to 9. The backbone is the shared
bed's small ViT that has learned to fill in hidden patches and no label. Every seed draws its own
images, start and order, the same for all arms. Each of two blocks of seeds has its own run of stage
1 and its own half of the target's test images. The rates of modules and head are searched for every
arm, once with 1 image a class (used for 1 and 2) and once with 8 (used for 4 to 16).
"""

from __future__ import annotations

from typing import Any

import torch

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.insert.pvp import few_shot
from toolkit.labs.insert.transfer import longer, world
from toolkit.labs.insert.transfer.attention import mass
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

SHOTS = {"ci": (1, 2, 4), "cpu": (1, 2, 4, 8, 16)}
"""Images of each class."""
REGIMES = {1: (1, 2), 8: (4, 8, 16)}
"""Images of a class at a search, and where its rates are used."""
LORA_SHOTS = (1, 16)
SHARES = (0.25, 0.5, 0.75)
"""t of the starts between random and pre-trained."""
TIMES = 4
"""Steps of the longer runs at most shots, as a multiple."""
MODULES = ("random", "pvp", "shuffled", "lora", "lora pvp")
HEAD_START = 8e-2
STARTS = {"random": 3.2e-2, "pvp": 3.2e-2, "shuffled": 3.2e-2, "lora": 8e-3, "lora pvp": 8e-3}
"""Middle of the first rates: of every head, and of the modules."""


def head_run(arm: str, shots: int, head_rate: float, seed: int, scale: str) -> dict[str, Any]:
    """The head alone, on the backbone as it is or with frozen modules."""
    torch.set_num_threads(1)
    return world.learn_head(arm, shots, head_rate, seed, scale)


def module_run(
    arm: str, shots: int, rate: float, head_rate: float, seed: int, scale: str
) -> dict[str, Any]:
    """Modules and head."""
    torch.set_num_threads(1)
    return world.learn(arm, shots, rate, head_rate, seed, scale)


def between_run(
    arm: str, shots: int, rate: float, head_rate: float, seed: int, scale: str, t: float
) -> dict[str, Any]:
    """The same from a start between random and pre-trained."""
    torch.set_num_threads(1)
    return world.learn(arm, shots, rate, head_rate, seed, scale, t)


def longer_run(
    arm: str, shots: int, rate: float, head_rate: float, seed: int, scale: str, times: int
) -> dict[str, Any]:
    """The same for several times the steps, with the rates of the shorter run."""
    torch.set_num_threads(1)
    return longer.course(arm, shots, rate, head_rate, seed, scale, times)


def stage_run(kind: str, shuffled: bool, stage: int, scale: str) -> dict[str, Any]:
    """Stage 1: accuracy in per cent on test images of the source."""
    torch.set_num_threads(1)
    if kind == "all":
        return {"accuracy": world.seen(stage, scale)[1]}
    return {"accuracy": world.stage_one(kind, shuffled, stage, scale)[1]}


def attention_run(arm: str, seed: int, scale: str) -> dict[str, Any]:
    """Share of a token's attention that goes to the prompts, in per cent, by block, before the
    first step of the task."""
    torch.set_num_threads(1)
    model, adapted = world.prepared(arm, seed, scale)
    return {"mass": mass(model, adapted, world.judges(seed, scale)[0][:250])}


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: the searches, then all arms."""
    name, where = scale.name, {"scale": scale.name}
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=40))
    seeds = [seed for block in blocks for seed in block]
    heads: dict[tuple[str, int], float] = {}
    rates: dict[tuple[str, int], float] = {}
    options: dict[str, Any] = {
        "seeds": search_seeds(n=4), "reported": seeds, "judged": "accuracy", "better": "max",
        "factor": 2.0, "width": scale.pick(ci=1, cpu=3, gpu=3),
    }  # fmt: skip
    for k, used in REGIMES.items():
        arms = [arm for arm in MODULES if arm != "shuffled" or k == 1]
        at = {"shots": min(k, max(SHOTS["ci"])) if name == "ci" else k, **where}
        alone = runs.tune(
            f"head alone, {k}", head_run, dict.fromkeys(world.HEAD_ALONE, at),
            dict.fromkeys(world.HEAD_ALONE, HEAD_START), rate="head_rate", **options,
        )  # fmt: skip
        moved = runs.tune(
            f"modules, {k}", module_run, dict.fromkeys(arms, at | {"head_rate": HEAD_START}),
            {arm: STARTS[arm] for arm in arms}, **options,
        )  # fmt: skip
        beside = runs.tune(
            f"head beside, {k}", module_run, {arm: at | {"rate": moved[arm].rate} for arm in arms},
            dict.fromkeys(arms, HEAD_START), rate="head_rate", **options,
        )  # fmt: skip
        for shots in used:
            heads |= {(arm, shots): found.rate for arm, found in (alone | beside).items()}
            rates |= {(arm, shots): found.rate for arm, found in moved.items()}
    runs.blocks("shots", blocks)
    functions: dict[str, Any] = dict.fromkeys(world.ARMS, module_run)
    functions |= dict.fromkeys(world.HEAD_ALONE, head_run)
    jobs = []
    for seed in seeds:  # what a seed's random modules make of the images is then kept
        for arm in world.ARMS:
            for shots in shots_of(arm, name):
                more = {} if arm in world.HEAD_ALONE else {"rate": rates[arm, shots]}
                jobs.append({"arm": arm, "shots": shots, **more, "seed": seed,
                             "head_rate": heads[arm, shots], **where})  # fmt: skip
    runs.table("shots", functions, jobs)
    some = scale.pick(ci=seeds[:1] + seeds[2:3], cpu=seeds[:4] + seeds[10:14], gpu=seeds)
    runs.table("between", between_run, [
        {"arm": "pvp", "shots": shots, "rate": rates["pvp", shots], "seed": seed, "t": t,
         "head_rate": heads["pvp", shots], **where}
        for shots in between_shots(name) for t in SHARES for seed in some
    ])  # fmt: skip
    stages = scale.pick(ci=(0,), cpu=(0, 1, 2), gpu=(0, 1, 2))
    runs.table("stage 1", stage_run, [
        {"kind": kind, "shuffled": shuffled, "stage": stage, **where}
        for kind, shuffled in (("prompts", False), ("prompts", True), ("factors", False),
                               ("all", False))
        for stage in stages
    ])  # fmt: skip
    runs.table("attention", attention_run, [
        {"arm": arm, "seed": seed, **where} for arm in ("random", "pvp", "shuffled")
        for seed in some
    ])  # fmt: skip
    most = SHOTS["ci" if name == "ci" else "cpu"][-1]
    runs.table("longer", longer_run, [
        {"arm": arm, "shots": most, "rate": rates[arm, most], "head_rate": heads[arm, most],
         "seed": seed, "times": TIMES, **where}
        for arm in ("random", "pvp")
        for seed in scale.pick(ci=seeds[:2], cpu=seeds[10:16], gpu=seeds)
    ])  # fmt: skip


def shots_of(arm: str, scale: str) -> tuple[int, ...]:
    """Images of a class at which an arm is measured."""
    every = SHOTS["ci" if scale == "ci" else "cpu"]
    if arm == "shuffled":
        return every[:1]
    if arm == "disturbed" or arm.startswith("lora"):
        return every[:1] + every[-1:]
    return every


def between_shots(scale: str) -> tuple[int, ...]:
    """Images of a class at which starts in between are measured."""
    return SHOTS["ci"][:2] if scale == "ci" else (1, 4, 16)


POINTS = (-100.0, 100.0)
CLAIMS = (
    Claim(
        "few",
        "With one image a class, pre-trained modules beat random ones.",
        whose="paper", where="abstract", unit="points", margin=4.0,
        figure="+16.1 points at 1 shot, +11.5 at 2, mean of five bird, flower, dog and car sets",
        quantity="test accuracy, pre-trained start minus random start",
        reason="a quarter of the paper's gain at one shot",
        conditions=(
            Condition("prompts, 1 shot", n=20, spread=7.0, support=POINTS, decides=True),
            Condition("prompts, 2 shots", n=20, spread=6.0, support=POINTS),
            Condition("LoRA, 1 shot", n=20, spread=7.0, support=POINTS),
        ),
    ),
    Claim(
        "falls",
        "The gain is larger at 1 shot than at 16.",
        whose="paper", where="abstract", unit="points", margin=4.0,
        figure="+16.1 against +1.95 points",
        quantity="gain at 1 shot minus gain at 16 shots, test accuracy",
        reason="more than a quarter of the 14 points by which the paper's gain falls",
        conditions=(
            Condition("prompts", n=20, spread=7.0, support=(-200.0, 200.0), decides=True),
            Condition("LoRA", n=20, spread=7.0, support=(-200.0, 200.0)),
        ),
    ),
    Claim(
        "still",
        "At 16 shots the pre-trained start is still better.",
        whose="paper", where="abstract", unit="points", margin=1.0,
        figure="+1.95 points",
        quantity="test accuracy at 16 shots, pre-trained start minus random start",
        reason="half of the paper's gain",
        conditions=(
            Condition("prompts", n=20, spread=2.0, support=POINTS, decides=True),
            Condition("LoRA", n=20, spread=2.0, support=POINTS),
        ),
    ),
    Claim(
        "knowledge",
        "What helps is what the source's labels say, not that the modules were trained.",
        whose="ours", unit="points", margin=4.0,
        quantity="test accuracy at 1 shot, start from true labels minus start from shuffled labels",
        reason="as for the gain itself",
        conditions=(
            Condition("prompts, 1 shot", n=20, spread=7.0, support=POINTS, decides=True),
        ),
    ),
    Claim(
        "moving",
        "Pre-trained prompts must go on learning: the head alone, over them frozen, is worse.",
        whose="ours", unit="points", margin=2.0,
        quantity="test accuracy, prompts and head trained minus head alone, both pre-trained",
        reason="less would not pay for keeping prompts for every task",
        conditions=(
            Condition("1 shot", n=20, spread=4.0, support=POINTS, decides=True),
            Condition("16 shots", n=20, spread=4.0, support=POINTS),
        ),
    ),
    Claim(
        "seen",
        "PVP beats a head on a backbone that all of was trained on the source's labels.",
        whose="ours", unit="points", margin=4.0,
        quantity="test accuracy, PVP minus the head alone on the backbone trained on the source",
        reason="as for the gain itself",
        conditions=(
            Condition("1 shot", n=20, spread=7.0, support=POINTS, decides=True),
            Condition("16 shots", n=20, spread=4.0, support=POINTS),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    most = SHOTS["ci" if found.scale == "ci" else "cpu"][-1]

    def at(arm: str, shots: int) -> dict[int, float]:
        return found.values("shots", "accuracy", arm=arm, shots=shots)

    def arms(ours: str, theirs: str, shots: int) -> Measured:
        return measured(at(ours, shots), at(theirs, shots), shots)

    def measured(ours: Any, theirs: Any, shots: int) -> Measured:
        return Measured(
            ours, theirs, control=at("seen", shots), nothing=at("head", shots),
            blocks=found.blocks("shots"), tuning_seeds=search_seeds(n=4),
        )  # fmt: skip

    def falls(ours: str, theirs: str) -> Measured:
        one, last = gain(found, ours, theirs, 1), gain(found, ours, theirs, most)
        return measured(one, last, 1)

    return {
        "few": {
            "prompts, 1 shot": arms("pvp", "random", 1),
            "prompts, 2 shots": arms("pvp", "random", 2),
            "LoRA, 1 shot": arms("lora pvp", "lora", 1),
        },
        "falls": {"prompts": falls("pvp", "random"), "LoRA": falls("lora pvp", "lora")},
        "still": {"prompts": arms("pvp", "random", most), "LoRA": arms("lora pvp", "lora", most)},
        "knowledge": {"prompts, 1 shot": arms("pvp", "shuffled", 1)},
        "moving": {"1 shot": arms("pvp", "frozen", 1), "16 shots": arms("pvp", "frozen", most)},
        "seen": {"1 shot": arms("pvp", "seen", 1), "16 shots": arms("pvp", "seen", most)},
    }


def gain(
    found: Found, ours: str, theirs: str, shots: int, column: str = "accuracy"
) -> dict[int, float]:
    """One arm minus another with so many images of a class, by seed."""
    one = found.values("shots", column, arm=ours, shots=shots)
    other = found.values("shots", column, arm=theirs, shots=shots)
    return {seed: one[seed] - other[seed] for seed in one}


def facts(found: Found) -> list[Fact]:
    """What must hold exactly, checked by doing it."""
    scale = found.scale
    trained = {}
    for arm in ("random", "lora"):
        adapted = world.prepared(arm, 0, scale)[1]
        assert adapted is not None
        trained[arm] = sum(p.numel() for p in adapted.parameters())
    labels = torch.arange(40) % 5
    few, more = (few_shot(labels, k, generator(0, "fact")).view(5, k) for k in (2, 5))
    return [
        Fact("equal", "Prompts and factors train as many numbers, with the head.",
             trained["random"] == trained["lora"], trained["random"], "numbers"),
        Fact("nested", "A draw of 2 shots is part of the draw of 5 by the same generator.",
             torch.equal(few, more[:, :2])),
    ]  # fmt: skip


LAB = Lab(
    slug="pvp", part="insert", measure=measure, judge=judge, claims=CLAIMS, facts=facts,
    data=("mnist",),
)  # fmt: skip
