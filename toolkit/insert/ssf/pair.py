r"""Pairs as numbers: read, written, composed, undone, and walked to.

Of two pairs in a row the second acts on what the first gives:

.. math:: \gamma_2(\gamma_1 y+\beta_1)+\beta_2 = \gamma_2\gamma_1\,y + (\gamma_2\beta_1+\beta_2)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toolkit.insert.ssf.layer import PairLayer


class Pair(NamedTuple):
    """A scale ``gamma`` (c,) and a shift ``beta`` (c,)."""

    gamma: Tensor
    beta: Tensor

    def after(self, first: Pair) -> Pair:
        """The one pair that does what ``first`` does and then this one."""
        return Pair(self.gamma * first.gamma, self.gamma * first.beta + self.beta)

    def inverse(self) -> Pair:
        """The pair that undoes this one.

        Raises:
            ValueError: a scale is 0, after which nothing is left to bring back.
        """
        if bool((self.gamma == 0).any()):
            dead = int((self.gamma == 0).nonzero()[0])
            raise ValueError(f"gamma: channel {dead} is scaled by 0, which no pair undoes")
        return Pair(1 / self.gamma, -self.beta / self.gamma)

    def at(self, t: float) -> Pair:
        """The pair a share t of the way from (1, 0) to this one; beyond 1 it goes on."""
        return Pair(1 + t * (self.gamma - 1), t * self.beta)

    def apply(self, y: Tensor, axis: int = -1) -> Tensor:
        """Features scaled and shifted along a channel axis.

        Raises:
            ValueError: the axis has another length than the pair.
        """
        if y.shape[axis] != len(self.gamma):
            raise ValueError(
                f"y: axis {axis} of shape {tuple(y.shape)} has {y.shape[axis]} channels, the pair "
                f"{len(self.gamma)}; name the channel axis: -1 of tokens, 1 of images"
            )
        return (self.gamma * y.movedim(axis, -1) + self.beta).movedim(-1, axis)


def pairs(adapted: Any) -> dict[str, Pair]:
    """Site -> a copy of its pair.

    Args:
        adapted: as :func:`toolkit.adapt` gives it, with SSF on some of its sites.

    Raises:
        ValueError: no site carries SSF.
    """
    found = {}
    for name, layer in _layers(adapted).items():
        gamma = layer.gamma.detach().clone()
        beta = torch.zeros_like(gamma) if layer.beta is None else layer.beta.detach().clone()
        found[name] = Pair(gamma, beta)
    return found


@torch.no_grad()
def put_pairs(adapted: Any, given: Mapping[str, Pair]) -> None:
    """Write pairs onto sites; those not named keep theirs.

    Args:
        adapted: a model with SSF.
        given: site -> pair.

    Raises:
        ValueError: a site without SSF, another width, or a number that the site does not have (a
            shift where only scales are learned). Nothing is written then.
    """
    layers = _layers(adapted)
    for name, pair in given.items():
        if name not in layers:
            raise ValueError(f"pairs: {name!r} carries no SSF; choose among {', '.join(layers)}")
        layer = layers[name]
        for part, value in zip(("gamma", "beta"), pair, strict=True):
            if value.shape != layer.gamma.shape:
                raise ValueError(
                    f"pairs: {part} of {name!r} has shape {tuple(value.shape)}, the site "
                    f"{tuple(layer.gamma.shape)}"
                )
        if (layer.beta is None and pair.beta.any()) or (
            "gamma" in layer._buffers and bool((pair.gamma != 1).any())
        ):
            raise ValueError(f"pairs: {name!r} learns one of scale and shift; the other stays")
    for name, pair in given.items():
        layers[name].gamma.copy_(pair.gamma)
        if layers[name].beta is not None:
            layers[name].beta.copy_(pair.beta)


@contextlib.contextmanager
def interpolated(adapted: Any, t: float) -> Iterator[nn.Module]:
    r"""The model with every pair at :math:`(1-t)(1, 0) + t(\gamma, \beta)`, inside a ``with``.

    The head and whatever else trains beside stay as they are. Afterwards the pairs are back.

    Args:
        adapted: a model with SSF.
        t: 0 for the base's features, 1 for the adapted ones.
    """
    kept = pairs(adapted)
    put_pairs(adapted, {name: pair.at(t) for name, pair in kept.items()})
    try:
        yield adapted.model
    finally:
        put_pairs(adapted, kept)


def groups(adapted: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: tensors with more than one axis decay, vectors do not.

    This is the code's rule. Decay would pull scales to 0 and not to 1. At most the matrix of the
    head is left to decay.

    Args:
        adapted: a model with SSF.
        weight_decay: of the first group.
    """
    every = adapted.parameters()
    wide = [p for p in every if p.dim() > 1]
    narrow = [p for p in every if p.dim() <= 1]
    made = [
        {"params": wide, "weight_decay": weight_decay},
        {"params": narrow, "weight_decay": 0.0},
    ]
    return [group for group in made if group["params"]]


def _layers(adapted: Any) -> dict[str, PairLayer]:
    found = {n: layer for n, layer in adapted.adapters.items() if isinstance(layer, PairLayer)}
    if not found:
        raise ValueError("adapted: no site carries SSF; put it on with adapt(model, SSF(), ...)")
    return found
