"""The training loop of one chunk of lanes: batches, gradients, SAM, SGD and AdamW."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim.sgd import sgd

from toolkit.core.lanes.lane import Lane, labels_with_noise
from toolkit.core.lanes.nets import LaneNet, States, stack
from toolkit.core.seeds import generator

LaneLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
BETA2, EPS = 0.999, 1e-8
SAM_EPS = 1e-12  # official SAM code, beside the norm


def cross_entropy(logits: Tensor, y: Tensor, lanes: Tensor | None = None) -> Tensor:
    """Cross-entropy (M, b) of logits (M, b, K) and labels (M, b), the same for all lanes."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def lane_loss(losses: Sequence[nn.Module]) -> LaneLoss:
    """One loss for all lanes from one module per lane.

    Modules that are alike in all but their buffers are computed at once.

    Args:
        losses: M modules over logits (b, K) and labels (b,), each returning a number.

    Returns:
        What ``train`` takes as ``loss``: the modules' values (M',) for the lanes at hand.

    Raises:
        ValueError: no module.
    """
    kinds: dict[str, list[int]] = {}
    for m, module in enumerate(losses):
        settings = [
            (name, type(part), {k: v for k, v in sorted(vars(part).items()) if k[0] != "_"})
            for name, part in module.named_modules()
        ]
        shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        kinds.setdefault(f"{settings} {shapes}", []).append(m)
    if not kinds:
        raise ValueError("losses is empty: give one module per lane.")
    parts = [(losses[own[0]], stack([losses[m] for m in own]), own) for own in kinds.values()]
    spot = torch.empty(len(losses), dtype=torch.int64)
    for _, _, own in parts:
        spot[own] = torch.arange(len(own))

    local = threading.local()

    def loss(logits: Tensor, y: Tensor, lanes: Tensor) -> Tensor:
        # calling a module with other buffers is not safe in two threads at once
        if not hasattr(local, "modules"):
            local.modules = [copy.deepcopy(module) for module, _, _ in parts]
        if len(parts) == 1:
            return _batched(local.modules[0], parts[0][1], lanes, logits, y)
        numbers = lanes.tolist()
        value = logits.new_zeros(len(numbers))
        for module, (_, states, own) in zip(local.modules, parts, strict=True):
            members = set(own)
            here = [i for i, m in enumerate(numbers) if m in members]
            if here:
                at = torch.tensor(here, device=logits.device)
                place = spot[[numbers[i] for i in here]].to(logits.device)
                value = value.index_copy(0, at, _batched(module, states, place, logits[at], y[at]))
        return value

    return loss


