r"""AdamR: Adam with a pull towards the pre-trained weights, equally strong for all coordinates.

.. math::
    \bar v_t = \sqrt{\tfrac1N \textstyle\sum_k \hat v_{t,k}}, \qquad
    \theta_t = \theta_{t-1} - \frac{\eta\lambda}{\bar v_t}(\theta_{t-1} - \theta_P)
    - \eta \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

The mean is taken over every tensor of every group that has a gradient. With L1 the sign of the
difference stands in its place. DAREx-L2 is dropping after training so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

BASE = "base"


class AdamR(torch.optim.Adam):
    """PyTorch's Adam, and before each of its steps the pull.

    The base is part of the state, so that ``state_dict`` carries it.

    Args:
        params: parameters, or groups of them.
        base: a tensor for each parameter, in order over all groups; None in place of one (a new
            head) for no pull. Left out, the values that the parameters have now.
        lr: learning rate.
        betas, eps, amsgrad: as in Adam.
        decay: strength of the pull; a group may have its own.
        norm: "l2" pulls by the difference, "l1" by its sign.
        foreach: as in Adam.

    Raises:
        ValueError: a negative ``decay``, an unknown norm, or base tensors that do not fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Iterable[Tensor | None] | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 1e-4,
        norm: Literal["l2", "l1"] = "l2",
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
    ) -> None:
        self.pulled: dict[Tensor, Tensor] = {}
        groups = _groups(params)
        if base is not None:
            _shared_out(groups, list(base))
        self._ours = {"decay": decay, "norm": norm}
        super().__init__(groups, lr, betas, eps, amsgrad=amsgrad, foreach=foreach)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``base``, ``decay`` and ``norm``."""
        group = self._ours | param_group
        parameters = group["params"] = _listed(group["params"])
        given = group.pop(BASE, None)
        if not group["decay"] >= 0:
            raise ValueError(f"decay={group['decay']}: must be 0 or more")
        if group["norm"] not in ("l2", "l1"):
            raise ValueError(f"norm={group['norm']!r}: choose 'l2' or 'l1'")
        plain = [p[1] if isinstance(p, tuple) else p for p in parameters]
        start = [p.detach() for p in plain] if given is None else list(given)
        if len(start) != len(plain):
            raise ValueError(f"base has {len(start)} tensors for {len(plain)} parameters")
        for number, (p, one) in enumerate(zip(plain, start, strict=True)):
            if one is not None and one.shape != p.shape:
                raise ValueError(
                    f"base tensor {number} has shape {tuple(one.shape)}, its parameter "
                    f"{tuple(p.shape)}"
                )
        super().add_param_group(group)
        for p, one in zip(plain, start, strict=True):
            if one is not None:
                self.pulled[p] = one.detach().to(p, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"pulled": self.pulled, "_ours": self._ours}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; the loss if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._remember()
        self._pull()
        super().step()
        self._remember()
        return loss

    def _remember(self) -> None:
        """Take bases from the state, which may have been loaded, or put them there."""
        for p, base in self.pulled.items():
            state = self.state.get(p)
            if state:  # Adam fills an empty one at its first step
                self.pulled[p] = state.setdefault(BASE, base)

    def _pull(self) -> None:
        """Move every parameter that has a gradient towards its base."""
        if all(group["decay"] == 0 for group in self.param_groups):
            return
        spread = self._spread()
        for group in self.param_groups:
            for p in group["params"]:
                if group["decay"] == 0 or p.grad is None or p not in self.pulled:
                    continue
                way = p - self.pulled[p]
                if group["norm"] == "l1":
                    way.sign_()
                p.sub_(way.mul_(group["decay"] * group["lr"] / spread.to(p.device)))

    def _spread(self) -> Tensor:
        """Root of the mean of the corrected second moments that this step will have; 1 for 0.

        A sum of squares of the gradient is enough: no tensor of moments is formed twice.
        """
        terms, count = [], 0
        for group in self.param_groups:
            beta = group["betas"][1]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse or p.is_complex():
                    raise RuntimeError("AdamR takes dense, real gradients")
                state, wide = self.state.get(p) or {}, _wide(p)
                if group["amsgrad"]:
                    total = _largest(p.grad, state, beta).sum(dtype=wide)
                else:
                    total = (1 - beta) * torch.linalg.vector_norm(p.grad, dtype=wide).square()
                    if state:
                        total = total + beta * state["exp_avg_sq"].sum(dtype=wide)
                time = float(state["step"]) + 1 if state else 1.0
                terms.append(total.double() / (1 - beta**time))
                count += p.numel()
        if not count:
            return torch.ones(())
        spread = torch.stack([term.to(terms[0].device) for term in terms]).sum().div(count).sqrt()
        return torch.where(spread == 0, torch.ones_like(spread), spread)


def _largest(grad: Tensor, state: dict[str, Tensor], beta: float) -> Tensor:
    """AMSGrad's second moments after this gradient."""
    new = grad.square() * (1 - beta)
    if not state:
        return new
    return torch.maximum(state["max_exp_avg_sq"], new.add_(state["exp_avg_sq"], alpha=beta))


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups with lists of parameters; one group if plain parameters are given."""
    given = _listed(params)
    groups = [dict(one) for one in given] if given and isinstance(given[0], dict) else None
    groups = [{"params": given}] if groups is None else groups
    for group in groups:
        group["params"] = _listed(group["params"])
    return groups


def _shared_out(groups: list[dict[str, Any]], base: list[Tensor | None]) -> None:
    """Give each group its part of the base.

    Raises:
        ValueError: there are more or fewer tensors than parameters.
    """
    count = sum(len(group["params"]) for group in groups)
    if len(base) != count:
        raise ValueError(f"base has {len(base)} tensors for {count} parameters")
    start = 0
    for group in groups:
        end = start + len(group["params"])
        group[BASE], start = base[start:end], end
