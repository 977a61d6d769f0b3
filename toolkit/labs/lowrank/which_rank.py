"""What is measured on *Which rank, when?*: the variants beside LoRA of the same final rank.

On texts nothing is run here that a chapter has not run: every job is a job of a method's own lab,
with the same arguments, and is taken over. Turned MNIST is run here for all of them: a small vision
transformer that reads upright digits. Each variant is compared with LoRA at one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.labs.beds import images
from toolkit.labs.beds.arms import Arm
from toolkit.labs.lab import Found, Lab
from toolkit.labs.lowrank.adalora import abstracts_adalora, allocate, reviews_adalora
from toolkit.labs.lowrank.against import compare, paired
from toolkit.labs.lowrank.increlora import abstracts_increlora, pace, reviews_increlora
from toolkit.labs.lowrank.lora import (
    ABSTRACTS_START,
    PARTS,
    REVIEWS_START,
    abstracts_lora,
    abstracts_plain,
    reading,
    reviews_lora,
    reviews_plain,
)
from toolkit.labs.lowrank.lora_ggpo import abstracts_ggpo, reviews_ggpo, reviews_mgpo, text_ggpo
from toolkit.labs.lowrank.lora_pro import abstracts_pro, reviews_pro
from toolkit.labs.lowrank.triadaptlora import (
    abstracts_triadaptlora,
    grown,
    reviews_triadaptlora,
)
from toolkit.lowrank.increlora import IncreLoRA
from toolkit.lowrank.lora import LoRA
from toolkit.lowrank.lora_ggpo.mgpo import LoRAMGPO
from toolkit.lowrank.lora_pro import LoRAPro


def images_plain(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """The vision transformer as it is, its head, or everything, on turned images."""
    return reading(images, PARTS[arm], rate, seed, scale, part)


def _method(method: Any, *run: Any) -> dict[str, Any]:
    return reading(images, Arm("method", method), *run)


def images_lora(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """LoRA of one rank on every linear layer of the blocks, and the head."""
    return _method(LoRA(rank=rank, alpha=2.0 * rank), rate, seed, scale, part)


def _placed(method: Any, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    how = Arm("method", method)
    _, adapted, record = images.train(how, rate, seed, scale=scale, parts=(part,))
    return record | {"ranks": list(adapted.controller.ranks().values())}


def images_adalora(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """AdaLoRA of one final rank, from twice as much, with the plan it has on texts."""
    return allocate(images, arm, rank, rate, seed, scale, part, images.size(scale).steps)


def images_increlora(
    arm: str, target: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """IncreLoRA of one average final rank, with the plan it has on texts."""
    this = images.size(scale)
    method = IncreLoRA(**pace(this.steps, 6 * this.depth, target))
    return _placed(method, rate, seed, scale, part)


def images_triadaptlora(
    arm: str, target: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """TriAdaptLoRA of one average final rank, with the plan it has on texts."""
    return _placed(grown(images.size(scale).steps, target), rate, seed, scale, part)


def images_ggpo(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """LoRA-GGPO with the settings it has on texts."""
    return reading(images, text_ggpo(), rate, seed, scale, part)


def images_mgpo(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """LoRA-MGPO with the settings it has on texts."""
    return _method(LoRAMGPO(rank=8, alpha=16.0, rho=0.05, smoothing=0.9), rate, seed, scale, part)


def images_efficient(
    arm: str, rank: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """LoRA-Pro in efficient mode, whose Adam stands outside, so that the head has it too."""
    method = LoRAPro(rank=rank, alpha=2.0 * rank, mode="efficient")
    return _method(method, rate, seed, scale, part)


PLAIN: dict[str, dict[str, Any]] = {"head": {}, "full": {}}
BEDS: dict[str, dict[str, Any]] = {
    "abstracts": {
        "functions": {
            "nothing": abstracts_plain, "head": abstracts_plain, "full": abstracts_plain,
            "rank 2": abstracts_lora, "rank 8": abstracts_lora, "adalora": abstracts_adalora,
            "increlora": abstracts_increlora, "triadaptlora": abstracts_triadaptlora,
            "ggpo": abstracts_ggpo, "lora_pro": abstracts_pro,
        },
        "arms": PLAIN | {
            "rank 2": {"rank": 2}, "rank 8": {"rank": 8}, "adalora": {"rank": 2},
            "increlora": {"target": 2}, "triadaptlora": {"target": 2}, "ggpo": {},
            "lora_pro": {"rank": 8},
        },
        "starts": ABSTRACTS_START | {
            "adalora": 6.4e-2, "increlora": 1.6e-2, "triadaptlora": 6.4e-2, "ggpo": 1.6e-2,
            "lora_pro": 4e-3,
        },
        "beside": {
            "adalora": "rank 2", "increlora": "rank 2", "triadaptlora": "rank 2",
            "ggpo": "rank 8", "lora_pro": "rank 8",
        },
    },
    "reviews": {
        "functions": {
            "nothing": reviews_plain, "head": reviews_plain, "full": reviews_plain,
            "rank 1": reviews_lora, "rank 8": reviews_lora, "adalora": reviews_adalora,
            "increlora": reviews_increlora, "triadaptlora": reviews_triadaptlora,
            "ggpo": reviews_ggpo, "mgpo": reviews_mgpo, "lora_pro": reviews_pro,
        },
        "arms": PLAIN | {
            "rank 1": {"rank": 1}, "rank 8": {"rank": 8}, "adalora": {"rank": 1},
            "increlora": {"target": 8}, "triadaptlora": {"target": 8}, "ggpo": {}, "mgpo": {},
            "lora_pro": {"rank": 8},
        },
        "starts": REVIEWS_START | {
            "adalora": 1.6e-2, "increlora": 4e-3, "triadaptlora": 1.6e-2, "ggpo": 4e-3,
            "mgpo": 4e-3, "lora_pro": 5e-4,
        },
        "beside": {
            "adalora": "rank 1", "increlora": "rank 8", "triadaptlora": "rank 8",
            "ggpo": "rank 8", "mgpo": "rank 8", "lora_pro": "rank 8",
        },
    },
    "images": {
        "functions": {
            "nothing": images_plain, "head": images_plain, "full": images_plain,
            "rank 2": images_lora, "rank 8": images_lora, "adalora": images_adalora,
            "increlora": images_increlora, "triadaptlora": images_triadaptlora,
            "ggpo": images_ggpo, "mgpo": images_mgpo, "efficient": images_efficient,
        },
        "arms": PLAIN | {
            "rank 2": {"rank": 2}, "rank 8": {"rank": 8}, "adalora": {"rank": 2},
            "increlora": {"target": 2}, "triadaptlora": {"target": 2}, "ggpo": {}, "mgpo": {},
            "efficient": {"rank": 8},
        },
        "starts": {
            "head": 3.2e-2, "full": 4e-3, "rank 2": 1.6e-2, "rank 8": 1.6e-2, "adalora": 3.2e-2,
            "increlora": 1.6e-2, "triadaptlora": 3.2e-2, "ggpo": 1.6e-2, "mgpo": 1.6e-2,
            "efficient": 4e-3,
        },
        "beside": {
            "adalora": "rank 2", "increlora": "rank 2", "triadaptlora": "rank 2",
            "ggpo": "rank 8", "mgpo": "rank 8", "efficient": "rank 8",
        },
    },
}  # fmt: skip
"""For each bed: job functions and arguments by arm, middles of the first rates, and which rank of
LoRA a variant is compared with."""
PLACING = ("adalora", "increlora", "triadaptlora")
"""Variants that decide where ranks go."""


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the page: on texts as the methods' labs ask for them."""
    for name, bed in BEDS.items():
        compare(runs, scale, name, bed["functions"], bed["arms"], bed["starts"],
                scale.pick(ci=4, cpu=8, gpu=20))  # fmt: skip


