"""What is measured about long tails: two imbalances, and an average of models against one of them.

Two worlds in which the pre-training data are known. *Digit pairs*: two noisy digits side by side,
the class is the pair; foundation models are residual networks. *MNIST*: digits turned by 90
degrees, seen through the frozen features of the bed's vision transformer; a foundation model is a
residual network on these features. Every foundation model is pre-trained on a long tail with a
class order of its own, and fine-tuned (AdaptFormers and head) on another long tail with an order
that has nothing to do with it. All draws are new for every seed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core import data
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.lanes.lane import Lane
from toolkit.core.lanes.nets import States
from toolkit.core.nets.residual import residual_mlp
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.diagnose.longtail_bias.accuracy import class_accuracy
from toolkit.diagnose.longtail_bias.adaptformer import bottleneck_for
from toolkit.diagnose.longtail_bias.checks import prior_from_counts
from toolkit.diagnose.longtail_bias.ensemble import backdoor_adjust, gla
from toolkit.diagnose.longtail_bias.losses import LogitAdjustedLoss
from toolkit.diagnose.longtail_bias.prior import estimate_prior
from toolkit.diagnose.longtail_bias.tails import groups_by_rank, longtail_counts, longtail_sample
from toolkit.labs.beds import arms, images
from toolkit.labs.diagnose.experiment.menu import loss_of
from toolkit.labs.diagnose.world import Design, DigitPairs, Set
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

PAIRS, MNIST = "digit pairs", "MNIST"
WIDTH, DEPTH, SCALE = 64, 2, 16.0
ONES = {
    PAIRS: ("CE", "CE, adjusted after", "LA", "GLA-Train", "GLA", "balanced"),
    MNIST: ("CE", "CE, adjusted after", "LA", "GLA-Train", "GLA", "balanced", "focal", "LDAM",
            "GRW", "LADE", "head", "full"),
}  # fmt: skip
"""Arms of one model. Adapters and head train, but for ``head`` and ``full``, which train with LA;
``balanced`` is CE on a downstream set of the same size without a tail: the positive control."""
MANY = ("M priors", "one prior", "one model", "M priors, adjusted after")
"""Arms of M students: M models with orders of their own; M models of one order; one model tuned M
times; the first again, with CE and one adjustment after averaging."""
MEASURES = ("all", "D-Few", "P-Few", "mean P-Few", "tail-tail", "D gap", "P gap")


@dataclass(frozen=True)
class Size:
    """Numbers of one world at one scale: ``digits`` or classes, models, examples, training."""

    digits: int
    models: int
    ratios: tuple[int, ...]
    pre_largest: int
    ratio: int
    largest: int
    valid: int
    test: int
    pretrain: Lane
    tune: Lane
    epochs: tuple[int, int]
    pool: int = 0

    @property
    def classes(self) -> int:
        """K."""
        return self.digits if self.pool else self.digits**2


def _lane(rate: float, batch: int) -> Lane:
    return Lane(lr=rate, batch=batch, schedule="cosine", weight_decay=5e-4)


SIZES = {
    (PAIRS, "cpu"): Size(8, 4, (1, 20, 200), 400, 30, 60, 20, 30, _lane(0.1, 128),
                         _lane(0.01, 128), (8, 12)),
    (PAIRS, "ci"): Size(4, 2, (1, 50), 100, 10, 20, 5, 10, _lane(0.1, 64), _lane(0.01, 64), (2, 2)),
    (MNIST, "cpu"): Size(10, 4, (1, 200), 600, 30, 60, 100, 0, _lane(0.1, 32), _lane(0.01, 32),
                         (8, 12), 7_500),
    (MNIST, "ci"): Size(10, 2, (1, 20), 20, 5, 10, 5, 0, _lane(0.1, 16), _lane(0.01, 16), (2, 2),
                        600),
}  # fmt: skip


def size(world: str, scale: str) -> Size:
    """The numbers of a world; ``gpu`` takes those of ``cpu``."""
    return SIZES[world, arms.sizes_of(scale)]


class Head(Design):
    """Only the head of the foundation model trains."""

    def student(self, draw: torch.Generator) -> nn.Module:
        """The foundation model, frozen below its head."""
        network = self.foundation(draw).requires_grad_(False)
        network.head.requires_grad_(True)
        return network


class Full(Design):
    """All of the foundation model trains."""

    def student(self, draw: torch.Generator) -> nn.Module:
        """The foundation model."""
        return self.foundation(draw)


KINDS: dict[str, type[Design]] = {"head": Head, "full": Full}


def design(world: str, scale: str, kind: type[Design] = Design) -> Design:
    """Networks and training of a world."""
    this = size(world, scale)
    inputs = features(scale)[0][0].shape[1] if this.pool else 128

    def body(draw: torch.Generator) -> nn.Module:
        return residual_mlp(inputs, WIDTH, DEPTH, this.classes, generator=draw)

    return kind(
        body, this.classes, WIDTH, bottleneck_for(this.classes, DEPTH), SCALE, this.pretrain,
        this.tune, *this.epochs, options=(("workers", 1), ("memory_gib", 2.0)),
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def features(scale: str) -> tuple[Set, Set, Set]:
    """Features (n, width) that the bed's transformer has of turned digits, with their labels.

    Three sets: the first images of the bed's pool, its validation and its test images. Each
    feature is shifted and scaled to mean 0 and spread 1 over the first set.
    """
    network, parts = images.network("vit", scale), images.load(scale)
    network.head = nn.Identity()
    most = size(MNIST, scale).pool
    made = [
        (arms.scores(network, images.shifted(x[:count], "rotated")), y[:count])
        for (x, y), count in zip(parts, (most, most, None), strict=True)
    ]
    middle, spread = made[0][0].mean(0), made[0][0].std(0) + 1e-6
    pool, valid, test = (((x - middle) / spread, y) for x, y in made)
    return pool, valid, test


class Pictures:
    """MNIST's features with counts of our choice; the test set is always whole."""

    def __init__(self, scale: str) -> None:
        self.classes = 10
        self.parts = dict(zip(("train", "valid", "test"), features(scale), strict=True))

    def pairs(self, counts: Tensor, pool: str, draw: torch.Generator) -> Set:
        """Features (n, width) and labels (n,) of one part."""
        x, y = self.parts[pool]
        rows = torch.arange(len(y))
        if pool != "test":
            rows = longtail_sample(y, counts.expand(self.classes), draw)
        return x[rows], y[rows]


