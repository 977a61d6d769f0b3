r"""Model Surgery: change a language model's behaviour by moving a few rows of its gates.

A probe tells the unwanted behaviour from hidden states; its row of that class is the direction
:math:`v`. Of the gate rows :math:`w_{l,j}` of all layers, the k that point most against it move:

.. math:: \mathrm{MLP}(h) = W_{down}\,[\mathrm{SiLU}(W_{gate} h) \odot (W_{up} h)], \qquad
    w_{l,j} \leftarrow w_{l,j} + \alpha\, v
    \quad\text{for the } k \text{ smallest } \cos(w_{l,j}, v)

Such a row is silent where the state leans towards the behaviour. Moved, it opens there, and what
it writes was learned for the opposite. Neither v nor w is normalised, and nothing else changes.

Source: Wang et al., *Model Surgery: Modulating LLM's Behavior Via Simple Parameter Editing*,
arXiv 2407.08770; official code ``lucywang720/model-surgery``. The code is followed; its 32 layers
of 11008 rows are not. The paper itself was read in parts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from toolkit.core.declare.fields import Declared, Range, Share
from toolkit.core.declare.info import Info
from toolkit.core.states.deltas import fingerprint
from toolkit.merge.model_surgery.edit import Applied, Edit
from toolkit.merge.model_surgery.gates import cosines, gains_before, gate_rows
from toolkit.merge.model_surgery.probe import Probe, masked_mean, mean_states

__all__ = ["Applied", "Edit", "Probe", "gate_rows", "masked_mean", "mean_states"]

Model: TypeAlias = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelSurgery(Declared):
    """Which gate rows move along a direction, and how far.

    Args:
        k: rows that move, of all layers together. Source: official code, 4096 * 4 for the 352,256
            rows of a model with 7 billion parameters.
        alpha: multiple of the direction that is added; does not carry over to another model or
            probe, see :meth:`alpha_for`. Source: official code, 1.0; its script for LLaMA-2 1.08.
        side: rows with the smallest cosines (opposed) or the largest (aligned). Source: official
            code, opposed.
        share: of all rows, rounded, instead of k. Source: ours.
        absorb_norm: compare w times the gain of the norm before it, which is what a state meets.
            Source: ours; the official code leaves the gain out.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    k: Annotated[int, Range(0, 1_000_000_000)] = 16384
    alpha: Annotated[float, Range(-1e6, 1e6)] = 1.0
    side: Literal["opposed", "aligned"] = "opposed"
    share: Share | None = None
    absorb_norm: bool = False

    info: ClassVar[Info] = Info(
        slug="model_surgery",
        part="merge",
        title="Model Surgery",
        arxiv="2407.08770",
        year=2024,
        code="lucywang720/model-surgery",
        equation=r"w_{l,j} \leftarrow w_{l,j} + \alpha v",
        acts_on="the gate rows that point most against a probe's direction",
        count="0",
        inference="none",
        colour="#7570B3",
    )

    def rows(
        self,
        model: Model,
        direction: Tensor,
        at: str | Sequence[str] | None = None,
        gains: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The rows that move: name of the tensor -> numbers of its rows, ascending.

        All layers are one pool. Of equal cosines the earlier layer and row come first.

        Args:
            model: a module whose gated feed-forwards are found by form, or a state dict.
            direction: v (d,), the probe's row of the unwanted class.
            at: patterns of layers (of tensors in a state dict), as in :func:`gate_rows`.
            gains: for ``absorb_norm``: tensor's name -> gain (d,) of the norm before it; left out,
                read from the module.

        Raises:
            ValueError: no gate is found, a width differs from d, more rows are asked for than
                there are, or the direction is zero or not finite.
            TypeError: a gate's weight is no plain floating-point matrix.
        """
        scores = self.scores(model, direction, at, gains)
        pooled = torch.cat(list(scores.values()))
        count = self.k if self.share is None else round(self.share * len(pooled))
        if count > len(pooled):
            raise ValueError(
                f"k = {count}: the model has {len(pooled)} gate rows; give at most that many, or "
                "share=0.0465, which is k = 16384 of a model with 7 billion parameters"
            )
        chosen = pooled.argsort(descending=self.side == "aligned", stable=True)[:count]
        marks = torch.zeros(len(pooled), dtype=torch.bool).index_fill(0, chosen, True)
        parts = marks.split([len(s) for s in scores.values()])
        found = {name: part.nonzero()[:, 0] for name, part in zip(scores, parts, strict=True)}
        return {name: numbers for name, numbers in found.items() if len(numbers)}

    def scores(
        self,
        model: Model,
        direction: Tensor,
        at: str | Sequence[str] | None = None,
        gains: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Cosine of each gate row with the direction, name of the tensor -> (m,), on the CPU.

        Arguments and errors as for :meth:`rows`.
        """
        gates = gate_rows(model, at)
        if self.absorb_norm and gains is None:
            gains = gains_before(model, gates)
        return cosines(gates, direction, gains if self.absorb_norm else None)

    def edit(
        self,
        model: Model,
        direction: Tensor,
        at: str | Sequence[str] | None = None,
        gains: Mapping[str, Tensor] | None = None,
    ) -> Edit:
        """The edit of this model; nothing is changed until it is applied.

        Arguments and errors as for :meth:`rows`.
        """
        rows = self.rows(model, direction, at, gains)
        state = model
        if isinstance(model, nn.Module):
            state = dict(model.named_parameters(remove_duplicate=False))
        bases = {name: fingerprint(state[name]) for name in rows}
        return Edit(rows, direction.detach().clone(), float(self.alpha), bases)

    def alpha_for(
        self,
        model: Model,
        direction: Tensor,
        strength: float,
        at: str | Sequence[str] | None = None,
    ) -> float:
        r"""The alpha of a strength that means the same for every model and probe.

        .. math:: \text{strength} = \alpha\,\lVert v\rVert \,/\, \overline{\lVert w\rVert}

        Args:
            model, direction, at: as for :meth:`rows`.
            strength: length of the shift in mean lengths of the model's gate rows.
        """
        gates = gate_rows(model, at)
        cosines(gates, direction)  # refuses what does not fit
        lengths = torch.cat([rows.detach().norm(dim=1).float().cpu() for rows in gates.values()])
        return float(strength * lengths.mean() / direction.detach().norm().float().cpu())
