"""What IncreLoRA does around each step: scores, averages, and which layers grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.core.adapt.steps.growth import Growth, looks
from toolkit.core.adapt.steps.growth_controller import GrowthController
from toolkit.core.adapt.steps.importance import smooth
from toolkit.core.adapt.steps.processes import average
from toolkit.lowrank.increlora.score import Scratch


class IncrementController(GrowthController):
    r"""Around each step: score, penalty and growth before; after the target, nothing is scored.

    .. math:: I_k \leftarrow \beta_1 I_k + (1-\beta_1) S_k,\quad
        U_k \leftarrow \beta_2 U_k + (1-\beta_2)|S_k - I_k|,\quad \hat S_k = I_k U_k

    Attributes: ``importance`` and ``uncertainty``, (N,) each, and those of
    :class:`~toolkit.core.adapt.steps.growth_controller.GrowthController`.

    Args:
        scaler: the ``torch.amp.GradScaler`` of the run, if any: the scores are divided by its
            scale, as it does with the gradients.
        score_dtype: in which linear layers multiply input and output gradient for the score; None:
            their own. With ``torch.bfloat16`` on a processor with bfloat16 units a float32 model
            is scored two to four times as fast, and a score moves by about 1e-5 of itself.
        where, options: see the base class; of them ``scorer``, ``weight_decay`` and ``penalty``.
    """

    def __init__(
        self,
        method: Any,
        *where: Any,
        scaler: Any = None,
        score_dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(method, *where, growth=method.growth, **options)
        self.scaler, self.squared = scaler, method.like == "paper"
        self.importance = torch.zeros_like(self.layers[0].A0[0, 0]).repeat(len(self.layers))
        self.uncertainty, self.seen = torch.zeros_like(self.importance), False
        self.scratch = Scratch()
        for layer in self.layers:
            layer.score_dtype, layer.scratch = score_dtype, self.scratch
        self._listen()

    def check_schedule(self) -> None:
        super().check_schedule()
        m = self.method
        rounds = looks(m.warmup, m.interval, self.total_steps)
        missing, most = self.target - self.total, rounds * min(m.top, len(self.layers)) * m.growth
        if missing > most:
            raise ValueError(
                f"total_steps={self.total_steps} has {rounds} growths after warmup={m.warmup} at "
                f"interval={m.interval}, which add {most} ranks at most, but {missing} are "
                "missing to the target; lower interval or warmup, raise top or growth, or train "
                "longer"
            )

    def blocks(self) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        pairs = [layer.blocks() for layer in self.layers]
        if self.method.like != "library":
            return pairs
        return [([B], [A]) for Bs, As in pairs for B, A in zip(Bs, As, strict=True)]

    def _listen(self) -> None:
        """Score while there is rank to give; afterwards take the reserves out of the output."""
        more = self.growing and self.step < self.total_steps
        look = -(-max(self.step, self.warmup + 1) // self.interval) * self.interval
        near = self.method.window is None or look - self.step < self.method.window
        self.listening = more and self.scorer is None and near
        for layer in self.layers:
            layer.listening, layer.score = self.listening, None
            if not more:
                layer.retire()

    def released(self) -> None:
        """Stop the layers from scoring for nobody."""
        for layer in self.layers:
            layer.listening, layer.score = False, None
        self.scratch.clear()

    def before_step(self) -> None:
        try:
            super().before_step()
        finally:
            self.discard()

    def discard(self) -> None:
        super().discard()
        for layer in self.layers:
            layer.score = None
        self.scratch.clear()

    def finish(self) -> None:
        super().finish()
        if self.step == self.total_steps or (self.method.window is not None and self.growing):
            self._listen()

    def grow(self, amounts: Sequence[int], *decision: Any, **draws: Any) -> None:
        super().grow(amounts, *decision, **draws)
        if not self.growing:
            self._listen()

    def decide(self) -> Growth | None:
        """Take this step's scores into the averages; how much each layer grows, if it is time."""
        if self.growing and self.listening:
            self._average_scores()
        if not self.allocating:
            return None
        if self.scorer is None and not self.seen:
            raise RuntimeError(
                "growth was due before any score exists: no adapted layer ran in training mode "
                "with gradients. Call model.train(), or give attach() a scorer"
            )
        return self.chosen(self.scores(), self.method.top)

    def _average_scores(self) -> None:
        found = [layer.score for layer in self.layers]
        self.seen = self.seen or any(s is not None for s in found)
        I = self.importance
        zero = torch.zeros_like(I[0])
        now = torch.stack([zero if s is None else s.to(I) for s in found])
        if self.scaler is not None:
            now = now / self.scaler.get_scale()
        average([now])
        # a step that GradScaler skipped leaves inf behind: the averages then stand still
        now = torch.where(torch.isfinite(now), now, I)
        smooth([now], [I], [self.uncertainty], self.method.beta1, self.method.beta2)

    def scores(self) -> Sequence[float] | Tensor:
        """(N,) importance of the layers: I U, or what ``scorer`` says."""
        return self.importance * self.uncertainty if self.scorer is None else self.scorer(self)

    def state(self) -> dict[str, Tensor]:
        own = {"importance": self.importance, "uncertainty": self.uncertainty}
        return super().state() | own | {"seen": torch.tensor(self.seen)}

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.importance.copy_(state["importance"])
        self.uncertainty.copy_(state["uncertainty"])
        self.seen = bool(state["seen"])
        self._listen()
