"""What is measured about SaRA: a small denoiser of digits, and the transformer of the text bed.

The denoiser learns which noise was added to MNIST's digits, averaged to 14 x 14 pixels, at one of
100 levels. It is then adapted to digits turned by 90 degrees (the target) and judged on both those
and upright ones (the source). Every masked arm moves a fifth of each weight matrix; biases are
frozen. Examples, order and noise are drawn anew for every seed; the base is one network.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.put import adapt
from toolkit.core.baselines.sparse_mask import SparseMask
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.core.train.fit import fit, set_rate
from toolkit.core.train.rates import cosine, linear
from toolkit.labs.beds import characters, images
from toolkit.labs.beds.arms import Arm
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.lowrank import lora
from toolkit.labs.lowrank.against import compare, paired
from toolkit.lowrank.lora import LoRA
from toolkit.select.sara import SaRA

LEVELS = 100
SHARE = 0.2
RANK = {"ci": 6, "cpu": 17}
"""LoRA's rank at which it trains about as many numbers as a fifth of the entries."""
ZEROED = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
CUTS = ("smallest", "random", "largest")
CHECKS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.27, 0.35, 0.45, 0.55, 0.7, 0.85, 1.0)
"""Shares of a run at which both losses are taken."""
OFF: dict[str, Any] = {"rank_weight": 0.0}
METHODS: dict[str, Any] = {
    "smallest": SaRA(share=SHARE, switch=None, **OFF),
    "random": SparseMask(share=SHARE, by="random"),
    "largest": SparseMask(share=SHARE, by="largest"),
    "two stages": SaRA(share=SHARE, **OFF),
    "sara": SaRA(share=SHARE, rank_weight=5e-3),
}
ARMS = ("full", "lora", *METHODS)
STARTS = {"full": 2e-3, "lora": 4e-3}
"""Middles of the first rates tried; 4e-3 for what is masked."""


class Size(NamedTuple):
    """Numbers of one scale: width of the denoiser, steps, images of a run and to judge on."""

    width: int
    pretraining: int
    steps: int
    examples: int
    judged: int


SIZES = {"ci": Size(72, 50, 8, 128, 100), "cpu": Size(160, 3000, 300, 1000, 1000)}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES["ci" if scale == "ci" else "cpu"]


class Denoiser(nn.Module):
    """Noisy images (batch, 196) and levels (batch,) to the noise (batch, 196)."""

    def __init__(self, width: int, draws: torch.Generator):
        super().__init__()
        widths = [196 + 32, width, width, width, 196]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layer = nn.Linear(a, b)
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -1 / math.sqrt(a), 1 / math.sqrt(a), generator=draws)
            layers += [layer, nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, noisy: Tensor) -> Tensor:
        """``noisy`` holds the level in its last column."""
        angle = noisy[:, -1:] * torch.logspace(0, 2, 16, device=noisy.device) / LEVELS
        return self.layers(torch.cat([noisy[:, :-1], angle.sin(), angle.cos()], 1))


def kept_signal() -> Tensor:
    """Share of the variance that is still the image's at each level, (100,), along a cosine."""
    t = (torch.arange(LEVELS) + 1) / (LEVELS + 1)
    return torch.cos(t * math.pi / 2).square()


def noised(x: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 196) with noise at random levels, the level beside them; and the noise."""
    levels = torch.randint(LEVELS, (len(x), 1), generator=draws)
    noise = torch.randn(x.shape, generator=draws)
    keep = kept_signal()[levels]
    return torch.cat([keep.sqrt() * x + (1 - keep).sqrt() * noise, levels.float()], 1), noise


@functools.lru_cache(maxsize=4)
def pictures(scale: str, turned: bool) -> dict[str, Tensor]:
    """The parts of the image bed as (n, 196) numbers in [-1, 1], upright or turned."""
    found = {}
    for part, (x, _) in images.load(scale)._asdict().items():
        x = images.shifted(x, "rotated") if turned else x
        found[part] = 2 * F.avg_pool2d(x[:, None], 2).flatten(1) - 1
    return found


@functools.lru_cache(maxsize=2)
def _base(scale: str) -> Denoiser:
    this, draws = size(scale), generator(0, "denoiser")
    model, x = Denoiser(this.width, draws), pictures(scale, False)["pool"]
    rows = torch.randint(len(x), (this.pretraining, 64), generator=draws)
    batches = (noised(x[r], draws) for r in rows)
    fit(model, None, 2e-3, 0, batches, F.mse_loss, steps=this.pretraining, decay=cosine)
    return model


def base(scale: str) -> Denoiser:
    """A fresh copy of the denoiser that was trained on upright digits."""
    return copy.deepcopy(_base(scale)).requires_grad_(True)


def judged_on(scale: str, turned: bool, part: str, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of one part and their noise: the same for every arm of a seed."""
    draws = generator(seed, part, int(turned))
    x = pictures(scale, turned)[part]
    return noised(x[torch.randperm(len(x), generator=draws)[: size(scale).judged]], draws)


