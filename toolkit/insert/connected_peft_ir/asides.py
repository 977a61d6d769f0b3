r"""The aside itself, in the four places where one can stand.

.. math:: B(x) = U\,\sigma(D x + d) + u, \qquad D \in \mathbb{R}^{r \times m},\
    U \in \mathbb{R}^{m \times r},\ U = 0 \text{ at the start}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.beside import first_input, on_tensor
from toolkit.core.adapt.sites import Site, normal
from toolkit.core.declare.fields import Declared, Range, Rank
from toolkit.core.declare.info import Info

MARK = "_stream_beside"
"""Attribute under which a block's output takes the stream along to the next block."""
SECOND = ("input_tensor", "residual", "stream")
"""Names under which a module is given the stream that it adds, if not second."""


@dataclass(frozen=True)
class Aside(Declared):
    """One aside; :class:`~toolkit.insert.connected_peft_ir.Connected` places them.

    Args:
        rank: hidden units r. Source: ours.
        features: width m of what it reads; None takes the site's. Source: the network.
        place: ``beside`` adds to a module's output what comes of its input; ``residual`` adds to
            the stream that a module is given second; ``tapped`` adds to a block's output what comes
            of what a :class:`Tap` in it saw; ``stream`` keeps a stream from block to block. Source:
            inferred.
        order: of a block in its stack, for the stream. Source: the network.
        inject: whether blocks read the stream. Source: inferred.
        act: nonlinearity. Source: inferred.
        std: of the start of the way down. Source: inferred.
    """

    rank: Rank = 8
    features: Annotated[int, Range(1, 1_000_000)] | None = None
    place: Literal["beside", "residual", "tapped", "stream"] = "beside"
    order: Literal["first", "inner", "last", "only"] = "only"
    inject: Literal["every", "top"] = "every"
    act: Literal["gelu", "relu"] = "gelu"
    std: Annotated[float, Range(0.0, 1.0, open_low=True)] = 0.02

    info: ClassVar[Info] = Info(
        slug="connected_peft_ir",
        part="insert",
        title="Aside",
        arxiv="2208.09847",
        year=2022,
        equation=r"y' = y + U\,\sigma(D x)",
        acts_on="what passes beside a frozen module",
        count=r"2rm + r + m",
        inference="two small products",
        colour="#7A5195",
        mergeable=False,
        kinds=("module",),
    )

    def build(self, site: Site, generator: torch.Generator | None = None) -> AsideLayer:
        return LAYERS[self.place](self, site, generator)

    def count(self, site: Site) -> int:
        """2rm + r + m numbers."""
        m = self.features or site.rows
        return 2 * self.rank * m + self.rank + m


class AsideLayer(nn.Module):
    """``down`` (r, m) is drawn, ``up`` (m, r) and both biases start at 0."""

    def __init__(self, method: Aside, site: Site, generator: torch.Generator | None):
        super().__init__()
        self.site = site
        self.act: Callable[[Tensor], Tensor] = F.gelu if method.act == "gelu" else F.relu
        self.order, self.inject = method.order, method.inject
        r, m = method.rank, method.features or site.rows
        where = {"dtype": site.dtype, "device": site.device}
        self.down = nn.Parameter(normal((r, m), method.std, site, generator))
        self.down_bias = nn.Parameter(torch.zeros(r, **where))
        self.up = nn.Parameter(torch.zeros(m, r, **where))
        self.up_bias = nn.Parameter(torch.zeros(m, **where))

    def beside(self, x: Tensor) -> Tensor:
        """B(x), (..., m) to the same shape.

        Raises:
            RuntimeError: x has another width.
        """
        if x.shape[-1] != self.down.shape[1]:
            raise RuntimeError(
                f"module {self.site.name!r} was given {x.shape[-1]} features on the last axis, its "
                f"aside reads {self.down.shape[1]}; name the blocks in targets, or say where the "
                "parts are with Anatomy.by_hand"
            )
        hidden = self.act(F.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return F.linear(hidden, self.up, self.up_bias).to(x.dtype)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        more = self.beside(first_input(self.site.name, args, kwargs))
        return on_tensor(base(*args, **kwargs), lambda y: y + more)

    @property
    def changed(self) -> int:
        """Numbers of the base that differ once merged: none, as it cannot be merged."""
        return 0

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        raise TypeError(f"the aside beside {self.site.name!r} is no change of a weight")


class ResidualAside(AsideLayer):
    """In post-LN blocks, where one module adds the stream and normalises: LN(y + x + B(x))."""

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1] + self.beside(args[1]), *args[2:])
        elif name := next((n for n in SECOND if isinstance(kwargs.get(n), Tensor)), None):
            kwargs = kwargs | {name: kwargs[name] + self.beside(kwargs[name])}
        else:
            raise TypeError(
                f"module {self.site.name!r} was not given the stream second, nor as "
                f"{', '.join(SECOND)}, so nothing can be added before its norm; use "
                'variant="layer" or "stream"'
            )
        return base(*args, **kwargs)


