"""What is measured about SNELL and SNELLA: the kernel, the competition, and the shares of layers.

Digits: the network and the turned digits of LoRA's lab; a change sits on both hidden layers, and
the head trains in every arm. Images: the shared bed's small ViT, which reads upright MNIST digits,
learns turned ones in few steps; a change sits on all 24 linear layers of its blocks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.adapt.sites import Site
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.labs.beds import images
from toolkit.labs.beds.arms import Arm
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.lowrank.against import compare, paired
from toolkit.labs.lowrank.lora import HEAD, HIDDEN, accuracy, digits_task, fit
from toolkit.lowrank.lora import LoRA
from toolkit.select.snella import SNELLA
from toolkit.select.snella.allocation import share_out
from toolkit.select.snella.competition import sparsify
from toolkit.select.snella.kernels import KERNELS
from toolkit.select.snella.layer import KernelLayer
from toolkit.select.snella.snell import SNELL

RANK, WIDE = 4, 32
"""Columns of the factors on digits; and as many as the smaller side of both layers has."""
SHARES = (0.0, 0.5, 0.9, 0.99)
"""Shares of the change that are set to zero."""
STEPS = {"ci": 2, "cpu": 60, "gpu": 60}
"""Steps on images."""


class RandomLayer(KernelLayer):
    """A kernel's change of which a fixed random set of entries is kept, as many as would win."""

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__(method, site, generator, method.sparsity)
        order = torch.randperm(site.rows * site.cols, generator=generator)
        count = round((1 - method.sparsity) * len(order))
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:count]] = True
        self.register_buffer("mask", mask.view(site.rows, site.cols))

    def formed(self, share: float, tensors: tuple[Tensor, ...]) -> Tensor:
        change = KERNELS[self.kernel](*tensors).T
        return change * torch.where(self.mask, change.detach().abs(), 0.0)


@dataclass(frozen=True)
class RandomEntries(SNELL):
    """SNELL without competition: which entries are kept is drawn once."""

    def build(self, site: Site, generator: torch.Generator | None = None) -> RandomLayer:
        return RandomLayer(self, site, generator)


def snell(kernel: Any, rank: int, sparsity: float, like: Any) -> SNELL:
    """SNELL as it is run here: the change is kept for the backward pass, which is quicker."""
    return SNELL(rank=rank, sparsity=sparsity, kernel=kernel, like=like, recompute=False)


def by_size(controller: Any) -> Tensor:
    """Scores that give every layer the same share of its entries."""
    return controller.rooms


def _digits(method: Any, rate: float, seed: int, steps: int, pretraining: int) -> dict[str, Any]:
    """A method on both hidden layers, and the head."""
    task = digits_task(seed, pretraining)
    model = copy.deepcopy(task.base)
    draw = generator(seed, "factors")
    adapted = adapt(model, method, targets=HIDDEN, train=f"{HEAD}.*", generator=draw)
    if hasattr(method, "controller"):
        _attached(adapted, task, rate, seed, steps)
    else:
        fit(model, adapted.parameters(), task.train, steps, rate, seed)
    costs = adapted.costs()
    return _judged(task, model) | {
        "trained": costs["trained"],
        "changed": costs["changed"] - sum(p.numel() for p in adapted.extra.values()),
    }


def _judged(task: Any, model: nn.Module) -> dict[str, Any]:
    parts = {"validation": task.validation, "test": task.test}
    return {name: accuracy(model, part) for name, part in parts.items()}