@torch.no_grad()
def error(model: nn.Module, pair: tuple[Tensor, Tensor]) -> float:
    """Mean squared error of the noise; 1 is what answering 0 gives."""
    return float(F.mse_loss(model(pair[0]), pair[1]))


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weight matrices by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 2}


def turned_run(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """One arm learns turned digits; both losses at :data:`CHECKS` of the run.

    ``validation`` or ``test``: the target's loss at the end. ``targets`` and ``sources``: both
    losses from before the first step on (only with part "test"). ``stable_rank``: mean over the
    matrices of the change's squared Frobenius norm over its squared largest singular value.
    """
    torch.set_num_threads(1)
    this, model = size(scale), base(scale)
    before = matrices(model)
    pool, draws = pictures(scale, True)["pool"], generator(seed, "examples")
    x = pool[torch.randperm(len(pool), generator=draws)[: this.examples]]
    rows = torch.randint(len(x), (this.steps, 32), generator=draws)
    pairs = {turn: judged_on(scale, turn, part, seed) for turn in (True, False)}
    curve: dict[bool, list[float]] = {turn: [error(model, pairs[turn])] for turn in pairs}
    moments = {max(1, round(share * this.steps)) for share in CHECKS}

    def watch(step: int, adapted: Any, network: nn.Module) -> None:
        if part == "test" and step + 1 in moments:
            for turn, pair in pairs.items():
                curve[turn].append(error(network, pair))

    adapted, _ = fit(
        model, method(arm, scale), rate, seed, (noised(x[r], draws) for r in rows), F.mse_loss,
        steps=this.steps, decay=linear, watch=watch,
    )  # fmt: skip
    found: dict[str, Any] = {part: error(model, pairs[True])}
    trained = model.parameters() if adapted is None else adapted.parameters()
    found["trained"] = sum(p.numel() for p in trained)
    if part == "test":
        found |= {"targets": curve[True], "sources": curve[False]}
        if adapted is not None:
            if isinstance(adapted.method, SaRA):
                shares = adapted.controller.shares().values()
                found["still_small"] = 100 * sum(shares) / len(shares)
            adapted.merge()
        after = matrices(model)
        found["stable_rank"] = sum(_stable(after[n] - before[n]) for n in before) / len(before)
    return found


def _stable(change: Tensor) -> float:
    sizes = torch.linalg.svdvals(change).square()
    return float(sizes.sum() / sizes[0])


def method(arm: str, scale: str) -> Any:
    """The method of an arm; None for full training."""
    if arm == "lora":
        rank = RANK["ci" if scale == "ci" else "cpu"]
        return LoRA(rank=rank, alpha=2.0 * rank)
    return METHODS.get(arm)


def zeroed_run(cut: str, share: float, seed: int, scale: str) -> dict[str, Any]:
    """The denoiser with a share of each matrix set to 0, on upright digits."""
    torch.set_num_threads(1)
    model = base(scale)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() == 2):
            sizes = weight.abs().flatten()
            if cut == "random":
                sizes = torch.rand(len(sizes), generator=generator(seed, "cut"))
            order = sizes.argsort(descending=cut == "largest")
            weight.view(-1)[order[: round(share * len(order))]] = 0.0
    return {"loss": error(model, judged_on(scale, False, "test", seed))}


def further_run(seed: int, scale: str, rate: float) -> dict[str, Any]:
    """All weights train on upright digits for as long again: which of a small fifth stay small?

    ``still`` and ``new``: at :data:`CHECKS` of the run, in per cent of the fifth: entries of it
    that are still below its threshold, and entries from outside that are below it now.
    """
    torch.set_num_threads(1)
    this, model = size(scale), base(scale)
    weights = [p for p in model.parameters() if p.dim() == 2]
    limits = [p.detach().abs().flatten().quantile(SHARE) for p in weights]
    first = [p.detach().abs() < t for p, t in zip(weights, limits, strict=True)]
    count = sum(int(mask.sum()) for mask in first)
    x, draws = pictures(scale, False)["pool"], generator(seed, "further")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    moments = {max(1, round(share * this.pretraining)) for share in CHECKS}
    still, new = [100.0], [0.0]
    for step in range(this.pretraining):
        set_rate(optimizer, rate * cosine(step, this.pretraining))
        rows = torch.randint(len(x), (64,), generator=draws)
        noisy, noise = noised(x[rows], draws)
        optimizer.zero_grad()
        F.mse_loss(model(noisy), noise).backward()
        optimizer.step()
        if step + 1 in moments:
            now = [p.detach().abs() < t for p, t in zip(weights, limits, strict=True)]
            both = sum(int((a & b).sum()) for a, b in zip(first, now, strict=True))
            still.append(100 * both / count)
            new.append(100 * (sum(int(b.sum()) for b in now) - both) / count)
    return {"still": still, "new": new, "left": 100 - still[-1]}


