"""What is measured about LoRA: rank, scale and quality, on digits, texts and film reviews.

Digits: a network of two hidden layers reads upright digits of 8 x 8 pixels and is adapted to digits
turned by 90 degrees. The head trains in every arm; LoRA sits on both hidden layers with scale 1.
Network, split, start and order are drawn anew for every seed.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core import data, nets
from toolkit.core.adapt.put import adapt
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.labs.beds import characters, texts
from toolkit.labs.beds.arms import Arm
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.lowrank.against import compare, paired
from toolkit.lowrank.lora import LoRA

HIDDEN, HEAD = ["0", "2"], "4"
RANKS = (1, 2, 4, 8, 16, 32)
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
OPTIMISERS = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
GRID_RATES = {
    "Adam": tuple(2.0**k for k in range(-8, -1)),
    "SGD": tuple(2.0**k for k in range(-6, 2)),
}
LAWS = ("uniform, as in the code", "Gaussian of equal spread", "Gaussian of spread 1")


class Digits(NamedTuple):
    """A network that reads upright digits, and turned ones: pairs of images (n, 64) and labels."""

    base: nn.Sequential
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    upright: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=64)
def digits_task(seed: int, pretraining: int) -> Digits:
    """The task of one seed: 1,077 images to train, 360 to choose rates, 360 to report."""
    images = data.digits(seed=seed)

    def view(x: Any, turn: bool) -> Tensor:
        x = torch.as_tensor(x)
        return (x.rot90(1, (1, 2)) if turn else x).flatten(1)

    x, y = view(images.x_train, True), torch.as_tensor(images.y_train)
    base = nets.mlp([64, 32, 32, 10], generator=generator(seed, "base"))
    fit(base, base.parameters(), (view(images.x_train, False), y), pretraining, 3e-3, seed)
    labels = torch.as_tensor(images.y_test)
    return Digits(
        base.requires_grad_(False),
        (x[:-360], y[:-360]),
        (x[-360:], y[-360:]),
        (view(images.x_test, True), labels),
        (view(images.x_test, False), labels),
    )


def fit(
    model: nn.Module,
    parameters: Any,
    part: tuple[Tensor, Tensor],
    steps: int,
    rate: float,
    seed: int,
    optimizer: Any = torch.optim.Adam,
) -> nn.Module:
    """Minimise cross-entropy on batches of 64 drawn by the seed, the rate falling linearly to 0."""
    x, y = part
    rows = torch.randint(len(x), (steps, 64), generator=generator(seed, "batches"))
    descent = optimizer(list(parameters), lr=rate, fused=True)
    for step, batch in enumerate(rows):
        descent.param_groups[0]["lr"] = rate * (1 - step / steps)
        descent.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        descent.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of right answers, in percent."""
    return 100 * (model(part[0]).argmax(1) == part[1]).double().mean().item()


