"""What is measured about LoRA-GGPO and LoRA-MGPO: flatness, and whether it pays.

Digits: a network of two hidden layers knows digits turned by 90 degrees. It gets 200 upright ones,
and 30 % of their labels are drawn at random: who fits them all has learned nonsense. LoRA of rank
32 and scale 1 sits on both hidden layers; every arm of noise or moves trains the same numbers from
the same start on the same batches. Network, images, wrong labels, start and order are drawn anew
for every seed. Accuracy counts right labels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core import nets
from toolkit.core.adapt.put import adapt
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.core.train.sam import sam_step
from toolkit.labs.beds import characters, texts
from toolkit.labs.beds.arms import Arm
from toolkit.labs.beds.tasks import Digits, accuracy, digits_task, digits_train
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.lowrank.against import compare, paired
from toolkit.labs.lowrank.lora import (
    abstracts_lora,
    abstracts_plain,
    reading,
    reviews_lora,
    reviews_plain,
)
from toolkit.lowrank.lora import LoRA
from toolkit.lowrank.lora_ggpo import LoRAGGPO, LoRAMGPO

LAYERS = ["0", "2"]
LARGE: dict[str, Any] = {"rank": 32, "alpha": 32.0}
EVERY = 10
"""Steps between two looks at the training loss of the plain network."""
WALK = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6)
"""Steps away from the end of training, as parts of each row's length; sharpness is taken at 0.2."""
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
SHARED, HIGH = 1e-2, 2e-2
SIZES = (0.03, 0.1, 0.3)
SIGMA, TEXT_SIGMA, USUAL_BETA = 0.3, 0.1, 0.01


@functools.lru_cache(maxsize=32)
def task_of(seed: int) -> Digits:
    """The digits of one seed, to read and not to train."""
    return digits_task(seed, examples=200, noise=0.3)


@torch.no_grad()
def walk(model: nn.Module, seed: int, directions: int = 6) -> list[float]:
    """Mean training loss at each step of :data:`WALK`, forth and back in random directions.

    A step t changes row i of every weight W by t |W_i| / sqrt(n) times standard normal numbers.
    """
    task = task_of(seed)
    weights = {k: p for k, p in model.named_parameters() if k.endswith("weight")}
    units = {k: p.norm(dim=1, keepdim=True) / p.shape[1] ** 0.5 for k, p in weights.items()}
    draws = generator(seed, "walk")
    found = torch.zeros(len(WALK))
    found[0] = 2 * directions * F.cross_entropy(model(task.x), task.y)
    for _ in range(directions):
        z = {k: units[k] * torch.randn(p.shape, generator=draws) for k, p in weights.items()}
        for at, t in enumerate(WALK[1:], 1):
            for sign in (t, -t):
                there = {k: p + sign * z[k] for k, p in weights.items()}
                found[at] += F.cross_entropy(functional_call(model, there, (task.x,)), task.y)
    return (found / (2 * directions)).tolist()


def study(
    method: Any,
    rate: float,
    seed: int,
    steps: int,
    train: tuple[str, ...] = (),
    step: Callable[..., Tensor] | None = None,
) -> tuple[dict[str, Any], Any]:
    """One run on the digits: its record, and the method's handle, merged; None without a method."""
    task = task_of(seed)
    curve: list[float] = []
    shares: list[float] = []

    def watch(number: int, adapted: Any, model: nn.Module) -> None:
        if number % EVERY == EVERY - 1:
            with torch.no_grad():  # without gradients nothing is perturbed
                curve.append(F.cross_entropy(model(task.x), task.y).item())
            if isinstance(method, LoRAGGPO):
                shares.append(gradient_share(adapted.controller, method.beta))

    model, adapted, told = digits_train(
        method, rate, seed, steps=steps, examples=200, noise=0.3,
        targets=None if method is None else LAYERS, train=train, step=step, watch=watch,
    )  # fmt: skip
    record = {name: told[name] for name in ("validation", "test", "train", "trained")}
    if isinstance(method, LoRAGGPO):
        record |= {"share": sum(shares) / len(shares), "noise": relative_noise(adapted)}
    if adapted is not None:
        adapted.merge()
    losses = walk(model, seed)
    lowest, rebound = float("inf"), 0.0
    for value in curve:
        lowest = min(lowest, value)
        rebound = max(rebound, value - lowest)
    record |= {"walk": losses, "sharpness": losses[2] - losses[0], "rebound": rebound}
    return record | {"curve": curve}, adapted


