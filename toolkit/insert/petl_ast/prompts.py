r"""Prompts of a spectrogram transformer: learned tokens after the class token.

Shallow ones go in before the first block and pass through all; deep ones are put in afresh before
each block, in the place of what the block before made of its own. Source: as
:mod:`toolkit.insert.petl_ast`; the form is that of Jia et al., arXiv 2203.12119.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.tokens import TokenLayer
from toolkit.core.declare.fields import Declared, Range, Rank
from toolkit.core.declare.info import Info
from toolkit.core.nets.anatomy import anatomy
from toolkit.insert.petl_ast.places import CLASS, DISTILLATION, Plan, chosen, holds
from toolkit.insert.petl_ast.prefix import bound


@dataclass(frozen=True)
class ASTPrompts(Declared):
    """Learned tokens before the first block, or before each block that ``targets`` names.

    Args:
        tokens: p, in each place. Source: official code.
        deep: tokens of its own for each block. Source: official code.
        drop: take the distillation token out, which stands at position 1. Source: official code,
            always.
        after: how many tokens stay before the prompts; None is 1 where the model has a class token
            and 0 elsewhere. Source: official code, 1.
        kept: leave what the last block makes of deep prompts in its output, for a mean over all
            tokens; shallow ones stay in any case. Source: official code.
        patch: side P of a patch, which only sets the size of the start. Source: official code.
        here: which block of the stack this stands at; :func:`toolkit.adapt` fills it in. Source:
            ours.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range.
    """

    tokens: Rank = 25
    deep: bool = True
    drop: bool = False
    after: Annotated[int, Range(0, 4096)] | None = None
    kept: bool = True
    patch: Annotated[int, Range(1, 1024)] = 16
    here: Literal["open", "first", "inner", "last", "only"] = "open"

    # the catalogue lists methods by their package; this one shares its chapter
    info: ClassVar[Info] = Info(
        slug="petl_ast",
        part="insert",
        title="Prompts",
        arxiv="2312.03694",
        year=2023,
        code="umbertocappellazzo/PETL_AST",
        equation=r"x_{l+1} = B_l([x_1; P_l; x_{2:}])",
        acts_on="the tokens that a block reads",
        count="pm",
        inference="p more tokens in every block",
        colour="#44AA99",
        zero_init=False,
        init_reason="the tokens start at random and are looked at at once",
        mergeable=False,
        kinds=("module",),
    )

    def decided(self, model: nn.Module, targets: Any, batches: Any, loss: Any, train: Any) -> Plan:
        """Which block gets tokens, and what becomes of them there.

        Raises:
            ValueError: no blocks, or no distillation token to drop.
        """
        blocks = [block.name for block in chosen(self, model, targets)]
        if self.here != "open":
            return Plan({self: blocks})
        if self.drop and not holds(model, DISTILLATION):
            raise ValueError(
                f"ASTPrompts(drop=True): {type(model).__name__} has no distillation token "
                f"({' or '.join(DISTILLATION)}), so a patch would be dropped; use drop=False"
            )
        every = [block.name for block in anatomy(model).blocks]
        if not self.deep:
            blocks = every[:1]
        elif self.drop and every[0] not in blocks:
            raise ValueError(f"ASTPrompts(drop=True): name the first block {every[0]!r} in targets")
        after = int(holds(model, CLASS)) if self.after is None else self.after
        made: dict[Any, list[str]] = {}
        for name in blocks:
            first, last = name == every[0], name == every[-1]
            here = "only" if first and last else "first" if first else "last" if last else "inner"
            one = dataclasses.replace(self, after=after, here=here)  # type: ignore[arg-type]
            made.setdefault(one, []).append(name)
        return Plan(made)

    def build(self, site: Site, generator: torch.Generator | None = None) -> PromptLayer:
        return PromptLayer(self, site, generator)

    def count(self, site: Site) -> int:
        """p d numbers for a block of width d."""
        return self.tokens * site.rows


class PromptLayer(TokenLayer):
    """The tokens of one block; at the first one the distillation token goes, if asked for."""

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        last = method.here in ("last", "only", "open")
        super().__init__(
            site, method.tokens, generator=generator, bound=bound(method.patch, site.rows),
            after=method.after or 0, kept=not method.deep or (method.kept and last),
        )  # fmt: skip
        self.drop = method.drop and method.here in ("first", "only")

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.drop:
            rest = [*args[1:], *(v for k, v in kwargs.items() if args or k != "hidden_states")]
            if any(isinstance(value, Tensor) for value in rest):
                raise ValueError(
                    f"block {self.site.name!r} is given more than its tokens, such as a mask, "
                    "which would be one token too long; use drop=False"
                )
            if args:
                args = (_without_second(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = _without_second(kwargs["hidden_states"])
        return super().forward(base, *args, **kwargs)


def _without_second(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x[:, 2:]], 1)
