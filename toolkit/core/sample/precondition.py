r"""A network made a denoiser: inputs, outputs and targets of size one at every noise (EDM).

.. math:: D(x;\sigma) = c_{skip}\,x + c_{out}\,F(c_{in}\,x,\ \tfrac14\ln\sigma)

Source: Karras et al., arXiv 2206.00364, table 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from toolkit.core.sample.schedule import Level


class Preconditioned(nn.Module):
    """A denoiser of states in any view, from a network that is told noise and labels.

    Args:
        network: ``network(x, noise, labels)`` with ``noise`` (batch,), to the shape of ``x``.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: a deviation that is not positive.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data: must be above 0, got {sigma_data}")
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Tensor, level: Level | Tensor, labels: Tensor | None = None) -> Tensor:
        """The predicted clean sample.

        Args:
            x: states (batch, ...).
            level: of all states; or the noise (batch,) of each, in the EDM view.
            labels: (batch,) class numbers, if the network takes them.
        """
        if isinstance(level, Level):
            x = x if level.alpha == 1 else x / level.alpha
            sigma = torch.full((len(x),), level.sigma, dtype=x.dtype, device=x.device)
        else:
            sigma = level
        wide = sigma.view(-1, *[1] * (x.dim() - 1))
        total = wide.square() + self.sigma_data**2
        said = self.network(x * total.rsqrt(), sigma.log() / 4, labels)
        return self.sigma_data**2 / total * x + wide * self.sigma_data * total.rsqrt() * said

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error at a noise (batch,): one over what ``c_out`` squared is."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()


def drawn_sigmas(
    count: int, generator: torch.Generator | None = None, mean: float = -1.2, spread: float = 1.2
) -> Tensor:
    """Noise levels (count,) to train at: log-normal, as EDM draws them."""
    return (mean + spread * torch.randn(count, generator=generator)).exp()
