r"""SNELL: SNELLA's predecessor, with one fixed share of zeros in every layer.

.. math:: \Delta W_{ij} = \sum_{p=1}^{P} c_p \lVert A^{(p)}_j - B^{(p)}_i \rVert_2, \qquad
    c = (+0.1, -0.1)

Source: Shen, Sun, Ji, Huang, Wang, *Expanding Sparse Tuning for Low Memory Usage*, arXiv
2411.01800; official code ``ssfgunner/SNELL``. The paper's text calls s the share that stays; its
equation and the code set that share to zero, as here. With s = 0 the code neither drops nor squares
anything, under ``like="code"`` so does this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.declare.fields import BelowOne, Declared, Range, Rank, Share
from toolkit.core.declare.info import Info
from toolkit.select.snella.layer import KernelLayer, check_pieces, count


@dataclass(frozen=True)
class SNELL(Declared):
    """SNELL's hyperparameters; builds the factors of one layer.

    Args:
        rank: columns r of both factors; the change has a higher rank. Source: paper, 8, 16, 32.
        sparsity: share s of the change that is set to zero. Source: official scripts, 0 to 0.995
            by task.
        kernel: how rows become entries. Source: paper: piecewise; the others fit worse.
        pieces: parts P of a row, whose distances count with + and - in turn. Source: paper.
        scale: weight of a distance. Source: official code.
        like: multiply by the magnitude, held constant (code), subtract the limit and learn the
            pieces' weights (paper), or only mask (hard, ours). Source: official code.
        dropout: dropout on the input of the change. Source: ours; official scripts 0.1.
        drop_path: share of examples that pass without the change. Source: ours; official scripts
            0.1.
        recompute: form the change again in the backward pass instead of keeping it. Source: paper.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range, or a rank
            that is no multiple of ``pieces``.
    """

    rank: Rank = 8
    sparsity: Share = 0.9
    kernel: Literal["piecewise", "mixed", "linear", "sigmoid", "rbf"] = "piecewise"
    pieces: Annotated[int, Range(1, 64)] = 2
    scale: Annotated[float, Range(0.0, 100.0, open_low=True)] = 0.1
    like: Literal["paper", "code", "hard"] = "code"
    dropout: BelowOne = 0.0
    drop_path: BelowOne = 0.0
    recompute: bool = True

    # the catalogue lists methods by their package, here SNELLA; this one shares its chapter
    info: ClassVar[Info] = Info(
        slug="snella",
        part="select",
        title="SNELL",
        arxiv="2411.01800",
        year=2024,
        code="ssfgunner/SNELL",
        equation=r"W = W_0 + \Delta W^s,\quad \Delta W = \kappa(A, B)^\top",
        acts_on="the entries of largest change, which a kernel of two factors gives",
        count=r"r\,(m+n)",
        inference="none once merged",
        colour="#44AA99",
        zero_init=False,
        init_reason="a distance kernel has no zero; the change starts near its own square",
        kinds=KINDS,
    )
    tiny: ClassVar[dict[str, Any]] = {"rank": 4, "like": "hard", "sparsity": 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pieces(self)

    def build(self, site: Site, generator: torch.Generator | None = None) -> KernelLayer:
        dense = self.like == "code" and self.sparsity == 0
        return KernelLayer(self, site, generator, self.sparsity, dense)

    def count(self, site: Site) -> int:
        """r (m + n) numbers for a layer of shape (m, n), and the kernel's own."""
        return count(self, site)
