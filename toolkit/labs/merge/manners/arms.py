"""Ways to make the network politer, each in sixteen strengths, and the price on neutral texts.

Of the sixteen that strength is taken which is least rude on validation texts and raises the neutral
log-loss there by :data:`BUDGET` at most; doing nothing is always among the choices.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.seeds import generator
from toolkit.core.train.fit import fit
from toolkit.labs.beds.arms import warm
from toolkit.labs.merge.manners.language import Language
from toolkit.labs.merge.manners.network import (
    Judges,
    base,
    facts_right,
    labelled,
    manners,
    next_word_loss,
)
from toolkit.lowrank.lora import LoRA
from toolkit.merge.model_surgery import Edit, ModelSurgery, Probe, gate_rows, mean_states

BUDGET = 0.05
"""Nats per word that an arm may cost on neutral texts: five per cent of their perplexity."""
SHARES = (0.05, 0.1, 0.2, 0.4)
STRENGTHS = (1.0, 2.0, 4.0, 8.0)
"""Shares of the gate rows, and shifts in mean lengths of a gate row."""
EDITS: dict[str, tuple[str, str, int]] = {
    "published": ("opposed", "probe", 1),
    "random direction": ("opposed", "random", 1),
    "random rows": ("random", "probe", 1),
    "aligned rows": ("aligned", "probe", 1),
    "aligned, minus": ("aligned", "probe", -1),
    "mean difference": ("opposed", "difference", 1),
}
"""Arm -> which rows move, along which direction, which way."""
TUNED = ("full", "lora")
ARMS = (*EDITS, "steering", *TUNED)
STEER = tuple(0.06 * 2 ** (i / 3) for i in range(16))
"""Lengths that steering takes off a state, in mean lengths of the states there."""
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Optimizer steps after which fine-tuning is looked at."""


def settings(scale: str) -> list[tuple[float, float]]:
    """Shares and shifts of an edit, sixteen in all; four in quick checks."""
    thin = 2 if scale == "ci" else 1
    return [(share, strength) for share in SHARES[::thin] for strength in STRENGTHS[::thin]]


def thinned(values: tuple[Any, ...], scale: str) -> tuple[Any, ...]:
    """Sixteen strengths; four of them in quick checks."""
    return values[1:8:2] if scale == "ci" else values


@dataclass(frozen=True)
class Study:
    """One trained network with its probe.

    Attributes:
        directions: name -> (width,), all as long as the probe's row of the rude class.
        held_out: share of texts that the probe tells right and was not fitted on.
        angle: cosine of the probe's two rows.
        length: mean length of the states after the middle block.
    """

    spoken: Language
    model: nn.Module
    directions: dict[str, Tensor]
    held_out: float
    angle: float
    length: float


def study(seed: int, scale: str) -> Study:
    """The network of a seed, and a probe that tells rude from polite texts by its last states."""
    spoken, model = base(seed, scale)
    model.eval().requires_grad_(False)
    batch, labels = labelled(spoken, seed, scale, "fit")
    states = mean_states(model, [batch], at="norm")
    draws = generator(seed, "probe")
    probe = Probe.fit(states, labels, rate=1e-2, epochs=20, batch=32, generator=draws)
    v = probe.direction(bad=1)
    gap = states[labels == 1].mean(0) - states[labels == 0].mean(0)
    chance = torch.randn(len(v), generator=generator(seed, "direction"))
    directions = {
        "probe": v,
        "difference": gap * v.norm() / gap.norm(),
        "random": chance * v.norm() / chance.norm(),
    }
    other, right = labelled(spoken, seed, scale, "held out")
    unseen = mean_states(model, [other], at="norm")
    middle = mean_states(model, [batch], at=_middle(model)).norm(dim=1).mean()
    angle = F.cosine_similarity(probe.weight[0], probe.weight[1], dim=0)
    return Study(
        spoken, model, directions, probe.accuracy(unseen, right), float(angle), float(middle)
    )


def _middle(model: nn.Module) -> str:
    return f"blocks.{len(model.blocks) // 2}"


def surgery(this: Study, arm: str, share: float, strength: float, seed: int) -> Edit:
    """The edit of one arm; bound to no base, since it is put on one that is known."""
    side, along, sign = EDITS[arm]
    v = this.directions[along]
    method = ModelSurgery(share=share, side="aligned" if side == "aligned" else "opposed")
    # controls move the rows of the published rule: those are chosen by the probe
    chosen_by = v if along == "difference" else this.directions["probe"]
    rows = method.rows(this.model, chosen_by)
    if side == "random":
        rows = random_rows(this.model, sum(map(len, rows.values())), seed)
    alpha = sign * method.alpha_for(this.model, v, strength)
    return Edit(rows, v, alpha, {})


def random_rows(model: nn.Module, count: int, seed: int) -> dict[str, Tensor]:
    """So many gate rows drawn at random; a smaller draw of a seed is part of a larger one."""
    counts = {name: len(rows) for name, rows in gate_rows(model).items()}
    order = torch.randperm(sum(counts.values()), generator=generator(seed, "rows"))[:count]
    chosen, first = {}, 0
    for name, many in counts.items():
        inside = (order >= first) & (order < first + many)
        chosen[name] = (order[inside] - first).sort().values
        first += many
    return {name: rows for name, rows in chosen.items() if len(rows)}


