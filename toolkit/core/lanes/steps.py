"""The training loop of one chunk of lanes: batches, gradients, SAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from toolkit.core.lanes.chains import chain
from toolkit.core.lanes.lane import Lane, labels_with_noise
from toolkit.core.lanes.losses import LaneLoss, cross_entropy
from toolkit.core.lanes.nets import LaneNet, States
from toolkit.core.lanes.optimizers import OPTIMIZERS, column
from toolkit.core.seeds import generator
from toolkit.core.train.labels import IGNORED

SAM_EPS = 1e-12  # official SAM code, beside the norm
NOTED = 32
"""Steps after which losses are looked at and progress is told."""


class Stepper:
    """Trains one chunk of lanes that share batch size and whether they use SAM.

    Args:
        net: calls the lanes.
        lanes: sorted from the longest to the shortest, so that those that go on come first.
        x, y: training set on the device.
        classes: number of classes.
        states: starting states (M, ...); not changed.
        masks: parameter name -> (M, ...).
        optimizer: ``sgd`` or ``adamw``.
        compile: whether to compile the gradient.
        rows: (M, n) examples that each lane trains on; None for all of ``x``.
        loss: takes logits (M, b, K), labels (M, b) and the lanes' numbers (M,), and returns (M, b)
            or (M,).
        numbers: (M,) what the lanes are called in ``loss``.
    """

    def __init__(
        self,
        net: LaneNet,
        lanes: Sequence[Lane],
        x: Tensor,
        y: Tensor,
        classes: int,
        states: States,
        masks: States,
        optimizer: str,
        compile: bool,
        rows: Tensor | None = None,
        loss: LaneLoss | None = None,
        numbers: Tensor | None = None,
    ):
        self.net, self.lanes, self.x = net, list(lanes), x.detach()
        self.flat, self.batch = x.new_empty(0), x.new_empty(0)
        names = net.parameters
        self.names = names
        self.weights = [states[n].clone() for n in names]
        held = set(names) | net.tied.keys()
        self.buffers = {n: t.clone() for n, t in states.items() if n not in held}
        self.masks = [masks.get(n) for n in names]
        for w, mask in zip(self.weights, self.masks, strict=True):
            if mask is not None:
                w.mul_(mask)
        for name in self.buffers.keys() & masks.keys():  # frozen parameters
            self.buffers[name].mul_(masks[name])
        self.optimizer = OPTIMIZERS[optimizer](self.weights)
        kinds = sorted({(lane.noise, lane.noise_seed) for lane in lanes})
        which = [kinds.index((lane.noise, lane.noise_seed)) for lane in lanes]
        tables = torch.stack([labels_with_noise(y, classes, *kind) for kind in kinds])
        # one row serves all lanes where there is one kind of labels
        self.labels = tables[torch.tensor(which, device=y.device)] if len(kinds) > 1 else tables
        self.rows, self.loss, self.numbers = rows, loss or cross_entropy, numbers
        self.ignoring = loss is None and bool((y == IGNORED).any())
        self.size = len(x) if rows is None else rows.shape[1]
        self.columns = self._columns(len(lanes))
        self.total, self.counted = self.weights[0].new_zeros(len(lanes)), 0
        # compiling serves networks of any form, so it takes the general way
        self.chain = None if loss or compile else chain(net.template, x, y)
        self.gradient = self._gradient
        if compile:
            cuda = x.device.type == "cuda"
            self.gradient = torch.compile(
                self._gradient, mode="reduce-overhead" if cuda else "default"
            )

    def _columns(self, count: int) -> dict[str, float | Tensor]:
        """Settings of the first ``count`` lanes: a number where all agree, else (count,)."""
        found: dict[str, float | Tensor] = {}
        for name in ("momentum", "weight_decay", "rho"):
            values = [getattr(lane, name) for lane in self.lanes[:count]]
            same = len(set(values)) == 1
            found[name] = values[0] if same else self.weights[0].new_tensor(values)
        return found

    def run(self, snapshots: Sequence[int], tick: Callable[[int], object]) -> dict[str, Tensor]:
        """Train to the end of every lane.

        Returns:
            ``final/<name>``, ``<step>/<name>``, ``facts/loss`` and ``facts/diverged``, each with
            a leading axis of the chunk's lanes.
        """
        count = len(self.lanes)
        steps = [lane.steps for lane in self.lanes]
        done = {f"final/{n}": torch.empty_like(t) for n, t in self._states().items()}
        for s in snapshots:
            done |= {f"{s}/{n}": torch.zeros_like(t) for n, t in self._states().items()}
        done["facts/loss"] = torch.zeros_like(self.total)
        done["facts/diverged"] = torch.full((count,), -1, device=self.x.device)
        ends = sorted({0, *steps, *(s for s in snapshots if s <= steps[0])})
        for begin, end in pairwise([0, *ends]):
            if end > begin:
                self._segment(begin, end, done, tick)
            going = sum(s > end for s in steps)
            states = self._states()
            active = len(next(iter(states.values())))
            if end in snapshots:
                for n, t in states.items():
                    done[f"{end}/{n}"][:active] = t
            if going < active and end > 0:
                for n, t in states.items():
                    done[f"final/{n}"][going:active] = t[going:]
                self._shrink(going)
        return done

    def _states(self) -> States:
        states = dict(zip(self.names, self.weights, strict=True)) | self.buffers
        return states | {name: states[first] for name, first in self.net.tied.items()}

    def _shrink(self, count: int) -> None:
        """Go on with the first ``count`` lanes; the others have come to their end."""
        self.weights = [t[:count].clone() for t in self.weights]
        self.optimizer.shrink(count)
        self.masks = [t if t is None else t[:count] for t in self.masks]
        self.buffers = {n: t[:count].clone() for n, t in self.buffers.items()}
        self.total = self.total[:count]
        self.rows = None if self.rows is None else self.rows[:count]
        self.numbers = None if self.numbers is None else self.numbers[:count]
        if len(self.labels) > 1:
            self.labels = self.labels[:count]
        if count:
            self.columns = self._columns(count)

    def _segment(
        self, begin: int, end: int, done: dict[str, Tensor], tick: Callable[[int], object]
    ) -> None:
        count = len(self.weights[0])
        lanes = self.lanes[:count]
        per_epoch = self.size // lanes[0].batch
        rates = torch.tensor([[lane.rate(s) for lane in lanes] for s in range(begin, end)],
                             dtype=torch.float64)  # fmt: skip
        alike = bool((rates == rates[:, :1]).all())
        on_device = rates.to(self.weights[0])
        diverged, loss = done["facts/diverged"][:count], done["facts/loss"][:count]
        epoch, order = -1, self.x
        losses, kept = self.total.new_empty(NOTED, count), 0
        for step in range(begin, end):
            now, place = divmod(step, per_epoch)
            if now != epoch:
                epoch, order = now, self._order(lanes, now, per_epoch)
            rate = float(rates[step - begin, 0]) if alike else on_device[step - begin]
            found = self._step(order[place], step, rate)
            if place == 0:
                self.total, self.counted = torch.zeros_like(found), 0
            self.total += found
            self.counted += 1
            losses[kept] = found
            kept += 1
            if kept == NOTED or step == end - 1:
                _note(diverged, losses[:kept], step + 1 - kept)
                tick(kept * count)
                kept = 0
        loss.copy_(self.total / self.counted)

    def _order(self, lanes: Sequence[Lane], epoch: int, per_epoch: int) -> Tensor:
        """Indices (steps of the epoch, M, b); equal order seeds see equal batches."""
        drawn: dict[int, Tensor] = {}
        for lane in lanes:
            if lane.order not in drawn:
                draw = generator(lane.order, "order", epoch)
                drawn[lane.order] = torch.randperm(self.size, generator=draw)
        unique = list(drawn)
        table = torch.stack(list(drawn.values()))[:, : per_epoch * lanes[0].batch]
        table = table.to(self.x.device).view(len(unique), per_epoch, lanes[0].batch)
        table = table.transpose(0, 1)
        if len(unique) == 1:
            table = table.expand(-1, len(lanes), -1)
        else:
            place = {order: i for i, order in enumerate(unique)}
            which = torch.tensor([place[lane.order] for lane in lanes], device=self.x.device)
            table = table.index_select(1, which)
        if self.rows is None:
            return table
        return self.rows.expand(per_epoch, -1, -1).gather(2, table)

    def _examples(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (M, b, ...) and labels (M, b) of a step; the next one writes over the inputs."""
        numbers = index.flatten()
        if len(self.flat) != len(numbers):
            self.flat = self.x.new_empty(len(numbers), *self.x.shape[1:])
            self.batch = self.flat.view(*index.shape, *self.x.shape[1:])
        # rows of memory as a whole; indexing by a matrix goes number by number
        torch.index_select(self.x, 0, numbers, out=self.flat)
        if len(self.labels) > 1:
            return self.batch, self.labels.gather(1, index)
        return self.batch, self.labels[0].index_select(0, numbers).view(index.shape)

    def _step(self, index: Tensor, step: int, rate: float | Tensor) -> Tensor:
        x, y = self._examples(index)
        rho = self.columns["rho"]
        loss, grads = self.gradient(self.weights, self.buffers, x, y)
        self._mask(grads)
        if isinstance(rho, Tensor) or rho > 0:
            norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
            reach = rho / (norm + SAM_EPS)
            moved = [w.addcmul(g, column(reach, g)) for w, g in zip(self.weights, grads,
                                                                    strict=True)]  # fmt: skip
            # the second pass must not move the running statistics
            frozen = {n: t.clone() for n, t in self.buffers.items()}
            _, grads = self.gradient(moved, frozen, x, y)
            self._mask(grads)
        self.optimizer.step(
            self.weights, grads, step, rate, self.columns["weight_decay"], self.columns["momentum"]
        )
        return loss

    def _mask(self, grads: Sequence[Tensor]) -> None:
        for g, mask in zip(grads, self.masks, strict=True):
            if mask is not None:
                g.mul_(mask)

    def _gradient(
        self, weights: list[Tensor], buffers: States, x: Tensor, y: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss (M,) and gradients of all lanes; lanes do not mix, so one backward serves all.

        The gradients may lie in memory that the next call writes over.
        """
        if self.chain is not None:
            return self.chain(weights, x, y)
        leaves = [w.detach().requires_grad_() for w in weights]
        states = dict(zip(self.names, leaves, strict=True)) | buffers
        out = self.net(states, x, train=True)
        loss = self.loss(out, y, self.numbers)
        if self.ignoring:
            loss = loss.sum(1) / (y != IGNORED).sum(1)
        loss = loss.mean(1) if loss.dim() == 2 else loss
        return loss.detach(), list(torch.autograd.grad(loss.sum(), leaves))


def _note(diverged: Tensor, losses: Tensor, first: int) -> None:
    """Write down where a lane's loss was first not finite.

    Args:
        diverged: (M,) steps, -1 where it has been finite so far; changed in place.
        losses: (steps, M).
        first: number of the first of these steps.
    """
    wrong = ~torch.isfinite(losses)
    new = wrong.any(0) & (diverged < 0)
    diverged.copy_(torch.where(new, first + wrong.int().argmax(0), diverged))