def _attached(adapted: Any, task: Any, rate: float, seed: int, steps: int) -> None:
    """As LoRA's :func:`fit`, with the controller on the optimizer."""

    def attach(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(parameters, **options)
        adapted.attach(optimizer, total_steps=steps)
        return optimizer

    fit(adapted.model, adapted.parameters(), task.train, steps, rate, seed, attach)


def digits_nothing(arm: str, seed: int, pretraining: int) -> dict[str, Any]:
    """The network as it is."""
    task = digits_task(seed, pretraining)
    return _judged(task, task.base) | {"trained": 0}


def digits_plain(arm: str, rate: float, seed: int, steps: int, pretraining: int) -> dict[str, Any]:
    """The head alone, or everything."""
    task = digits_task(seed, pretraining)
    model = copy.deepcopy(task.base)
    part = model[int(HEAD)] if arm == "head" else model
    parameters = list(part.requires_grad_(True).parameters())
    fit(model, parameters, task.train, steps, rate, seed)
    return _judged(task, model) | {"trained": sum(p.numel() for p in parameters)}


def digits_lora(
    arm: str, rank: int, rate: float, seed: int, steps: int, pretraining: int
) -> dict[str, Any]:
    """LoRA of scale 1."""
    return _digits(LoRA(rank=rank, alpha=float(rank)), rate, seed, steps, pretraining)


def digits_snell(
    arm: str, kernel: str, rank: int, sparsity: float, like: str, rate: float, seed: int,
    steps: int, pretraining: int,
) -> dict[str, Any]:  # fmt: skip
    """SNELL with one kernel, share of zeros and form of the competition."""
    return _digits(snell(kernel, rank, sparsity, like), rate, seed, steps, pretraining)


def digits_random(
    arm: str, rank: int, sparsity: float, rate: float, seed: int, steps: int, pretraining: int
) -> dict[str, Any]:
    """The same kernel, with entries drawn once."""
    method = RandomEntries(rank=rank, sparsity=sparsity, recompute=False)
    return _digits(method, rate, seed, steps, pretraining)


def digits_snella(
    arm: str, rank: int, sparsity: float, rate: float, seed: int, steps: int, pretraining: int
) -> dict[str, Any]:
    """SNELLA, whose two layers compete."""
    method = SNELLA(
        rank=rank, target_sparsity=sparsity, interval=max(1, steps // 20), final=steps // 5,
        recompute=False,
    )  # fmt: skip
    return _digits(method, rate, seed, steps, pretraining)


def images_plain(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """The ViT as it is, its head, or everything."""
    how = {"nothing": Arm("nothing"), "head": Arm("head"), "full": Arm("all")}[arm]
    return _images(how, rate, seed, scale, part)[1]


def images_lora(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """LoRA of scale 2."""
    return _images(Arm("method", LoRA(rank=rank, alpha=2.0 * rank)), rate, seed, scale, part)[1]


def images_snell(
    arm: str, kernel: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """SNELL with nine tenths of the change set to zero."""
    adapted, record = _images(
        Arm("method", snell(kernel, rank, 0.9, "code")), rate, seed, scale, part
    )
    return record | {"changed": sum(layer.changed for layer in adapted.adapters.values())}


def images_snella(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """SNELLA, or with the arm "equal" the same with one share in all layers."""
    steps = STEPS[scale]
    method = SNELLA(
        rank=rank, target_sparsity=0.9, interval=max(1, steps // 12), final=steps // 6,
        recompute=False,
    )  # fmt: skip
    options = (("scorer", by_size),) if arm == "equal" else ()
    adapted, record = _images(Arm("method", method, options=options), rate, seed, scale, part)
    return record | {
        "changed": sum(layer.changed for layer in adapted.adapters.values()),
        "shares": list(adapted.controller.shares().values()),
    }


def _images(how: Arm, rate: float, seed: int, scale: str, part: str) -> tuple[Any, dict[str, Any]]:
    return images.train(how, rate, seed, scale=scale, parts=(part,), steps=STEPS[scale])[1:]


def matrix_fit(kernel: str, rank: int, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """How well a kernel's change, nothing dropped, fits a random matrix of 48 x 48."""
    goal = torch.randn(48, 48, generator=generator(seed, "goal"))
    layer = nn.Linear(48, 48)
    change = adapt(
        nn.Sequential(layer), snell(kernel, rank, 0.0, "code"), generator=generator(seed, "factors")
    ).adapters["0"]
    with torch.no_grad():  # to the size at which distances of 0.1 times reach the goal
        for factor in (change.A, change.B):
            factor.mul_(30 if kernel == "piecewise" else 3)
    optimizer = torch.optim.Adam([change.A, change.B], lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        (change.delta() - goal).square().mean().backward()
        optimizer.step()
    found = change.delta().detach()
    return {
        "misfit": ((found - goal).square().mean() / goal.square().mean()).item(),
        "rank of the change": int(torch.linalg.matrix_rank(found)),
    }


def _arm(sparsity: float, kernel: str = "piecewise", rank: int = RANK, like: str = "code"):
    return {"kernel": kernel, "rank": rank, "sparsity": sparsity, "like": like}


DIGITS: dict[str, dict[str, Any]] = {
    "head": {},
    "full": {},
    "lora": {"rank": RANK},
    **{f"kernel {s:g}": _arm(s) for s in SHARES},
    "linear 0.9": _arm(0.9, "linear"),
    "wide linear 0.9": _arm(0.9, "linear", WIDE),
    "soft 0.9": _arm(0.9, like="paper"),
    "hard 0.9": _arm(0.9, like="hard"),
    "random 0.9": {"rank": RANK, "sparsity": 0.9},
    "snella 0.9": {"rank": RANK, "sparsity": 0.9},
}
"""Arm -> its arguments."""
DIGITS_JOBS: dict[str, Any] = dict.fromkeys(DIGITS, digits_snell) | {
    "head": digits_plain, "full": digits_plain, "lora": digits_lora,
    "random 0.9": digits_random, "snella 0.9": digits_snella,
}  # fmt: skip
DIGITS_START = dict.fromkeys(DIGITS, 6.4e-2) | {
    "head": 3.2e-2, "full": 1.6e-2, "lora": 3.2e-2, "kernel 0": 3.2e-2, "hard 0.9": 3.2e-2,
    "wide linear 0.9": 3.2e-2, "snella 0.9": 1.6e-2,
}  # fmt: skip
IMAGES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 8},
    "linear": {"kernel": "linear", "rank": 8},
    "kernel": {"kernel": "piecewise", "rank": 8},
    "snella": {"rank": 8},
    "equal": {"rank": 8},
}
IMAGES_JOBS = {
    "nothing": images_plain, "full": images_plain, "lora": images_lora, "linear": images_snell,
    "kernel": images_snell, "snella": images_snella, "equal": images_snella,
}  # fmt: skip
IMAGES_START = {
    "full": 4e-3, "lora": 1.6e-2, "linear": 6.4e-2, "kernel": 0.128, "snella": 6.4e-2,
    "equal": 6.4e-2,
}  # fmt: skip


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    _measure_digits(runs, scale)
    compare(runs, scale, "images", IMAGES_JOBS, IMAGES, IMAGES_START,
            scale.pick(ci=4, cpu=8, gpu=20))  # fmt: skip
    runs.table("fit", matrix_fit, [
        {"kernel": kernel, "rank": rank, "rate": 0.05, "seed": seed,
         "steps": scale.pick(ci=10, cpu=500, gpu=500)}
        for kernel in ("linear", "piecewise") for rank in (4, 8)
        for seed in range(scale.pick(ci=1, cpu=3, gpu=3))
    ])  # fmt: skip


def _measure_digits(runs: Runs, scale: Scale) -> None:
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    start = {"pretraining": scale.pick(ci=10, cpu=400, gpu=400)}
    size = start | {"steps": scale.pick(ci=3, cpu=150, gpu=150)}
    runs.table("digits as they are", digits_nothing, [
        {"arm": "nothing", "seed": seed, **start} for seed in seeds
    ])  # fmt: skip
    found = runs.tune(
        "digits", DIGITS_JOBS, {arm: more | size for arm, more in DIGITS.items()}, DIGITS_START,
        seeds=search_seeds(), reported=seeds, judged="validation", better="max", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("digits", blocks)
    runs.table("digits", DIGITS_JOBS, [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **size}
        for arm, more in DIGITS.items() for seed in seeds
    ])  # fmt: skip


CLAIMS = (
    Claim(
        "sparsify",
        "Sparsified to a tenth, a kernel's change reads better than a plain low-rank one.",
        whose="paper", where="ablation of SNELL, VTAB, rank 8", unit="points", margin=1.0,
        figure="73.9 against 65.7 at nine tenths zeros",
        quantity="test accuracy, piecewise kernel minus linear kernel, both nine tenths zero",
        reason="the paper's gap is 8 points; one is an eighth of it",
        conditions=(
            Condition("images", n=8, spread=1.0, support=(-100.0, 100.0), decides=True),
            Condition("digits", n=20, spread=2.0, support=(-100.0, 100.0)),
        ),
    ),
    Claim(
        "gain",
        "With the kernel, setting nine tenths to zero raises accuracy.",
        whose="paper", where="ablation of SNELL, VTAB", unit="points", margin=1.0,
        figure="73.2 without against 74.2 with sparsity, rank 8",
        quantity="test accuracy, piecewise kernel with nine tenths zero minus the same with none",
        reason="the paper's gain is one point at rank 8, and grows with rank",
        conditions=(
            Condition("digits", n=20, spread=2.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
    Claim(
        "shares",
        "Layers that compete for the budget read better than layers with equal shares.",
        whose="paper", where="abstract of SNELLA", unit="points", margin=1.0,
        quantity="test accuracy, SNELLA minus the same with one share in all layers",
        reason="the paper's gain over the method before is 1.8 points, of which this is a part",
        conditions=(
            Condition("images", n=8, spread=1.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
    Claim(
        "beyond-rank",
        "The kernel does more than allow a high rank.",
        whose="ours", unit="points", margin=1.0,
        quantity="test accuracy, kernel of rank 4 minus plain factors of full rank 32, both nine "
        "tenths zero",
        reason="one point is less than the spread over test sets of this size",
        conditions=(
            Condition("digits", n=20, spread=2.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
    Claim(
        "competition",
        "It matters that the entries compete.",
        whose="ours", unit="points", margin=1.0,
        quantity="test accuracy, kernel with nine tenths zero minus the same with as many entries "
        "drawn once",
        reason="one point is less than the spread over test sets of this size",
        conditions=(
            Condition("digits", n=20, spread=2.0, support=(-100.0, 100.0), decides=True),
        ),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""

    def test(arm: str) -> dict[int, float]:
        return found.values("digits", "test", arm=arm)

    def digits(ours: str, theirs: str) -> Measured:
        return Measured(
            test(ours), test(theirs), control=test("full"),
            nothing=found.values("digits as they are", "test"), blocks=found.blocks("digits"),
            tuning_seeds=search_seeds(),
        )  # fmt: skip

    accuracy = "test_accuracy"
    return {
        "sparsify": {
            "images": paired(found, "images", accuracy, "kernel", "linear"),
            "digits": digits("kernel 0.9", "linear 0.9"),
        },
        "gain": {"digits": digits("kernel 0.9", "kernel 0")},
        "shares": {"images": paired(found, "images", accuracy, "snella", "equal")},
        "beyond-rank": {"digits": digits("kernel 0.9", "wide linear 0.9")},
        "competition": {"digits": digits("kernel 0.9", "random 0.9")},
    }


def kept_bytes(method: Any, scale: str, batch: int = 32) -> int:
    """Bytes kept for the backward pass of one batch on the ViT, its frozen weights left out."""
    model = images.network("vit", scale)
    if method is not None:
        adapt(model, method, images.TARGETS["vit"], train="head.*", generator=generator(0, "kept"))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no address is used twice
        return tensor

    held: list[Tensor] = []
    x = torch.rand(batch, 28, 28, generator=generator(0, "batch"))

    # what a checkpoint keeps is its inputs, of which autograd does not tell
    def given(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        note(args[0])

    inputs = [
        m.register_forward_pre_hook(given)
        for m in model.modules() if isinstance(getattr(m, "adapter", None), KernelLayer)
    ]  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x).sum()
    for hook in inputs:
        hook.remove()
    return sum(seen.values())


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    model = nets.mlp([64, 32, 32, 10], generator=generator(0, "facts"), dtype=torch.float64)
    method = SNELLA(rank=4, start_sparsity=0.9)
    adapted = adapt(model, method, targets=HIDDEN, generator=generator(0, "factors"))
    costs, formula = adapted.costs(), 4 * (32 + 64) + 4 * (32 + 32) + 2 * 3
    tenth = round(0.1 * 32 * 64) + round(0.1 * 32 * 32)
    x = torch.randn(50, 64, generator=generator(0, "x"), dtype=torch.float64)
    outputs = []
    for recompute in (False, True):
        for layer in adapted.adapters.values():
            layer.recompute = recompute
        y = model(x)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), adapted.parameters())])
    gap = max((a - b).abs().max().item() for a, b in zip(*outputs, strict=True))
    change = torch.randn(40, 50, generator=generator(0, "change"))
    jump = sparsify(change, 0.0).norm() / change.norm()
    uniform = share_out(100, torch.zeros(4), torch.full((4,), 50))
    return [
        Fact("count", "SNELLA of rank 4 trains r(m + n) + 3 numbers a layer.",
             costs["trained"] == formula, costs["trained"], "numbers"),
        Fact("changed", "With nine tenths zero it changes a tenth of the entries.",
             abs(costs["changed"] - tenth) <= 2, costs["changed"], "numbers"),
        Fact("recompute", "Outputs and gradients are the same whether the change is kept or formed "
             "again.", gap == 0, gap, "largest difference"),
        Fact("jump", "Without zeros the code leaves the change as it is; with one zero it is "
             "multiplied by its own size.", abs(jump - 1) > 0.1, round(float(jump), 3), "times"),
        Fact("uniform", "Where all scores are zero all layers get the same.",
             uniform == [25] * 4, uniform[0], "entries of 100 for four layers"),
    ]  # fmt: skip


LAB = Lab(
    slug="snella",
    part="select",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("digits", "mnist"),
)