@contextlib.contextmanager
def edited(model: nn.Module, edit: Edit) -> Iterator[nn.Module]:
    """A network with an edit, for a block of code."""
    with edit.apply(model):
        yield model


@contextlib.contextmanager
def steered(model: nn.Module, shift: Tensor) -> Iterator[nn.Module]:
    """A network that takes a vector off every state after its middle block."""
    hook = model.get_submodule(_middle(model)).register_forward_hook(lambda *call: call[-1] - shift)
    try:
        yield model
    finally:
        hook.remove()


Ways = list[Callable[[], contextlib.AbstractContextManager[nn.Module]]]
"""What is called for a context that holds an altered network."""


def altered(this: Study, arm: str, seed: int, scale: str) -> Ways:
    """Sixteen strengths of an arm that trains nothing."""
    if arm == "steering":
        v = this.directions["probe"]
        shifts = [strength * this.length * v / v.norm() for strength in thinned(STEER, scale)]
        return [partial(steered, this.model, shift) for shift in shifts]
    edits = [surgery(this, arm, share, strength, seed) for share, strength in settings(scale)]
    return [partial(edited, this.model, edit) for edit in edits]


def trained(this: Study, arm: str, rate: float, seed: int, scale: str) -> Ways:
    """Sixteen moments of fine-tuning on the polite texts that the probe was fitted on."""
    (rows, mask), labels = labelled(this.spoken, seed, scale, "fit")
    # whole texts only, so that no padding is learned
    polite = rows[(labels == 0) & (mask.sum(1) == rows.shape[1])]
    draws, moments = generator(seed, "order"), thinned(STEPS, scale)
    steps = moments[-1]
    batches = (polite[torch.randint(len(polite), (32,), generator=draws)] for _ in range(steps))
    found: Ways = []

    def watch(step: int, adapted: Any, network: nn.Module) -> None:
        if step + 1 in moments:
            found.append(partial(contextlib.nullcontext, copy.deepcopy(network).eval()))

    fit(
        copy.deepcopy(this.model).requires_grad_(True),
        LoRA(rank=4, alpha=8.0) if arm == "lora" else None,
        rate, seed, ((b[:, :-1], b[:, 1:]) for b in batches), next_word_loss,
        steps=steps, decay=warm, targets="blocks.*" if arm == "lora" else None, watch=watch,
    )  # fmt: skip
    return found


@dataclass(frozen=True)
class Judged:
    """What an arm did on one network.

    Attributes:
        rude, polite, damage: at each strength on validation texts: words in a hundred, and nats
            per word of neutral texts more than before.
        chosen: the strength taken, or -1 for doing nothing.
    """

    rude: list[float]
    polite: list[float]
    damage: list[float]
    chosen: int


def validated(found: Ways, before: dict[str, float], told: Judges) -> Judged:
    """Look at every strength on validation texts and choose one.

    Args:
        found: the arm's strengths.
        before: of the network as it is, on the same texts.
        told: the validation texts.
    """
    seen = []
    for way in found:
        with way() as network:
            seen.append(manners(network, told))
    damage = [one["neutral"] - before["neutral"] for one in seen]
    rude = [one["rude"] for one in seen]
    allowed = [i for i, cost in enumerate(damage) if cost <= BUDGET and rude[i] < before["rude"]]
    chosen = min(allowed, key=rude.__getitem__, default=-1)
    return Judged(rude, [one["polite"] for one in seen], damage, chosen)


def tested(network: nn.Module, told: Judges, before: dict[str, float]) -> dict[str, float]:
    """Rude and polite words in a hundred, damage and facts on test texts."""
    found = manners(network, told)
    return {
        "rude": found["rude"], "polite": found["polite"],
        "damage": found["neutral"] - before["neutral"], "facts": facts_right(network, told),
    }  # fmt: skip


def opened(this: Study, edit: Edit, seed: int, scale: str) -> dict[str, float]:
    """Mean SiLU of the edited rows' gates, on rude and on polite texts, before and after."""
    (rows, _), labels = labelled(this.spoken, seed, scale, "held out")
    whole = rows[1::2], labels[1::2]
    found = {}
    for when in ("before", "after"):
        with edit.apply(this.model) if when == "after" else contextlib.nullcontext():
            for style, name in enumerate(("polite", "rude")):
                found[f"{name}_{when}"] = _open(this.model, edit, whole[0][whole[1] == style])
    return found


@torch.no_grad()
def _open(model: nn.Module, edit: Edit, rows: Tensor) -> float:
    gates: list[Tensor] = []
    hooks = []
    for name, at in edit.rows.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        hooks.append(layer.register_forward_hook(
            lambda *call, at=at: gates.append(F.silu(call[-1][..., at]).flatten())))  # fmt: skip
    try:
        model(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.cat(gates).double().mean())
