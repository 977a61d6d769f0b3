"""Where pairs can stand, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from toolkit.core.adapt import targets as names
from toolkit.core.adapt.layer import AdaptedLayer
from toolkit.core.adapt.sites import fits, is_norm

KINDS = ("linear", "hf_conv1d", "conv", "attention", "norm")
HEADS = ("head", "heads", "classifier", "fc", "score", "lm_head", "cls")
"""Names under which networks keep their last layer."""
SHOWN = 12


def places(model: nn.Module, head: str | Iterable[str] | None = None) -> list[str]:
    """Every linear layer, convolution, fused projection and norm but the head, by name, in order.

    In a vision transformer: the projection of patches, in every block both norms, query, key and
    value (one layer or three), the output of attention and both layers of the feed-forward, and
    the last norm. Tables, class tokens and positions are no layers, so they are left alone. Norms
    that know no bias (RMS norms) take ``SSF(learn="scale")`` only, and are not among them.

    Args:
        model: the network.
        head: modules to leave out, with what is inside them: patterns as ``targets`` has them; an
            empty list for a network without a head; None looks for :data:`HEADS`.

    Raises:
        ValueError: no head is found or named, or nothing is left.
    """
    modules = dict(model.named_modules())
    if head is None:
        left = [name for name, _ in model.named_children() if name in HEADS]
        if not left:
            raise ValueError(
                f"head: {type(model).__name__} has no layer named {', '.join(HEADS)}. Name it, as "
                f"in head={list(modules)[-1]!r}; head=[] if there is none"
            )
    else:
        patterns = [head] if isinstance(head, str) else list(head)
        left = [n for n in modules if n and any(names.matches(n, p) for p in patterns)]
        for pattern in patterns:
            if not any(names.matches(n, pattern) for n in modules if n):
                near = ", ".join(list(modules)[-4:])
                raise ValueError(f"head={pattern!r} names no module; the last ones are {near}")
    found = [
        name
        for name in _sites(modules, KINDS, shift=True)
        if not any(name == place or name.startswith(place + ".") for place in left)
    ]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no place for SSF outside its head")
    return found


def _sites(modules: dict[str, nn.Module], kinds: tuple[str, ...], shift: bool) -> list[str]:
    """Names of modules on which a pair can stand."""
    return [n for n, m in modules.items() if n and fits(m, kinds) and not (shift and bare(m))]


def bare(module: nn.Module) -> bool:
    """Whether a module is a norm with a weight and no place for a bias."""
    return is_norm(module) and "bias" not in module._parameters


def check(model: nn.Module, targets: Any, kinds: tuple[str, ...], shift: bool) -> None:
    """Refuse targets on which no pair can stand.

    Args:
        model: the network, as yet unchanged.
        targets: as :func:`toolkit.adapt` takes them.
        kinds: of layers that are accepted.
        shift: whether a shift is learned.

    Raises:
        TypeError, ValueError: with the reason, and the places that there are.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, AdaptedLayer) for module in modules.values()):
        return
    sites = _sites(modules, kinds, shift)
    more = f" and {len(sites) - SHOWN} more" if len(sites) > SHOWN else ""
    there = f"Places in this model: {', '.join(sites[:SHOWN]) or 'none'}{more}"
    try:
        chosen = names.select(model, targets, kinds)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}. {_plain(model, targets, modules)}{there}") from None
    wrong = [name for name, module in chosen.items() if shift and bare(module)]
    if wrong:
        raise TypeError(
            f"targets name {wrong[0]!r} ({type(modules[wrong[0]]).__name__}), a norm without a "
            "place for a bias, so a shift after it could not be merged; leave it out, or take "
            f'SSF(learn="scale"). {there}'
        )


def _plain(model: nn.Module, targets: Any, modules: dict[str, nn.Module]) -> str:
    """What to do where a norm was named that has no weight."""
    try:
        named = names.predicate(targets, KINDS)
        hit = [n for n, m in modules.items() if n and named(n, m) and _weightless(m)]
    except (TypeError, ValueError):
        return ""
    if not hit:
        return ""
    return f"{hit[0]!r} is a norm without weights: give_affine(model) gives it ones and zeros. "


def _weightless(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm):
        return module.weight is None and len(module.normalized_shape) == 1
    known = isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase)
    return known and module.weight is None


def give_affine(model: nn.Module) -> list[str]:
    """Give every norm that has none a weight of ones and a bias of zeros, in place.

    What the network computes stays the same; the norms become places for SSF.

    Args:
        model: layer, group, batch and instance norms are found; RMS norms know no bias.

    Returns:
        Names of the norms that were changed.
    """
    like = next(model.parameters(), torch.empty(0))
    changed = []
    for name, module in model.named_modules():
        if not _weightless(module):
            continue
        if isinstance(module, nn.LayerNorm):
            width, flag = module.normalized_shape[0], "elementwise_affine"
        elif isinstance(module, nn.GroupNorm):
            width, flag = module.num_channels, "affine"
        else:
            width, flag = module.num_features, "affine"
        where = {"dtype": like.dtype, "device": like.device}
        module.weight = nn.Parameter(torch.ones(width, **where))
        module.bias = nn.Parameter(torch.zeros(width, **where))
        setattr(module, flag, True)
        changed.append(name)
    return changed


def vit_count(width: int, depth: int) -> int:
    """Numbers that SSF trains in a plain vision transformer, its head left out: (22 L + 4) d.

    Args:
        width: d, of a token; the feed-forward has 4 d hidden units.
        depth: L blocks.
    """
    return (22 * depth + 4) * width