def abstracts_sara(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """SaRA on every linear layer of the blocks, with as many numbers as LoRA of rank 8."""
    blank = adapt(characters.network(scale), LoRA(rank=8), targets=characters.TARGETS)
    layers = blank.sites.values()
    count = sum(LoRA(rank=8).count(p.site) for p in layers)
    whole = sum(p.site.rows * p.site.cols for p in layers)
    sara = SaRA(share=count / whole, **OFF)
    return lora.reading(characters, Arm("method", sara), rate, seed, scale, part)


ABSTRACTS = {
    "nothing": lora.abstracts_plain, "full": lora.abstracts_plain, "rank 8": lora.abstracts_lora,
    "sara": abstracts_sara,
}  # fmt: skip
ABSTRACTS_ARMS: dict[str, dict[str, Any]] = {"full": {}, "rank 8": {"rank": 8}, "sara": {}}
ABSTRACTS_STARTS = {**lora.ABSTRACTS_START, "sara": 8e-3}


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first the searches for rates, then what is reported."""
    n, few = scale.pick(ci=4, cpu=20, gpu=20), scale.pick(ci=2, cpu=8, gpu=20)
    blocks, where = two_blocks(n), {"scale": scale.name}
    seeds = [seed for block in blocks for seed in block]
    found = runs.tune(
        "turned", turned_run, {arm: {**where, "part": "validation"} for arm in ARMS},
        {arm: STARTS.get(arm, 4e-3) for arm in ARMS},
        seeds=search_seeds(), reported=seeds, judged="validation", better="min", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    for name in ("turned", "zeroed"):
        runs.blocks(name, blocks)
    runs.table("turned", turned_run, [
        {"arm": arm, "rate": found[arm].rate, "seed": seed, **where, "part": "test"}
        for arm in ARMS for seed in seeds
    ])  # fmt: skip
    runs.table("zeroed", zeroed_run, grid(cut=CUTS, share=ZEROED, seed=seeds, **where))
    runs.blocks("further", two_blocks(scale.pick(ci=4, cpu=8, gpu=20)))
    again = [s for block in two_blocks(scale.pick(ci=4, cpu=8, gpu=20)) for s in block]
    runs.table("further", further_run, grid(seed=again, rate=[2e-3], **where))
    compare(runs, scale, "abstracts", ABSTRACTS, ABSTRACTS_ARMS, ABSTRACTS_STARTS, max(few, 4))


CLAIMS = (
    Claim(
        "zeroed",
        "Without the smallest tenth of its weights the model is at most two per cent worse.",
        whose="paper", where="section 3, figure 2", unit="%", scale="log", better="less",
        than=-3.0, margin=1.0,
        quantity="source loss, smallest tenth set to 0 against none, from 3 % above",
        reason="one per cent is what the paper calls no change of its quality measures",
        conditions=(Condition("digits", n=20, spread=0.3, decides=True),),
    ),
    Claim(
        "left",
        "Most weights that are small now are not small after further training: four of five leave.",
        whose="paper", where="section 3, figure 3", unit="points", than=75.0, margin=5.0,
        quantity="share of the smallest fifth that has left the band after as many steps as the "
        "base was trained for, from 75 points",
        reason="the paper's figure shows more than 80 % leaving early in further training",
        conditions=(Condition("digits", n=8, spread=1.0, support=(-75.0, 25.0), decides=True),),
    ),
    Claim(
        "largest",
        "At equal loss on the target, training the smallest weights forgets less than training as "
        "many of the largest.",
        whose="paper", where="ablation, table of largest and random weights", unit="%",
        scale="log", better="less", margin=2.0,
        quantity="source loss at equal target loss, smallest below largest",
        reason="two per cent of a denoising loss cannot be seen in a picture of this size",
        conditions=(Condition("turned digits", n=20, spread=3.0, decides=True),),
    ),
    Claim(
        "random",
        "At equal loss on the target, training the smallest weights forgets less than training as "
        "many drawn at random.",
        whose="paper", where="ablation, table of largest and random weights", unit="%",
        scale="log", better="less", margin=2.0,
        quantity="source loss at equal target loss, smallest below random",
        reason="two per cent of a denoising loss cannot be seen in a picture of this size",
        conditions=(Condition("turned digits", n=20, spread=3.0, decides=True),),
    ),
    Claim(
        "full",
        "At equal loss on the target, SaRA forgets less than full training.",
        whose="paper", where="table of main results, CLIP scores", unit="%", scale="log",
        better="less", margin=2.0,
        quantity="source loss at equal target loss, SaRA below full training",
        reason="two per cent of a denoising loss cannot be seen in a picture of this size",
        conditions=(Condition("turned digits", n=20, spread=3.0, decides=True),),
    ),
)  # fmt: skip


def level(table: Any) -> dict[int, float]:
    """Seed -> the target loss that every arm reaches: the worst arm's best."""
    best = table.assign(best=[min(curve) for curve in table.targets])
    return best.groupby("seed").best.max().to_dict()


def source_at(targets: list[float], sources: list[float], wanted: float) -> float:
    """The source loss where the target loss first falls to ``wanted``, between two checks linear.

    NaN where it never does.
    """
    for i, now in enumerate(targets):
        if now <= wanted:
            if i == 0:
                return sources[0]
            way = (targets[i - 1] - wanted) / (targets[i - 1] - now)
            return sources[i - 1] + way * (sources[i] - sources[i - 1])
    return math.nan


def forgetting(found: Found) -> dict[str, dict[int, float]]:
    """Arm -> seed -> source loss at the target loss that every arm of the seed reaches."""
    table = found["turned"]
    wanted = level(table)
    result: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for row in table.itertuples():
        result[row.arm][row.seed] = source_at(row.targets, row.sources, wanted[row.seed])
    return result


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    search, lost = search_seeds(), forgetting(found)
    blocks = found.blocks("turned")

    def forgets(ours: str, theirs: str) -> dict[str, Measured]:
        return {"turned digits": Measured(
            lost[ours], lost[theirs], blocks=blocks, tuning_seeds=search)}  # fmt: skip

    def zeroed(share: float, cut: str = "smallest") -> dict[int, float]:
        return found.values("zeroed", "loss", cut=cut, share=share)

    return {
        "zeroed": {"digits": Measured(
            zeroed(0.1), zeroed(0.0), blocks=found.blocks("zeroed"), control=zeroed(0.0),
            nothing=zeroed(0.5, "largest"))},
        "left": {"digits": Measured(
            found.values("further", "left"), blocks=found.blocks("further"))},
        "largest": forgets("smallest", "largest"),
        "random": forgets("smallest", "random"),
        "full": forgets("sara", "full"),
    }  # fmt: skip


def abstracts_gap(found: Found) -> Measured:
    """SaRA and LoRA of as many numbers on abstracts, seed by seed."""
    return paired(found, "abstracts", "test", "sara", "rank 8")


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    model = base(found.scale)
    pair = judged_on(found.scale, False, "test", 0)
    plain = model(pair[0])
    adapted = adapt(model, SaRA(share=SHARE, **OFF))
    gap = float((model(pair[0]) - plain).detach().abs().max())
    flipped = base(found.scale)
    with torch.no_grad():
        for weight in (p for p in flipped.parameters() if p.dim() == 2):
            small = weight.abs() < weight.abs().flatten().quantile(SHARE)
            weight[small] = weight[small].abs()
    wrong = error(flipped, pair) / error(base(found.scale), pair)
    count = sum(p.numel() for p in adapted.parameters())
    optimizer = torch.optim.Adam(adapted.parameters())
    adapted.attach(optimizer, total_steps=10)
    F.mse_loss(model(pair[0]), pair[1]).backward()
    optimizer.step()
    held = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    return [
        Fact("start", "Before the first step SaRA's network gives the outputs of its base.",
             gap == 0, gap, "largest difference"),
        Fact("sign", "The published optimizer's absolute values change the network before the "
             "first step: its source loss grows.", wrong > 1, wrong, "times the base's loss"),
        Fact("moments", "Adam's two moments are as long as the choice, twice.", held == 2 * count,
             held, "numbers"),
    ]  # fmt: skip


LAB = Lab(
    slug="sara",
    part="select",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist", "tinyshakespeare", "cranfield"),
)