def _batched(module: nn.Module, states: States, place: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    own = {name: t.to(logits.device)[place] for name, t in states.items()}
    return vmap(lambda s, z, t: functional_call(module, s, (z, t)))(own, logits, y)


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

        self.net, self.lanes, self.x = net, list(lanes), x
        self.adam = optimizer == "adamw"
        names = net.parameters
        self.names = names
        self.weights = [states[n].clone() for n in names]
        self.buffers = {n: t.clone() for n, t in states.items() if n not in set(names)}
        self.masks = [masks.get(n) for n in names]
        for w, mask in zip(self.weights, self.masks, strict=True):
            if mask is not None:
                w.mul_(mask)
        for name in self.buffers.keys() & masks.keys():  # frozen parameters
            self.buffers[name].mul_(masks[name])
        self.moments = [torch.zeros_like(w) for w in self.weights]
        self.squares = [torch.zeros_like(w) for w in self.weights] if self.adam else []
        kinds = sorted({(lane.noise, lane.noise_seed) for lane in lanes})
        which = [kinds.index((lane.noise, lane.noise_seed)) for lane in lanes]
        tables = torch.stack([labels_with_noise(y, classes, *kind) for kind in kinds])
        # one row serves all lanes where there is one kind of labels
        self.labels = tables[torch.tensor(which, device=y.device)] if len(kinds) > 1 else tables
        self.rows, self.loss, self.numbers = rows, loss or cross_entropy, numbers
        self.size = len(x) if rows is None else rows.shape[1]
        self.columns = self._columns(len(lanes))
        self.total, self.counted = x.new_zeros(len(lanes)), 0
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
            found[name] = values[0] if same else self.x.new_tensor(values)
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
        done["facts/loss"] = self.x.new_zeros(count)
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
        return dict(zip(self.names, self.weights, strict=True)) | self.buffers

    def _shrink(self, count: int) -> None:
        """Go on with the first ``count`` lanes; the others have come to their end."""
        self.weights = [t[:count].clone() for t in self.weights]
        self.moments = [t[:count].clone() for t in self.moments]
        self.squares = [t[:count].clone() for t in self.squares]
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
        on_device = rates.to(self.x)
        diverged, loss = done["facts/diverged"][:count], done["facts/loss"][:count]
        epoch, order, since = -1, self.x, 0
        for step in range(begin, end):
            now, place = divmod(step, per_epoch)
            if now != epoch:
                epoch, order = now, self._order(lanes, now, per_epoch)
            rate = float(rates[step - begin, 0]) if alike else on_device[step - begin]
            found = self._step(order[:, place], step, rate)
            bad = ~torch.isfinite(found) & (diverged < 0)
            diverged.masked_fill_(bad, step)
            if place == 0:
                self.total, self.counted = torch.zeros_like(found), 0
            self.total += found
            self.counted += 1
            since += 1
            if since == 32 or step == end - 1:
                tick(since * count)
                since = 0
        loss.copy_(self.total / self.counted)

    def _order(self, lanes: Sequence[Lane], epoch: int, per_epoch: int) -> Tensor:
        """Indices (M, steps of the epoch, b); equal order seeds see equal batches."""
        drawn: dict[int, Tensor] = {}
        for lane in lanes:
            if lane.order not in drawn:
                draw = generator(lane.order, "order", epoch)
                drawn[lane.order] = torch.randperm(self.size, generator=draw)
        unique = list(drawn)
        table = torch.stack(list(drawn.values()))[:, : per_epoch * lanes[0].batch]
        table = table.to(self.x.device).view(len(unique), per_epoch, lanes[0].batch)
        if len(unique) == 1:
            table = table.expand(len(lanes), -1, -1)
        else:
            which = [unique.index(lane.order) for lane in lanes]
            table = table[torch.tensor(which, device=self.x.device)]
        if self.rows is None:
            return table
        return self.rows.gather(1, table.flatten(1)).view(table.shape)

    def _step(self, index: Tensor, step: int, rate: float | Tensor) -> Tensor:
        x = self.x[index]
        y = self.labels.expand(len(index), -1).gather(1, index)
        rho = self.columns["rho"]
        loss, grads = self.gradient(self.weights, self.buffers, x, y)
        self._mask(grads)
        if isinstance(rho, Tensor) or rho > 0:
            norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
            reach = rho / (norm + SAM_EPS)
            moved = [w.addcmul(g, _column(reach, g)) for w, g in zip(self.weights, grads,
                                                                     strict=True)]  # fmt: skip
            # the second pass must not move the running statistics
            frozen = {n: t.clone() for n, t in self.buffers.items()}
            _, grads = self.gradient(moved, frozen, x, y)
            self._mask(grads)
        self._update(grads, step, rate)
        return loss

    def _mask(self, grads: Sequence[Tensor]) -> None:
        for g, mask in zip(grads, self.masks, strict=True):
            if mask is not None:
                g.mul_(mask)

    def _gradient(
        self, weights: list[Tensor], buffers: States, x: Tensor, y: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss (M,) and gradients of all lanes; lanes do not mix, so one backward serves all."""
        leaves = [w.detach().requires_grad_() for w in weights]
        states = dict(zip(self.names, leaves, strict=True)) | buffers
        out = self.net(states, x, train=True)
        loss = self.loss(out, y, self.numbers)
        loss = loss.mean(1) if loss.dim() == 2 else loss
        return loss.detach(), list(torch.autograd.grad(loss.sum(), leaves))

    def _lay_out(self, grads: list[Tensor]) -> None:
        """Give weights and moments the memory order of their gradients.

        Gradients of matrices come transposed. Copying them at every step would cost more than the
        update; the fused optimiser reads memory in order and needs all of one tensor alike.
        """
        for i, g in enumerate(grads):
            for tensors in (self.weights, self.moments, self.squares):
                if tensors and tensors[i].stride() != g.stride():
                    tensors[i] = torch.empty_strided(
                        g.shape, g.stride(), dtype=g.dtype, device=g.device
                    ).copy_(tensors[i])

    @torch.no_grad()
    def _update(self, grads: list[Tensor], step: int, rate: float | Tensor) -> None:
        # empty_like keeps the strides of a tensor that fills its memory; others are copied
        grads = [g if torch.empty_like(g).stride() == g.stride() else g.contiguous() for g in grads]
        self._lay_out(grads)
        decay, momentum = self.columns["weight_decay"], self.columns["momentum"]
        if self.adam:
            self._adamw(grads, step, rate, decay, momentum)
        elif not any(isinstance(v, Tensor) for v in (decay, momentum, rate)):
            sgd(
                *map(_in_order, (self.weights, grads, self.moments)),
                weight_decay=decay, momentum=momentum, lr=rate,
                dampening=0.0, nesterov=False, maximize=False, fused=True,
            )  # fmt: skip
        else:
            for w, g, m in zip(self.weights, grads, self.moments, strict=True):
                g.addcmul_(w, _column(decay, w))
                m.mul_(_column(momentum, m)).add_(g)
                w.addcmul_(m, _column(rate, w), value=-1)

    def _adamw(
        self,
        grads: list[Tensor],
        step: int,
        rate: float | Tensor,
        decay: float | Tensor,
        beta1: float | Tensor,
    ) -> None:
        first = 1 - beta1 ** (step + 1)
        second = math.sqrt(1 - BETA2 ** (step + 1))
        for w, g, m, v in zip(self.weights, grads, self.moments, self.squares, strict=True):
            w.mul_(1 - _column(rate * decay, w))
            m.lerp_(g, 1 - _column(beta1, m)) if isinstance(beta1, Tensor) else m.lerp_(
                g, 1 - beta1
            )
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            w.sub_(_column(rate / first, w) * m / (v.sqrt() / second + EPS))


def _in_order(tensors: list[Tensor]) -> list[Tensor]:
    """Views whose axes follow memory: the fused optimiser would copy any others."""
    return [t.permute(sorted(range(t.dim()), key=lambda d, t=t: -t.stride(d))) for t in tensors]


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or one number per lane, in a form that broadcasts over ``like`` (M, ...)."""
    if not isinstance(value, Tensor):
        return like.new_tensor(value)
    return value.view(-1, *[1] * (like.dim() - 1))
