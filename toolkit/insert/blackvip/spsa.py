r"""Gradients from losses alone, and the descent that lives on them.

Two-sided, with independent entries :math:`|\Delta_j| \in [0.5, 1]` of either sign:

.. math:: \hat g = \frac1K\sum_k \frac{L(\phi + c\Delta_k) - L(\phi - c\Delta_k)}{2c}
    \oslash \Delta_k

One-sided (BAR), with directions :math:`u` on the unit sphere and :math:`P` numbers:

.. math:: \hat g = \frac{P}{K}\sum_k \frac{L(\phi + c u_k) - L(\phi)}{c}\, u_k
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]
"""Takes rows (R, P), gives the loss of each, (R,)."""


def gains(
    i: int, *, a: float = 0.01, o: float = 1.0, alpha: float = 0.4, c: float = 0.01,
    gamma: float = 0.1,
) -> tuple[float, float]:  # fmt: skip
    r"""Step size :math:`a_i = a/(i+o)^\alpha` and width :math:`c_i = c/i^\gamma` of step ``i``.

    Raises:
        ValueError: ``i`` is below 1, or ``c`` is not positive.
    """
    if i < 1:
        raise ValueError(f"i: steps count from 1, got {i}; c / 0**gamma does not exist")
    if not c > 0:
        raise ValueError(f"c: must be above 0, got {c}; losses are divided by it")
    return a / (i + o) ** alpha, c / i**gamma


def segmented_uniform(
    count: int,
    size: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Directions (count, size), entries independent and uniform on [-1, -0.5] and [0.5, 1].

    They are drawn where the generator lives, and moved to ``device``.
    """
    where = generator.device if generator is not None else torch.device("cpu")
    u = torch.rand(count, size, generator=generator, dtype=dtype, device=where).sub_(0.5)
    return u.add_(torch.where(u < 0, -0.5, 0.5)).to(device or where)


