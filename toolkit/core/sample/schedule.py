r"""How much noise there is at which time: laws, and the falling levels that a sampler visits.

A noisy state is :math:`x = \alpha\,x_0 + s\,\varepsilon`. All laws describe the same family of
states, up to a factor: what counts is :math:`\sigma = s/\alpha`, the noise over the signal. In the
EDM view :math:`\alpha = 1`; in the view that preserves variance (VP) :math:`\alpha^2 + s^2 = 1`,
so that :math:`x_{VP} = \alpha\,x_{EDM}` and :math:`\alpha = 1/\sqrt{1+\sigma^2}`.

Levels are Python floats: a loop over them never waits for a device.

Sources: Karras et al., arXiv 2206.00364; Song et al., arXiv 2011.13456; Ho et al., arXiv
2006.11239; Nichol and Dhariwal, arXiv 2102.09672.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Level(NamedTuple):
    """One amount of noise.

    Attributes:
        time: its name under the law; what networks are told that were trained with times.
        alpha: factor of the clean sample in the state.
        std: standard deviation of the noise in the state.
    """

    time: float
    alpha: float
    std: float

    @property
    def sigma(self) -> float:
        """Noise over signal, the level in the EDM view."""
        return self.std / self.alpha

    @property
    def log_snr(self) -> float:
        r"""Half the logarithm of signal over noise, :math:`\lambda = \ln(\alpha/s)`."""
        return math.inf if self.std == 0 else math.log(self.alpha / self.std)


class Law:
    """Which time stands for which noise. A law of your own gives ``sigma`` and ``time``.

    Attributes:
        preserving: whether states are scaled to keep their variance (VP), or left as they are
            (EDM).
    """

    preserving: bool = True

    def sigma(self, time: float) -> float:
        """Noise over signal at a time."""
        raise NotImplementedError

    def time(self, sigma: float) -> float:
        """The time of a positive noise over signal: the inverse of :meth:`sigma`."""
        raise NotImplementedError

    def level(self, time: float) -> Level:
        """The level at a time."""
        return self._level(time, self.sigma(time))

    def at(self, sigma: float) -> Level:
        """The level with this noise over signal; without noise its time is :attr:`clean`."""
        return self._level(self.time(sigma) if sigma else self.clean, sigma)

    @property
    def clean(self) -> float:
        """The time that stands for no noise."""
        return 0.0

    def _level(self, time: float, sigma: float) -> Level:
        if not self.preserving:
            return Level(time, 1.0, sigma)
        root = math.hypot(1.0, sigma)
        return Level(time, 1.0 / root, sigma / root)


@dataclass(frozen=True)
class EDM(Law):
    """The time is the noise itself, and the signal keeps its size."""

    preserving = False

    def sigma(self, time: float) -> float:
        """The time."""
        return time

    def time(self, sigma: float) -> float:
        """The noise."""
        return sigma


@dataclass(frozen=True)
class LinearVP(Law):
    r"""A rate of noise that grows linearly from time 0 to 1:
    :math:`\ln\alpha_t = -\tfrac14 t^2(b - a) - \tfrac12 t a`.

    Args:
        low: the rate ``a`` at time 0.
        high: the rate ``b`` at time 1.

    Raises:
        ValueError: rates that are not positive, or that fall.
    """

    low: float = 0.1
    high: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"low, high: need 0 < low <= high, got {self.low} and {self.high}")

    def sigma(self, time: float) -> float:
        """Noise over signal at a time from 0 to 1, or a little beyond."""
        slope = self.high - self.low
        return math.sqrt(math.expm1(2 * (time**2 * slope / 4 + time * self.low / 2)))

    def time(self, sigma: float) -> float:
        """The time of a noise over signal."""
        fallen = math.log1p(sigma**2) / 2  # -ln(alpha)
        root = math.sqrt(self.low**2 + 4 * (self.high - self.low) * fallen)
        return 4 * fallen / (self.low + root)


class Betas(Law):
    r"""Discrete times 0 to T-1 with :math:`\alpha_t^2 = \prod_{s\le t}(1-\beta_s)`.

    Between whole times the logarithm of the noise is interpolated.

    Args:
        betas: (T,) rates, each between 0 and 1.

    Raises:
        ValueError: fewer than two rates, or one outside.
    """

    def __init__(self, betas: Iterable[float]) -> None:
        rates = [float(b) for b in betas]
        if len(rates) < 2 or not all(0 < b < 1 for b in rates):
            raise ValueError("betas: need two rates or more, each above 0 and below 1")
        kept = itertools.accumulate(math.log1p(-b) for b in rates)
        self._logs = [math.log(math.expm1(-log)) / 2 for log in kept]

    @classmethod
    def linear(cls, steps: int = 1000, low: float = 1e-4, high: float = 0.02) -> Betas:
        """Rates that grow linearly, as in DDPM."""
        return cls(_line(low, high, steps))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, low: float = 0.00085, high: float = 0.012) -> Betas:
        """Rates whose roots grow linearly, as in Stable Diffusion."""
        return cls(root**2 for root in _line(math.sqrt(low), math.sqrt(high), steps))

    @classmethod
    def cosine(cls, steps: int = 1000, most: float = 0.999) -> Betas:
        """Signal that falls along a squared cosine, no rate above ``most``."""
        kept = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return cls(min(1 - b / a, most) for a, b in itertools.pairwise(kept))

    @property
    def clean(self) -> float:
        """Minus one: the step before the first."""
        return -1.0

    def sigma(self, time: float) -> float:
        """Noise over signal at a time from 0 to T-1, or -1 for none.

        Raises:
            ValueError: a time outside.
        """
        if time == self.clean:
            return 0.0
        last = len(self._logs) - 1
        if not 0 <= time <= last:
            raise ValueError(f"time: from 0 to {last}, got {time}")
        before = min(int(time), last - 1)
        share = time - before
        return math.exp((1 - share) * self._logs[before] + share * self._logs[before + 1])

    def time(self, sigma: float) -> float:
        """The time of a noise over signal.

        Raises:
            ValueError: more or less noise than any time has.
        """
        log, logs = math.log(sigma), self._logs
        slack = 1e-12 * (logs[-1] - logs[0])
        if not logs[0] - slack <= log <= logs[-1] + slack:
            ends = f"{math.exp(logs[0]):.4g} to {math.exp(logs[-1]):.4g}"
            raise ValueError(f"sigma: this law has noise from {ends}, got {sigma:.4g}")
        after = min(max(bisect.bisect_left(logs, log), 1), len(logs) - 1)
        share = (log - logs[after - 1]) / (logs[after] - logs[after - 1])
        return min(max(after - 1 + share, 0.0), len(logs) - 1.0)


@dataclass(frozen=True)
class Schedule:
    """The levels that a sampler visits, from much noise to little.

    Args:
        levels: one more than there are steps. Noise and times fall; no noise at all is allowed
            for the last level only.

    Raises:
        ValueError: no step, levels that do not fall or are not finite, or a level without noise
            before the last. The message says which.
    """

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise ValueError(
                f"steps: {max(len(self.levels) - 1, 0)} steps; a schedule needs two levels or more"
            )
        for number, level in enumerate(self.levels):
            if not all(map(math.isfinite, level)) or level.alpha <= 0 or level.std < 0:
                raise ValueError(
                    f"levels: level {number} is {tuple(level)}; time, alpha and std must be "
                    "finite, alpha above 0, std not below it"
                )
            if level.std == 0 and number < self.steps:
                raise ValueError(
                    f"levels: level {number} of {self.steps} has no noise, and steps divide by "
                    "it; only the last level may be 0"
                )
        for number, (one, two) in enumerate(itertools.pairwise(self.levels)):
            if not (two.sigma < one.sigma and two.time < one.time):
                raise ValueError(
                    f"times: they must fall, with the noise; from level {number} to {number + 1} "
                    f"times go {one.time:g} -> {two.time:g}, noise {one.sigma:g} -> {two.sigma:g}"
                )

    @classmethod
    def of(cls, law: Law, times: Iterable[float]) -> Schedule:
        """The levels of a law at given times, which fall."""
        return cls(tuple(law.level(float(t)) for t in times))

    @classmethod
    def even(cls, law: Law, steps: int, start: float, stop: float) -> Schedule:
        """Levels at times with equal distances, from ``start`` down to ``stop``."""
        return cls.of(law, _line(start, stop, _positive(steps) + 1))

    @classmethod
    def even_log_snr(cls, law: Law, steps: int, start: float, stop: float) -> Schedule:
        """Levels at equal distances of the log-SNR, from time ``start`` down to ``stop``."""
        high, low = (math.log(law.sigma(t)) for t in (start, stop))
        logs = _line(high, low, _positive(steps) + 1)
        return cls(tuple(law.at(math.exp(log)) for log in logs))

    @classmethod
    def edm(
        cls, steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0,
        to_zero: bool = True,
    ) -> Schedule:  # fmt: skip
        r"""The levels of EDM, :math:`\sigma_i = (h^{1/\rho} + \tfrac{i}{n-1}(l^{1/\rho} -
        h^{1/\rho}))^\rho`, and 0 at the end.

        Args:
            steps: how many, ``n``; without the 0 at the end there is one level more.
            low: the least noise ``l`` that is not 0.
            high: the noise ``h`` at the start.
            rho: how much the levels crowd at low noise.
            to_zero: end without noise.

        Raises:
            ValueError: no step, or noise that is not positive or does not fall.
        """
        if not 0 < low < high < math.inf:
            raise ValueError(f"low, high: need 0 < low < high, got {low} and {high}")
        if not rho > 0:
            raise ValueError(f"rho: must be above 0, got {rho}")
        count = _positive(steps) + (not to_zero)
        ends = high ** (1 / rho), low ** (1 / rho)
        sigmas = [high, *(root**rho for root in _line(*ends, count)[1:])]
        return cls.of(EDM(), [*sigmas, 0.0] if to_zero else sigmas)

    @property
    def steps(self) -> int:
        """How many steps lead down the levels."""
        return len(self.levels) - 1

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise over signal at each level."""
        return tuple(level.sigma for level in self.levels)

    @property
    def times(self) -> tuple[float, ...]:
        """The levels' times."""
        return tuple(level.time for level in self.levels)

    def under(self, law: Law) -> Schedule:
        """The same noise over signal, named and scaled as another law does."""
        return Schedule(tuple(law.at(level.sigma) for level in self.levels))

    def last(self, steps: int) -> Schedule:
        """The last steps alone, as for a sample that is noised part of the way and cleaned again.

        Raises:
            ValueError: no step, or more than there are.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps: keep 1 to {self.steps} of {self.steps}, got {steps}")
        return Schedule(self.levels[-steps - 1 :])


def rescaled(x: Tensor, here: Level, there: Level) -> Tensor:
    """The state of one view in another, at the same noise over signal.

    Raises:
        ValueError: the two levels have different noise over signal.
    """
    if not math.isclose(here.sigma, there.sigma, rel_tol=1e-9):
        raise ValueError(
            f"here, there: views of one level have equal noise over signal, not {here.sigma:g} "
            f"and {there.sigma:g}"
        )
    return x * (there.alpha / here.alpha)


Network = Callable[..., Tensor]
"""What a network computes: ``network(x, level)``, or ``network(x, level, labels)``."""


def clean_from(network: Network, what: str) -> Network:
    r"""A denoiser from a network that predicts something else.

    Args:
        network: of a state and its :class:`Level` (and labels).
        what: "noise" for :math:`\varepsilon`, "velocity" for :math:`v = \alpha\varepsilon - s x_0`,
            "clean" for :math:`x_0` itself.

    Returns:
        The same of the predicted clean sample.

    Raises:
        ValueError: another word.
    """
    if what not in ("clean", "noise", "velocity"):
        raise ValueError(f'what: "clean", "noise" or "velocity", got {what!r}')
    if what == "clean":
        return network

    def denoiser(x: Tensor, level: Level, *labels: Tensor) -> Tensor:
        said = network(x, level, *labels)
        if what == "noise":
            return (x - level.std * said) / level.alpha
        return (level.alpha * x - level.std * said) / (level.alpha**2 + level.std**2)

    return denoiser


def _line(start: float, stop: float, count: int) -> list[float]:
    if count == 1:
        return [start]
    inner = [start + (stop - start) * (i / (count - 1)) for i in range(1, count - 1)]
    return [start, *inner, stop]


def _positive(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: a whole number, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps: at least 1, got {steps}")
    return steps
