r"""Data whose best denoiser is known exactly: mixtures of round Gaussians, or single points.

For data :math:`y\sim\sum_k w_k\,N(\mu_k, s_k^2 I)` the posterior mean, the score and the density
of a noisy state are sums over components, under Gaussian noise and under the Student-t noise of
PFGM++. So a sampler can be judged without a trained network.

Student-t noise of :math:`D` degrees of freedom is Gaussian with a random width
:math:`\sigma/\sqrt\tau`, :math:`\tau\sim\mathrm{Gamma}(D/2, D/2)`. Where the components have width,
:math:`\tau` is integrated out by the trapezoidal rule in :math:`\ln\tau`, which converges
exponentially here; single points have a closed form.

Source of the kernel: Xu et al., arXiv 2302.04265.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.core.sample.draws import check_freedom
from toolkit.core.sample.schedule import Level
from toolkit.core.train.labels import class_numbers, refuse_outside

MOST = 1 << 24
"""Numbers that a posterior takes at a time; more states are looked at in parts."""
TAIL = 36.0
"""Nats below its peak at which an integrand is cut off."""


class _Posterior(NamedTuple):
    """What the components k say of a state: arrays (batch, K), and log densities (batch,)."""

    share: Tensor  # p(k | x)
    gain: Tensor  # p(k | x) times how much of the state the posterior mean keeps
    precision: Tensor  # p(k | x) times one over the variance of the state
    log_density: Tensor


class Mixture:
    """A mixture of round Gaussians in any number of dimensions. It computes in double precision.

    Args:
        means: (K, ...) centres, in the shape of a sample.
        scales: standard deviations (K,), or one for all; 0 makes components single points.
        weights: (K,) positive, of any sum; left out, all are equal.
        classes: (K,) class number of each component, for labels; left out, there are none.

    Attributes:
        untold: the label that means that the class is not told; None without classes.

    Raises:
        ValueError: shapes that do not fit, negative scales, or weights that are not positive.
    """

    def __init__(
        self,
        means: Tensor,
        scales: Tensor | Sequence[float] | float = 0.0,
        weights: Tensor | Sequence[float] | None = None,
        classes: Any = None,
    ) -> None:
        means = torch.as_tensor(means)
        if means.dim() < 2 or not means.numel():
            raise ValueError(f"means: (components, ...), got shape {tuple(means.shape)}")
        count, self.shape = len(means), means.shape[1:]
        self.means = means.double().flatten(1)
        where = means.device
        self.scales = torch.as_tensor(scales, dtype=torch.float64, device=where).expand(count)
        if not bool((self.scales >= 0).all()):
            raise ValueError("scales: standard deviations, 0 or more")
        given = [1.0] * count if weights is None else weights
        shares = torch.as_tensor(given, dtype=torch.float64, device=where)
        if shares.shape != (count,) or not bool((shares > 0).all()):
            raise ValueError(f"weights: {count} positive numbers, one per component")
        self.log_weights = (shares / shares.sum()).log()
        self.classes = None if classes is None else class_numbers(classes, count, "classes")
        self.untold = None if self.classes is None else int(self.classes.max()) + 1

    def denoise(
        self, x: Tensor, level: Level, labels: Any = None, *, freedom: float = math.inf
    ) -> Tensor:
        """The mean of the clean samples that a state may have come from.

        Args:
            x: states (batch, ...).
            level: of all of them.
            labels: (batch,) classes to which each state's components are restricted, or None.
            freedom: D of Student-t noise; infinite for Gaussian noise.

        Raises:
            ValueError: another shape, labels without classes, or a D that is not positive.
        """
        z = self._flat(x) / level.alpha
        found = self._posterior(z, level.sigma, labels, freedom)
        kept = found.gain.sum(1, keepdim=True)
        mean = (found.share - found.gain) @ self.means + kept * z
        return mean.view(x.shape).to(x.dtype)

    def score(
        self, x: Tensor, level: Level, labels: Any = None, *, freedom: float = math.inf
    ) -> Tensor:
        """The gradient of the log density of states; see :meth:`denoise`."""
        z = self._flat(x) / level.alpha
        found = self._posterior(z, level.sigma, labels, freedom)
        pulled = found.precision @ self.means - found.precision.sum(1, keepdim=True) * z
        return (pulled / level.alpha).view(x.shape).to(x.dtype)

    def log_density(
        self, x: Tensor, level: Level, labels: Any = None, *, freedom: float = math.inf
    ) -> Tensor:
        """The log density (batch,) of states, in nats; see :meth:`denoise`."""
        z = self._flat(x) / level.alpha
        found = self._posterior(z, level.sigma, labels, freedom)
        return found.log_density - z.shape[1] * math.log(level.alpha)

    def draw(
        self, count: int, generator: torch.Generator | None = None, dtype: Any = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Clean samples (count, ...) and the numbers (count,) of their components."""
        chosen = torch.multinomial(self.log_weights.exp().cpu(), count, True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        chosen, noise = chosen.to(self.means.device), noise.to(self.means.device)
        made = self.means[chosen] + self.scales[chosen, None] * noise
        return made.view(count, *self.shape).to(dtype), chosen

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"x: states (batch, {', '.join(map(str, self.shape))}) for these means, got shape "
                f"{tuple(x.shape)}"
            )
        return x.double().flatten(1)

    def _log_weights(self, labels: Any, rows: int) -> Tensor:
        """(rows, K), minus infinity for the components of other classes."""
        if labels is None:
            return self.log_weights.expand(rows, -1)
        if self.classes is None:
            raise ValueError("labels: this mixture has no classes; give it some, or no labels")
        told = class_numbers(labels, rows)
        refuse_outside(told, self.untold + 1)
        for name in told.unique().tolist():
            if name != self.untold and not bool((self.classes == name).any()):
                raise ValueError(f"labels: no component is of class {name}")
        other = (told[:, None] != self.classes) & (told[:, None] != self.untold)
        weights = self.log_weights.expand(rows, -1).masked_fill(other, -math.inf)
        return weights.log_softmax(1)

    def _posterior(self, z: Tensor, sigma: float, labels: Any, freedom: float) -> _Posterior:
        """Of states (batch, N) in the EDM view."""
        check_freedom(freedom)
        points = bool((self.scales == 0).all())
        if not sigma > 0 and (points or freedom < math.inf):
            raise ValueError(f"level: needs noise above 0 here, got {sigma}")
        weights = self._log_weights(labels, len(z))
        rows = max(1, MOST // (len(self.means) * z.shape[1]))
        distances = torch.cat(
            [(part[:, None] - self.means).square().sum(-1) for part in z.split(rows)]
        )
        if math.isinf(freedom):
            parts = [self._gaussian(distances, weights, sigma, z.shape[1])]
        elif points:
            parts = [self._points(distances, weights, sigma, z.shape[1], freedom)]
        else:
            low, step, count = _nodes(float(distances.detach().max()), sigma, z.shape[1], freedom)
            logs = low + step * torch.arange(count, dtype=torch.float64, device=z.device)
            rows = max(1, MOST // (len(self.means) * count))
            parts = [
                self._student(*pair, sigma, z.shape[1], freedom, logs)
                for pair in zip(distances.split(rows), weights.split(rows), strict=True)
            ]
        return _Posterior(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _gaussian(self, distances: Tensor, weights: Tensor, sigma: float, n: int) -> _Posterior:
        variances = self.scales.square() + sigma**2
        logs = weights - n / 2 * (2 * math.pi * variances).log() - distances / (2 * variances)
        share = logs.softmax(1)
        gain = share * (self.scales.square() / variances)
        return _Posterior(share, gain, share / variances, logs.logsumexp(1))

    def _points(
        self, distances: Tensor, weights: Tensor, sigma: float, n: int, freedom: float
    ) -> _Posterior:
        logs = weights + _log_student(distances, sigma, n, freedom)
        share = logs.softmax(1)
        precision = share * (n + freedom) / (distances + freedom * sigma**2)
        return _Posterior(share, torch.zeros_like(share), precision, logs.logsumexp(1))

    def _student(
        self, distances: Tensor, weights: Tensor, sigma: float, n: int, freedom: float, at: Tensor
    ) -> _Posterior:
        """With the noise's width integrated out at nodes ``at`` of ln tau, evenly spaced."""
        variances = self.scales.square() + (sigma**2 / at.exp())[:, None]  # (nodes, K)
        half = freedom / 2
        prior = half * (at - at.exp()) + half * math.log(half) - math.lgamma(half)
        prior = prior + (at[1] - at[0]).log()
        logs = prior[:, None] - n / 2 * (2 * math.pi * variances).log()
        logs = logs + weights[:, None] - distances[:, None] / (2 * variances)  # (batch, nodes, K)
        share = logs.flatten(1).softmax(1).view_as(logs)
        gain = (share * (self.scales.square() / variances)).sum(1)
        precision = (share / variances).sum(1)
        return _Posterior(share.sum(1), gain, precision, logs.flatten(1).logsumexp(1))


def _nodes(distance: float, sigma: float, n: int, freedom: float) -> tuple[float, float, int]:
    """First node, spacing and number of nodes in ln tau, for all squared distances up to one.

    Every integrand has its peaks between D / (D + distance / sigma^2) and 1 + n / D, falls no
    slower than the prior beyond, and has no peak sharper than Gamma((n + D) / 2) in ln tau.
    """
    low = math.log(freedom / (freedom + distance / sigma**2))
    low -= 2 * TAIL / freedom + 2 * math.sqrt(TAIL / freedom)
    high = math.log1p(n / freedom) + min(
        2 * math.sqrt(TAIL / freedom) + 2 * TAIL / freedom, math.log1p(2 * TAIL / freedom) + 3
    )
    step = 0.5 * math.sqrt(2 / (n + freedom))
    step = min(step, 0.25)
    return low, step, math.ceil((high - low) / step) + 1


def log_kernel(offset: Tensor, sigma: float, freedom: float = math.inf) -> Tensor:
    r"""Log density (batch,) of noise offsets: Student-t of scale ``sigma``, or Gaussian.

    The kernel of PFGM++, :math:`p_r(x\mid y)\propto(\|x-y\|^2 + r^2)^{-(N+D)/2}` with
    :math:`r = \sigma\sqrt D`, is this for offsets :math:`x - y`.

    Args:
        offset: (batch, ...).
        sigma: above 0.
        freedom: D, above 0.

    Raises:
        ValueError: a sigma or D that is not positive.
    """
    check_freedom(freedom)
    if not sigma > 0:
        raise ValueError(f"sigma: must be above 0, got {sigma}")
    flat = offset.double().flatten(1)
    squared, n = flat.square().sum(1), flat.shape[1]
    if math.isinf(freedom):
        return -n / 2 * math.log(2 * math.pi * sigma**2) - squared / (2 * sigma**2)
    return _log_student(squared, sigma, n, freedom)


def _log_student(squared: Tensor, sigma: float, n: int, freedom: float) -> Tensor:
    scale = freedom * sigma**2
    front = math.lgamma((n + freedom) / 2) - math.lgamma(freedom / 2)
    front -= n / 2 * math.log(math.pi * scale)
    return front - (n + freedom) / 2 * torch.log1p(squared / scale)
