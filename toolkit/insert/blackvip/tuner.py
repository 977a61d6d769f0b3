"""The loop's one step: prompted images go to the black box, losses come back, phi moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.insert.blackvip.box import BlackBox
from toolkit.insert.blackvip.spsa import SPSA
from toolkit.insert.blackvip.vectors import Flat

Encoder = Callable[[Tensor], Any]
Loss = Callable[[Tensor, Tensor], Tensor]
NUMBERS = 2**23
"""Pixels and channels of prompted images that are made at one time, at most."""


class Progress(NamedTuple):
    """What one step did.

    Attributes:
        loss: mean loss of the prompted images that were sent, in nats.
        images, calls: what this step sent to the black box.
        a, c: step size and width.
    """

    loss: float
    images: int
    calls: int
    a: float
    c: float


class Tuner:
    """Prompts, their optimiser and the valid range of pixels; see :meth:`BlackVIP.start`.

    Args:
        prompter: a :class:`Coordinator`, a :class:`Frame`, or any :class:`Flat`.
        optimiser: holds phi.
        encoder: takes images, gives features (N, d_z); None where the prompter reads none.
        eps: prompt strength.
        mean, std: by which images were normalised, one for each channel or one for all.
        at_once: most prompted images made at one time; None bounds them by :data:`NUMBERS`.

    Raises:
        ValueError: arguments that do not fit.
    """

    def __init__(
        self, prompter: Flat, optimiser: SPSA, encoder: Encoder | None, eps: float,
        mean: Sequence[float], std: Sequence[float], at_once: int | None = None,
    ) -> None:  # fmt: skip
        if prompter.features and encoder is None:
            raise ValueError(
                f"encoder: the prompter reads {prompter.features} features; give a function that "
                "takes images and returns them"
            )
        mu, sigma = (torch.as_tensor(part, dtype=torch.float32).flatten() for part in (mean, std))
        for name, part in (("mean", mu), ("std", sigma)):
            if len(part) not in (1, prompter.channels):
                raise ValueError(f"{name}: 1 or {prompter.channels} numbers, got {len(part)}")
        if not bool((sigma > 0).all()):
            raise ValueError("std: every channel's must be above 0")
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once: 1 or more images, or None, got {at_once}")
        self.prompter, self.optimiser, self.encoder = prompter, optimiser, encoder
        self.eps, self.at_once = eps, at_once
        self.low, self.high = ((end - mu) / sigma for end in (0.0, 1.0))
        self.images = self.calls = 0

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """What the frozen encoder says of images: (N, d_z), or (N, 0) without one."""
        if not self.prompter.features or self.encoder is None:
            return x.new_empty(len(x), 0)
        return torch.as_tensor(self.encoder(x)).detach()

    @torch.no_grad()
    def prompt(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The prompts eps h(x) (N, C, H, W) that images would get now, by the kept statistics."""
        self._fits(x)
        before = self.prompter.training
        self.prompter.eval()
        try:
            h = self.prompter.prompts(
                self.optimiser.phi[None], self.features(x) if z is None else z
            )
        finally:
            self.prompter.train(before)
        return self.eps * h[0].to(x).expand_as(x)

    def prompted(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Images with their prompts, cut to the valid range."""
        return self.clip(x + self.prompt(x, z))

    def clip(self, x: Tensor) -> Tensor:
        """Images (..., C, H, W) cut to pixels of 0 to 1 before normalisation."""
        low, high = (end.to(x)[:, None, None] for end in (self.low, self.high))
        return x.clamp(low, high)

    def predict(self, box: BlackBox, x: Tensor) -> Tensor:
        """The black box's log-probabilities (N, classes) of prompted images; they count there."""
        box.afford(len(x))
        return box(self.prompted(x))

    def step(
        self,
        box: BlackBox,
        x: Tensor,
        y: Tensor,
        *,
        z: Tensor | None = None,
        loss: Loss | None = None,
        delta: Tensor | None = None,
        given: tuple[float, float] | None = None,
    ) -> Progress:
        """Ask the box about 2K prompted copies of a batch, and move phi. All or nothing.

        Args:
            box: the black box.
            x: normalised images (N, C, H, W).
            y: labels (N,), whole numbers from 0.
            z: features of ``x`` that were kept; left out, the encoder is asked once.
            loss: takes log-probabilities (N, classes) and ``y``, gives one number; left out,
                cross-entropy.
            delta: directions (K, P); left out, drawn.
            given: (a_i, c_i) in place of the schedule's.

        Raises:
            BudgetSpent: the step's images are more than the budget leaves; none was sent.
            CallFailed, BadAnswer, FloatingPointError, ValueError, TypeError: in each case phi, m,
                statistics, generator and the count of steps are as before, so the same step can
                be taken again. What was sent stays counted.
        """
        self._fits(x)
        if y.shape != (len(x),) or y.is_floating_point():
            raise ValueError(
                f"y: one whole label for each of {len(x)} images, got {tuple(y.shape)}"
            )
        if self.optimiser.estimator == "spsa":
            rows = 2 * (self.optimiser.directions if delta is None else len(delta))
        else:
            rows = 1 + (self.optimiser.directions if delta is None else len(delta))
        box.afford(rows * len(x))
        z = self.features(x) if z is None else z
        kept = {name: part.clone() for name, part in self.prompter.named_buffers()}
        counted = box.images, box.calls
        self.prompter.train()
        try:
            done = self.optimiser.step(
                lambda phi: self.losses(box, phi, x, y, z, loss), delta, given
            )
        except BaseException:
            for name, part in self.prompter.named_buffers():
                part.copy_(kept[name])
            raise
        finally:
            sent = box.images - counted[0], box.calls - counted[1]
            self.images, self.calls = self.images + sent[0], self.calls + sent[1]
        return Progress(done.loss, *sent, done.a, done.c)

    @torch.no_grad()
    def losses(
        self, box: BlackBox, phi: Tensor, x: Tensor, y: Tensor, z: Tensor,
        loss: Loss | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss (R,) of every row of phi (R, P) on one batch; arguments as of :meth:`step`."""
        each = max(1, (self.at_once or NUMBERS // x[0].numel()) // len(x))
        found = []
        for n, part in enumerate(phi.split(each)):
            own = self.optimiser.phi if n == 0 else None
            h = self.prompter.prompts(part, z, own)
            sent = x.new_empty(len(part), *x.shape)
            torch.add(x, h.to(x), alpha=self.eps, out=sent)
            low, high = (end.to(x)[:, None, None] for end in (self.low, self.high))
            said = box(sent.clamp_(low, high).flatten(0, 1))
            if int(y.max()) >= said.shape[1] or int(y.min()) < 0:
                raise ValueError(
                    f"y: labels {int(y.min())} to {int(y.max())}, the box knows "
                    f"{said.shape[1]} classes, counted from 0"
                )
            said = said.view(len(part), len(x), -1)
            if loss is None:
                where = y.to(said.device).expand(len(part), -1)[..., None]
                found.append(-said.gather(2, where)[..., 0].mean(1))
            else:
                found.append(torch.stack([torch.as_tensor(loss(one, y)) for one in said]))
        return torch.cat(found)

    def _fits(self, x: Tensor) -> None:
        this = self.prompter
        wanted = (this.channels, this.size, this.size)
        if x.dim() != 4 or not len(x) or tuple(x.shape[1:]) != wanted or not x.is_floating_point():
            raise ValueError(
                f"x: images (N, {', '.join(map(str, wanted))}) of floating point, got "
                f"{tuple(x.shape)} of {x.dtype}; resize and normalise them, or build the prompter "
                "for their size"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors: phi, m, steps, generator, statistics, what
        was sent. The box's own count is ``box.state_dict()``."""
        buffers = {f"buffer.{k}": v.clone() for k, v in self.prompter.named_buffers()}
        sent = {"images": torch.tensor(self.images), "calls": torch.tensor(self.calls)}
        return self.optimiser.state_dict() | buffers | sent

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`; the next step is the one that was to come.

        Raises:
            ValueError: it belongs to another prompter; nothing is changed then.
        """
        buffers = dict(self.prompter.named_buffers())
        lacking = [
            k for k in ("images", "calls", *(f"buffer.{k}" for k in buffers)) if k not in state
        ]
        if lacking:
            raise ValueError(f"state: it lacks {lacking[0]}; it is of another prompter")
        self.optimiser.load_state_dict(state)
        for name, part in buffers.items():
            part.copy_(state[f"buffer.{name}"])
        self.images, self.calls = int(state["images"]), int(state["calls"])

    def write(self) -> Flat:
        """Write phi into the prompter's parameters, for use as a plain module; returns it."""
        self.prompter.put(self.optimiser.phi)
        return self.prompter