def world_of(world: str, seed: int, scale: str) -> DigitPairs | Pictures:
    """Where the examples of one seed come from."""
    if world == MNIST:
        return Pictures(scale)
    glyphs = data.digits()
    x = torch.cat([torch.as_tensor(glyphs.x_train), torch.as_tensor(glyphs.x_test)])
    y = torch.cat([torch.as_tensor(glyphs.y_train), torch.as_tensor(glyphs.y_test)]).long()
    kept = y < size(world, scale).digits
    draw = generator(seed, "world")
    return DigitPairs(x[kept], y[kept], draw, size(world, scale).digits, noise=0.35)


def order_of(classes: int, seed: int, *stream: int | str) -> Tensor:
    """Classes from most to least frequent, in a random order."""
    return torch.randperm(classes, generator=generator(seed, "order", *stream))


def place_of(order: Tensor) -> Tensor:
    """Minus the place of each class in an order: cut into thirds it gives Many, Medium and Few."""
    return -order.argsort().double()


def largest_for(this: Size, ratio: int) -> int:
    """The largest class with which a tail of this ratio is as long as that of the last ratio."""
    wanted = int(longtail_counts(this.classes, this.pre_largest, this.ratios[-1]).sum())

    def missing(largest: int) -> int:
        return abs(int(longtail_counts(this.classes, largest, ratio).sum()) - wanted)

    return min(range(ratio, this.pre_largest + 1), key=missing)


