r"""Key and value prefixes: p/2 vectors each in every attention, put in after the projections.

.. math:: \mathrm{softmax}\big(Q\,[K_1; P_K; K_{2:}]^\top/\sqrt{d_h}\big)\,[V_1; P_V; V_{2:}]

Only the keys and values grow; the row of tokens stays as long as it was. Source: as
:mod:`toolkit.insert.petl_ast`; the form is that of Li and Liang, arXiv 2101.00190.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.beside import first_input
from toolkit.core.adapt.sites import Site, uniform
from toolkit.core.declare.fields import Declared, Range
from toolkit.core.declare.info import Info
from toolkit.core.nets.anatomy.blocks import Map
from toolkit.core.nets.anatomy.form import common, matrix
from toolkit.insert.petl_ast.places import Plan, chosen

HEADS = ("num_attention_heads", "num_heads", "heads", "n_heads")
PARTS = ("query", "key", "value", "output")


def bound(patch: int, width: int) -> float:
    r"""v of the uniform start: :math:`\sqrt{6 / (3 P^2 + d)}`."""
    return math.sqrt(6 / (3 * patch**2 + width))


@dataclass(frozen=True)
class ASTPrefix(Declared):
    """Key and value vectors in the attention of each block that ``targets`` names.

    Args:
        tokens: p, half of which are keys and half values. Source: official code.
        patch: side P of a patch, which only sets the size of the start. Source: official code.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range, or an odd p.
    """

    tokens: Annotated[int, Range(2, 4096, log=True)] = 24
    patch: Annotated[int, Range(1, 1024)] = 16

    # the catalogue lists methods by their package; this one shares its chapter
    info: ClassVar[Info] = Info(
        slug="petl_ast",
        part="insert",
        title="Prefix",
        arxiv="2312.03694",
        year=2023,
        code="umbertocappellazzo/PETL_AST",
        equation=r"\mathrm{softmax}(Q[K; P_K]^\top)\,[V; P_V]",
        acts_on="the keys and values of each attention",
        count="pm",
        inference="p/2 more keys in every block",
        colour="#332288",
        zero_init=False,
        init_reason="the vectors start at random and are looked at at once",
        mergeable=False,
        kinds=("module",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens % 2:
            raise ValueError(
                f"ASTPrefix(tokens={self.tokens}): half are keys and half are values; choose an "
                "even number"
            )

    def decided(self, model: nn.Module, targets: Any, batches: Any, loss: Any, train: Any) -> Plan:
        """The attentions of the blocks that targets name.

        Raises:
            ValueError: no blocks, or an attention without layers of its own for query, key, value.
        """
        if callable(targets):  # of a file, which names the attentions
            sites = [n for n, m in model.named_modules() if targets(n, m)]
            if sites and all(_layers(model.get_submodule(n)) for n in sites):
                return Plan({self: sites})
        blocks, sites = chosen(self, model, targets), []
        for block in blocks:
            place = common(block.attention.values()) if block.attention else ""
            if not place or not _layers(model.get_submodule(place)):
                has = ", ".join(block.attention) or "no attention"
                raise ValueError(
                    f"ASTPrefix: the attention of block {block.name!r} needs layers of its own for "
                    f"query, key, value and output, all of one width; it has {has}. Use prompts, "
                    "or an adapter"
                )
            sites.append(place)
        return Plan({self: sites})

    def build(self, site: Site, generator: torch.Generator | None = None) -> PrefixLayer:
        return PrefixLayer(self, site, generator)

    def count(self, site: Site) -> int:
        """p d numbers for an attention of width d."""
        return self.tokens * site.rows


def _layers(attention: nn.Module) -> dict[str, str]:
    """Names of the four layers of an attention of one width, or nothing."""
    found = Map(attention).attentions
    if len(found) != 1 or not set(PARTS) <= found[0].layers.keys():
        return {}
    layers = {part: found[0].layers[part] for part in PARTS}
    ends = {matrix(attention.get_submodule(name)) for name in layers.values()}
    return layers if len(ends) == 1 and None not in ends else {}


class PrefixLayer(nn.Module):
    """``keys`` and ``values`` (p/2, d) after the first key and value of one attention.

    The attention is formed anew from its four layers, since modules read the number of keys from
    their input. Before the first use that form is held against the module's own output, and an
    attention that does more (a mask, rotary positions, norms of queries) is refused.
    """

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__()
        self.site, self.checked = site, False
        self._known: tuple[dict[str, str], int] | None = None
        shape, size = (method.tokens // 2, site.rows), bound(method.patch, site.rows)
        self.keys = nn.Parameter(uniform(shape, size, site, generator))
        self.values = nn.Parameter(uniform(shape, size, site, generator))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = first_input(self.site.name, args, kwargs)
        masks = [*args[1:], *(v for k, v in kwargs.items() if "mask" in k)]
        if any(value is not None for value in masks):
            raise ValueError(
                f"attention {self.site.name!r} is given a mask, which a prefix does not carry; "
                "use prompts, or call the model without a mask"
            )
        if not self.checked and not torch.compiler.is_compiling():
            self._check(base, x, args, kwargs)
            self.checked = True
        made = self.attend(base, x, self.keys, self.values)
        return (made, None) if self.paired else made

    def _check(self, base: nn.Module, x: Tensor, args: Any, kwargs: Any) -> None:
        modes = [(module, module.training) for module in base.modules()]
        base.eval()
        try:
            with torch.no_grad():
                own = base(*args, **kwargs)
                self.paired = isinstance(own, tuple)
                own = own[0] if self.paired else own
                ours = self.attend(base, x, None, None)
        finally:
            for module, mode in modes:
                module.training = mode
        if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-2, atol=1e-3):
            raise TypeError(
                f"attention {self.site.name!r} ({type(base).__name__}) does more than softmax of "
                "query and key, so a prefix would replace it by another map; use prompts"
            )

    paired = False

    def attend(
        self, base: nn.Module, x: Tensor, keys: Tensor | None, values: Tensor | None
    ) -> Tensor:
        """(batch, M, d) to the same shape, with more keys and values or without."""
        if self._known is None:
            self._known = _layers(base), self._heads(base)
        layers, heads = self._known
        query, key, value = (base.get_submodule(layers[part])(x) for part in PARTS[:3])
        if keys is not None and values is not None:
            key, value = _after_first(key, keys), _after_first(value, values)
        query, key, value = (
            z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key, value)
        )
        drop = getattr(base, "attention_dropout", 0.0) if base.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        return base.get_submodule(layers["output"])(mixed.transpose(1, 2).flatten(-2))

    def _heads(self, base: nn.Module) -> int:
        for module in base.modules():
            for name in HEADS:
                if isinstance(count := getattr(module, name, None), int):
                    return count
        raise TypeError(
            f"attention {self.site.name!r} ({type(base).__name__}) does not say how many heads it "
            f"has; looked for {', '.join(HEADS)}. Use prompts, or an adapter"
        )

    @property
    def changed(self) -> int:
        """Numbers of the base that differ once merged: none, as this cannot be merged."""
        return 0

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        raise TypeError(f"the prefix in {self.site.name!r} is no change of a weight")


def _after_first(x: Tensor, more: Tensor) -> Tensor:
    return torch.cat([x[:, :1], more.to(x.dtype).expand(len(x), *more.shape), x[:, 1:]], 1)
