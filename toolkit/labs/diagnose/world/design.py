"""How networks of the world are built, pre-trained and tuned, many lanes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core import lanes
from toolkit.core.lanes import Lane
from toolkit.core.lanes.nets import LaneNet, States, initial, take
from toolkit.core.seeds import generator
from toolkit.diagnose.longtail_bias.adaptformer import CosineHead, add_adaptformer
from toolkit.labs.diagnose.world.pairs import Set, pooled


@dataclass(frozen=True)
class Design:
    """How networks of the world are built and trained.

    Args:
        build: makes the network without its head, from a generator; it ends in a module ``head``
            of input width ``width``.
        classes: K.
        width: of the features.
        bottleneck: of the AdaptFormers.
        scale: of the cosine head.
        pretrain, tune: seed and order are filled in, steps are derived from the epochs.
        pretrain_epochs, tune_epochs: passes over the training set.
        train: what trains lanes; ``toolkit.core.lanes.train``, or the same runs one by one.
        options: of ``train``.
        optimizer: of the pre-training; students are tuned with SGD.
        device: where lanes train and answer; data come from and logits go to the CPU.
    """

    build: Callable[[torch.Generator], nn.Module]
    classes: int
    width: int
    bottleneck: int
    scale: float
    pretrain: Lane
    tune: Lane
    pretrain_epochs: int
    tune_epochs: int
    train: Callable[..., Any] = lanes.train
    options: tuple[tuple[str, Any], ...] = (("workers", 1),)
    optimizer: str = "sgd"
    device: torch.device | str = "cpu"

    def foundation(self, draw: torch.Generator) -> nn.Module:
        """The network that is pre-trained, with a cosine head."""
        network = self.build(draw)
        network.head = CosineHead(self.width, self.classes, self.scale, draw)
        return network

    def student(self, draw: torch.Generator) -> nn.Module:
        """The same with AdaptFormers; these and the head train."""
        network = self.foundation(draw)
        add_adaptformer(network, self.bottleneck, generator=draw)
        network.head.requires_grad_(True)
        return network

    def logits(self, states: States, x: Tensor, batch: int = 500) -> Tensor:
        """Logits (M, N, K) of foundation models or students (M, ...) for inputs x (N, ...).

        ``batch`` inputs are answered at a time, which bounds the memory.
        """
        return self._answer(self._template(states), states, x, batch)

    def features(self, states: States, x: Tensor, batch: int = 500) -> Tensor:
        """What the head sees, (M, N, width), of foundation models or students, for x (N, ...)."""
        network = self._template(states)
        network.head = nn.Identity()
        body = {name: t for name, t in states.items() if not name.startswith("head.")}
        return self._answer(network, body, x, batch)

    def _template(self, states: States) -> nn.Module:
        adapted = any(".adapter." in name for name in states)
        return (self.student if adapted else self.foundation)(generator(0, "template"))

    def _answer(self, network: nn.Module, states: States, x: Tensor, batch: int) -> Tensor:
        there = {name: t.to(self.device) for name, t in states.items()}
        return LaneNet(network.to(self.device)).predict(there, x.to(self.device), batch).cpu()

    def pretrained(self, sets: Sequence[Set], seeds: Sequence[int], **change: Any) -> States:
        """Pre-train foundation models.

        Args:
            sets: the pre-training set of each, inputs (n, ...) and labels (n,), all of one size.
            seeds: of its weights and of its data order.
            change: fields of ``pretrain`` that differ here, such as ``lr``.

        Returns:
            Their states (M, ...).

        Raises:
            ValueError: sets of different sizes, or what ``toolkit.core.lanes.train`` refuses.
        """
        x, y, rows = pooled(sets)
        x, y = x.to(self.device), y.to(self.device)
        base = replace(self.pretrain, **change)
        steps = self.pretrain_epochs * (rows.shape[1] // base.batch)
        runs = [replace(base, seed=s, order=s, steps=steps) for s in seeds]
        options = {"optimizer": self.optimizer, **dict(self.options)}
        return self.train(self.foundation, runs, x, y, rows=rows, **options).states

    def tuned(
        self,
        states: States,
        picks: Sequence[int],
        sets: Sequence[Set],
        losses: Sequence[nn.Module],
        seeds: Sequence[int],
        rates: Sequence[float] | None = None,
    ) -> States:
        """Students, one for each pick.

        Args:
            states: foundation models (M, ...).
            picks: which of them each student starts from.
            sets: its downstream set. One object given many times is stored once.
            losses: its loss.
            seeds: of its adapters and of its data order.
            rates: its learning rate; that of ``tune`` by default.

        Returns:
            States (students, ...).

        Raises:
            ValueError: sets of different sizes, or what ``toolkit.core.lanes.train`` refuses.
        """
        unique = list({id(s): s for s in sets}.values())
        place = {id(s): i for i, s in enumerate(unique)}
        x, y, rows = pooled(unique)
        x, y = x.to(self.device), y.to(self.device)
        rows = rows[torch.tensor([place[id(s)] for s in sets])]
        start = initial(self.student, seeds)
        # a block that has an AdaptFormer beside it is called ".block." inside its old name
        known = {_plain(name): name for name in start}
        base = take(states, list(picks))
        start |= {known[name]: t for name, t in base.items()}
        steps = self.tune_epochs * (rows.shape[1] // self.tune.batch)
        runs = [
            replace(self.tune, seed=s, order=s, steps=steps, lr=rate)
            for s, rate in zip(seeds, rates or [self.tune.lr] * len(seeds), strict=True)
        ]
        loss = lanes.lane_loss(losses)
        return self.train(
            self.student, runs, x, y, states=start, rows=rows, loss=loss, **dict(self.options)
        ).states


def _plain(name: str) -> str:
    return name.replace(".block.", ".") if ".adapter." not in name else name