@functools.lru_cache(maxsize=64)
def foundations(
    world: str, seed: int, scale: str, ratio: int, orders: tuple[int, ...]
) -> tuple[States, list[Tensor]]:
    """Foundation models, one for each entry of ``orders``, and their class orders.

    Models whose entries are equal share the order of the classes, and nothing else.
    """
    this, place = size(world, scale), world_of(world, seed, scale)
    kinds = [order_of(this.classes, seed, number) for number in orders]
    largest, sets = largest_for(this, ratio), []
    for m, order in enumerate(kinds):
        counts = longtail_counts(this.classes, largest, ratio, order=order)
        sets.append(place.pairs(counts, "train", generator(seed, "pre", orders[m], m)))
    least = min(len(y) for _, y in sets)  # all of one size already; lanes want to be sure
    sets = [(x[:least], y[:least]) for x, y in sets]
    seeds = [1000 * seed + 100 * (orders[m] != m) + m for m in range(len(orders))]
    return design(world, scale).pretrained(sets, seeds), kinds


@dataclass(frozen=True)
class Task:
    """One seed's downstream task: counts, training set, balanced validation and test sets."""

    counts: Tensor
    order: Tensor
    train: Set
    flat: Set
    valid: Set
    test: Set

    @property
    def prior(self) -> Tensor:
        """Shares of the classes (K,)."""
        return prior_from_counts(self.counts)