def lora_student(base: nn.Module, rank: int, seed: int) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the network with LoRA on both hidden layers, and what trains, the head included."""
    model = copy.deepcopy(base)
    method = LoRA(rank=rank, alpha=float(rank))
    draw = generator(seed, "factors")
    adapted = adapt(model, method, targets=HIDDEN, train=f"{HEAD}.*", generator=draw)
    return model, adapted.parameters()


def _trained(task: Digits, model: nn.Module, parameters: Any, rate: float, seed: int, steps: int):
    parameters = list(parameters)
    fit(model, parameters, task.train, steps, rate, seed)
    return {
        "validation": accuracy(model, task.validation),
        "test": accuracy(model, task.test),
        "trained": sum(p.numel() for p in parameters),
    }


def digits_nothing(arm: str, seed: int, pretraining: int) -> dict[str, Any]:
    """The network as it is, on turned and on upright digits."""
    task = digits_task(seed, pretraining)
    parts = {"validation": task.validation, "test": task.test, "upright": task.upright}
    return {name: accuracy(task.base, part) for name, part in parts.items()} | {"trained": 0}


def digits_head(arm: str, rate: float, seed: int, steps: int, pretraining: int) -> dict[str, Any]:
    """The last layer alone trains."""
    task = digits_task(seed, pretraining)
    model = copy.deepcopy(task.base)
    return _trained(task, model, model[4].requires_grad_(True).parameters(), rate, seed, steps)


def digits_full(arm: str, rate: float, seed: int, steps: int, pretraining: int) -> dict[str, Any]:
    """Everything trains."""
    task = digits_task(seed, pretraining)
    model = copy.deepcopy(task.base).requires_grad_(True)
    return _trained(task, model, model.parameters(), rate, seed, steps)


def digits_lora(
    arm: str, rank: int, rate: float, seed: int, steps: int, pretraining: int
) -> dict[str, Any]:
    """LoRA of one rank on both hidden layers, and the head."""
    task = digits_task(seed, pretraining)
    return _trained(task, *lora_student(task.base, rank, seed), rate, seed, steps)


def digits_cut(
    arm: str, rate: float, seed: int, steps: int, pretraining: int, ranks: list[int]
) -> dict[str, Any]:
    """Everything trains; afterwards the change of both hidden layers is cut to each rank."""
    task = digits_task(seed, pretraining)
    model = copy.deepcopy(task.base).requires_grad_(True)
    fit(model, model.parameters(), task.train, steps, rate, seed)
    old = {name: task.base.get_submodule(name).weight for name in HIDDEN}
    changes = {
        name: torch.linalg.svd((model.get_submodule(name).weight - old[name]).detach())
        for name in HIDDEN
    }
    found = {}
    for rank in ranks:
        cut = {
            f"{name}.weight": old[name] + (U[:, :rank] * values[:rank]) @ V[:rank]
            for name, (U, values, V) in changes.items()
        }
        with torch.no_grad():
            scores = functional_call(model, cut, (task.test[0],))
        found[f"rank {rank}"] = 100 * (scores.argmax(1) == task.test[1]).double().mean().item()
    return found


def merged_twice(rank: int, rate: float, seed: int, steps: int, pretraining: int) -> dict[str, Any]:
    """LoRA and the head train; then its difference is added to the weights once, and twice."""
    task = digits_task(seed, pretraining)
    model, parameters = lora_student(task.base, rank, seed)
    fit(model, parameters, task.train, steps, rate, seed)
    once = accuracy(model, task.test)
    with torch.no_grad():  # a silent merge adds to the weight and leaves the factors in force
        for name in HIDDEN:
            layer = model.get_submodule(name)
            layer.base.weight += layer.adapter.delta()
    return {"once": once, "twice": accuracy(model, task.test)}


def scale_run(
    optimiser: str, rank: int, s: float, rate: float, seed: int, steps: int, pretraining: int
) -> dict[str, Any]:
    """LoRA of scale ``s`` on all three layers; nothing else trains."""
    task = digits_task(seed, pretraining)
    model = copy.deepcopy(task.base)
    adapted = adapt(model, LoRA(rank=rank, alpha=s * rank), generator=generator(seed, "factors"))
    fit(model, adapted.parameters(), task.train, steps, rate, seed, OPTIMISERS[optimiser])
    return {"validation": accuracy(model, task.validation), "test": accuracy(model, task.test)}


def first_draw_run(
    law: str, rate: float, seed: int, steps: int, pretraining: int
) -> dict[str, Any]:
    """LoRA of rank 4 and scale 1 on all three layers, with another law for the first ``A``."""
    task, draw = digits_task(seed, pretraining), generator(seed, "first draw")
    model = copy.deepcopy(task.base)
    adapted = adapt(model, LoRA(rank=4, alpha=4.0), generator=generator(seed, "factors"))
    for factors in adapted.adapters.values():
        spread = {LAWS[1]: 1 / math.sqrt(3 * factors.A.shape[1]), LAWS[2]: 1.0}.get(law)
        if spread is not None:
            factors.A.data = spread * torch.randn(factors.A.shape, generator=draw)
    fit(model, adapted.parameters(), task.train, steps, rate, seed)
    return {"test": accuracy(model, task.test)}


def reading(bed: Any, arm: Arm, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """One arm on a bed of texts, judged on "validation" or "test": what its record says."""
    return bed.train(arm, rate, seed, scale=scale, parts=(part,))[2]


def abstracts_plain(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """The base as it is, its head, or everything, on abstracts; nats per character."""
    return reading(characters, PARTS[arm], rate, seed, scale, part)


def abstracts_lora(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """LoRA of one rank on every linear layer of the blocks, and nothing beside it."""
    return reading(characters, _lora_arm(rank), rate, seed, scale, part)


def reviews_plain(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """A head of zeros, the head alone, or both upper blocks of MiniLM, on film reviews."""
    return reading(texts, PARTS[arm], rate, seed, scale, part)


def reviews_lora(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """LoRA of one rank on the twelve linear layers of the upper blocks, and the head."""
    return reading(texts, _lora_arm(rank), rate, seed, scale, part)


def _lora_arm(rank: int) -> Arm:
    return Arm("method", LoRA(rank=rank, alpha=2.0 * rank))


PARTS = {"nothing": Arm("nothing"), "head": Arm("head"), "full": Arm("all")}
DIGITS = {"head": digits_head, "full": digits_full} | {f"rank {r}": digits_lora for r in RANKS}
ABSTRACTS = {"nothing": abstracts_plain, "head": abstracts_plain, "full": abstracts_plain,
             "rank 2": abstracts_lora, "rank 8": abstracts_lora}  # fmt: skip
REVIEWS = {"nothing": reviews_plain, "head": reviews_plain, "full": reviews_plain,
           "rank 1": reviews_lora, "rank 8": reviews_lora}  # fmt: skip
ABSTRACTS_START = {"head": 2e-2, "full": 4e-3, "rank 2": 1.6e-2, "rank 8": 1.6e-2}
REVIEWS_START = {"head": 1.6e-2, "full": 2.5e-4, "rank 1": 4e-3, "rank 8": 4e-3}
"""Middles of the first rates tried."""


def arms(functions: Any, ranks: Any = None) -> dict[str, dict[str, Any]]:
    """Further arguments of each arm that trains: LoRA's rank."""
    found = {name: int(name[5:]) if name.startswith("rank") else None for name in functions}
    return {
        name: {} if rank is None else {"rank": rank}
        for name, rank in found.items()
        if name != "nothing" and (rank is None or ranks is None or rank in ranks)
    }


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    n = scale.pick(ci=4, cpu=20, gpu=20)
    few = scale.pick(ci=4, cpu=8, gpu=20)
    size = {"pretraining": scale.pick(ci=30, cpu=400, gpu=400)}
    steps = {"steps": scale.pick(ci=6, cpu=300, gpu=300)}
    _digits(runs, scale, n, size | steps)
    compare(runs, scale, "abstracts", ABSTRACTS, arms(ABSTRACTS), ABSTRACTS_START, few)
    compare(runs, scale, "reviews", REVIEWS, arms(REVIEWS), REVIEWS_START, few)
    size |= {"steps": scale.pick(ci=2, cpu=100, gpu=100)}
    _scales(runs, scale, n, size)
    runs.table(
        "first draw", first_draw_run,
        grid(law=LAWS, rate=_every(GRID_RATES["Adam"], scale),
             seed=range(scale.pick(ci=2, cpu=8, gpu=20)), **size),
    )  # fmt: skip


