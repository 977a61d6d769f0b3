"""Learned tokens beside a transformer block's own: prompts.

The block sees k tokens more; what it makes of them is dropped after it, so every block may have
tokens of its own (deep prompts). Around a whole stack of blocks they are shallow ones. Attention
masks grow with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.beside import on_tensor
from toolkit.core.adapt.sites import Site, normal, uniform


class TokenLayer(nn.Module):
    """``tokens`` (k, m) in the (batch, length, m) input of one block, or of a stack of blocks.

    Args:
        site: the block.
        count: k.
        std: standard deviation of a normal start.
        generator: source of the draw.
        bound: draw uniformly from [-bound, bound] instead.
        after: how many of the block's own tokens stay before the learned ones, such as 1, a class
            token. Masks grow in the same place.
        kept: leave what the block makes of the learned tokens in its output, for a mean over all
            tokens; the next block then reads them.
    """

    def __init__(
        self,
        site: Site,
        count: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
        bound: float | None = None,
        after: int = 0,
        kept: bool = False,
    ):
        super().__init__()
        self.site, self.after, self.kept = site, after, kept
        shape = (count, site.rows)
        if bound is None:
            tokens = normal(shape, std, site, generator)
        else:
            tokens = uniform(shape, bound, site, generator)
        self.tokens = nn.Parameter(tokens)

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
        k, length, after = len(self.tokens), x.shape[1], self.after
        if after > length:
            raise ValueError(
                f"after={after}, but block {self.site.name!r} reads {length} tokens; choose less"
            )
        tokens = self.tokens.to(x.dtype).expand(len(x), k, -1)
        longer = torch.cat([x[:, :after], tokens, x[:, after:]] if after else [tokens, x], 1)
        rest = tuple(_wider(a, k, length, "", after) for a in args[1:])
        named = {name: _wider(a, k, length, name, after) for name, a in kwargs.items()}
        if args:
            output = base(longer, *rest, **named)
        else:
            output = base(**(named | {"hidden_states": longer}))
        return output if self.kept else on_tensor(output, self._without)

    def _without(self, y: Tensor) -> Tensor:
        k, after = len(self.tokens), self.after
        return torch.cat([y[:, :after], y[:, after + k :]], 1) if after else y[:, k:]

    @property
    def changed(self) -> int:
        """Numbers of the base that differ once merged: none, as tokens cannot be merged."""
        return 0

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        raise TypeError(f"tokens before {self.site.name!r} are no change of a weight")


def _wider(argument: Any, k: int, length: int, name: str, after: int) -> Any:
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
    axes = [argument.dim() - 1]
    if argument.dim() >= 3 and argument.shape[-2] == length:  # (..., queries, keys)
        axes.append(argument.dim() - 2)
    for axis in axes:
        first, last = argument.split([after, length - after], axis)
        shape = (*first.shape[:axis], k, *first.shape[axis + 1 :])
        argument = torch.cat([first, first.new_full(shape, free), last], axis)
    return argument