@functools.lru_cache(maxsize=64)
def task_of(world: str, seed: int, scale: str) -> Task:
    """The downstream task of a seed; ``flat`` is as large as ``train``, without a tail."""
    this, place = size(world, scale), world_of(world, seed, scale)
    order = order_of(this.classes, seed, "down")
    counts = longtail_counts(this.classes, this.largest, this.ratio, order=order)
    total = int(counts.sum())
    even = torch.full_like(counts, total // this.classes)
    even[order[: total - int(even.sum())]] += 1
    return Task(
        counts, order,
        place.pairs(counts, "train", generator(seed, "downstream")),
        place.pairs(even, "train", generator(seed, "flat")),
        place.pairs(torch.tensor(this.valid), "valid", generator(seed, "valid")),
        place.pairs(torch.tensor(this.test), "test", generator(seed, "test")),
    )  # fmt: skip


def told(z: Tensor, task: Task, kinds: list[Tensor], part: str = "test") -> dict[str, float]:
    """Accuracies in percent, means over the classes of a group, and both gaps, Many minus Few.

    P groups are cut by the order of the first model's pre-training data, which is known here, and
    for ``mean P-Few`` by the mean place in the orders of all models.
    """
    each = 100 * class_accuracy(z.argmax(1), getattr(task, part)[1], z.shape[1])
    d = groups_by_rank(place_of(task.order))
    p = groups_by_rank(place_of(kinds[0]))
    mean = groups_by_rank(torch.stack([place_of(order) for order in kinds]).mean(0))

    def over(chosen: Tensor) -> float:
        return float(each[chosen].mean())

    found = {
        "all": float(each.mean()),
        "D-Few": over(d == 2),
        "P-Few": over(p == 2),
        "mean P-Few": over(mean == 2),
        "D gap": over(d == 0) - over(d == 2),
        "P gap": over(p == 0) - over(p == 2),
    }
    return found | ({"tail-tail": over((d == 2) & (p == 2))} if ((d == 2) & (p == 2)).any() else {})


def nothing(arm: str, seed: int, world: str, scale: str, ratio: int) -> dict[str, Any]:
    """The first foundation model as it is, and without its estimated prior."""
    states, kinds = foundations(world, seed, scale, ratio, (0,))
    task, made = task_of(world, seed, scale), design(world, scale)
    estimate = estimate_prior(made.logits(states, task.valid[0])[0], task.valid[1])
    z = made.logits(states, task.test[0])[0]
    if arm == "prior removed":
        z = z - estimate.log_prior
    this = size(world, scale)
    counts = longtail_counts(this.classes, largest_for(this, ratio), ratio, order=kinds[0])
    true, guess = prior_from_counts(counts).double().log(), estimate.log_prior.double()
    both = torch.stack([true - true.mean(), guess - guess.mean()])
    return told(z, task, kinds) | {
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "slope": float((both[0] * both[1]).sum() / both[0].square().sum()),
        "true": [round(v, 3) for v in true.tolist()],
        "estimated": [round(v, 3) for v in guess.tolist()],
    }


LOSS = {"CE, adjusted after": "CE", "balanced": "CE", "GLA": "LA", "head": "LA", "full": "LA",
        "GLA-Train, rate of LA": "GLA-Train"}  # fmt: skip


def students(
    names: list[str], rates: list[float], seed: int, world: str, scale: str, ratio: int, part: str
) -> dict[str, dict[str, float]]:
    """Arms of ``ONES``, tuned side by side from the first foundation model, and judged."""
    states, kinds = foundations(world, seed, scale, ratio, (0,))
    task, made = task_of(world, seed, scale), design(world, scale)
    seen, x = task.valid, getattr(task, part)[0]
    estimate = estimate_prior(made.logits(states, seen[0])[0], seen[1])
    found = {}
    for kind in (Design, Head, Full):
        mine = [i for i, arm in enumerate(names) if KINDS.get(arm, Design) is kind]
        if not mine:
            continue
        tuned = design(world, scale, kind)
        network = tuned.student(generator(0, "count"))
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        done = tuned.tuned(
            states, [0] * len(mine),
            [task.flat if names[i] == "balanced" else task.train for i in mine],
            [loss_of(LOSS.get(names[i], names[i]), task.counts, estimate.prior, SCALE)
             for i in mine],
            [seed] * len(mine), [rates[i] for i in mine],
        )  # fmt: skip
        for i, z in zip(mine, tuned.logits(done, x), strict=True):
            if names[i] == "CE, adjusted after":
                z = z - task.prior.log()
            if names[i] == "GLA":
                z = gla(z, made.logits(states, x)[0], estimate.prior)
            found[names[i]] = told(z, task, kinds, part) | {"trained": trained}
    return found


def one(arm: str, rate: float, seed: int, world: str, scale: str, ratio: int) -> dict[str, Any]:
    """One arm of ``ONES`` on validation data, for the search of its rate."""
    return students([arm], [rate], seed, world, scale, ratio, "valid")[arm]


def ones(
    names: list[str], rates: list[float], seed: int, world: str, scale: str, ratio: int
) -> dict[str, Any]:
    """All arms of ``ONES`` at their rates on test data, each measure under "<arm>: <measure>"."""
    found = students(names, rates, seed, world, scale, ratio, "test")
    return {f"{arm}: {name}": v for arm, row in found.items() for name, v in row.items()}


def many(
    seed: int, world: str, scale: str, ratio: int, rate: float, after: float, kinds: list[str]
) -> dict[str, Any]:
    """Averages of 1 to M students, for some arms of ``MANY``.

    Args:
        seed: of all draws.
        world, scale: where.
        ratio: of the pre-training sets.
        rate: learning rate with LA; ``after`` that of CE, for the arm that is adjusted after.
        kinds: which arms.

    Returns:
        For each arm and measure the values at 1 to M models, under "<arm>: <measure>"; and
        "<arm>, probabilities" at M.
    """
    count, task = size(world, scale).models, task_of(world, seed, scale)
    made, mine = design(world, scale), tuple(range(count))
    own, orders = foundations(world, seed, scale, ratio, mine)
    found: dict[str, Any] = {}
    for arm in kinds:
        states, picks, seeds = own, list(mine), [seed] * count
        if arm == "one prior":
            shared, _ = foundations(world, seed, scale, ratio, (0,) * count)
            # the first model of both arms is one and the same
            states = {k: torch.cat([own[k][:1], v[1:]]) for k, v in shared.items()}
        if arm == "one model":
            picks, seeds = [0] * count, [seed] + [1000 * seed + m for m in range(1, count)]
        plain = arm == "M priors, adjusted after"
        loss = LogitAdjustedLoss(task.prior, tau=0.0 if plain else 1.0)
        rates = [after if plain else rate] * count
        tuned = made.tuned(states, picks, [task.train] * count, [loss] * count, seeds, rates)
        z = made.logits(tuned, task.test[0])
        z = z - task.prior.log() if plain else z
        rows = [told(backdoor_adjust(z[: m + 1]), task, orders) for m in range(count)]
        for measure in rows[0]:
            found[f"{arm}: {measure}"] = [row[measure] for row in rows]
        found[f"{arm}, probabilities"] = told(backdoor_adjust(z, "prob"), task, orders)["all"]
    return found


def measure(runs: Runs, scale: Scale) -> None:
    """Ask for every experiment."""
    search = search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3))
    blocks, few = (two_blocks(scale.pick(ci=4, cpu=n, gpu=20)) for n in (20, 8))
    seeds = [seed for block in blocks for seed in block]
    for world in (PAIRS, MNIST):
        this = size(world, scale.name)
        where = {"world": world, "scale": scale.name, "ratio": this.ratios[-1]}
        starts = {arm: STARTS.get(arm, 4e-2) for arm in ONES[world]}
        found = runs.tune(
            world, one, {arm: dict(where) for arm in starts}, starts,
            seeds=search, reported=seeds, judged="all", better="max", factor=2.0,
            width=scale.pick(ci=1, cpu=3, gpu=3), extensions=6,
        )  # fmt: skip
        runs.blocks(world, blocks)
        rates = {arm: tuned.rate for arm, tuned in found.items()}
        rates[AT_LA] = rates["LA"]
        runs.table(world, ones, [
            {"names": list(rates), "rates": list(rates.values()), "seed": seed, **where}
            for seed in seeds
        ])  # fmt: skip
        runs.table(f"{world}, as they are", nothing, grid(
            arm=["nothing", "prior removed"], seed=seeds, **where
        ))  # fmt: skip
        where |= {"rate": rates["LA"], "after": rates["CE, adjusted after"]}
        last = this.ratios[-1]
        runs.blocks(f"{world}, averages", blocks)
        runs.blocks(f"{world}, fewer seeds", few)
        runs.table(f"{world}, averages", many, [
            {"seed": seed, **where, "ratio": ratio,
             "kinds": list(MANY if ratio == last else MANY[:2])}
            for ratio in this.ratios
            for block in (blocks if ratio == last else few) for seed in block
        ])  # fmt: skip


