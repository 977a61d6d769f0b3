"""What is measured about LoRA-Pro: where its steps point, and what is left once rates are tuned.

Digits: a network of two hidden layers knows digits turned by 90 degrees and gets upright ones.
LoRA and LoRA-Pro sit on all three layers with scale 2; the head is one of them, and nothing trains
beside. Network, start and order are drawn anew for every seed. A run whose numbers overflow counts
as guessing: 10 % right, a loss of log 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.core.train.fit import fit, optimise, set_rate
from toolkit.core.train.rates import cosine, linear
from toolkit.labs.beds import arms as bed_arms
from toolkit.labs.beds import characters, sentences, texts
from toolkit.labs.beds.tasks import accuracy, digits_task, digits_train
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.lowrank.against import compare, paired
from toolkit.labs.lowrank.lora import (
    abstracts_lora,
    abstracts_plain,
    reviews_lora,
    reviews_plain,
)
from toolkit.lowrank.lora import LoRA
from toolkit.lowrank.lora_pro import LoRAPro
from toolkit.lowrank.lora_pro.projection import adjusted, equivalent_gradient

HIDDEN = ["0", "2"]
RANKS = (1, 2, 4, 8, 16, 32, 64)
RATES = tuple(2.0**k for k in range(-12, -2))
PARTS_OF = {"full training's rate": 1.0, "an 8th of it": 1 / 8, "a 32nd of it": 1 / 32,
            "4 times it": 4.0}  # fmt: skip
"""The shared rates of a claim, as parts of the rate that suits full training."""
WALK_RATE = 2.0**-8
START = 2.0**-6
BINS = 20
GUESSING = {"validation": 10.0, "test": 10.0}


def binned(values: Sequence[float]) -> list[float]:
    """Means over twenty stretches of equal length, or the values where there are fewer."""
    width = max(1, len(values) // BINS)
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    return [round(sum(part) / len(part), 4) for part in parts]


def trained_digits(method: Any, rate: float, seed: int, steps: int, **options: Any) -> Any:
    """Accuracies, and the training loss along the way, of one run on the digits."""
    try:
        told = digits_train(method, rate, seed, steps=steps, **options)[2]
    except FloatingPointError:
        return GUESSING | {"curve": binned([math.log(10)] * steps), "overflow": True}
    return {
        "validation": told["validation"], "test": told["test"], "trained": told["trained"],
        "curve": binned(told["losses"]), "overflow": False,
    }  # fmt: skip


def digits_nothing(arm: str, seed: int) -> dict[str, Any]:
    """The network as it is."""
    task = digits_task(seed)
    return {"test": accuracy(task.model, task.test), "trained": 0}


def digits_head(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """The last layer alone trains."""
    return trained_digits(None, rate, seed, steps, train=("4.*",))


def digits_full(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Everything trains."""
    return trained_digits(None, rate, seed, steps)


