r"""DC-Solver: compensate a predictor-corrector sampler, one searched number per step.

UniPC asks the network once a step, at the *predicted* state, corrects the state with the answer and
then keeps the answer as if it belonged to the corrected state. DC-Solver moves the newest answer
along the Lagrange polynomial through the last K + 1 of them, to a time that is a little off:

.. math:: t'_i = \rho_i t_i + (1 - \rho_i)\,t_{i-1}, \qquad
    \hat m_i = \sum_{k=0}^{K} \prod_{l\ne k}\frac{t'_i - t_{i-l}}{t_{i-k} - t_{i-l}}\; m_{i-k}

The ratios are found once, on a few noises, against a fine reference run. Sampling costs no call
more.

Source: Zhao, Wang, Zhou and Lu, *DC-Solver: Improving Predictor-Corrector Diffusion Sampler via
Dynamic Compensation*, ECCV 2024, arXiv 2409.03755; official code ``wl-zhao/DC-Solver``. The paper
was read in parts only; where it differs from the code, ``like`` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from toolkit.core.declare.fields import Declared, Like, Range
from toolkit.core.declare.info import Info
from toolkit.core.sample.plans import DDIM, DPMpp2M, Plan, Step, UniPC
from toolkit.core.sample.schedule import Network, Schedule
from toolkit.generate.dc_solver.blend import (
    Ratio,
    compensated,
    compensated_prediction,
    has_history,
    lagrange_weights,
    refined,
    states_at,
    whole_times,
)
from toolkit.generate.dc_solver.cpr import cpr_features, cpr_ratios, fit_cpr
from toolkit.generate.dc_solver.search import Searched, reference_states, search_ratios

__all__ = [
    "Searched", "compensated", "compensated_prediction", "cpr_features", "cpr_ratios", "fit_cpr",
    "has_history", "lagrange_weights", "reference_states", "refined", "search_ratios", "states_at",
    "whole_times",
]  # fmt: skip


@dataclass(frozen=True)
class DCSolver(Plan, Declared):
    """A solver whose newest prediction is compensated before each step.

    With all ratios 1 it is the solver alone, bit for bit. Numbers in place of the text of ratios
    are turned into text.

    Args:
        ratios: one number for all steps with enough history, or one per step, with commas. Left
            empty they must be searched or given before sampling. Source: searched.
        order: of UniPC's predictor, p. Source: official code, 2 for text to image; without labels
            3.
        variant: of UniPC. Source: official code, bh2 for text to image; bh1 without labels.
        degree: of the polynomial, K. Source: paper and official code, 2.
        corrector: whether states are corrected; without it UniPC is a predictor alone. Source:
            paper.
        first_corrector: whether the first step is corrected. Source: official code, off for text to
            image and on without labels.
        solver: what is compensated. Source: paper, UniPC, and predictors such as the others.
        like: how many predictions are kept: max(p, K + 1), or p as the official code without labels
            does, so that nothing is ever compensated where p is not above K. Source: ours.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range, or ratios that are no
            numbers.
    """

    ratios: str = ""
    order: Annotated[int, Range(1, 3)] = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    degree: Annotated[int, Range(1, 6)] = 2
    corrector: bool = True
    first_corrector: bool = True
    solver: Literal["unipc", "ddim", "dpmpp_2m"] = "unipc"
    like: Like = "paper"

    info: ClassVar[Info] = Info(
        slug="dc_solver",
        part="generate",
        title="DC-Solver",
        arxiv="2409.03755",
        year=2024,
        code="wl-zhao/DC-Solver",
        equation=r"\hat m_i = \sum_{k=0}^{K} \prod_{l\ne k}"
        r"\frac{t'_i - t_{i-l}}{t_{i-k} - t_{i-l}}\, m_{i-k}",
        acts_on="the newest prediction of a multistep solver, by one searched number per step",
        count="0",
        inference="none",
        colour="#C1440E",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.ratios, str):
            given = self.ratios
            numbers = [given] if isinstance(given, int | float) else list(given)
            object.__setattr__(self, "ratios", ",".join(repr(float(n)) for n in numbers))
        super().__post_init__()
        self._numbers()

    def _numbers(self) -> list[float]:
        try:
            return [float(word) for word in self.ratios.split(",") if self.ratios]
        except ValueError as error:
            raise ValueError(
                f"ratios: numbers with commas between them, as 1,1,1.2, got {self.ratios!r}"
            ) from error

    @property
    def kept(self) -> int:
        """How many predictions are held."""
        uses = {"unipc": self.order, "ddim": 1, "dpmpp_2m": 2}[self.solver]
        return uses if self.like == "code" else max(uses, self.degree + 1)

    def given(self, ratios: Iterable[float]) -> DCSolver:
        """The same solver with these ratios, one per step, or one number for all."""
        return replace(self, ratios=",".join(repr(float(ratio)) for ratio in ratios))

    def plain(self, schedule: Schedule) -> list[Step]:
        """The steps of the solver without compensation.

        Raises:
            ValueError: the schedule does not suit the solver, such as fewer steps than the order.
        """
        if self.solver == "ddim":
            return DDIM().steps(schedule)
        if self.solver == "dpmpp_2m":
            return DPMpp2M().steps(schedule)
        left = () if self.first_corrector else (0,)
        return UniPC(self.order, self.variant, self.corrector, left).steps(schedule)

    def table(self, schedule: Schedule, ratios: Sequence[Ratio]) -> list[Step]:
        """The steps with ratios given as numbers, or as tensors to be searched for.

        Raises:
            ValueError: see :func:`~toolkit.generate.dc_solver.blend.compensated`, and as
                :meth:`plain`.
        """
        return compensated(self.plain(schedule), schedule, ratios, self.degree, self.kept)

    def steps(self, schedule: Schedule) -> list[Step]:
        """See :class:`~toolkit.core.sample.plans.Plan`.

        Raises:
            ValueError: there are no ratios, or another number of them than steps; and as
                :meth:`table`.
        """
        numbers: list[Any] = list(self._numbers())
        if not numbers:
            self.plain(schedule)  # what is wrong with the schedule is said first
            raise ValueError(
                "ratios: none are given; search them with DCSolver().search(...), or give "
                'ratios="1", which is the solver without compensation'
            )
        if len(numbers) == 1 and schedule.steps > 1:
            able = [has_history(n, self.degree, self.kept) for n in range(schedule.steps)]
            numbers = [numbers[0] if can else 1.0 for can in able]
        return self.table(schedule, numbers)

    def search(
        self,
        denoiser: Network,
        schedule: Schedule,
        start: Tensor,
        reference: Sequence[Tensor],
        **options: Any,
    ) -> Searched:
        """Search ratios for this solver; ``given(found.ratios.tolist())`` then samples with them.

        Args:
            denoiser, schedule, start, reference, options: see
                :func:`~toolkit.generate.dc_solver.search.search_ratios`.
        """
        return search_ratios(
            denoiser, schedule, self.plain(schedule), start, reference, degree=self.degree,
            kept=self.kept, **options,
        )  # fmt: skip

    def predicted(self, coefficients: Tensor, guidance: float, calls: int) -> DCSolver:
        """The same solver with the ratios of fitted polynomials; see
        :func:`~toolkit.generate.dc_solver.cpr.cpr_ratios`."""
        return self.given(cpr_ratios(coefficients, guidance, calls))