def sphere(
    count: int,
    size: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Directions (count, size), uniform on the unit sphere."""
    where = generator.device if generator is not None else torch.device("cpu")
    u = torch.randn(count, size, generator=generator, dtype=dtype, device=where)
    return u.div_(u.norm(dim=1, keepdim=True)).to(device or where)


def two_sided(plus: Tensor, minus: Tensor, delta: Tensor, c: float) -> Tensor:
    """The estimate (P,) from losses (K,) at both sides of directions (K, P)."""
    return ((plus - minus) / (2 * c * len(delta))).to(delta.dtype) @ delta.reciprocal()


def one_sided(plus: Tensor, centre: Tensor, u: Tensor, c: float) -> Tensor:
    """The estimate (P,) from losses (K,) along ``u`` (K, P), and the loss () at the centre."""
    return ((plus - centre) * (u.shape[1] / (c * len(u)))).to(u.dtype) @ u


def relative_error(size: int, directions: int) -> float:
    r"""Expected squared error of the two-sided estimate of a linear loss, over :math:`|g|^2`.

    The sum over all entries of :math:`\mathrm{Var}\,\hat g_j = \frac76(|g|^2 - g_j^2)/K`.
    """
    return 7 / 6 * (size - 1) / directions


def expected_cosine(size: int, directions: int) -> float:
    r"""What the cosine of estimate and gradient is near: :math:`1/\sqrt{1 + 7(P-1)/(6K)}`."""
    return 1 / math.sqrt(1 + relative_error(size, directions))


class Taken(NamedTuple):
    """What a step did.

    Attributes:
        loss: mean of the losses that the step saw.
        gradient: the estimate (P,).
        a, c: the step size and the width that were used.
    """

    loss: float
    gradient: Tensor
    a: float
    c: float


class SPSA:
    """Descent of a flat vector by losses alone: SPSA, and with ``beta`` above 0 SPSA-GC.

    As coded: m = g at first, then beta m + g; phi moves by -a (g + beta m). With ``lookahead``
    the losses are asked round phi + beta m; m becomes beta m - a g, and is added to phi.

    A step is whole or not at all: where ``losses`` raises, phi, m, the count of steps and the
    generator are as before.

    Args:
        phi: where to start, (P,) floating point; copied.
        a, o, alpha, c, gamma: see :func:`gains`.
        beta: how much of the momentum stays.
        directions: K.
        lookahead: which of the two forms.
        estimator: two-sided SPSA, or the one-sided estimate of BAR.
        generator: of the directions; left out, a step needs them given.

    Raises:
        ValueError: no vector, or a gain out of range.
    """

    def __init__(
        self, phi: Tensor, *, a: float = 0.01, o: float = 1.0, alpha: float = 0.4,
        c: float = 0.01, gamma: float = 0.1, beta: float = 0.9, directions: int = 5,
        lookahead: bool = False, estimator: str = "spsa",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if phi.dim() != 1 or not phi.numel() or not phi.is_floating_point():
            raise ValueError(f"phi: one vector of floating point, got {tuple(phi.shape)}")
        if estimator not in ("spsa", "one-sided"):
            raise ValueError(f"estimator: choose spsa or one-sided, got {estimator!r}")
        if not 0 <= beta < 1 or directions < 1:
            raise ValueError(
                f"beta: from 0 to below 1, directions: 1 or more, got {beta}, {directions}"
            )
        self.options = {"a": a, "o": o, "alpha": alpha, "c": c, "gamma": gamma}
        gains(1, **self.options)
        self.beta, self.directions = beta, directions
        self.lookahead, self.estimator, self.generator = lookahead, estimator, generator
        self.phi = phi.detach().clone()
        self.m = torch.zeros_like(self.phi)
        self.taken = 0

    @property
    def asked(self) -> int:
        """Losses that a step asks for: 2K, or one-sided K + 1."""
        return 2 * self.directions if self.estimator == "spsa" else self.directions + 1

    def draw(self) -> Tensor:
        """Directions (K, P) of the next step."""
        if self.generator is None:
            raise ValueError("delta: give directions, or a generator to draw them from")
        make = segmented_uniform if self.estimator == "spsa" else sphere
        phi = self.phi
        return make(self.directions, len(phi), self.generator, phi.dtype, phi.device)

    @torch.no_grad()
    def step(
        self, losses: Losses, delta: Tensor | None = None,
        given: tuple[float, float] | None = None,
    ) -> Taken:  # fmt: skip
        """One step.

        Args:
            losses: gives the losses (R,) of rows (R, P). Two-sided the rows are
                +1, -1, +2, -2, ...; one-sided the centre, then 1, 2, ...
            delta: directions (K, P); left out, drawn.
            given: (a_i, c_i) of this step in place of those of the schedule.

        Raises:
            ValueError: directions or gains that do not fit.
            FloatingPointError: a loss is not finite.
        """
        before = None if self.generator is None else self.generator.get_state()
        try:
            return self._step(losses, delta, given)
        except BaseException:
            if self.generator is not None and before is not None:
                self.generator.set_state(before)
            raise

    def _step(
        self, losses: Losses, delta: Tensor | None, given: tuple[float, float] | None
    ) -> Taken:
        a, c = given or gains(self.taken + 1, **self.options)
        if not c > 0:
            raise ValueError(f"given: the width c must be above 0, got {c}")
        delta = self.draw() if delta is None else delta.to(self.phi)
        if delta.dim() != 2 or delta.shape[1] != len(self.phi):
            raise ValueError(f"delta: (K, {len(self.phi)}), got {tuple(delta.shape)}")
        if self.estimator == "spsa" and bool((delta == 0).any()):
            raise ValueError("delta: it holds a 0, and the estimate divides by each entry")
        at = torch.add(self.phi, self.m, alpha=self.beta) if self.lookahead else self.phi
        found = losses(self._rows(at, delta, c)).detach()
        if found.shape != (self._count(len(delta)),):
            raise ValueError(f"losses: one for each row, got shape {tuple(found.shape)}")
        if not bool(found.isfinite().all()):
            raise FloatingPointError("losses: one is not finite; take a smaller a or c")
        found = found.to(self.phi.device)
        if self.estimator == "spsa":
            g = two_sided(found[0::2], found[1::2], delta, c)
        else:
            g = one_sided(found[1:], found[0], delta, c)
        if self.lookahead:
            m = torch.sub(self.beta * self.m, g, alpha=a)
            phi = self.phi + m
        else:
            m = torch.add(g, self.m, alpha=self.beta) if self.taken else g
            phi = torch.sub(self.phi, torch.add(g, m, alpha=self.beta), alpha=a)
        loss = float(found.mean())
        self.phi, self.m, self.taken = phi, m, self.taken + 1  # all or nothing
        return Taken(loss, g, a, c)

    def _count(self, directions: int) -> int:
        return 2 * directions if self.estimator == "spsa" else directions + 1

    def _rows(self, at: Tensor, delta: Tensor, c: float) -> Tensor:
        if self.estimator == "spsa":
            moved = delta * c
            return torch.stack([at + moved, at - moved], 1).flatten(0, 1)
        return torch.cat([at[None], at + delta * c])

    def state_dict(self) -> dict[str, Tensor]:
        """phi, m, the count of steps and the generator's state, all tensors."""
        found = {"phi": self.phi, "m": self.m, "steps": torch.tensor(self.taken)}
        if self.generator is not None:
            found["generator"] = self.generator.get_state()
        return {name: value.clone() for name, value in found.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it is of another size, or lacks an entry; nothing is changed then.
        """
        lacking = {"phi", "m", "steps"} - state.keys()
        if lacking or state["phi"].shape != self.phi.shape:
            what = f"lacks {sorted(lacking)}" if lacking else f"holds {len(state['phi'])} numbers"
            raise ValueError(f"state: it {what}; here are {len(self.phi)}")
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"].cpu())
        self.phi, self.m = (state[name].to(self.phi).clone() for name in ("phi", "m"))
        self.taken = int(state["steps"])
