"""Learned tokens before a transformer block's own: prompts and prefixes.

The block sees k tokens more; what it makes of them is dropped after it, so every block may have
tokens of its own (deep prompts). Attention masks grow with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.beside import on_tensor
from toolkit.core.adapt.sites import Site, normal


class TokenLayer(nn.Module):
    """``tokens`` (k, m) before the (batch, length, m) input of one block.

    Args:
        site: the block.
        count: k.
        std: standard deviation of the start.
        generator: source of the draw.
    """

    def __init__(
        self, site: Site, count: int, std: float = 0.02, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.site = site
        self.tokens = nn.Parameter(normal((count, site.rows), std, site, generator))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.site.rows:
            raise TypeError(
                f"module {self.site.name!r} is no transformer block that reads (batch, length, "
                f"{self.site.rows}); name the blocks in targets"
            )
        if "position_embeddings" in kwargs:
            raise TypeError(
                f"block {self.site.name!r} is given the positions of its tokens (rotary "
                "embeddings), and learned tokens have none; use a method on its weights instead"
            )
        k, length = len(self.tokens), x.shape[1]
        longer = torch.cat([self.tokens.to(x.dtype).expand(len(x), k, -1), x], 1)
        rest = tuple(_wider(a, k, length, "") for a in args[1:])
        named = {name: _wider(a, k, length, name) for name, a in kwargs.items()}
        if args:
            output = base(longer, *rest, **named)
        else:
            output = base(**(named | {"hidden_states": longer}))
        return on_tensor(output, lambda y: y[:, k:])

    @property
    def changed(self) -> int:
        """Numbers of the base that differ once merged: none, as tokens cannot be merged."""
        return 0

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        raise TypeError(f"tokens before {self.site.name!r} are no change of a weight")


def _wider(argument: Any, k: int, length: int, name: str) -> Any:
    """A mask over ``length`` tokens as one over k more, which all may be looked at.

    torch's own blocks mark what may *not* be looked at (``src_mask``, ``..._padding_mask``).
    """
    if not isinstance(argument, Tensor) or argument.dim() < 2 or argument.shape[-1] != length:
        return argument
    if argument.dtype == torch.bool:
        free: Any = not (name.startswith("src") or name.endswith("padding_mask"))
    elif argument.is_floating_point():
        free = 0.0  # added to the scores
    else:
        free = 1
    pads = [k, 0]
    if argument.dim() >= 3 and argument.shape[-2] == length:  # (..., queries, keys)
        pads += [k, 0]
    return nn.functional.pad(argument, pads, value=free)