class TappedAside(AsideLayer):
    """Around a feed-forward that is no module: added to the block's output, read at its norm."""

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tap = next((m for m in base.modules() if isinstance(m, TapLayer)), None)
        if tap is not None:
            tap.seen = None
        y = base(*args, **kwargs)
        if tap is None or tap.seen is None:
            raise RuntimeError(
                f"block {self.site.name!r} did not call the norm before its feed-forward, so its "
                'aside has nothing to read; use variant="layer" or "stream"'
            )
        more, tap.seen = self.beside(tap.seen), None
        return on_tensor(y, lambda z: z + more)


class StreamAside(AsideLayer):
    """A block of a stack with a stream beside it: s' = s + B(h + s).

    The stream travels as an attribute of the block's output, so the next block must be given that
    very tensor; otherwise it says so.
    """

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = first_input(self.site.name, args, kwargs)
        stream = None if self.order in ("first", "only") else getattr(x, MARK, None)
        if stream is None and self.order in ("inner", "last"):
            raise RuntimeError(
                f"block {self.site.name!r} was not given the very tensor that the block before it "
                "returned, so the stream is lost (something acts between the blocks, or one was "
                'called alone); use variant="layer"'
            )
        z = x if stream is None else x + stream
        more = self.beside(z) if stream is None else stream + self.beside(z)
        if self.inject == "every" and stream is not None:
            args, kwargs = with_first(z, args, kwargs)
        y = base(*args, **kwargs)
        if self.order in ("last", "only"):
            return on_tensor(y, lambda h: h + more)
        return on_tensor(y, lambda h: marked(h, more))


def marked(h: Tensor, stream: Tensor) -> Tensor:
    """A view of a block's output that takes the stream along."""
    h = h.view_as(h)
    setattr(h, MARK, stream)
    return h


def with_first(
    value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with another first one."""
    if args:
        return (value, *args[1:]), kwargs
    name = next(n for n in ("input", "hidden_states", "x") if n in kwargs)
    return args, kwargs | {name: value}


@dataclass(frozen=True)
class Tap(Declared):
    """Keeps what a norm gives until the aside of its block has read it; trains nothing."""

    info: ClassVar[Info] = Info(
        slug="connected_peft_ir",
        part="insert",
        title="Tap",
        arxiv="2208.09847",
        year=2022,
        equation="y' = y",
        acts_on="nothing",
        count="0",
        inference="none",
        colour="#7A5195",
        mergeable=False,
        kinds=("norm",),
    )

    def build(self, site: Site, generator: torch.Generator | None = None) -> TapLayer:
        return TapLayer(site)

    def count(self, site: Site) -> int:
        """Nothing."""
        return 0


class TapLayer(nn.Module):
    """A norm as it is; ``seen`` is what it gave last, until that is read."""

    def __init__(self, site: Site):
        super().__init__()
        self.site = site
        self.seen: Tensor | None = None

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen = base(*args, **kwargs)
        return self.seen

    @property
    def changed(self) -> int:
        """Numbers of the base that change: none."""
        return 0

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        raise TypeError(f"a tap at {self.site.name!r} is no change of a weight")


LAYERS = {
    "beside": AsideLayer,
    "residual": ResidualAside,
    "tapped": TappedAside,
    "stream": StreamAside,
}
