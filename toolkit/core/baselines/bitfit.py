r"""BitFit, or any choice of parameters that simply train: biases, norms, a head, a table.

.. math:: \theta_i \text{ trains if its name is matched, and is frozen otherwise}

``adapt(model, Train(), "*.bias")`` is BitFit. Source: Ben Zaken, Goldberg, Ravfogel, *BitFit:
Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models*,
arXiv 2106.10199.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from toolkit.core.declare.fields import Declared
from toolkit.core.declare.info import Info


@dataclass(frozen=True)
class Train(Declared):
    """The parameters that a pattern matches train as they are; ``unload`` restores them.

    >>> import torch
    >>> from toolkit import Train, adapt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> list(adapt(model, Train(), "*.bias").extra)
    ['0.bias', '1.bias']
    """

    info: ClassVar[Info] = Info(
        slug="bitfit",
        part="core",
        title="BitFit",
        arxiv="2106.10199",
        year=2021,
        equation=r"b \leftarrow b - \eta\,\nabla_b \mathcal{L}",
        acts_on="the parameters that are named, such as all biases",
        count="m",
        inference="none",
        colour="#8C8C8C",
        kinds=("parameter",),
    )

    def build(self, site: Any, generator: Any = None) -> Any:
        raise TypeError("Train() builds nothing: the parameters themselves train")

    def count(self, site: Any) -> int:
        return 0
