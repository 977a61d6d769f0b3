"""What is measured about DAREx: networks that read upright digits and learn transposed ones.

Two beds. Digits: scikit-learn's 8 x 8 pixels, one hidden layer, base and fine-tuning drawn anew for
every seed. MNIST: one base that read 55,000 upright images; every seed draws other transposed ones
to learn from, and all 10,000 test images judge. Each bed is fine-tuned at a small and at a large
rate, so that the differences are small or large. Every matrix is pruned, every bias kept.

A pruned model is judged by its mean accuracy over masks that no search has seen.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core import data, nets
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.core.states.rules import Rule
from toolkit.core.train.fit import fit, set_rate
from toolkit.core.train.rates import cosine
from toolkit.labs.beds import arms as bed_arms
from toolkit.labs.beds import images
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.merge.darex import DAREx, prune
from toolkit.merge.darex.activations import differences, inputs, signals
from toolkit.merge.darex.adamr import AdamR
from toolkit.merge.darex.analytic import layer_q, least_q
from toolkit.merge.darex.importance import Wanda
from toolkit.merge.darex.search import coarse_to_fine, output_change, over_masks
from toolkit.merge.darex.stored import Pruned
from toolkit.merge.darex.theory import moments

BEDS = ("digits", "mnist")
TITLES = {"digits": "digits", "mnist": "MNIST"}
RATES = {"small": 1e-3, "large": 1e-2}
"""Learning rates of the fine-tuning: small and large differences."""
ARMS = ("dare", "labels", "outputs", "analytic", "star", "magnitude", "wanda")
WAYS = {"ci": 5, "cpu": 9}
"""Values of q in a curve, from 1 - p to 1 in equal ratios."""
SEARCHED = {"ci": (0, 1), "cpu": (0, 1, 2, 3)}
"""Masks that every search uses."""
STEPS = {"ci": ((0.3, 0.5), (2.0, 0.5)), "cpu": ((0.05, 0.1), (0.5, 0.4))}
"""Coarse step and decay of the searches for q, and for the power of ten that is eta."""
PULLED_AT = {"ci": 0.9, "cpu": 0.95}
PULLS = {"ci": (0.3,), "cpu": (0.02, 0.1, 0.3, 1.0)}


class Size(NamedTuple):
    """Numbers of one bed at one scale: hidden width, steps of base and fine-tuning, examples of a
    fine-tuning, held-out images, images of the unlabelled batch, masks, dropping rates."""

    width: int
    pretraining: int
    steps: int
    examples: int
    held: int
    few: int
    masks: int
    drops: tuple[float, ...]


SIZES = {
    "ci": {
        "digits": Size(32, 60, 40, 1077, 120, 60, 2, (0.5, 0.9)),
        "mnist": Size(32, 60, 40, 1000, 100, 60, 2, (0.9, 0.99)),
    },
    "cpu": {
        "digits": Size(1024, 400, 400, 1077, 360, 120, 6, (0.5, 0.9, 0.95, 0.99)),
        "mnist": Size(512, 800, 400, 10_000, 500, 120, 3, (0.9, 0.95, 0.99)),
    },
}


def size(bed: str, scale: str) -> Size:
    """The sizes of a bed; ``gpu`` takes those of ``cpu``."""
    return SIZES[bed_arms.sizes_of(scale)][bed]


class Task(NamedTuple):
    """Base and fine-tuned network, and pairs of transposed images and labels."""

    base: nn.Sequential
    tuned: nn.Sequential
    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def batches(
    part: tuple[Tensor, Tensor], steps: int, batch: int, draws: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images and their labels, step by step."""
    x, y = part
    for _ in range(steps):
        rows = torch.randint(len(y), (batch,), generator=draws)
        yield x[rows], y[rows]


def flat(x: Tensor, turned: bool = True) -> Tensor:
    """Images (n, side, side) as (n, side^2), transposed or not."""
    return (x.transpose(1, 2) if turned else x).flatten(1)


def pretrained(part: tuple[Tensor, Tensor], this: Size, draws: torch.Generator) -> Any:
    """A network with one hidden layer that reads upright images."""
    x, y = part
    model = nets.mlp((x[0].numel(), this.width, 10), generator=draws)
    stream = batches((flat(x, False), y), this.pretraining, 64, draws)
    fit(model, None, 1e-3, 0, stream, F.cross_entropy, steps=this.pretraining, decay=cosine)
    return model