def _every(values: Any, scale: Scale) -> list[Any]:
    """All values, or at ``ci`` every third."""
    return list(values[:: scale.pick(ci=3, cpu=1, gpu=1)])


def _digits(runs: Runs, scale: Scale, n: int, size: dict[str, Any]) -> None:
    blocks = two_blocks(n)
    seeds = [seed for block in blocks for seed in block]
    start = {"pretraining": size["pretraining"]}
    runs.table("digits as they are", digits_nothing, grid(arm="nothing", seed=seeds, **start))
    chosen = arms(DIGITS, scale.pick(ci=(1, 8, 32), cpu=RANKS, gpu=RANKS))
    found = runs.tune(
        "digits", DIGITS, {arm: more | size for arm, more in chosen.items()},
        {arm: 3e-2 if arm == "head" else 1e-2 for arm in chosen},
        seeds=search_seeds(), reported=seeds, judged="validation", better="max",
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("digits", blocks)
    runs.table("digits", DIGITS, [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **size}
        for arm, more in chosen.items() for seed in seeds
    ])  # fmt: skip
    ranks = [more["rank"] for more in chosen.values() if "rank" in more]
    runs.table("digits, cut afterwards", digits_cut, [
        {"arm": "cut", "rate": found["full"].rate, "seed": seed, "ranks": ranks, **size}
        for seed in seeds
    ])  # fmt: skip
    runs.table("merged twice", merged_twice, [
        {"rank": 8, "rate": found["rank 8"].rate, "seed": seed, **size} for seed in seeds
    ])  # fmt: skip