AT_LA = "GLA-Train, rate of LA"
STARTS = {"CE": 2e-2, "focal": 1e-2, "LDAM": 5e-3, "GLA-Train": 5e-3}
"""Middle of the first rates, where it is not 0.04; found on seed 900."""


def arms_of(found: Found, world: str) -> Any:
    """Arms of one model, one row for each arm and seed."""
    import pandas as pd

    table = found[world]
    names = table.names.iloc[0]
    rows = [
        {"arm": arm, "seed": run["seed"], **{m: run.get(f"{arm}: {m}") for m in MEASURES},
         "trained": run[f"{arm}: trained"]}
        for _, run in table.iterrows() for arm in names
    ]  # fmt: skip
    asis = found[f"{world}, as they are"].assign(trained=0)
    columns = ["arm", "seed", *(m for m in MEASURES if m in asis), "trained"]
    return pd.concat([asis[columns], pd.DataFrame(rows)], ignore_index=True)


def averages_of(found: Found, world: str) -> Any:
    """Averages of 1 to M models, one row for each ratio, arm, number of models and seed."""
    import pandas as pd

    rows = []
    for _, run in found[f"{world}, averages"].iterrows():
        for arm in run["kinds"]:
            values = {m: run.get(f"{arm}: {m}") for m in MEASURES}
            values = {m: v for m, v in values.items() if isinstance(v, list)}
            rows += [
                {"ratio": run["ratio"], "arm": arm, "seed": run["seed"], "M": m + 1,
                 **{name: v[m] for name, v in values.items()}}
                for m in range(len(values["all"]))
            ]  # fmt: skip
    return pd.DataFrame(rows)


def _support(low: float, high: float) -> dict[str, Any]:
    return {"support": (low, high)}


