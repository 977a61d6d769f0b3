r"""The Coordinator: a tiny decoder that writes one prompt for each image from its features.

.. math:: h_\phi(x) = g_{\phi_d}\big(\mathrm{reshape}[\,f(x)\,;\,\phi_t\,]\big)

A transposed convolution of width 2 and stride 2 has no overlap: each pixel becomes four, whatever
its neighbours are. So a stage is one matrix product over pixels, all rows of :math:`\phi` are
decoded by one batched product, and pixels are put in order once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.insert.blackvip.vectors import Flat

STEP = 2
"""Every stage doubles both sides."""


class Coordinator(Flat):
    """A learned trigger and a decoder; the encoder is the user's, and is not in here.

    The defaults are the official decoder for 224 pixels: 9,920 numbers, the trigger's 800 among
    them (9,136 with ``src_dim=784``, 11,488 with 3136). ``trigger`` is uniform in [0, 0.1],
    convolutions start as PyTorch's. Its plain call is that of a network: features (N, features)
    to prompts (N, channels, size, size).

    Args:
        features: length of the encoder's answer, d_z.
        size: pixels along a side of the prompt.
        src_dim: length of features and trigger together; the first map has
            ``src_dim / start ** 2`` channels.
        start: side of the first map, 7. Each stage doubles it; what passes ``size`` is cut.
        widths: channels after each stage but the last.
        channels: of the images.
        norm: batch or group normalisation after each stage but the last.
        groups: of group normalisation.
        statistics: which passes move the statistics that evaluation of batch normalisation uses:
            ``"own"``, one pass of the unperturbed phi in a step, or ``"perturbed"``, each of the
            perturbed passes, as the official code does.
        momentum: of these statistics.
        generator: draws the start, on the CPU.

    Raises:
        ValueError: sizes that do not fit; the message names one and the remedy.
    """

    def __init__(
        self,
        features: int = 768,
        size: int = 224,
        *,
        src_dim: int = 1568,
        start: int = 7,
        widths: Sequence[int] = (64, 32, 32, 16),
        channels: int = 3,
        norm: Literal["batch", "group"] = "batch",
        groups: int = 4,
        statistics: Literal["own", "perturbed"] = "own",
        momentum: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        area, widths = start * start, tuple(widths)
        first = src_dim // area
        if src_dim % area or not first:
            raise ValueError(
                f"src_dim: {src_dim} numbers do not fill maps of {start} x {start}; take a "
                f"multiple of {area}, such as {max(1, first) * area}"
            )
        if not 0 <= features < src_dim:
            raise ValueError(
                f"features: {features} leave no room for the trigger in src_dim = {src_dim}; "
                f"take src_dim = {(features // area + 1) * area} or more"
            )
        if not widths or min(widths) < 1 or widths[0] % first:
            raise ValueError(
                f"widths: {widths}; give one or more, the first a multiple of the {first} "
                f"channels that src_dim = {src_dim} makes"
            )
        if start * STEP ** (len(widths) + 1) < size:
            need = math.ceil(math.log2(size / start)) - 1
            raise ValueError(
                f"widths: {len(widths) + 1} stages reach "
                f"{start * STEP ** (len(widths) + 1)} of {size} pixels; give {need} widths"
            )
        if norm not in ("batch", "group") or statistics not in ("own", "perturbed"):
            raise ValueError(
                f"norm: batch or group; statistics: own or perturbed; got {norm!r}, {statistics!r}"
            )
        self.features, self.size, self.channels = features, size, channels
        self.first, self.start, self.statistics = first, start, statistics
        self._places: tuple[Any, Tensor] = None, torch.empty(0)
        self.trigger = nn.Parameter(torch.empty(1, src_dim - features))
        before = torch.get_rng_state()
        body: list[nn.Module] = []
        inner = first
        for n, width in enumerate(widths):
            middle = widths[0] if n == 0 else inner
            body += [
                nn.ConvTranspose2d(inner, middle, STEP, STEP, groups=inner),
                nn.ConvTranspose2d(middle, width, 1, bias=False),
                nn.BatchNorm2d(width, momentum=momentum)
                if norm == "batch"
                else nn.GroupNorm(math.gcd(groups, width), width),
                nn.GELU(),
            ]
            inner = width
        body.append(nn.ConvTranspose2d(inner, channels, STEP, STEP, bias=False))
        self.body = nn.Sequential(*body)
        torch.set_rng_state(before)
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the start again: trigger in [0, 0.1], convolutions as PyTorch does."""
        self.trigger.uniform_(0.0, 0.1, generator=generator)
        for part in self.body:
            if isinstance(part, nn.ConvTranspose2d):
                # PyTorch's fan-in of a transposed convolution: outputs in a group, times pixels
                bound = 1 / math.sqrt(part.weight[0].numel())
                part.weight.uniform_(-bound, bound, generator=generator)
                if part.bias is not None:
                    part.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(part, nn.BatchNorm2d | nn.GroupNorm):
                part.reset_parameters()

    def forward(self, z: Tensor) -> Tensor:
        """Features (N, features) to prompts (N, channels, size, size), layer by layer."""
        x = torch.cat([self._fitting(z), self.trigger.expand(len(z), -1)], 1)
        return self._cut(self.body(x.view(len(z), self.first, self.start, self.start)))

    def prompts(self, rows: Tensor, z: Tensor, own: Tensor | None = None) -> Tensor:
        """Prompts (R, N, channels, size, size) of all rows (R, P) for all features (N, features).

        Normalises by the batch in training, and by the kept statistics in evaluation.

        Args:
            rows: vectors phi, in the order of ``parameters()``.
            z: features.
            own: the unperturbed phi (P,), whose pass moves the statistics where ``statistics`` is
                ``"own"``; left out, none does.
        """
        z, batch = self._fitting(z), len(z)
        lead = int(own is not None and self._tracks and self.statistics == "own")
        every = torch.cat([own[None], rows]) if lead and own is not None else rows
        parts = self.split(every)
        trigger = next(parts)[:, 0, :, None].expand(-1, -1, batch)
        x = torch.cat([z.T.expand(len(every), -1, -1), trigger], 1)
        # (R, channels, pixels, N) -> (R, channels, N * pixels), an image's pixels side by side
        x = x.view(len(every), self.first, -1, batch).transpose(2, 3).flatten(2)
        for layer in self.body[2:-1:4]:
            mixing, shift = _joined(next(parts), next(parts), next(parts))
            x = F.gelu(self._stage(layer, x, mixing, shift, next(parts), next(parts), batch, lead))
        last = next(parts)[lead:].flatten(3).permute(0, 2, 3, 1).flatten(1, 2)
        return self._ordered(torch.bmm(last, x[lead:]), batch)

    @property
    def _tracks(self) -> bool:
        return self.training and isinstance(self.body[2], nn.BatchNorm2d)

    def _fitting(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.features:
            raise ValueError(
                f"encoder: features of shape {tuple(z.shape)}, wanted (N, {self.features}); "
                "flatten them, or build the Coordinator for their length"
            )
        return z.to(self.trigger)

    def _stage(
        self, layer: Any, x: Tensor, mixing: Tensor, shift: Tensor, weight: Tensor, bias: Tensor,
        batch: int, lead: int,
    ) -> Tensor:  # fmt: skip
        """Doubling, mixing and normalisation of ``x`` (R, C, pixels), each row with its own."""
        rows, out = shift.shape
        if isinstance(layer, nn.GroupNorm):
            y = torch.bmm(mixing, x).view(rows, out, -1) + shift[..., None]
            y = y.view(rows, layer.num_groups, out // layer.num_groups, -1, batch, self.start**2)
            var, mean = torch.var_mean(y, (2, 3, 5), correction=0, keepdim=True)
            y = ((y - mean) * (var + layer.eps).rsqrt()).reshape(rows, out, -1)
            return torch.addcmul(bias[..., None], y, weight[..., None])
        if layer.training:
            # the product of centred pixels needs no second pass for its mean, and loses no digits
            centre = x.mean(2, keepdim=True)
            y = torch.bmm(mixing, x - centre)
            each = torch.bmm(mixing, centre).view(rows, out, -1)  # mean of each of the 4 pixels
            mean = each.mean(2)
            apart = each - mean[..., None]
            squares = torch.linalg.vector_norm(y, dim=2).square().view(rows, out, -1) / x.shape[2]
            var = (squares + apart.square()).mean(2)
            if self._tracks and (lead or self.statistics == "perturbed"):
                self._follow(layer, mean + shift, var, 4 * x.shape[2], lead)
            scale = weight * (var + layer.eps).rsqrt()
            begin = bias[..., None] + apart * scale[..., None]
        else:
            y = torch.bmm(mixing, x)
            scale = weight * (layer.running_var + layer.eps).rsqrt()
            begin = bias + (shift - layer.running_mean) * scale
            begin = begin[..., None].expand(-1, -1, mixing.shape[1] // out)
        factor = scale[..., None].expand_as(begin).reshape(rows, -1, 1)
        target = None if torch.is_grad_enabled() else y
        y = torch.addcmul(begin.reshape(rows, -1, 1), y, factor, out=target)
        return y.view(rows, out, -1)

    @torch.no_grad()
    def _follow(self, layer: Any, mean: Tensor, var: Tensor, pixels: int, lead: int) -> None:
        """Statistics after all rows, one after the other, or after the first alone."""
        if lead:
            mean, var = mean[:1], var[:1]
        keep = 1 - layer.momentum
        share = layer.momentum * keep ** torch.arange(len(mean) - 1, -1, -1).to(mean)
        unbiased = var * (pixels / max(1, pixels - 1))
        layer.running_mean.mul_(keep ** len(mean)).add_(share @ mean)
        layer.running_var.mul_(keep ** len(mean)).add_(share @ unbiased)
        layer.num_batches_tracked.add_(len(mean))

    def _ordered(self, x: Tensor, batch: int) -> Tensor:
        """Images (R, N, C, size, size) of pixels in the order (last stage, ..., first, N, map)."""
        if self._places[0] != (batch, x.device):
            self._places = (batch, x.device), self._place(batch).to(x.device)
        pixels = x.reshape(len(x) * self.channels, -1)
        index = self._places[1].expand(len(pixels), -1)
        found = pixels.gather(1, index).view(len(x), self.channels, batch, self.size, self.size)
        return found.transpose(1, 2)

    def _place(self, batch: int) -> Tensor:
        """Where each pixel of (N, size, size) stands."""
        stages, side = (len(self.body) - 1) // 4 + 1, self.start
        shape = (*(STEP, STEP) * stages, batch, side, side)
        down = [2 * k for k in reversed(range(stages))]  # the first stage is the coarsest
        at = 2 * stages
        order = (at, at + 1, *down, at + 2, *(d + 1 for d in down))
        side *= STEP**stages
        place = torch.arange(math.prod(shape)).view(shape).permute(order)
        return self._cut(place.reshape(batch, side, side)).flatten()

    def _cut(self, x: Tensor) -> Tensor:
        """The middle of a map that is larger than the images."""
        gap, side = (x.shape[-1] - self.size) // 2, self.size
        return x[..., gap : gap + side, gap : gap + side]


def _joined(spread: Tensor, bias: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """A grouped doubling and the mixing after it as one matrix (R, 4 out, in) and shift (R, out).

    Args:
        spread: (R, in, middle / in, 2, 2); bias: (R, middle); mix: (R, middle, out, 1, 1).
    """
    rows, inner, each = spread.shape[:3]
    mix = mix.flatten(2)
    shift = torch.bmm(bias[:, None], mix)[:, 0]
    by_group = mix.view(rows, inner, each, -1)
    joined = torch.einsum("rcmo,rcms->rosc", by_group, spread.flatten(3))
    return joined.reshape(rows, -1, inner), shift