def _scales(runs: Runs, scale: Scale, n: int, size: dict[str, Any]) -> None:
    """Rank 4 on all seeds and, to choose rates, on those of the search; other ranks on fewer."""
    blocks = two_blocks(n)
    runs.blocks("scale", blocks)
    seeds = [*search_seeds(), *(seed for block in blocks for seed in block)]
    jobs = []
    for optimiser, rates in GRID_RATES.items():
        axes = {
            "optimiser": optimiser,
            "s": scale.pick(ci=[1.0, 4.0], cpu=list(SCALES), gpu=list(SCALES)),
            "rate": rates,
        }
        jobs += grid(**axes, rank=4, seed=seeds, **size)
        jobs += grid(
            **axes,
            rank=scale.pick(ci=[1], cpu=[1, 8], gpu=[1, 8]),
            seed=scale.pick(ci=[0], cpu=[0, 1, 2], gpu=[0, 1, 2]),
            **size,
        )
    runs.table("scale", scale_run, jobs)


CLAIMS = (
    Claim(
        "quality-points",
        "With far fewer trained numbers LoRA of rank 8 is at most two points below full "
        "fine-tuning.",
        whose="paper", unit="points", margin=1.0, than=-3.0,
        quantity="test accuracy, LoRA of rank 8 minus full fine-tuning, from 3 points below",
        reason="one point is half of the two that are called comparable",
        conditions=(
            Condition("digits", n=20, spread=1.7, support=(-97.0, 103.0), decides=True),
            Condition("film reviews", n=8, spread=1.0, support=(-97.0, 103.0)),
        ),
    ),
    Claim(
        "behind-nats",
        "On new text full training ends at least 0.05 nats per character below LoRA of rank 8.",
        whose="ours", unit="nats per character", margin=0.05, better="less",
        quantity="log-loss on abstracts, full training below LoRA of rank 8",
        reason="0.05 nats are five per cent of a character's probability",
        conditions=(Condition("abstracts", n=8, spread=0.006, decides=True),),
    ),
    Claim(
        "rank-points",
        "Accuracy rises with rank.",
        whose="ours", unit="points", margin=1.0,
        quantity="test accuracy, LoRA of rank 8 minus rank 1",
        reason="one point is less than the spread over test sets of this size",
        conditions=(
            Condition("digits", n=20, spread=1.5, support=(-100.0, 100.0), decides=True),
            Condition("film reviews", n=8, spread=1.0, support=(-100.0, 100.0)),
        ),
    ),
    Claim(
        "rank-nats",
        "On texts the log-loss falls with rank.",
        whose="ours", unit="nats per character", margin=0.02, better="less",
        quantity="log-loss on abstracts, LoRA of rank 8 below rank 2",
        reason="0.02 nats are two per cent of a character's probability",
        conditions=(Condition("abstracts", n=8, spread=0.008, decides=True),),
    ),
    Claim(
        "limit",
        "At the highest rank LoRA comes within two points of full fine-tuning.",
        whose="ours", unit="points", margin=1.0, than=-3.0,
        quantity="test accuracy, LoRA of rank 32 minus full fine-tuning, from 3 points below",
        reason="one point is half of the two that are called comparable",
        conditions=(Condition("digits", n=20, spread=1.7, support=(-97.0, 103.0), decides=True),),
    ),
    Claim(
        "scale",
        "The best learning rate depends on the scale s.",
        whose="ours", unit="points", margin=2.0,
        quantity="test accuracy, mean over five scales: the rate that suits each scale minus the "
        "best single rate",
        reason="two points are what the choice of a rate may cost before anybody minds",
        conditions=(
            Condition("Adam", n=20, spread=3.0, support=(-100.0, 100.0), decides=True,
                      grid=GRID_RATES["Adam"]),
            Condition("SGD", n=20, spread=3.0, support=(-100.0, 100.0), grid=GRID_RATES["SGD"]),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    search = search_seeds()
    asis = found.values("digits as they are", "test")

    def digits(ours: str, theirs: str) -> Measured:
        return Measured(
            found.values("digits", "test", arm=ours), found.values("digits", "test", arm=theirs),
            control=found.values("digits", "test", arm="full"), nothing=asis,
            blocks=found.blocks("digits"), tuning_seeds=search,
        )  # fmt: skip

    accuracy = "test_accuracy"
    return {
        "quality-points": {
            "digits": digits("rank 8", "full"),
            "film reviews": paired(found, "reviews", accuracy, "rank 8", "full"),
        },
        "behind-nats": {"abstracts": paired(found, "abstracts", "test", "full", "rank 8")},
        "rank-points": {
            "digits": digits("rank 8", "rank 1"),
            "film reviews": paired(found, "reviews", accuracy, "rank 8", "rank 1"),
        },
        "rank-nats": {"abstracts": paired(found, "abstracts", "test", "rank 8", "rank 2")},
        "limit": {"digits": digits("rank 32", "full")},
        "scale": {name: one_rate(found, name) for name in OPTIMISERS},
    }


def one_rate(found: Found, optimiser: str) -> Measured:
    """The rate that suits each scale, against every rate that is kept for all scales.

    Rates are chosen on the validation images of the search's seeds, and reported on others.
    """
    cells = found["scale"]
    cells = cells[(cells.optimiser == optimiser) & (cells["rank"] == 4)]
    search = search_seeds()
    apart = cells.seed.isin(search)
    valid = cells[apart].groupby(["s", "rate"]).validation.mean()
    best = {s: valid[s].idxmax() for s in sorted(cells.s.unique())}
    rest = cells[~apart]
    suited = rest[rest.rate == rest.s.map(best)].groupby("seed").test.mean()
    fixed = rest.groupby(["rate", "seed"]).test.mean()
    return Measured(
        suited.to_dict(),
        {rate: fixed[rate].to_dict() for rate in sorted(rest.rate.unique())},
        blocks=found.blocks("scale"), tuning_seeds=search,
    )  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    base = digits_task(0, 1).base
    trained = sum(p.numel() for p in lora_student(base, 4, 0)[1])
    formula = 4 * (32 + 64) + 4 * (32 + 32) + (32 * 10 + 10)
    wide = nets.mlp([64, 32, 32, 10], generator=generator(0, "merge"), dtype=torch.float64)
    count = sum(p.numel() for p in wide.parameters())
    adapted = adapt(wide, LoRA(rank=4), generator=generator(0, "factors"))
    for factors in adapted.adapters.values():
        factors.B.data.normal_(generator=generator(0, "B"))
    x = torch.randn(360, 64, generator=generator(0, "x"), dtype=torch.float64)
    with torch.no_grad():
        beside = wide(x)
        adapted.merge()
        gap = (wide(x) - beside).abs().max().item()
    extra = sum(p.numel() for p in wide.parameters()) - count
    return [
        Fact("count", "LoRA of rank 4 on both hidden layers trains r(m + n) numbers each, and the "
             "head its own.", trained == formula, trained, "numbers"),
        Fact("merge", "Merged and unmerged outputs agree to 1e-12 in double precision.",
             gap < 1e-12, gap, "largest difference"),
        Fact("plain", "The merged network has no numbers more than its base.", extra == 0, count,
             "numbers in both"),
    ]  # fmt: skip


LAB = Lab(
    slug="lora",
    part="lowrank",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("digits", "sst2", "minilm", "tinyshakespeare", "cranfield"),
)