@functools.lru_cache(maxsize=1)
def _mnist_base(scale: str) -> nn.Sequential:
    return pretrained(images.load(scale).pool, size("mnist", scale), generator(0, "base"))


@functools.lru_cache(maxsize=32)
def _digits_base(seed: int, scale: str) -> nn.Sequential:
    pool = parts("digits", seed, scale)["pool"]
    return pretrained(pool, size("digits", scale), generator(seed, "base"))


def parts(bed: str, seed: int, scale: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Upright images ``pool``, ``held`` and ``test`` with labels."""
    this = size(bed, scale)
    if bed == "mnist":
        found = images.load(scale)
        rows = torch.randperm(len(found.validation[1]), generator=generator(seed, "held"))
        rows = rows[: this.held]
        held = found.validation[0][rows], found.validation[1][rows]
        return {"pool": found.pool, "held": held, "test": found.test}
    drawn = data.digits(seed=seed)
    x, y = torch.from_numpy(drawn.x_train), torch.from_numpy(drawn.y_train)
    cut = this.examples
    return {
        "pool": (x[:cut], y[:cut]), "held": (x[cut : cut + this.held], y[cut : cut + this.held]),
        "test": (torch.from_numpy(drawn.x_test), torch.from_numpy(drawn.y_test)),
    }  # fmt: skip


def start(bed: str, seed: int, scale: str) -> Task:
    """A base twice, and the transposed images it will be tuned on."""
    this, found = size(bed, scale), parts(bed, seed, scale)
    base = _mnist_base(scale) if bed == "mnist" else _digits_base(seed, scale)
    x, y = found["pool"]
    rows = torch.randperm(len(y), generator=generator(seed, "examples"))[: this.examples]
    turned = {name: (flat(x), y) for name, (x, y) in found.items() if name != "pool"}
    train = flat(x[rows]), y[rows]
    return Task(bed_arms.fresh(base), bed_arms.fresh(base), train, turned["held"], turned["test"])


@torch.no_grad()
def accuracy(model: nn.Module, state: Mapping[str, Tensor], part: tuple[Tensor, Tensor]) -> float:
    """Right answers in per cent of a network with these tensors."""
    outputs = functional_call(model, dict(state), (part[0],))
    return 100 * (outputs.argmax(1) == part[1]).double().mean().item()


class Judged(NamedTuple):
    """What is needed to prune a fine-tuned network and to judge the result."""

    task: Task
    base: dict[str, Tensor]
    tuned: dict[str, Tensor]
    few: Tensor
    scale: str

    @classmethod
    def of(cls, task: Task, few: int, scale: str) -> Judged:
        """Freeze both networks; the unlabelled batch comes from the held-out images."""
        base, tuned = (
            {name: value.detach().clone() for name, value in one.state_dict().items()}
            for one in (task.base, task.tuned)
        )
        return cls(task, base, tuned, task.held[0][:few], bed_arms.sizes_of(scale))

    def mean(self, rule: Rule, masks: int) -> float:
        """Test accuracy, the mean over masks that no search used."""
        return statistics.fmean(self.each(rule, masks))

    def each(self, rule: Rule, masks: int) -> list[float]:
        """Test accuracy by mask."""
        return [
            accuracy(self.task.tuned, prune(self.base, self.tuned, rule, seed=100 + m),
                     self.task.test)
            for m in range(masks)
        ]  # fmt: skip

    def labels(self, state: Mapping[str, Tensor]) -> float:
        """Accuracy on held-out images."""
        return accuracy(self.task.tuned, state, self.task.held)

    @torch.no_grad()
    def outputs(self, state: Mapping[str, Tensor]) -> float:
        """Minus the mean absolute change of the outputs on the unlabelled batch."""
        model = self.task.tuned
        return -float(output_change(model(self.few), functional_call(model, state, (self.few,))))

    def search(self, rule: Callable[[float], DAREx], judge: Any, low: float, high: float,
               step: float, decay: float) -> float:  # fmt: skip
        """Coarse to fine over the masks of searches."""
        seeds, trim = SEARCHED[self.scale], judge == self.outputs
        score = over_masks(self.base, self.tuned, rule, judge, seeds=seeds, trim=trim)
        return coarse_to_fine(score, low, high, step=step, decay=decay, like="paper").best


def drop_run(bed: str, change: str, seed: int, scale: str) -> dict[str, Any]:
    """One fine-tuned network, pruned by every arm at every rate.

    ``<arm> <p>``: test accuracy in per cent; ``q <arm> <p>``: the divisor chosen; ``curve <p>`` and
    ``moved <p>``: accuracy and output change along q, see :func:`along`; ``spread <p>``: standard
    deviation of DARE over masks; ``dense`` and ``nothing``: without pruning, and the base.
    """
    torch.set_num_threads(1)
    this, task = size(bed, scale), start(bed, seed, scale)
    stream = batches(task.train, this.steps, 64, generator(seed, "order"))
    fit(task.tuned, None, RATES[change], seed, stream, F.cross_entropy, steps=this.steps,
        decay=cosine)  # fmt: skip
    work = Judged.of(task, this.few, scale)
    deltas = differences(work.base, work.tuned)
    seen = inputs(task.tuned, [work.few])
    pairs = signals(task.tuned, deltas, [work.few])
    matrices = [d for d in deltas.values() if d.dim() > 1]
    found: dict[str, Any] = {
        "dense": accuracy(task.tuned, work.tuned, task.test),
        "nothing": accuracy(task.tuned, work.base, task.test),
        "delta": float(torch.cat([d.flatten() for d in matrices]).abs().mean()),
    }
    for p in this.drops:
        rules, chosen = rules_at(p, work, deltas, seen, pairs)
        for arm, rule in rules.items():
            fixed = isinstance(rule, Wanda)
            each = work.each(rule, 1 if fixed else this.masks)
            found[f"{arm} {p:g}"] = statistics.fmean(each)
            if arm == "dare":
                found[f"spread {p:g}"] = statistics.stdev(each)
        found |= {f"q {arm} {p:g}": q for arm, q in chosen.items()}
        if change == "large":
            tried = [DAREx(drop=p, q=q) for q in along(p, scale)]
            half = max(2, this.masks // 2)
            found[f"curve {p:g}"] = [work.mean(one, half) for one in tried]
            found[f"moved {p:g}"] = [
                -statistics.fmean(
                    work.outputs(prune(work.base, work.tuned, one, seed=m)) for m in range(half)
                )
                for one in tried
            ]
    return found


def along(p: float, scale: str) -> list[float]:
    """Values of q from 1 - p to 1 in equal ratios."""
    count = WAYS[bed_arms.sizes_of(scale)]
    return [(1 - p) ** (1 - i / (count - 1)) for i in range(count)]


def rules_at(
    p: float, work: Judged, deltas: Mapping[str, Tensor], seen: Any, pairs: Any
) -> tuple[dict[str, Rule], dict[str, float]]:
    """The rule of every arm at one rate, and the divisors that were chosen."""
    plain = DAREx(drop=p)
    means = {name: stats.mean for name, stats in seen.items()}
    fine, powers = STEPS[work.scale]
    q = {
        name: work.search(plain.with_q, judge, 1 - p, 1.0, *fine)
        for name, judge in (("labels", work.labels), ("outputs", work.outputs))
    }

    # on a logarithmic scale: sizes of activations are not those of BERT
    def layered(power: float) -> DAREx:
        return plain.with_layers(layer_q(deltas, means, p, 10**power))

    power = work.search(layered, work.labels, -1.0, 3.0, *powers)
    rules: dict[str, Rule] = {
        "dare": plain, "labels": plain.with_q(q["labels"]), "outputs": plain.with_q(q["outputs"]),
        "analytic": layered(power), "star": plain.with_layers(least_q(pairs, p)),
        "magnitude": Wanda(drop=p, over="tensor"),
        "wanda": Wanda(drop=p).with_inputs({name: stats.size for name, stats in seen.items()}),
    }  # fmt: skip
    for arm in ("analytic", "star"):
        q[arm] = statistics.fmean(rules[arm].layers.values())  # type: ignore[attr-defined]
    return rules, q | {"eta": 10**power}


def pull_run(arm: str, value: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """Digits fine-tuned by Adam or AdamR, and DARE after it.

    Args:
        arm: "adam", with ``value`` its rate, or "adamr", with ``value`` its pull at rate 1e-3.
        value: see ``arm``.
        seed, scale: of the run.
        part: "validation", over the masks of searches, or "test", over others.

    Returns:
        ``validation`` or ``test``: accuracy after DARE in per cent; ``dense``: before it;
        ``delta``: root mean square of the differences.
    """
    torch.set_num_threads(1)
    this, task = size("digits", scale), start("digits", seed, scale)
    rate, pull = (value, 0.0) if arm == "adam" else (RATES["small"], value)
    model = task.tuned
    optimizer = AdamR(model.parameters(), task.base.parameters(), lr=rate, decay=pull)
    stream = batches(task.train, this.steps, 64, generator(seed, "order"))
    for step, (x, y) in enumerate(stream):
        set_rate(optimizer, rate * cosine(step, this.steps))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    work = Judged.of(task, this.few, scale)
    rule = DAREx(drop=PULLED_AT[bed_arms.sizes_of(scale)])
    judged = task.test if part == "test" else task.held
    first, count = (100, this.masks) if part == "test" else (0, len(SEARCHED[work.scale]))
    each = [
        accuracy(model, prune(work.base, work.tuned, rule, seed=first + m), judged)
        for m in range(count)
    ]
    matrices = [d for d in differences(work.base, work.tuned).values() if d.dim() > 1]
    spread = torch.cat([d.flatten() for d in matrices]).square().mean().sqrt()
    return {part: statistics.fmean(each), "dense": accuracy(model, work.tuned, judged),
            "delta": float(spread)}  # fmt: skip


def measure(runs: Runs, scale: Scale) -> None:
    """Pruning on both beds; then the searches for AdamR and Adam, and what is reported of them."""
    where = {"scale": scale.name}
    for bed, cpu in (("digits", 16), ("mnist", 8)):
        blocks = two_blocks(scale.pick(ci=4, cpu=cpu, gpu=20))
        runs.blocks(bed, blocks)
        seeds = [seed for block in blocks for seed in block]
        runs.table(bed, drop_run, grid(bed=[bed], change=list(RATES), seed=seeds, **where))
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    found = runs.tune(
        "pull", pull_run, {arm: {**where, "part": "validation"} for arm in ("adam", "adamr")},
        {"adam": RATES["small"], "adamr": 0.1}, rate="value",
        seeds=search_seeds(), reported=seeds, judged="validation", better="max", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("pull", blocks)
    settings = [("adam", RATES["small"])] + [(arm, found[arm].rate) for arm in found]
    runs.table("pull", pull_run, [
        {"arm": arm, "value": value, "seed": seed, **where, "part": "test"}
        for arm, value in dict.fromkeys(settings) for seed in seeds
    ])  # fmt: skip
    few = blocks[0][:4] + blocks[1][:4]
    runs.table("pulls", pull_run, [
        {"arm": "adamr", "value": value, "seed": seed, **where, "part": "test"}
        for value in (0.0, *PULLS[bed_arms.sizes_of(scale.name)]) for seed in few
    ])  # fmt: skip


CLAIMS = (
    Claim(
        "divisor",
        "Where DARE breaks, a larger divisor chosen on labels gives back accuracy.",
        whose="paper", where="abstract", figure="more than 30 points at p = 0.99", unit="points",
        margin=3.0,
        quantity="test accuracy with large differences, q chosen on labels minus q = 1 - p",
        reason="a tenth of what the abstract reports",
        conditions=(
            Condition("MNIST, p = 0.99", n=8, spread=3.0, support=(-100.0, 100.0), decides=True),
            Condition("MNIST, p = 0.95", n=8, spread=3.0, support=(-100.0, 100.0)),
            Condition("digits, p = 0.95", n=16, spread=5.0, support=(-100.0, 100.0)),
        ),
    ),
    Claim(
        "outputs",
        "A divisor chosen on outputs, without labels, costs at most two points against one chosen "
        "on labels.",
        whose="paper", where="abstract", unit="points", than=-4.0, margin=2.0,
        quantity="test accuracy as above, q chosen on outputs minus q chosen on labels, from 4 "
        "points below",
        reason="two points are what another draw of masks does",
        conditions=(
            Condition("MNIST, p = 0.99", n=8, spread=1.5, support=(-96.0, 104.0), decides=True),
            Condition("MNIST, p = 0.95", n=8, spread=1.5, support=(-96.0, 104.0)),
            Condition("digits, p = 0.95", n=16, spread=3.0, support=(-96.0, 104.0)),
        ),
    ),
    Claim(
        "importance",
        "Where differences are large, keeping the most important ones beats dropping at random "
        "with the best divisor.",
        whose="paper", where="abstract", unit="points", margin=3.0,
        quantity="test accuracy at p = 0.9 and large differences, importance minus random with q "
        "chosen on labels",
        reason="the margin of the first claim",
        conditions=(
            Condition("MNIST, p = 0.9", n=8, spread=3.0, support=(-100.0, 100.0), decides=True),
            Condition("digits, p = 0.9", n=16, spread=5.0, support=(-100.0, 100.0)),
        ),
    ),
    Claim(
        "pull",
        "Trained with AdamR, a network keeps more accuracy under DARE than trained with Adam.",
        whose="paper", where="abstract", unit="points", margin=3.0,
        quantity="test accuracy under DARE at p = 0.95, AdamR minus Adam at the same rate",
        reason="the margin of the first claim",
        conditions=(
            Condition("digits", n=20, spread=5.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
    Claim(
        "rate",
        "AdamR also beats Adam at a rate that was searched as long, on the same quantity.",
        whose="ours", unit="points", margin=3.0,
        quantity="test accuracy under DARE at p = 0.95, AdamR minus Adam at its best rate",
        reason="the margin of the first claim",
        conditions=(
            Condition("digits", n=20, spread=5.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
)  # fmt: skip
BROKEN = {"ci": {"digits": 0.9, "mnist": 0.9}, "cpu": {"digits": 0.95, "mnist": 0.95}}
"""Rates at which the first two claims are judged, beside MNIST's last."""


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    broken = BROKEN[bed_arms.sizes_of(found.scale)]

    def between(bed: str, ours: str, theirs: str, p: float) -> Measured:
        values = {
            arm: found.values(bed, column, change="large")
            for arm, column in {
                ours: f"{ours} {p:g}", theirs: f"{theirs} {p:g}", "dense": "dense",
                "nothing": "nothing",
            }.items()
        }  # fmt: skip
        return Measured(values[ours], values[theirs], control=values["dense"],
                        nothing=values["nothing"], blocks=found.blocks(bed))  # fmt: skip

    def where_broken(ours: str, theirs: str) -> dict[str, Measured]:
        last = size("mnist", found.scale).drops[-1]
        return {
            "MNIST, p = 0.99": between("mnist", ours, theirs, last),
            "MNIST, p = 0.95": between("mnist", ours, theirs, broken["mnist"]),
            "digits, p = 0.95": between("digits", ours, theirs, broken["digits"]),
        }

    def pulled(value: float) -> dict[str, Measured]:
        best = found.tuned("pull")["adamr"]["rate"]
        return {"digits": Measured(
            found.values("pull", "test", arm="adamr", value=best),
            found.values("pull", "test", arm="adam", value=value),
            blocks=found.blocks("pull"), tuning_seeds=search_seeds())}  # fmt: skip

    return {
        "divisor": where_broken("labels", "dare"),
        "outputs": where_broken("outputs", "labels"),
        "importance": {
            "MNIST, p = 0.9": between("mnist", "wanda", "labels", 0.9),
            "digits, p = 0.9": between("digits", "wanda", "labels", 0.9),
        },
        "pull": pulled(RATES["small"]),
        "rate": pulled(found.tuned("pull")["adam"]["rate"]),
    }


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    draws = generator(0, "facts")
    c = torch.randn(8, generator=draws, dtype=torch.float64)
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 8)
    chance = (masks * 0.1 + (1 - masks) * 0.9).prod(dim=1)
    H = ((1 - masks / 0.25) * c).sum(dim=1)
    gap = abs(float((chance * H.square()).sum() - moments(c, 0.9, 0.25).square))
    base = {"w": torch.randn(200, 300, generator=draws)}
    tuned = {"w": base["w"] + 0.1 * torch.randn(200, 300, generator=draws)}
    rule = DAREx(drop=0.99, q=0.03)
    small = Pruned.between(base, tuned, rule)
    same = torch.equal(small.applied(base)["w"], prune(base, tuned, rule)["w"])
    dense = tuned["w"].nbytes / small.bytes
    return [
        Fact("moments", "The mean square of a neuron's change is that of all 256 masks of eight "
             "inputs.", gap < 1e-12, gap, "difference"),
        Fact("stored", "A seed and the kept values give the pruned model to the bit.", same, dense,
             "times smaller than dense, at p = 0.99"),
    ]  # fmt: skip


LAB = Lab(
    slug="darex",
    part="merge",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
