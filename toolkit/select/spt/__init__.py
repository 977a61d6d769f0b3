r"""SPT: ask the task which weights matter, then spend a budget of numbers there.

The sensitivity of each scalar is the sum of its squared gradients over batches, and the
:math:`\tau` most sensitive of the whole model are marked. A matrix with many marks gets a
structured module, one with few trains just these entries:

.. math:: s_n=\sum_b g_{b,n}^2,\qquad
    W' = \begin{cases} W + BA & n_W \ge c_W/\alpha \\ W + M\odot\Delta & \text{else}\end{cases}

Source: He, Cai, Zhang, Tao, Zhuang, *Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning*,
arXiv 2303.08566; official code ``ziplab/SPT``. Where they differ: the code sweeps :math:`\tau` over
multiples of 20,000 up to 1,580,000 whatever the model, scores in train mode, and counts entries of
norms that it never trains. With ``like="code"`` the first two are so; here norms train in
both. In the code q, k and v share one dropout mask; here each layer draws its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from toolkit.core.adapt.lowrank import LowRankMethod
from toolkit.core.adapt.sites import Site
from toolkit.core.declare.fields import BelowOne, Interval, Like, Range, Rank
from toolkit.core.declare.info import Info
from toolkit.select.spt.plan import Plan, make
from toolkit.select.spt.structured import StructuredLayer

Easiness = Annotated[float, Range(0.0, open_low=True)]


@dataclass(frozen=True)
class SPT(LowRankMethod):
    r"""SPT's hyperparameters: :meth:`plan` decides over all tensors, :meth:`build` puts one module.

    A budget is spent over the whole model at once, or over what one pattern of a mapping names:
    ``adapt(model, {"*attention*": SPT(budget=...), "head.*": Train()}, batches=..., loss=...)``.
    ``adapt(model, SPT(budget=...), batches=..., loss=...)`` decides and adapts; :meth:`plan`
    decides alone, and :func:`toolkit.adapt` takes what
    it returns in place of a method, on the same weights:

    >>> import torch
    >>> from toolkit import SPT, adapt
    >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 9))
    >>> x, y = torch.randn(8, 20), torch.randn(8, 9)
    >>> plan = SPT(budget=150, rank=2).plan(
    ...     model, [(x, y)], lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    ... )
    >>> adapted = adapt(model, plan)
    >>> adapted.costs()["trained"] == plan.total
    True

    Without a budget the structured module goes to every layer that is named: the limit of a large
    :math:`\alpha`. It is :math:`\Delta W = BA` with no scale, B = 0 at the start and A drawn from
    :math:`U(-1/\sqrt n, 1/\sqrt n)`.

    Args:
        budget: numbers that a plan lets train, all tensors together. Source: official scripts,
            200,000 to 1,000,000.
        rank: rank of the LoRA, or width of the adapter, where a matrix is structured. Source:
            official code, 8.
        alpha: a matrix is structured from c / alpha marked entries on, c being what its module
            costs. Source: official scripts, 10.
        beta: a vector trains whole from d / beta marked entries on. Source: official scripts, 5.
        structured: the module of a structured matrix. Source: paper, SPT-LoRA and SPT-Adapter.
        whole_vectors: whether vectors may train whole. Source: official scripts, on.
        half: "structured" leaves out single entries, "entries" leaves out modules and whole
            vectors. Source: official code, structured_only.
        passes: most batches that are scored. Source: official code, 16.
        dropout: dropout on what a module reads. Source: official code, 0.1.
        drop_path: share of examples for which a module is left out in training. Source: official
            code, 0.1.
        like: "code" sweeps and scores as the official code does, see above. Source: both.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range.
    """

    budget: Annotated[int, Range(1, 1_000_000_000, log=True)] | None = None
    rank: Rank = 8
    alpha: Easiness = 10.0
    beta: Easiness = 5.0
    structured: Literal["lora", "adapter"] = "lora"
    whole_vectors: bool = True
    half: Literal["both", "structured", "entries"] = "both"
    passes: Interval = 16
    dropout: BelowOne = 0.1
    drop_path: BelowOne = 0.1
    like: Like = "paper"

    info: ClassVar[Info] = Info(
        slug="spt",
        part="select",
        title="SPT",
        arxiv="2303.08566",
        year=2023,
        code="ziplab/SPT",
        equation=r"s_n=\sum_b g_{b,n}^2",
        acts_on="entries, vectors and low-rank differences where the task is sensitive",
        count=r"r\,(m+n)\ \text{or}\ n_W",
        inference="none once merged",
        colour="#B5446E",
        kinds=("linear", "hf_conv1d"),
    )
    tiny: ClassVar[dict[str, float]] = {"dropout": 0.0, "drop_path": 0.0}
    moving: ClassVar[Mapping[str, Mapping[str, Tensor]]] = {}
    """Layer -> parameter -> entries that move beside the module; a plan fills it in."""

    scale: ClassVar[float] = 1.0

    def decided(
        self, model: nn.Module, targets: Any, batches: Any, loss: Any, train: Any
    ) -> Plan | None:
        """The plan that ``adapt(model, SPT(budget=...), batches=, loss=)`` follows."""
        if self.budget is None:
            return None
        return self.plan(model, batches, loss, targets, train=train)

    def layer(self, site: Site, generator: torch.Generator | None) -> StructuredLayer:
        if self.budget is not None or self.structured == "adapter":
            what = "a budget" if self.budget is not None else "structured='adapter'"
            raise TypeError(
                f"layer {site.name!r}: {what} is decided over all layers at once; pass "
                "adapt(model, SPT(budget=...), batches=..., loss=...), or the plan that "
                "SPT(budget=...).plan(model, batches, loss) returns"
            )
        return StructuredLayer(self, site, generator)

    def cost(self, rows: int, cols: int) -> int:
        """c: numbers of the structured module of an (m, n) matrix."""
        if self.structured == "lora":
            return self.rank * (rows + cols)
        return 2 * self.rank * rows + self.rank + rows

    def sweep(self, candidates: int) -> list[int]:
        r"""The values of :math:`\tau` that are tried, for so many candidate scalars.

        "code": 79 multiples of 20,000. "paper", which names none: every 2 % of the budget, from
        there to all candidates.
        """
        if self.like == "code":
            return [math.ceil(k * 0.02 * 1e6) for k in range(1, 80)]
        assert self.budget is not None
        step = max(1, self.budget // 50)
        return [*range(step, candidates, step), candidates]

    def plan(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        targets: Any = None,
        *,
        train: Any = (),
        counted: Any = (),
        scores: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """Score the weights, mark the most sensitive, and decide tensor by tensor.

        Args:
            model: plain, with the head that the task needs. It is left as it was.
            batches: what ``loss`` is called with, shuffled; the first ``passes`` are read.
            loss: ``(model, batch) -> scalar``, a mean over the batch.
            targets: modules whose weights and biases are candidates; None takes every linear layer
                and every norm that ``train`` leaves.
            train: what ``adapt(..., train=)`` will be given, such as the head: no candidates, and
                not in the budget.
            counted: parameters that train in any case and are in the budget, such as a class token.
            scores: sensitivities by parameter name, instead of ``batches`` and ``loss``.

        Returns:
            What :func:`toolkit.adapt` takes in place of a method.

        Raises:
            ValueError, TypeError: no budget, or one that no tensor can take; no batch; a score that
                is not a number; a rank that a matrix cannot have; a candidate that is tied or
                cannot be adapted.
        """
        return make(self, model, batches, loss, targets, train, counted, scores)
