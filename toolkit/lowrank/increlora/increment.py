"""IncreLoRA's score of a layer, read off its output's gradient, and the controller that grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.steps.growth import (
    GrowthController,
    Scorer,
    average_over_ranks,
    choose,
    looks,
)
from toolkit.core.adapt.steps.orthogonality import value_and_gradients


def size_factor(site: Site, normalise: str) -> float:
    """What the sum over a matrix is divided by: mn ("mean") or its root ("sqrt")."""
    entries = site.rows * site.cols
    return float(entries) if normalise == "mean" else math.sqrt(entries)


def weight_gradient(base: nn.Module, site: Site, x: Tensor, g: Tensor) -> Tensor:
    """Gradient of the loss for the (m, n) matrix of a layer, from its input and output gradient.

    Args:
        base, site: a linear, Conv1D or convolution layer.
        x: its input; features last for linear layers, channels first for convolutions.
        g: gradient at its output.
    """
    x = x.to(g.dtype)
    if site.kind != "conv":
        return g.reshape(-1, site.rows).T @ x.reshape(-1, site.cols)
    dims = len(site.shape) - 2
    if x.dim() == dims + 1:
        x, g = x.unsqueeze(0), g.unsqueeze(0)
    # padded by hand, so that every padding mode and "same" are one case
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
    gradient = (
        torch.nn.grad.conv1d_weight,
        torch.nn.grad.conv2d_weight,
        torch.nn.grad.conv3d_weight,
    )[dims - 1]
    return site.to_matrix(
        gradient(x, site.shape, g, base.stride, 0, base.dilation, site.groups).contiguous()
    )


@torch.no_grad()
def increment_score(
    base: nn.Module, site: Site, left: Tensor, right: Tensor, x: Tensor, g: Tensor
) -> Tensor:
    r""":math:`\sum|\Delta W\odot G|` of one layer, a scalar; G is formed and dropped here.

    Args:
        left, right: (m, r) and (r, n) with :math:`\Delta W` their product.
        x, g: the layer's input and the gradient at its output.
    """
    if site.kind == "embedding":
        # only the entries that were looked up have a gradient
        seen, where = torch.unique(x, return_inverse=True)
        G = torch.zeros(len(seen), site.rows, dtype=g.dtype, device=g.device)
        G.index_add_(0, where.flatten(), g.reshape(-1, site.rows))
        if base.padding_idx is not None:
            G.masked_fill_((seen == base.padding_idx)[:, None], 0.0)
        return ((left @ right[:, seen]).T * G).abs_().sum()
    G = weight_gradient(base, site, x, g).to(left.dtype)
    return G.mul_(left @ right).abs_().sum()


class IncrementController(GrowthController):
    r"""Around each step: penalty, score and growth before; after the target, nothing is scored.

    .. math:: I_k \leftarrow \beta_1 I_k + (1-\beta_1) S_k,\quad
        U_k \leftarrow \beta_2 U_k + (1-\beta_2)|S_k - I_k|,\quad \hat S_k = I_k U_k

    Attributes: ``importance`` and ``uncertainty``, (N,) each, and those of
    :class:`toolkit.core.adapt.steps.growth.GrowthController`.

    Args:
        method: the hyperparameters.
        layers: layer name -> its adapter.
        optimizer, total_steps, scorer, weight_decay: see the base class.
        scaler: the ``torch.amp.GradScaler`` of the run, if any: the scores are divided by its
            scale, as it does with the gradients.
    """

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        scorer: Scorer | None = None,
        weight_decay: float | None = None,
        scaler: Any = None,
    ):
        target = method.total_rank
        if target is None:
            target = method.target_rank * len(layers)
        self.method, self.scaler = method, scaler
        super().__init__(
            "IncreLoRA",
            layers,
            optimizer,
            total_steps,
            target=target,
            warmup=method.warmup,
            interval=method.interval,
            growth=method.growth,
            restart=method.restart,
            restart_warmup=method.restart_warmup,
            weight_decay=weight_decay,
            scorer=scorer,
        )
        first = self.layers[0].A0
        self.importance = torch.zeros(len(self.layers), dtype=first.dtype, device=first.device)
        self.uncertainty = torch.zeros_like(self.importance)
        self.seen = False
        self._listen()

    def _check_schedule(self, total_steps: int) -> None:
        super()._check_schedule(total_steps)
        m = self.method
        rounds = looks(m.warmup, m.interval, total_steps)
        missing = self.target - self.total
        most = rounds * min(m.top, len(self.layers)) * m.growth
        if missing > most:
            raise ValueError(
                f"total_steps={total_steps} has {rounds} growths after warmup={m.warmup} at "
                f"interval={m.interval}, which add {most} ranks at most, but {missing} are "
                "missing to the target; lower interval or warmup, raise top or growth, or train "
                "longer"
            )

    def _listen(self) -> None:
        """Score while there is rank to give; afterwards take the reserves out of the output."""
        open_ = self.growing and self.step < self.total_steps
        self.listening = open_ and self.scorer is None and self._near()
        for layer in self.layers:
            layer.listening = self.listening
            layer.score = None
            if not open_:
                layer.retire()

    def released(self) -> None:
        """Stop the layers from scoring for nobody."""
        for layer in self.layers:
            layer.listening, layer.score = False, None

    def _near(self) -> bool:
        """Whether the coming step is one of the last ``window`` up to a look."""
        first = max(self.step, self.warmup + 1)
        look = -(-first // self.interval) * self.interval
        return self.method.window is None or look - self.step < self.method.window

    @torch.no_grad()
    def before_step(self) -> None:
        grow = self.allocating
        try:
            self.check_gradients(finite=False)
            self.average_grown()  # first, so that all processes find the same gradients finite
            if grow:
                self.check_gradients(finite=True)
            amounts = self._decide(grow) if self.growing else None
        finally:
            for layer in self.layers:
                layer.score = None
        self._add_penalty()
        if amounts is not None and any(amounts):
            self.grow(amounts)
        super().before_step()

    def after_step(self) -> None:
        super().after_step()
        if self.step == self.total_steps or (self.method.window is not None and self.growing):
            self._listen()

    def grow(self, amounts: Sequence[int], draws: Mapping[str, Any] | None = None) -> None:
        super().grow(amounts, draws)
        if not self.growing:
            self._listen()

    def _decide(self, grow: bool) -> list[int] | None:
        """Take this step's scores into the averages; how much each layer grows, if it is time."""
        if self.listening:
            self._average_scores()
        if not grow:
            return None
        if self.scorer is None and not self.seen:
            raise RuntimeError(
                "growth was due before any score exists: no adapted layer ran in training mode "
                "with gradients. Call model.train(), or give attach() a scorer"
            )
        scores = torch.as_tensor(self.scores(), dtype=torch.float64).cpu()
        if len(scores) != len(self.layers):
            raise ValueError(
                f"scorer gave {len(scores)} scores for {len(self.layers)} layers; one per layer"
            )
        for name, score in zip(self.names, scores.tolist(), strict=True):
            if not math.isfinite(score):
                self.refuse(name, "score")
        m = self.method
        rooms = [layer.limit - layer.rank for layer in self.layers]
        return choose(scores, self.target - self.total, m.growth, m.top, rooms, m.overshoot)

    def _average_scores(self) -> None:
        found = [layer.score for layer in self.layers]
        self.seen = self.seen or any(s is not None for s in found)
        I, U = self.importance, self.uncertainty
        zero = torch.zeros_like(I[0])
        now = torch.stack([zero if s is None else s.to(I.device, I.dtype) for s in found])
        if self.scaler is not None:
            now = now / self.scaler.get_scale()
        average_over_ranks([now])
        # a step that GradScaler skipped leaves inf behind: the averages then stand still
        now = torch.where(torch.isfinite(now), now, I)
        I.lerp_(now, 1 - self.method.beta1)
        U.lerp_((now - I).abs(), 1 - self.method.beta2)

    def scores(self) -> Sequence[float] | Tensor:
        """(N,) importance of the layers: I U, or what ``scorer`` says."""
        if self.scorer is not None:
            return self.scorer(self)
        return self.importance * self.uncertainty

    def _add_penalty(self) -> None:
        """Add the gradient of the orthogonality penalty to that of the loss."""
        m = self.method
        if m.orthogonality == 0:
            return
        if m.block_orthogonality:
            sets = [
                ([B], [A]) for layer in self.layers for B, A in zip(*layer.blocks(), strict=True)
            ]
        else:
            sets = [layer.blocks() for layer in self.layers]
        pairs = [(torch.cat(Bs, 1), torch.cat(As)) for Bs, As in sets]
        extra = iter(value_and_gradients(pairs, m.squared)[1])
        tensors, additions = [], []
        for Bs, As in sets:
            for parts, dim in ((Bs, 1), (As, 0)):
                pieces = next(extra).split([t.shape[dim] for t in parts], dim)
                for t, g in zip(parts, pieces, strict=True):
                    if t.requires_grad:
                        if t.grad is None:
                            t.grad = torch.zeros_like(t)
                        tensors.append(t.grad)
                        additions.append(g)
        torch._foreach_add_(tensors, additions, alpha=m.orthogonality)

    def state(self) -> dict[str, Tensor]:
        return {
            **super().state(),
            "importance": self.importance,
            "uncertainty": self.uncertainty,
            "seen": torch.tensor(self.seen),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.importance.copy_(state["importance"])
        self.uncertainty.copy_(state["uncertainty"])
        self.seen = bool(state["seen"])
        self._listen()