def chosen(found: Found, name: str, among: Any) -> str:
    """The arm that the search found best, on validation data of seeds that no report uses."""
    tuned: Mapping[str, Any] = found.tuned(name)
    return min(
        among, key=lambda arm: min(s for s in tuned[arm]["scores"].values() if s is not None)
    )


CLAIMS = (
    Claim(
        "all-alike-nats",
        "Once every rate is tuned, no variant ends more than 0.03 nats per character below LoRA of "
        "the same rank.",
        whose="paper", unit="nats per character", margin=0.03, than=-0.06,
        quantity="log-loss on abstracts, the variant that validation prefers minus LoRA, from 0.06 "
        "below",
        reason="0.03 nats are the two per cent within which a study of nine variants found them",
        conditions=(
            Condition("rank 2", n=8, spread=0.01, decides=True),
            Condition("rank 8", n=8, spread=0.01),
        ),
    ),
    Claim(
        "all-alike-points",
        "Nor is one more than a point better on film reviews.",
        whose="paper", unit="points", margin=1.0, than=-2.0,
        quantity="test accuracy, LoRA minus the variant of its rank that validation prefers, from "
        "2 points below",
        reason="one point is what a study of nine variants calls alike",
        conditions=(Condition("rank 8", n=8, spread=1.0, support=(-98.0, 102.0), decides=True),),
    ),
    Claim(
        "all-alike-images",
        "Nor is one more than a point better on turned digits.",
        whose="paper", unit="points", margin=1.0, than=-2.0,
        quantity="test accuracy on turned MNIST, LoRA minus the variant of its rank that "
        "validation prefers, from 2 points below",
        reason="one point is what a study of nine variants calls alike",
        conditions=(
            Condition("rank 2", n=8, spread=0.5, support=(-98.0, 102.0), decides=True),
            Condition("rank 8", n=8, spread=0.5, support=(-98.0, 102.0)),
        ),
    ),
    Claim(
        "placing-nats",
        "Placing the ranks helps: the best of three methods that do ends below LoRA of the same "
        "rank.",
        whose="paper", unit="nats per character", margin=0.02, better="less",
        quantity="log-loss on abstracts, the one of AdaLoRA, IncreLoRA and TriAdaptLoRA that "
        "validation prefers below LoRA, all of final rank 2",
        reason="0.02 nats are two per cent of a character's probability",
        conditions=(Condition("abstracts", n=8, spread=0.01, decides=True),),
    ),
    Claim(
        "rank-first-nats",
        "Rank comes before variant: LoRA of rank 8 ends below the best variant of rank 2.",
        whose="ours", unit="nats per character", margin=0.05, better="less",
        quantity="log-loss on abstracts, LoRA of rank 8 below the variant of rank 2 that "
        "validation prefers",
        reason="0.05 nats are five per cent of a character's probability",
        conditions=(Condition("abstracts", n=8, spread=0.01, decides=True),),
    ),
    Claim(
        "full-nats",
        "Full training ends below every variant.",
        whose="ours", unit="nats per character", margin=0.02, better="less",
        quantity="log-loss on abstracts, full training below the variant that validation prefers",
        reason="0.02 nats are two per cent of a character's probability",
        conditions=(Condition("abstracts", n=8, spread=0.01, decides=True),),
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    beside = {name: bed["beside"] for name, bed in BEDS.items()}

    def at(name: str, rank: str) -> str:
        return chosen(found, name, [arm for arm, like in beside[name].items() if like == rank])

    def nats(ours: str, theirs: str) -> Measured:
        return paired(found, "abstracts", "test", ours, theirs)

    def above(ours: str, theirs: str) -> Measured:
        """The same where a larger loss speaks for the claim: then nothing must lie above full."""
        made = nats(ours, theirs)
        return replace(made, control=made.nothing, nothing=made.control)

    two, eight = at("abstracts", "rank 2"), at("abstracts", "rank 8")
    alike = {
        rank: paired(found, "images", "test_accuracy", rank, at("images", rank))
        for rank in ("rank 2", "rank 8")
    }
    return {
        "all-alike-nats": {"rank 2": above(two, "rank 2"), "rank 8": above(eight, "rank 8")},
        "all-alike-points": {
            "rank 8": paired(found, "reviews", "test_accuracy", "rank 8", at("reviews", "rank 8"))
        },
        "all-alike-images": alike,
        "placing-nats": {"abstracts": nats(chosen(found, "abstracts", PLACING), "rank 2")},
        "rank-first-nats": {"abstracts": nats("rank 8", two)},
        "full-nats": {"abstracts": nats("full", chosen(found, "abstracts", beside["abstracts"]))},
    }


def facts(found: Found) -> list[Fact]:
    """Final ranks are equal where arms are compared."""
    facts = []
    titles = {"abstracts": "abstracts", "reviews": "film reviews", "images": "turned digits"}
    for name, title in titles.items():
        runs = found[name]
        ranks = {arm: {sum(ranks) for ranks in runs[runs.arm == arm].ranks} for arm in PLACING}
        layers = {arm: {len(r) for r in runs[runs.arm == arm].ranks} for arm in PLACING}
        wanted = {arm: int(BEDS[name]["beside"][arm][5:]) for arm in PLACING}
        equal = all(ranks[arm] == {wanted[arm] * count for count in layers[arm]} for arm in PLACING)
        facts.append(Fact(
            f"ranks-{name}", f"On {title} the final ranks of the three methods that place them add "
            "up to those of the LoRA beside them, in every run.", equal,
        ))  # fmt: skip
    return facts


LAB = Lab(
    slug="which_rank",
    part="lowrank",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("sst2", "minilm", "tinyshakespeare", "cranfield", "mnist"),
)