def gradient_share(controller: Any, beta: float) -> float:
    """The gradient's share of the noise's variance by the equation, in percent, mean of layers."""
    parts = [
        (beta * g / (w + beta * g)).mean()
        for w, g in zip(controller.weight, controller.gradient, strict=True)
    ]
    return 100 * float(torch.stack(parts).mean())


@torch.no_grad()
def relative_noise(adapted: Any) -> float:
    """Length of the noise that lies there now by the row's length, in percent, mean of rows."""
    controller, found = adapted.controller, []
    for group, stds in zip(controller.groups, controller.std, strict=True):
        for i, std in zip(group, stds, strict=True):
            weight = controller.weight_of(i) + controller.layers[i].delta()
            found.append((std * weight.shape[1] ** 0.5 / weight.norm(dim=1)).mean())
    return 100 * float(torch.stack(found).mean())


def digits_nothing(arm: str, seed: int) -> dict[str, Any]:
    """The network as it is."""
    task = task_of(seed)
    parts = {"validation": task.validation, "test": task.test}
    return {name: accuracy(task.model, part) for name, part in parts.items()} | {"trained": 0}


def digits_head(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """The last layer alone trains."""
    return study(None, rate, seed, steps, train=("4.*",))[0]


def digits_full(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Everything trains."""
    return study(None, rate, seed, steps)[0]


def digits_lora(arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Plain LoRA."""
    return study(LoRA(**LARGE), rate, seed, steps)[0]


def digits_noise(
    arm: str, variant: Any, sigma: float, beta: float, rate: float, seed: int, steps: int
) -> dict[str, Any]:
    """LoRA under noise: LoRA-GGPO's, of one size for all rows of a layer, or kohya's sum."""
    method = LoRAGGPO(**LARGE, variant=variant, sigma=sigma, beta=beta, seed=seed)
    return study(method, rate, seed, steps)[0]


def digits_move(
    arm: str, like: Any, sign: Any, rho: float, rate: float, seed: int, steps: int
) -> dict[str, Any]:
    """LoRA-MGPO: the gradient is taken along the momentum, or against it."""
    return study(LoRAMGPO(**LARGE, like=like, sign=sign, rho=rho), rate, seed, steps)[0]


def digits_sam(arm: str, rho: float, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """LoRA by SAM: the gradient at the worst nearby point, two passes a step."""

    def step(loss: Callable[[], Tensor], optimizer: Any, adapted: Any) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        value = sam_step(adapted.parameters(), closure, rho)
        optimizer.step()
        return value

    return study(LoRA(**LARGE), rate, seed, steps, step=step)[0]


def text_ggpo() -> Arm:
    """LoRA-GGPO of rank 8, its scale that of the LoRA it is compared with."""
    return Arm("method", LoRAGGPO(rank=8, alpha=16.0, sigma=TEXT_SIGMA, beta=USUAL_BETA))


def abstracts_ggpo(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """LoRA-GGPO on every linear layer of the blocks, and nothing beside it."""
    return reading(characters, text_ggpo(), rate, seed, scale, part)


def reviews_ggpo(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """LoRA-GGPO on the twelve linear layers of the upper blocks, and the head."""
    return reading(texts, text_ggpo(), rate, seed, scale, part)


def reviews_mgpo(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """LoRA-MGPO with the paper's settings for T5-base, and the head."""
    method = LoRAMGPO(rank=8, alpha=16.0, rho=0.05, smoothing=0.9)
    return reading(texts, Arm("method", method), rate, seed, scale, part)


def _noise(variant: str, sigma: float, beta: float = USUAL_BETA) -> dict[str, Any]:
    return {"variant": variant, "sigma": sigma, "beta": beta}


def _move(like: str, sign: str) -> dict[str, Any]:
    return {"like": like, "sign": sign, "rho": 0.5}


NOISES = {
    f"{name} {sigma:g}": _noise(variant, sigma)
    for name, variant in (("ggpo", "ggpo"), ("random", "isotropic"))
    for sigma in SIZES
}
PLAIN_AND_NOISES: dict[str, dict[str, Any]] = {"lora": {}} | NOISES
TUNED: dict[str, dict[str, Any]] = {
    "head": {}, "full": {}, "lora": {}, "ggpo 0.03": NOISES["ggpo 0.03"],
    "ggpo 0.3": NOISES["ggpo 0.3"], "random 0.3": NOISES["random 0.3"],
    "mgpo": _move("paper", "ascent"), "sam": {"rho": 0.5},
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "mgpo": _move("paper", "ascent"), "mgpo, against": _move("paper", "descent"),
    "mgpo, each layer": _move("code", "ascent"), "mgpo, code": _move("code", "descent"),
    "kohya 0.3": _noise("kohya", SIGMA), "ggpo 0.3, beta 10": _noise("ggpo", SIGMA, 10.0),
    "random 0.3, beta 10": _noise("isotropic", SIGMA, 10.0),
}  # fmt: skip
DIGITS: dict[str, Any] = {
    "nothing": digits_nothing,
    "head": digits_head,
    "full": digits_full,
    "lora": digits_lora,
    "sam": digits_sam,
} | dict.fromkeys([*NOISES, "kohya 0.3", "ggpo 0.3, beta 10", "random 0.3, beta 10"], digits_noise)
DIGITS |= dict.fromkeys([name for name in FORMS if name.startswith("mgpo")], digits_move)
ABSTRACTS = {"nothing": abstracts_plain, "head": abstracts_plain, "full": abstracts_plain,
             "rank 8": abstracts_lora, "ggpo": abstracts_ggpo}  # fmt: skip
REVIEWS = {"nothing": reviews_plain, "head": reviews_plain, "full": reviews_plain,
           "rank 8": reviews_lora, "ggpo": reviews_ggpo, "mgpo": reviews_mgpo}  # fmt: skip
ABSTRACTS_START = {"head": 2e-2, "full": 4e-3, "rank 8": 1.6e-2, "ggpo": 1.6e-2}
REVIEWS_START = {"head": 1.6e-2, "full": 2.5e-4, "rank 8": 4e-3, "ggpo": 4e-3, "mgpo": 4e-3}
"""Middles of the first rates tried; those of the shared arms are LoRA's."""


def _arms(functions: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {"rank": 8} if name == "rank 8" else {} for name in functions if name != "nothing"
    }


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: first each search for rates, then the runs that are reported."""
    few = scale.pick(ci=4, cpu=8, gpu=20)
    _digits(runs, scale)
    compare(runs, scale, "abstracts", ABSTRACTS, _arms(ABSTRACTS), ABSTRACTS_START, few)
    compare(runs, scale, "reviews", REVIEWS, _arms(REVIEWS), REVIEWS_START, few)


def _digits(runs: Runs, scale: Scale) -> None:
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    steps = {"steps": scale.pick(ci=10, cpu=200, gpu=200)}
    parts = blocks[: scale.pick(ci=1, cpu=2, gpu=2)]
    few = [seed for block in parts for seed in block[: scale.pick(ci=1, cpu=2, gpu=5)]]
    runs.table("digits as they are", digits_nothing, grid(arm=["nothing"], seed=seeds))
    found = runs.tune(
        "digits", DIGITS, {arm: more | steps for arm, more in TUNED.items()},
        dict.fromkeys(TUNED, 5e-3) | {"head": 2e-2},
        seeds=search_seeds(), reported=seeds, judged="validation", better="max",
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("digits", blocks)
    runs.table("digits", DIGITS, [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **steps}
        for arm, more in TUNED.items() for seed in seeds
    ])  # fmt: skip
    runs.table("rates", DIGITS, [
        {"arm": arm, **more, "rate": rate, "seed": seed, **steps}
        for arm, more in PLAIN_AND_NOISES.items()
        for rate in RATES[:: scale.pick(ci=4, cpu=1, gpu=1)] for seed in few
    ])  # fmt: skip
    for rate, arms in ((SHARED, ("lora", "ggpo 0.3", "random 0.3")), (HIGH, ("lora", "ggpo 0.3"))):
        runs.table(f"rate {rate:g}", DIGITS, [
            {"arm": arm, **TUNED[arm], "rate": rate, "seed": seed, **steps}
            for arm in arms for seed in seeds
        ])  # fmt: skip
    some = [seed for block in parts for seed in block[: scale.pick(ci=1, cpu=4, gpu=10)]]
    runs.table("forms", DIGITS, [
        {"arm": arm, **more, "rate": SHARED, "seed": seed, **steps}
        for arm, more in FORMS.items() for seed in some
    ])  # fmt: skip


OWN, ONE, STEEP = "digits, own rates", f"digits, rate {SHARED:g}", f"digits, rate {HIGH:g}"
POINTS = (-100.0, 100.0)
CLAIMS = (
    Claim(
        "mgpo-points",
        "LoRA-MGPO, the second version, is better than LoRA.",
        whose="paper", where="version 2, table of T5-base on five GLUE tasks",
        figure="88.81 against 82.08, mean of five tasks",
        unit="points", margin=1.0,
        quantity="test accuracy, LoRA-MGPO minus LoRA, both of rank 8",
        reason="one point is a seventh of the difference in the paper",
        conditions=(Condition("film reviews", n=8, spread=1.0, support=POINTS, decides=True),),
    ),
    Claim(
        "ggpo-nats",
        "LoRA-GGPO, the first version, is better than LoRA on texts.",
        whose="paper", where="version 1, abstract",
        unit="nats", margin=0.02, better="less",
        quantity="log-loss, LoRA-GGPO below LoRA, both of rank 8",
        reason="0.02 nats are two per cent of the probability of what is right",
        conditions=(
            Condition("abstracts", n=8, spread=0.008, decides=True),
            Condition("film reviews", n=8, spread=0.02),
        ),
    ),
    Claim(
        "flatter",
        "Noise in training makes the end of training flatter.",
        whose="paper", where="version 1, abstract",
        unit="%", margin=25.0, scale="log", better="less",
        quantity="sharpness, LoRA-GGPO with noise of 0.3 below LoRA",
        reason="a smaller change is hardly seen in a plot of the walk",
        conditions=(
            Condition(OWN, n=20, spread=45.0, decides=True),
            Condition(ONE, n=20, spread=45.0),
        ),
    ),
    Claim(
        "rebound",
        "At a high rate LoRA's training loss falls, rises and falls; under noise it rises less.",
        whose="paper", where="version 1, title and abstract",
        unit="nats", margin=0.1, better="less",
        quantity="largest rise of the training loss after it had fallen, LoRA-GGPO below LoRA",
        reason="a rise of a tenth of a nat is hardly seen in a plot of the loss",
        conditions=(Condition(STEEP, n=20, spread=0.2, decides=True),),
    ),
    Claim(
        "wrong-labels",
        "Among wrong labels noise makes LoRA better on new images.",
        whose="ours", unit="points", margin=2.0,
        quantity="test accuracy, LoRA-GGPO with noise of 0.3 minus LoRA",
        reason="the choice of 200 images alone moves accuracy by two to four points",
        conditions=(
            Condition(OWN, n=20, spread=3.0, support=POINTS, decides=True),
            Condition(ONE, n=20, spread=3.0, support=POINTS),
        ),
    ),
    Claim(
        "structure",
        "Noise that follows rows and gradients is better than random noise of equal size.",
        whose="ours", unit="points", margin=2.0,
        quantity="test accuracy, LoRA-GGPO minus noise of one size for all rows of a layer",
        reason="the choice of 200 images alone moves accuracy by two to four points",
        # no condition at the shared rate: the search gave both arms that very rate
        conditions=(Condition(OWN, n=20, spread=3.0, support=POINTS, decides=True),),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    search, blocks = search_seeds(), found.blocks("digits")
    full = found.values("digits", "test", arm="full")
    asis = found.values("digits as they are", "test")

    def digits(name: str, column: str, theirs: str, ours: str = "ggpo 0.3") -> Measured:
        known: dict[str, Any] = {"control": full, "nothing": asis} if column == "test" else {}
        return Measured(
            found.values(name, column, arm=ours), found.values(name, column, arm=theirs),
            **known, blocks=blocks, tuning_seeds=search,
        )  # fmt: skip

    def both(column: str, theirs: str) -> dict[str, Measured]:
        return {OWN: digits("digits", column, theirs),
                ONE: digits(f"rate {SHARED:g}", column, theirs)}  # fmt: skip

    return {
        "mgpo-points": {
            "film reviews": paired(found, "reviews", "test_accuracy", "mgpo", "rank 8")
        },
        "ggpo-nats": {
            "abstracts": paired(found, "abstracts", "test", "ggpo", "rank 8"),
            "film reviews": paired(found, "reviews", "test", "ggpo", "rank 8"),
        },
        "flatter": both("sharpness", "lora"),
        "rebound": {STEEP: digits(f"rate {HIGH:g}", "rebound", "lora")},
        "wrong-labels": both("test", "lora"),
        "structure": {OWN: digits("digits", "test", "random 0.3")},
    }


def facts(found: Found) -> list[Fact]:
    """Identities, checked by computing them."""
    x, y = torch.randn(2, 16, 8, generator=generator(0, "x"), dtype=torch.float64)

    def trained(method: Any) -> Any:
        base = nets.mlp([8, 12, 12, 8], generator=generator(0, "base"), dtype=torch.float64)
        adapted = adapt(base, method, generator=generator(0, "factors"))
        optimizer = torch.optim.Adam(adapted.parameters(), lr=1e-2)
        adapted.attach(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            (adapted(x) - y).square().mean().backward()
            optimizer.step()
        return adapted

    plain, still = trained(LoRA(rank=4)), trained(LoRAGGPO(rank=4, sigma=0.0))
    pairs = zip(plain.parameters(), still.parameters(), strict=True)
    gap = max((p - q).abs().max().item() for p, q in pairs)
    noisy = trained(LoRAGGPO(rank=4, sigma=0.3))
    shaken = (noisy(x) - copy.deepcopy(noisy)(x)).abs().max().item()
    with torch.no_grad():
        rest = (noisy(x) - noisy.merge()(x)).abs().max().item()
    count = sum(p.numel() for p in still.parameters())
    same = count == sum(p.numel() for p in plain.parameters())
    return [
        Fact("without-noise", "With noise of size 0 the training is LoRA's, bit for bit.",
             gap == 0, gap, "largest difference"),
        Fact("count", "LoRA-GGPO trains as many numbers as LoRA.", same, count, "numbers in both"),
        Fact("plain", "A training pass is shaken; merged and evaluated, nothing is left of it.",
             shaken > 1e-3 and rest < 1e-12, rest, "largest difference of the merged network"),
    ]  # fmt: skip


LAB = Lab(
    slug="lora_ggpo",
    part="lowrank",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("digits", "sst2", "minilm", "tinyshakespeare", "cranfield"),
)
