r"""BlackVIP: prompts for a model of which only answers are seen.

A small Coordinator writes a prompt for each image from a frozen encoder's features, and its few
numbers learn by SPSA-GC: two-sided differences along random directions, with momentum.

.. math:: \tilde x &= \mathrm{clip}\big(x + \epsilon\, h_\phi(x)\big) \\
    \hat g_i &= \frac1K\sum_k \frac{L(\phi_i + c_i\Delta_k) - L(\phi_i - c_i\Delta_k)}{2c_i}
    \oslash \Delta_k \\
    m_i &= \beta m_{i-1} + \hat g_i, \qquad \phi_{i+1} = \phi_i - a_i(\hat g_i + \beta m_i)

Source: Oh et al., *BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning*, CVPR 2023,
arXiv 2303.14773; official code ``changdaeoh/BlackVIP``. Of the paper the abstract and the opening
were read; its look-ahead form is recalled. With a constant :math:`a_i` both forms are one iteration
seen at different points. The code runs in half precision; here it is that of the images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.declare.fields import BelowOne, Declared, Like, Range
from toolkit.core.declare.info import Info
from toolkit.insert.blackvip.box import BadAnswer, BlackBox, BudgetSpent, CallFailed
from toolkit.insert.blackvip.coordinator import Coordinator
from toolkit.insert.blackvip.spsa import (
    SPSA,
    expected_cosine,
    gains,
    one_sided,
    relative_error,
    segmented_uniform,
    sphere,
    two_sided,
)
from toolkit.insert.blackvip.tuner import Encoder, Progress, Tuner
from toolkit.insert.blackvip.vectors import Flat, Frame

__all__ = [
    "SPSA",
    "BadAnswer",
    "BlackBox",
    "BlackVIP",
    "BudgetSpent",
    "CallFailed",
    "Coordinator",
    "Flat",
    "Frame",
    "Progress",
    "Tuner",
    "expected_cosine",
    "gains",
    "one_sided",
    "relative_error",
    "segmented_uniform",
    "sphere",
    "two_sided",
]


@dataclass(frozen=True)
class BlackVIP(Declared):
    """How prompts learn from a black box.

    ``beta=0`` is plain SPSA; with a :class:`Frame` in place of a Coordinator it is universal visual
    prompting, and with ``estimator="one-sided"`` the estimate of BAR.

    Args:
        a: numerator of the step size a / (i + o)^alpha. Source: official code, 0.01.
        o: what delays its fall. Source: official code, 1.
        alpha: how fast it falls. Source: official code, 0.4.
        c: numerator of the width c / i^gamma of the differences. Source: official code, 0.005 to
            0.02 by data set.
        gamma: how fast the width falls. Source: official code, 0.1 to 0.2 by data set.
        beta: how much of the momentum stays. Source: official code, 0.9 for most data sets.
        directions: K, random directions a step, on one batch. Source: official code, 5.
        eps: prompt strength. Source: official code, 1 or 0.2 to 0.5 by data set.
        lookahead: the form that asks round the point to which the momentum carries, instead of the
            coded one. Source: paper, as recalled.
        estimator: two-sided SPSA, or one-sided differences on the sphere. Source: the paper's BAR
            baseline has the latter.
        like: whose statistics of batch normalisation: those of the prompts in use, or, as in the
            code, those of all perturbed passes. Source: official code; the other is ours.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    a: Annotated[float, Range(0.0, 1e6, log=True, open_low=True)] = 0.01
    o: Annotated[float, Range(0.0, 1e6)] = 1.0
    alpha: Annotated[float, Range(0.0, 2.0)] = 0.4
    c: Annotated[float, Range(0.0, 100.0, log=True, open_low=True)] = 0.01
    gamma: Annotated[float, Range(0.0, 2.0)] = 0.1
    beta: BelowOne = 0.9
    directions: Annotated[int, Range(1, 100_000, log=True)] = 5
    eps: Annotated[float, Range(0.0, 100.0)] = 1.0
    lookahead: bool = False
    estimator: Literal["spsa", "one-sided"] = "spsa"
    like: Like = "paper"

    info: ClassVar[Info] = Info(
        slug="blackvip",
        part="insert",
        title="BlackVIP",
        arxiv="2303.14773",
        year=2023,
        code="changdaeoh/BlackVIP",
        equation=r"\tilde x = \mathrm{clip}\big(x + \epsilon\, h_\phi(x)\big)",
        acts_on="the image, before a model that only answers",
        count="P",
        inference="an encoder and a tiny decoder before each image",
        colour="#A6761D",
        zero_init=False,
        mergeable=False,
    )

    def start(
        self,
        prompter: Flat,
        encoder: Encoder | None = None,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        generator: torch.Generator | None = None,
        at_once: int | None = None,
    ) -> Tuner:
        """Begin to learn.

        Args:
            prompter: a :class:`Coordinator` or a :class:`Frame`; its numbers are where phi starts.
                ``like`` decides which passes move a Coordinator's statistics.
            encoder: takes images (N, C, H, W), gives features (N, d_z); it stays as it is.
            mean, std: by which images are normalised, for the valid range of pixels.
            generator: of the directions; left out, every step needs them given.
            at_once: most prompted images made and sent at one time; left out, 8 million numbers.

        Raises:
            ValueError: arguments that do not fit; the message names one and the remedy.
        """
        if isinstance(prompter, Coordinator):
            prompter.statistics = "perturbed" if self.like == "code" else "own"
        options: dict[str, Any] = dataclasses.asdict(self)
        for name in ("eps", "like"):
            del options[name]
        optimiser = SPSA(prompter.vector(), generator=generator, **options)
        return Tuner(prompter, optimiser, encoder, self.eps, mean, std, at_once)