def digits_lora(arm: str, rank: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """LoRA on all three layers."""
    return trained_digits(LoRA(rank=rank, alpha=2.0 * rank), rate, seed, steps)


def digits_pro(
    arm: str, rank: int, X: Any, like: Any, rate: float, seed: int, steps: int
) -> dict[str, Any]:
    """LoRA-Pro in full mode: Adam inside, plain descent outside."""
    method = LoRAPro(rank=rank, alpha=2.0 * rank, X=X, like=like)
    return trained_digits(method, rate, seed, steps, sgd=True)


def digits_efficient(arm: str, rank: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """LoRA-Pro in efficient mode: adjusted gradients, Adam outside."""
    return trained_digits(LoRAPro(rank=rank, alpha=2.0 * rank, mode="efficient"), rate, seed, steps)


def walk(arm: str, rank: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Train both hidden layers and compare every move with full training's from the same place.

    Full training's Adam keeps its averages along the same way, from the gradients g of the merged
    weights on the same images. The first step, where B is 0, is left out.

    Returns:
        Cosines, means over steps and both layers: ``step`` of the weight's move with Adam's step;
        for gradient descent ``raw`` of LoRA's step with g and ``nearest`` of LoRA-Pro's, both from
        the factors of this way. ``length``: of the move, Adam's step being 1. ``along``: ``step``
        in twenty stretches.
    """
    torch.set_num_threads(1)
    task, plain = digits_task(seed), digits_task(seed).model
    pro = arm == "lora_pro"
    method = (LoRAPro if pro else LoRA)(rank=rank, alpha=2.0 * rank)
    adapted = adapt(task.model, method, targets=HIDDEN, generator=generator(seed, "init"))
    optimizer = optimise(adapted.parameters(), rate, sgd=pro)
    adapted.attach(optimizer, total_steps=steps)
    base = {name: plain.get_submodule(name).weight for name in HIDDEN}
    first, second = ({n: torch.zeros_like(w) for n, w in base.items()} for _ in range(2))
    factors, rows = adapted.adapters, []

    def merged() -> dict[str, Tensor]:
        return {n: (base[n] + factors[n].delta()).detach() for n in HIDDEN}

    order = torch.randint(len(task.y), (steps, 64), generator=generator(seed, "order"))
    for t, batch in enumerate(order, 1):
        x, y, before, now = task.x[batch], task.y[batch], merged(), rate * cosine(t - 1, steps)
        weights = {f"{n}.weight": w.clone().requires_grad_() for n, w in before.items()}
        loss = F.cross_entropy(functional_call(plain, weights, (x,)), y)
        dense = dict(zip(HIDDEN, torch.autograd.grad(loss, list(weights.values())), strict=True))
        near = {n: _steps(g, factors[n]) for n, g in dense.items()} if t > 1 else {}
        set_rate(optimizer, now)
        optimizer.zero_grad()
        F.cross_entropy(adapted(x), y).backward()
        optimizer.step()
        after = merged()
        for n, g in dense.items():
            first[n].lerp_(g, 0.1)
            second[n].lerp_(g.square(), 0.001)
            u = first[n] / (1 - 0.9**t) / ((second[n] / (1 - 0.999**t)).sqrt() + 1e-8)
            move = before[n] - after[n]
            if t > 1:
                length = (move.norm() / (now * u.norm())).item()
                rows.append((_cosine(move, u), *near[n], length))
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    record = dict(zip(("step", "raw", "nearest", "length"), means, strict=True))
    pairs = zip(rows[::2], rows[1::2], strict=True)  # both layers of a step
    return record | {"along": binned([(a[0] + b[0]) / 2 for a, b in pairs])}


@torch.no_grad()
def _steps(g: Tensor, layer: Any) -> tuple[float, float]:
    """Cosines with g of LoRA's own step and of the nearest, from the factors of a layer."""
    A, B, s = layer.A.detach(), layer.B.detach(), layer.scale
    raw = s * B.mT @ g, s * g @ A.mT
    near = equivalent_gradient(*adjusted(*raw, A, B, s), A, B, s)
    return _cosine(equivalent_gradient(*raw, A, B, s), g), _cosine(near, g)


def _cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def abstracts_pro(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """LoRA-Pro on every linear layer of the blocks; the bed's loop with plain descent outside."""
    torch.set_num_threads(1)
    this, read, model = characters.size(scale), characters.load(scale), characters.network(scale)
    windows = characters.batches(
        read.train, this.steps, this.batch, this.context, generator(seed, "windows")
    )
    adapted, _ = fit(
        model, LoRAPro(rank=rank, alpha=2.0 * rank), rate, seed, windows, characters.loss,
        steps=this.steps, decay=lambda step, of: bed_arms.warm(step, of) * linear(step, of),
        targets=characters.TARGETS, sgd=True,
    )  # fmt: skip
    trained = sum(p.numel() for p in adapted.parameters())
    return {part: characters.nats(model, getattr(read, part)), "trained": trained}


def reviews_pro(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """LoRA-Pro on the twelve linear layers of the upper blocks; the head has Adam of its own."""
    task = texts.load(scale, seed)
    raw = sentences.text_train(
        task, LoRAPro(rank=rank, alpha=2.0 * rank), rate, seed,
        steps=texts.STEPS[bed_arms.sizes_of(scale)], sgd=True, parts=(part,), loss=True,
    )[2]  # fmt: skip
    head = 2 * (task.train.hidden[0].shape[1] + 1)
    return {part: raw[f"{part}_loss"], f"{part}_accuracy": raw[part],
            "trained": raw["trained"] + head}  # fmt: skip


USUAL = {"X": "sylvester", "like": "paper"}
DIGITS: dict[str, Any] = {"nothing": digits_nothing, "head": digits_head, "full": digits_full,
          "lora 2": digits_lora, "lora 8": digits_lora, "lora_pro 2": digits_pro,
          "lora_pro 8": digits_pro, "efficient 8": digits_efficient}  # fmt: skip
FORMS = {"zero": {"X": "zero", "like": "paper"}, "symmetric": {"X": "symmetric", "like": "paper"},
         "code": {"X": "sylvester", "like": "code"}}  # fmt: skip
ABSTRACTS: dict[str, Any] = {"nothing": abstracts_plain, "head": abstracts_plain,
             "full": abstracts_plain, "rank 8": abstracts_lora,
             "lora_pro": abstracts_pro}  # fmt: skip
REVIEWS: dict[str, Any] = {"nothing": reviews_plain, "head": reviews_plain,
           "full": reviews_plain, "rank 8": reviews_lora, "lora_pro": reviews_pro}  # fmt: skip
ABSTRACTS_START = {"head": 2e-2, "full": 4e-3, "rank 8": 1.6e-2, "lora_pro": 4e-3}
REVIEWS_START = {"head": 1.6e-2, "full": 2.5e-4, "rank 8": 4e-3, "lora_pro": 5e-4}
"""Middles of the first rates tried; those of the shared arms are LoRA's."""


def more_of(functions: Any) -> dict[str, dict[str, Any]]:
    """Further arguments of each arm that trains."""
    found: dict[str, dict[str, Any]] = {}
    for name in functions:
        if name in ("rank 8", "lora_pro"):
            found[name] = {"rank": 8}
        elif name[-1].isdigit():
            found[name] = {"rank": int(name[-1])} | (USUAL if name.startswith("lora_pro") else {})
        elif name != "nothing":
            found[name] = {}
    return found


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    few = scale.pick(ci=4, cpu=8, gpu=20)
    _digits(runs, scale)
    _walks(runs, scale)
    compare(runs, scale, "abstracts", ABSTRACTS, more_of(ABSTRACTS), ABSTRACTS_START, few)
    compare(runs, scale, "reviews", REVIEWS, more_of(REVIEWS), REVIEWS_START, few)


def _digits(runs: Runs, scale: Scale) -> None:
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    few = [seed for block in blocks for seed in block[: scale.pick(ci=1, cpu=2, gpu=10)]]
    some = [seed for block in blocks for seed in block[: scale.pick(ci=1, cpu=4, gpu=10)]]
    steps = {"steps": scale.pick(ci=2, cpu=100, gpu=100)}
    arms = {arm: more | steps for arm, more in more_of(DIGITS).items()}
    runs.table("digits as they are", digits_nothing, grid(arm=["nothing"], seed=seeds))
    found = runs.tune(
        "digits", DIGITS, arms, dict.fromkeys(arms, START),
        seeds=search_seeds(), reported=seeds, judged="validation", better="max",
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("digits", blocks)

    def jobs(arm: str, rate: float, on: Sequence[int]) -> list[dict[str, Any]]:
        return [{"arm": arm, **arms[arm], "rate": rate, "seed": seed} for seed in on]

    runs.table("digits", DIGITS, [j for a in arms for j in jobs(a, found[a].rate, seeds)])
    # the rate that suits full training, and parts of it, for all
    pairs = ("full", "lora 2", "lora 8", "lora_pro 2", "lora_pro 8")
    for name, part in PARTS_OF.items():
        rate, here = part * found["full"].rate, pairs if part == 1 else ("lora 8", "lora_pro 8")
        runs.table(name, DIGITS, [job for arm in here for job in jobs(arm, rate, seeds)])
    runs.table("rates", DIGITS, [
        job for arm in pairs for rate in RATES
        for job in jobs(arm, rate, seeds if arm.startswith("lora ") else few)
    ])  # fmt: skip
    runs.table("forms", digits_pro, [
        {"arm": form, "rank": 8, **choice, "rate": found["lora_pro 8"].rate, "seed": seed, **steps}
        for form, choice in FORMS.items() for seed in some
    ])  # fmt: skip


def _walks(runs: Runs, scale: Scale) -> None:
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    few = [seed for block in blocks for seed in block[: scale.pick(ci=1, cpu=2, gpu=10)]]
    runs.blocks("walks", blocks)
    runs.table("walks", walk, [
        {"arm": arm, "rank": rank, "rate": WALK_RATE, "seed": seed,
         "steps": scale.pick(ci=3, cpu=60, gpu=60)}
        for rank in scale.pick(ci=(2, 8, 64), cpu=RANKS, gpu=RANKS)
        for seed in (seeds if rank in (2, 8) else few) for arm in ("lora", "lora_pro")
    ])  # fmt: skip


POINTS = (-100.0, 100.0)
CLAIMS = (
    Claim(
        "nearer-step",
        "LoRA-Pro moves the weight more nearly where full training would move it.",
        whose="paper", where="abstract",
        unit="of the cosine", margin=0.1,
        quantity="cosine of the move with full training's step under Adam, LoRA-Pro's minus LoRA's",
        reason="a tenth of the step's length, taken along the right direction",
        conditions=(
            Condition("digits, rank 8", n=20, spread=0.05, support=(-2.0, 2.0), decides=True),
            Condition("digits, rank 2", n=20, spread=0.05, support=(-2.0, 2.0)),
        ),
    ),
    Claim(
        "one-rate",
        "At one learning rate for all, LoRA-Pro is better than LoRA.",
        whose="paper", where="abstract",
        unit="points", margin=1.0,
        quantity="test accuracy at rank 8 and the same rate, LoRA-Pro minus LoRA",
        reason="one point is less than four images of this test set",
        conditions=tuple(
            Condition(name, n=20, spread=1.5, support=POINTS, decides=part == 1)
            for name, part in PARTS_OF.items()
        ),
    ),
    Claim(
        "own-nats",
        "With a learning rate of its own for each, LoRA-Pro is better than LoRA on texts.",
        whose="paper", where="abstract",
        unit="nats", margin=0.02, better="less",
        quantity="log-loss, LoRA-Pro below LoRA, both of rank 8",
        reason="0.02 nats are two per cent of the probability of what is right",
        conditions=(
            Condition("abstracts", n=8, spread=0.008, decides=True),
            Condition("film reviews", n=8, spread=0.02),
        ),
    ),
    Claim(
        "near-full",
        "LoRA-Pro narrows the gap: it ends less than 0.05 nats per character above full training.",
        whose="paper", where="abstract",
        unit="nats per character", margin=0.02, better="less", than=0.07,
        quantity="log-loss on abstracts, LoRA-Pro of rank 8 below full training plus 0.07",
        reason="0.02 nats are two per cent of a character's probability",
        conditions=(Condition("abstracts", n=8, spread=0.008, decides=True),),
    ),
    Claim(
        "every-rate",
        "LoRA-Pro at its own rate is better than LoRA at any rate.",
        whose="ours", unit="points", margin=1.0,
        quantity="test accuracy on digits, LoRA-Pro minus LoRA at the best of all rates",
        reason="one point is less than four images of this test set",
        conditions=(
            Condition("rank 8", n=20, spread=1.5, support=POINTS, decides=True, grid=RATES),
            Condition("rank 2", n=20, spread=1.5, support=POINTS, grid=RATES),
        ),
    ),
    Claim(
        "follows",
        "At full training's rate LoRA-Pro's loss stays nearer to full training's than LoRA's does.",
        whose="ours", unit="nats", margin=0.05, better="less",
        quantity="mean distance from full training's curve of the loss, LoRA-Pro's below LoRA's",
        reason="a twentieth of a nat is hardly seen in a plot of the loss",
        conditions=(
            Condition("rank 8", n=20, spread=0.05, decides=True),
            Condition("rank 2", n=20, spread=0.05),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    blocks = found.blocks("digits")
    known: dict[str, Any] = {
        "control": found.values("digits", "test", arm="full"),
        "nothing": found.values("digits as they are", "test"),
        "blocks": blocks, "tuning_seeds": search_seeds(),
    }  # fmt: skip

    def walked(rank: int) -> Measured:
        ours, theirs = (
            found.values("walks", "step", arm=arm, rank=rank) for arm in ("lora_pro", "lora")
        )
        return Measured(
            ours, theirs, blocks=found.blocks("walks"), tuning_seeds=search_seeds()
        )  # fmt: skip

    def shared(name: str) -> Measured:
        ours, theirs = (found.values(name, "test", arm=arm) for arm in ("lora_pro 8", "lora 8"))
        return Measured(ours, theirs, **known)

    def fixed(rank: int) -> Measured:
        every = {
            rate: found.values("rates", "test", arm=f"lora {rank}", rate=rate) for rate in RATES
        }
        return Measured(found.values("digits", "test", arm=f"lora_pro {rank}"), every, **known)

    def followed(rank: int) -> Measured:
        ours, theirs = (apart(found, f"{arm} {rank}") for arm in ("lora_pro", "lora"))
        return Measured(ours, theirs, blocks=blocks, tuning_seeds=search_seeds())

    both = {8: "rank 8", 2: "rank 2"}
    return {
        "nearer-step": {f"digits, {name}": walked(rank) for rank, name in both.items()},
        "one-rate": {name: shared(name) for name in PARTS_OF},
        "own-nats": {
            name: paired(found, bed, "test", "lora_pro", "rank 8")
            for name, bed in (("abstracts", "abstracts"), ("film reviews", "reviews"))
        },
        "near-full": {"abstracts": paired(found, "abstracts", "test", "lora_pro", "full")},
        "every-rate": {name: fixed(rank) for rank, name in both.items()},
        "follows": {name: followed(rank) for rank, name in both.items()},
    }


def apart(found: Found, arm: str) -> dict[int, float]:
    """Seed -> mean distance of an arm's loss from full training's, at full training's rate."""
    table = found["full training's rate"]
    curves = {(row.arm, row.seed): torch.tensor(row.curve) for row in table.itertuples()}
    return {
        seed: (curve - curves["full", seed]).abs().mean().item()
        for (name, seed), curve in curves.items() if name == arm
    }  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Identities and counts, checked by computing them."""
    draws = generator(0, "theorem")
    A, B, g, X = (
        torch.randn(shape, generator=draws, dtype=torch.float64)
        for shape in ((3, 6), (7, 3), (7, 6), (3, 3))
    )
    raw = 2 * B.mT @ g, 2 * g @ A.mT
    zero, other = (
        equivalent_gradient(*adjusted(*raw, A, B, 2.0, X=x, damping=0.0), A, B, 2.0)
        for x in ("zero", X)
    )
    PB, PA = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    rest = g - PB @ g
    gap = (zero - (g - rest + rest @ PA)).abs().max().item()
    moved = (zero - other).abs().max().item()

    def dressed(method: Any) -> Any:
        return adapt(nets.mlp([64, 96, 96, 10], generator=generator(0, "base")), method)

    plain, pro = dressed(LoRA(rank=8)), dressed(LoRAPro(rank=8))
    pro.attach(torch.optim.SGD(pro.parameters(), lr=1e-3))
    count = sum(p.numel() for p in pro.parameters())
    kept = sum(t.numel() for t in pro.controller.state().values() if t.ndim > 1)
    whole = 96 * 64 + 96 * 96 + 10 * 96
    return [
        Fact("theorem", "The adjusted pair moves the weight along the gradient but for the block "
             "that no step of A or B can reach.", gap < 1e-12, gap, "largest difference"),
        Fact("x", "Another X moves the weight in the same direction.", moved < 1e-12, moved,
             "largest difference"),
        Fact("count", "LoRA-Pro trains as many numbers as LoRA.",
             count == sum(p.numel() for p in plain.parameters()), count, "numbers in both"),
        Fact("memory", "In full mode it keeps two averages of each weight's size.",
             kept == 2 * whole, kept, "numbers kept"),
    ]  # fmt: skip


LAB = Lab(
    slug="lora_pro",
    part="lowrank",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("digits", "sst2", "minilm", "tinyshakespeare", "cranfield"),
)