CLAIMS = (
    Claim(
        "data-gap",
        "Logit adjustment in training removes most of the data gap.",
        whose="paper", unit="points", margin=10.0,
        quantity="gap by downstream count, Many minus Few: cross-entropy's less that of LA",
        reason="ten points of a gap are what a reader of such tables would act on",
        conditions=(
            Condition(PAIRS, n=20, spread=8.0, decides=True, **_support(-200.0, 200.0)),
            Condition(MNIST, n=20, spread=15.0, **_support(-200.0, 200.0)),
        ),
    ),
    Claim(
        "parameter-gap",
        "Under logit adjustment the parameter gap stays.",
        whose="paper", unit="points", margin=5.0,
        quantity="gap by pre-training count, Many minus Few, of one model with LA",
        reason="five points are what chance alone gives a third of the classes",
        conditions=(
            Condition(PAIRS, n=20, spread=6.0, decides=True, **_support(-100.0, 100.0)),
            Condition(MNIST, n=20, spread=10.0, **_support(-100.0, 100.0)),
        ),
    ),
    Claim(
        "gla-train",
        "Putting the model's own prior into the training loss as well does not help.",
        whose="paper", unit="points", margin=1.0, than=-2.0,
        quantity="test accuracy, LA minus GLA-Train, from 2 points below",
        reason="a gain of more than a point would be help",
        conditions=(
            Condition(PAIRS, n=20, spread=2.0, decides=True, **_support(-98.0, 102.0)),
            Condition(f"{PAIRS}, both at the rate of LA", n=20, spread=2.0,
                      **_support(-98.0, 102.0)),
            Condition(MNIST, n=20, spread=2.1, **_support(-98.0, 102.0)),
        ),
    ),
    Claim(
        "models",
        "Averaging four models, each with a prior of its own, beats one model.",
        whose="paper", unit="points", margin=1.0,
        quantity="test accuracy with LA, four models minus one",
        reason="four times the work at inference should buy a point",
        conditions=(
            Condition(PAIRS, n=20, spread=1.5, decides=True, **_support(-100.0, 100.0)),
            Condition(f"{PAIRS}, models without a bias", n=8, spread=1.1,
                      **_support(-100.0, 100.0)),
            Condition(MNIST, n=20, spread=2.1, **_support(-100.0, 100.0)),
        ),
    ),
    Claim(
        "priors",
        "The gain comes from different priors, not from more models.",
        whose="paper", unit="points", margin=1.0,
        quantity="test accuracy, four models of own priors minus four of one prior, less half of "
        "their gain over one model",
        reason="a cause should bring at least half of a gain; a point is what we tell apart",
        conditions=(
            Condition(PAIRS, n=20, spread=1.0, decides=True, **_support(-150.0, 150.0)),
            Condition(MNIST, n=20, spread=2.1, **_support(-150.0, 150.0)),
        ),
    ),
    Claim(
        "tail",
        "Different priors help the classes that were rare for the first model.",
        whose="ours", unit="points", margin=2.0,
        quantity="test accuracy on P-Few, four models of own priors minus four of one prior",
        reason="a fourth of the gap of ten points or so that is left",
        conditions=(
            Condition(PAIRS, n=20, spread=4.0, decides=True, **_support(-100.0, 100.0)),
            Condition(f"{PAIRS}, rare on average over the four", n=20, spread=3.0,
                      **_support(-100.0, 100.0)),
            Condition(MNIST, n=20, spread=4.2, **_support(-100.0, 100.0)),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    search = search_seeds()
    tables = {world: arms_of(found, world) for world in (PAIRS, MNIST)}
    averages = {world: averages_of(found, world) for world in (PAIRS, MNIST)}

    def single(world: str, arm: str, column: str = "all") -> dict[int, float]:
        table = tables[world]
        return table[table.arm == arm].set_index("seed")[column].astype(float).to_dict()

    def mean(world: str, arm: str, count: int | None = None, column: str = "all",
             ratio: int = -1) -> dict[int, float]:  # fmt: skip
        table, this = averages[world], size(world, found.scale)
        mine = (table.arm == arm) & (table.ratio == this.ratios[ratio])
        mine &= (count or this.models) == table.M
        return table[mine].set_index("seed")[column].astype(float).to_dict()

    def measured(world: str, ours: Any, theirs: Any, **more: Any) -> Measured:
        proof = {"control": single(world, "balanced"), "nothing": single(world, "nothing")}
        more = {**proof, "blocks": found.blocks(world), "tuning_seeds": search} | more
        return Measured(ours, theirs, **more)

    def data_gap(world: str) -> Measured:
        gap = {arm: single(world, arm, "D gap") for arm in ("CE", "LA", "balanced")}
        proof = {"control": gap["CE"], "nothing": gap["balanced"]}
        return measured(world, gap["CE"], gap["LA"], **proof)

    def parameter_gap(world: str) -> Measured:
        ours, theirs = single(world, "LA", "P gap"), mean(world, "M priors", 1, "P gap", ratio=0)
        asis = {seed: single(world, "nothing", "P gap")[seed] for seed in theirs}
        return measured(world, ours, None, control=asis, nothing=theirs)

    def priors(world: str) -> Measured:
        own, shared, lone = (mean(world, *arm) for arm in
                             (("M priors",), ("one prior",), ("M priors", 1)))  # fmt: skip
        half = {seed: (own[seed] - lone[seed]) / 2 for seed in own}
        return measured(world, {seed: own[seed] - shared[seed] for seed in own}, half)

    def models(world: str, ratio: int = -1) -> Measured:
        ours = mean(world, "M priors", ratio=ratio)
        more = {} if ratio else {"blocks": found.blocks(f"{world}, fewer seeds")}
        return measured(world, ours, mean(world, "M priors", 1, ratio=ratio), **more)

    def tail(world: str, column: str = "P-Few") -> Measured:
        own, shared = (mean(world, arm, column=column) for arm in ("M priors", "one prior"))
        proof = {name: single(world, name, column) for name in ("balanced", "nothing")}
        return measured(world, own, shared, control=proof["balanced"], nothing=proof["nothing"])

    here = single(PAIRS, "LA"), single(PAIRS, "GLA-Train"), single(PAIRS, AT_LA)
    return {
        "data-gap": {world: data_gap(world) for world in (PAIRS, MNIST)},
        "parameter-gap": {world: parameter_gap(world) for world in (PAIRS, MNIST)},
        "gla-train": {
            PAIRS: measured(PAIRS, here[0], here[1]),
            f"{PAIRS}, both at the rate of LA": measured(PAIRS, here[0], here[2]),
            MNIST: measured(MNIST, single(MNIST, "LA"), single(MNIST, "GLA-Train")),
        },
        "models": {
            PAIRS: models(PAIRS),
            f"{PAIRS}, models without a bias": models(PAIRS, 0),
            MNIST: models(MNIST),
        },
        "priors": {world: priors(world) for world in (PAIRS, MNIST)},
        "tail": {
            PAIRS: tail(PAIRS),
            f"{PAIRS}, rare on average over the four": tail(PAIRS, "mean P-Few"),
            MNIST: tail(MNIST),
        },
    }


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    draw = generator(0, "facts")
    z = torch.randn(50, 10, generator=draw, dtype=torch.float64)
    y = torch.randint(10, (50,), generator=draw)
    even = torch.full((10,), 0.1, dtype=torch.float64)
    gap = (LogitAdjustedLoss(even)(z, y) - nn.functional.cross_entropy(z, y)).abs().item()
    same = (backdoor_adjust(torch.stack([z] * 4)) - z).abs().max().item()
    made = design(PAIRS, found.scale)
    network = made.student(draw)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    r = made.bottleneck
    formula = DEPTH * (2 * WIDTH * r + 3 * WIDTH + r + 1) + made.classes * WIDTH
    return [
        Fact("even", "With an even prior LA is cross-entropy, to 1e-12.", gap < 1e-12, gap,
             "difference"),
        Fact("copies", "The average of four copies is the model itself, to 1e-12.", same < 1e-12,
             same, "largest difference"),
        Fact("count", "A student trains 2dr + 3d + r + 1 numbers a block, and its head.",
             trained == formula, trained, "numbers"),
    ]  # fmt: skip


LAB = Lab(
    slug="longtail_bias",
    part="diagnose",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("digits", "mnist"),
)
