r"""What stands beside a frozen module, in series after it or in parallel to it.

``ScaleShift``: :math:`y' = \gamma\odot y + \beta`, which merges into a weight and its bias.
``Bottleneck``: :math:`y' = y + s\,U\sigma(Dz)`, with z the module's output (serial) or its input
(parallel), which is no plain weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from toolkit.core.adapt.forwards import call_with, frozen, has_own_forward, is_hooked
from toolkit.core.adapt.sites import Site, normal

OVER_CHANNELS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
"""Norms whose features lie on axis 1."""


class ScaleShift(nn.Module):
    """A factor and, if asked for, an offset per output feature of one site.

    ``gamma`` (m,) starts at 1 and ``beta`` (m,) at 0. Outputs of convolutions and of norms over
    channels carry their features on axis 1, all others on the last.

    Args:
        site: where.
        shift: learn ``beta`` too.
        std: standard deviation of a normal law that is added to both starts.
        generator: source of that draw.
    """

    def __init__(
        self,
        site: Site,
        shift: bool = True,
        std: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.site = site
        where = {"dtype": site.dtype, "device": site.device}
        gamma = torch.ones(site.rows, **where)
        beta = torch.zeros(site.rows, **where)
        if std:
            gamma += normal((site.rows,), std, site, generator)
            beta += normal((site.rows,), std, site, generator)
        self.gamma = nn.Parameter(gamma)
        self.beta = nn.Parameter(beta) if shift else None

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._within(base) and not self._without_bias(base):
            return call_with(base, self.merged(base), self.site.name, args, kwargs)
        trailing = len(self.site.shape) - 2 if self.site.kind == "conv" else 0

        def act(y: Tensor) -> Tensor:
            return self.act(y, y.dim() - 2 if isinstance(base, OVER_CHANNELS) else trailing)

        return on_tensor(base(*args, **kwargs), act)

    def _within(self, base: nn.Module) -> bool:
        """Whether more follows in the layer's call than what its weight and bias are in."""
        return has_own_forward(base) or is_hooked(base)

    def _without_bias(self, base: nn.Module) -> bool:
        return self.beta is not None and getattr(base, "bias", None) is None

    def act(self, y: Tensor, trailing: int = 0) -> Tensor:
        """The scaled and shifted output, whose last axes, so many, are positions."""
        shape = (-1, *[1] * trailing)
        y = y * self.gamma.to(y.dtype).view(shape)
        return y if self.beta is None else y + self.beta.to(y.dtype).view(shape)

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        site = self.site
        lacks = self._without_bias(base)
        nowhere = lacks and "bias" not in base._parameters
        if (nowhere and bool(self.beta.any())) or (lacks and self._within(base)):
            raise TypeError(
                f"layer {site.name!r} has no bias to merge the shift into, and may not use one; "
                "keep it adapted, or build the layer with bias=True"
            )
        old = frozen(base, site.parameter, site.name)
        if site.kind == "norm":
            new = {"weight": (old * self.gamma).to(old.dtype)}
        else:
            matrix = self.gamma[:, None] * site.to_matrix(old).to(site.dtype)
            new = {site.parameter: site.to_weight(matrix).to(old.dtype).contiguous()}
        if getattr(base, "bias", None) is not None:
            bias = frozen(base, "bias", site.name)
            moved = bias * self.gamma if self.beta is None else bias * self.gamma + self.beta
            new["bias"] = moved.to(bias.dtype)
        elif lacks and not nowhere:
            new["bias"] = self.beta.to(old.dtype)
        return new


class Bottleneck(nn.Module):
    """A small network of one hidden layer beside one site, with its own input and output maps.

    ``down`` (h, m) is drawn from a normal law, ``up`` (m, h) starts at 0, so the model starts as
    its base. It acts on the features of each position: on axis 1 beside a convolution, on the last
    axis otherwise.

    Args:
        site: where.
        width: hidden units h.
        act: the nonlinearity.
        parallel: read the module's input instead of its output.
        scale: s, factor of what is added.
        std: standard deviation of the start of ``down``.
        generator: source of the draw.

    Raises:
        ValueError: parallel to a convolution, whose input may have other positions than its output.
    """

    def __init__(
        self,
        site: Site,
        width: int,
        act: nn.Module,
        parallel: bool = False,
        scale: float = 1.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if parallel and site.kind == "conv":
            raise ValueError(
                f"layer {site.name!r}: the input of a convolution may have other positions than "
                "its output, so it cannot be read in that one's place; use parallel=False"
            )
        self.site, self.parallel, self.scale, self.act = site, parallel, scale, act
        m = site.rows
        n = (site.cols or m) if parallel else m
        self.down = nn.Parameter(normal((width, n), std, site, generator))
        self.down_bias = nn.Parameter(torch.zeros(width, dtype=site.dtype, device=site.device))
        self.up = nn.Parameter(torch.zeros(m, width, dtype=site.dtype, device=site.device))
        self.up_bias = nn.Parameter(torch.zeros(m, dtype=site.dtype, device=site.device))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        axis = 1 - len(self.site.shape) if self.site.kind == "conv" else -1

        def added(y: Tensor) -> Tensor:
            z = first_input(self.site.name, args, kwargs) if self.parallel else y
            if axis != -1:
                z = z.movedim(axis, -1)
            if isinstance(z, Tensor) and z.shape[-1] != self.down.shape[1]:
                raise RuntimeError(
                    f"module {self.site.name!r} has {z.shape[-1]} features on its last axis, but "
                    f"{self.down.shape[1]} by its first norm or matrix; a bottleneck acts on the "
                    "last axis, so name a module that has its features there"
                )
            hidden = self.act(F.linear(z.to(self.down.dtype), self.down, self.down_bias))
            more = self.scale * F.linear(hidden, self.up, self.up_bias).to(y.dtype)
            return y + (more if axis == -1 else more.movedim(-1, axis))

        return on_tensor(base(*args, **kwargs), added)

    @property
    def changed(self) -> int:
        """Numbers of the base that differ once merged: none, as it cannot be merged."""
        return 0

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        raise TypeError(f"the bottleneck beside {self.site.name!r} is no change of a weight")


def first_input(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module reads, given first or by one of its usual names.

    Raises:
        TypeError: neither.
    """
    given = [*args[:1], *(kwargs[k] for k in ("input", "hidden_states", "x") if k in kwargs)]
    if not given or not isinstance(given[0], Tensor):
        raise TypeError(
            f"module {name!r} was not given a tensor first, nor as input, hidden_states or x, so "
            "nothing can be read beside it; choose another in targets"
        )
    return given[0]


def on_tensor(output: Any, act: Any) -> Any:
    """Apply ``act`` to a module's output, or to the first entry of a tuple of outputs."""
    if isinstance(output, Tensor | fx.Proxy):
        return act(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        first = act(output[0])
        rest = output[1:]
        return type(output)(first, *rest) if hasattr(output, "_fields") else (first, *rest)
    raise TypeError(
        f"a module that returns {type(output).__name__} cannot be adapted beside; choose one that "
        "returns a tensor, or a tuple that begins with one"
    )
