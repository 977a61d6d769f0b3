"""The few small networks that all chapters share.

Every network takes its random numbers from a `torch.Generator` on the CPU, in float32,
and is moved afterwards: the same state gives the same weights on every device. Building
one leaves PyTorch's global generator alone when a generator is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.nets.transformer import DigitsTransformer


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw the weights of a network afresh, in place, layer by layer.

    Linear and convolution layers are uniform in +-1/sqrt(fan-in), weight and bias, as in
    PyTorch; normalisations start as the identity. A module of another kind with parameters
    of its own must offer `reset(generator)`.

    Args:
        module: a network on the CPU.
        generator: a CPU generator; left out, PyTorch's global one.

    Raises:
        TypeError: a parameter would be left as it is.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            bound = 1 / math.sqrt(part.weight[0].numel())
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            if part.bias is not None:
                nn.init.uniform_(part.bias, -bound, bound, generator=generator)
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            part.reset_parameters()
        elif hasattr(part, "reset"):
            part.reset(generator)
        elif list(part.parameters(recurse=False)):
            raise TypeError(f"module: cannot initialise {type(part).__name__}; give it reset()")
    return module


def _build(
    make: Callable[[], nn.Module],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    draw: Callable[[nn.Module, torch.Generator | None], nn.Module] = initialise,
) -> Any:
    # PyTorch's own initialisation draws from the global generator, only for its numbers to be
    # replaced. Taking that back costs half of what making the network on "meta" first does, which
    # counts where hundreds of small networks are made.
    before = torch.get_rng_state()
    try:
        with torch.device("cpu"):
            module = make()
    finally:
        torch.set_rng_state(before)
    draw(module, generator)
    return module if device is None and dtype is None else module.to(device=device, dtype=dtype)


def _he(network: nn.Module, generator: torch.Generator | None) -> nn.Module:
    for part in network.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=math.sqrt(2 / part.in_features), generator=generator)
            nn.init.zeros_(part.bias)
    return network


def _at_least_one(name: str, sizes: Sequence[int]) -> None:
    if any(size < 1 for size in sizes):
        raise ValueError(f"{name}: every size must be at least 1, got {tuple(sizes)}")


def mlp(
    widths: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Linear layers with ReLU between them; the layers are `0`, `2`, `4`, ...

    Weights are normal with variance 2 / fan-in and biases zero (He et al., arXiv 1502.01852),
    which keeps the size of the signal through ReLU layers.

    Args:
        widths: input width, hidden widths, output width.
        generator: draws the weights.
        device, dtype: where and as what the weights live.

    Raises:
        ValueError: fewer than two widths, or one below 1.
    """
    if len(widths) < 2:
        raise ValueError(f"widths: need at least input and output width, got {tuple(widths)}")
    _at_least_one("widths", widths)

    def make() -> nn.Sequential:
        layers: list[nn.Module] = []
        for inside, outside in pairwise(widths):
            layers += [nn.Linear(inside, outside), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return _build(make, generator, device, dtype, _he)


class ConvNet(nn.Module):
    """Blocks of convolution, batch normalisation and ReLU, each but the last halving the
    image; then the mean over pixels and a linear `head`."""

    def __init__(self, inputs: int, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        blocks = []
        for number, (inside, outside) in enumerate(
            zip([inputs, *channels[:-1]], channels, strict=True)
        ):
            convolution = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
            parts = [convolution, nn.BatchNorm2d(outside), nn.ReLU()]
            if number < len(channels) - 1:
                parts.append(nn.MaxPool2d(2))
            blocks.append(nn.Sequential(*parts))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, inputs, height, width) to scores (batch, classes)."""
        return self.head(self.blocks(images).mean((-2, -1)))


def convnet(
    inputs: int = 1,
    channels: Sequence[int] = (16, 32, 64),
    classes: int = 10,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ConvNet:
    """A small batch-normed convolutional classifier for images of any size.

    Args:
        inputs: channels of the image.
        channels: output channels of each block.
        classes: number of scores.
        generator: draws the weights.
        device, dtype: where and as what the weights live.

    Raises:
        ValueError: a size below 1, or no block at all.
    """
    if not channels:
        raise ValueError("channels: need at least one block")
    _at_least_one("inputs, channels, classes", (inputs, *channels, classes))
    return _build(lambda: ConvNet(inputs, channels, classes), generator, device, dtype)


def digits_transformer(
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    classes: int = 10,
    patch: int = 2,
    size: int = 8,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DigitsTransformer:
    """A small pre-LN transformer for square grey images such as the 8 x 8 digits.

    Args:
        width: numbers per token; depth: blocks; heads: attention heads.
        classes: number of scores.
        patch: side of a patch; size: side of the image, both in pixels.
        generator: draws the weights.
        device, dtype: where and as what the weights live.

    Raises:
        ValueError: a size below 1, heads that do not divide the width, or patches that do
            not tile the image.
    """
    _at_least_one("width, depth, heads, classes, patch", (width, depth, heads, classes, patch))
    if width % heads:
        raise ValueError(f"heads: {heads} does not divide the width {width}")
    if size < patch or size % patch:
        raise ValueError(f"patch: patches of {patch} do not tile an image of {size} pixels")
    return _build(
        lambda: DigitsTransformer(width, depth, heads, classes, patch, size),
        generator,
        device,
        dtype,
    )
