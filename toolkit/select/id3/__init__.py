r"""ID3: unmask a few more weights at every step, those that look most important now.

Nothing may move at first. Step :math:`t` of :math:`T` unmasks the :math:`u_t` scalars of highest
importance among those still masked, over all tensors together, and trains all unmasked so far:

.. math:: H(\theta_i) = \frac{|\nabla_{\theta_i} L|}{(|\theta_i| + \epsilon)^p}, \qquad
    \Lambda_{t+1} = \Lambda_t \cup \mathrm{top}_{u_t} H, \qquad \sum_t u_t = B

Source: Agarwal, Ramesh, Sengupta, Chakraborty, *Step-by-Step Unmasking for Parameter-Efficient
Fine-tuning of Large Language Models*, arXiv 2408.14470; official code
``Aradhye2002/selective-peft-toolkit``. What the code does otherwise and this does not:

* weight decay moves masked scalars there; here they stay, bit for bit;
* ties at the cut-off mask scalars again that were unmasked before; here the first in order join;
* steps without a share of the budget fail, and so does a tensor without a gradient;
* it goes on unmasking after the last step; here the budget holds.

Gradients are dense for the moment of a choice; everything that lasts (values, moments, file) has
the length of the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from toolkit.core.adapt.forwards import frozen
from toolkit.core.adapt.mask import MaskLayer
from toolkit.core.adapt.sites import KINDS, Site, with_padding
from toolkit.core.declare.fields import Declared, Range
from toolkit.core.declare.info import Info
from toolkit.select.id3.unmasking import EntriesController


@dataclass(frozen=True)
class ID3(Declared):
    """ID3's hyperparameters; builds the empty choice of one layer.

    Call ``adapted.attach(optimizer, total_steps=T)``; options:
    :class:`~toolkit.select.id3.unmasking.UnmaskingController`. For tensors that train already, such
    as LoRA's factors or all parameters of a model, see :func:`~toolkit.select.id3.tensors.unmask`.

    Args:
        budget: number B of scalars unmasked in the end, over all layers; overrides ``share``.
            Source: paper, 103,000 and 320,000 of 184 million.
        share: share of all candidates instead. Source: paper, 0.0006 and 0.0017.
        exponent: exponent p of the magnitude; 0 ranks by gradient alone, large ones by smallness.
            Source: paper, from -2 to 2, best 1 and 2; the code's example has 0.
        epsilon: added to the magnitude. Source: paper, 0.001 to 1, best 0.1 and 1; the code's
            example has 0.001.
        schedule: how the budget is spent: the same at each step, more at first, more at last, all
            in the first step (static), or all of it anew at every step, which changes more than B
            and goes with "repeat" only. Source: paper and code, uniform.
        strategy: keep training what was unmasked; or choose anew among all and freeze the rest
            where it stands; or the same among those never chosen ("renew"), so that each moves
            once. Source: paper, increment against repeat.
        score: what is ranked: H; smallness alone (PaFi); or a draw. Source: paper, D3.
        order: which end of the ranking joins. Source: paper, highest.
        clock: whether Adam corrects its averages by the steps of the run (code), or by those since
            a scalar was unmasked. Source: official code, run.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range, no
            ``epsilon`` where the exponent is positive, or a schedule without its strategy.
    """

    budget: Annotated[int, Range(1, 1_000_000_000, log=True)] | None = None
    share: Annotated[float, Range(0.0, 1.0, log=True, open_low=True, open_high=True)] = 0.0017
    exponent: Annotated[float, Range(-64.0, 64.0)] = 1.0
    epsilon: Annotated[float, Range(0.0, 100.0)] = 1.0
    schedule: Literal["uniform", "front", "back", "once", "every"] = "uniform"
    strategy: Literal["increment", "repeat", "renew"] = "increment"
    score: Literal["d3", "magnitude", "random"] = "d3"
    order: Literal["highest", "lowest"] = "highest"
    clock: Literal["run", "own"] = "run"

    info: ClassVar[Info] = Info(
        slug="id3",
        part="select",
        title="ID3",
        arxiv="2408.14470",
        year=2024,
        code="Aradhye2002/selective-peft-toolkit",
        equation=r"\Lambda_{t+1} = \Lambda_t \cup \mathrm{top}_{u_t}\,"
        r"\frac{|\nabla\theta|}{(|\theta|+\epsilon)^p}",
        acts_on="single entries of the weights, a few more at every step",
        count=r"0 \text{ at first},\ B \text{ over all layers in the end}",
        inference="none once merged",
        colour="#1B7F5C",
        kinds=KINDS,
    )

    tiny: ClassVar[dict[str, Any]] = {"share": 0.5, "schedule": "once"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exponent > 0 and not self.epsilon:
            raise ValueError(
                f"ID3(epsilon={self.epsilon}, exponent={self.exponent}): epsilon must be positive "
                "with a positive exponent, or a weight of 0 has no importance"
            )
        if self.schedule == "every" and self.strategy != "repeat":
            raise ValueError(
                f"ID3(schedule='every', strategy={self.strategy!r}): the budget is unmasked at "
                "every step anew, so give strategy='repeat'"
            )

    def build(self, site: Site, generator: torch.Generator | None = None) -> UnmaskedLayer:
        return UnmaskedLayer(site)

    def count(self, site: Site) -> int:
        """0: nothing is unmasked at the start."""
        return 0

    def spent(self, candidates: int) -> int:
        """B, of so many candidates.

        Raises:
            ValueError: there are fewer than B.
        """
        total = self.budget
        if total is None:
            total = max(1, -int(-self.share * candidates // 1))
        if total > candidates:
            raise ValueError(
                f"ID3(budget={total}) is more than the {candidates} scalars of the tensors it may "
                "choose from; lower the budget, or name more targets"
            )
        return total

    def controller(
        self, adapted: Any, optimizer: torch.optim.Optimizer, total_steps: int | None, **options
    ) -> EntriesController:
        return EntriesController(self, adapted.sites, optimizer, total_steps, **options)


class UnmaskedLayer(MaskLayer):
    """The unmasked entries of one weight: ``values`` (k,), ``index`` (k,); k grows from 0.

    While a choice is to come, the frozen weight takes part in the graph as ``seen``, a leaf that
    shares its memory, so that a backward pass leaves the masked entries' gradient there.
    """

    def __init__(self, site: Site):
        nn.Module.__init__(self)
        self.site = site
        where = {"device": site.device}
        self.register_buffer("index", torch.zeros(0, dtype=torch.long, **where))
        self.values = nn.Parameter(torch.zeros(0, dtype=site.dtype, **where))
        self.seen: Tensor | None = None
        self.anchor: Sequence[nn.Parameter] = ()
        self.register_state_dict_post_hook(_mark_nothing)

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        old = frozen(base, self.site.parameter, self.site.name)
        values = torch.cat([self.values, *self.anchor]) if self.anchor else self.values
        seen = old if self.seen is None or not torch.is_grad_enabled() else self.seen
        new = seen.reshape(-1).index_put((self.index,), values.to(old.dtype))
        return {self.site.parameter: with_padding(base, self.site, new.view(old.shape))}

    def seen_whole(self) -> bool:
        return self.seen is not None or bool(self.anchor)

    def unmask(self, index: Tensor, gradient: Tensor, base: nn.Module, distributed: bool) -> None:
        """Let further entries move, (u,), which join with the gradient they have.

        Args:
            index: where they lie in the weight's memory order.
            gradient: of these entries.
            base: the frozen layer.
            distributed: whether DistributedDataParallel may wait for the present tensor: then it
                stays in the graph, without a number in it.
        """
        old, weight = self.values, frozen(base, self.site.parameter, self.site.name)
        start = weight.detach().reshape(-1)[index]
        self.values = nn.Parameter(torch.cat([old.detach(), start.to(old)]))
        had = torch.zeros_like(old) if old.grad is None else old.grad
        self.values.grad = torch.cat([had, gradient.to(old)])
        self.index = torch.cat([self.index, index])
        if distributed and not self.anchor and not old.numel():
            self.anchor = (old,)

    @torch.no_grad()
    def resize(self, state: dict[str, Tensor]) -> None:
        """Take on as many entries as saved tensors have.

        Raises:
            IndexError: the two tensors differ, an entry lies outside the weight or is there twice.
        """
        index, values = state.get("index"), state.get("values")
        if index is None or values is None or index.dim() != 1 or index.shape != values.shape:
            raise IndexError("index and values are not two tensors of one length")
        super().resize(_without_mark(state, ""))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(_without_mark(state_dict, prefix), prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seen": None, "anchor": ()}  # they belong to one attached run


NOTHING = -1
"""Index in a file that says: no entry. Some libraries leave out tensors without numbers."""


def _mark_nothing(layer: UnmaskedLayer, state: Any, prefix: str, _: Any) -> None:
    """Hook after ``state_dict``."""
    if not len(state[f"{prefix}index"]):
        state[f"{prefix}index"] = layer.index.new_full((1,), NOTHING)
        state[f"{prefix}values"] = layer.values.detach().new_zeros(1)


def _without_mark(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Saved tensors, without the one entry that says that there is none."""
    index = state.get(f"{prefix}index")
    if index is None or index.shape != (1,) or int(index) != NOTHING:
        return dict(state)
    empty = {f"{prefix}{key}": state[f"{prefix}{key}"][:0] for key in ("index", "values")}
    return dict(state) | empty
