"""LoRA-GGPO's noise over the layers, drawn anew after each step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.steps.gradients import finite
from toolkit.lowrank.lora_ggpo.grouped import GroupedController
from toolkit.lowrank.lora_ggpo.noise import noise_std, weight_row_squares

Draw = Callable[[int, str, tuple[int, int]], Tensor]


class NoiseController(GroupedController):
    """Fresh noise over every layer after each step; the same for all micro-batches of a step.

    Attributes: ``weight`` and ``gradient`` (squared row norms, (k, m) per group), ``std`` (the
    same shape: of the noise that lies there now), ``seeds`` (one per layer).

    Args:
        generator: source of the noise's seeds; None makes one from the method's ``seed``. Give
            each process its own for noise that differs between processes.
        draw: called with (step, layer name, (m, n)), returns standard normal numbers (m, n) to use
            instead. For comparisons.
    """

    def __init__(
        self,
        method: Any,
        adapted: Adapted,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator | None = None,
        draw: Draw | None = None,
    ):
        super().__init__(method, adapted, optimizer)
        self.generator = generator or torch.Generator().manual_seed(method.seed)
        self.draw = draw
        self.base = [torch.stack([self._row_squares(i) for i in g]) for g in self.groups]
        if method.variant == "kohya":
            # one number for a layer: the mean norm of its rows
            self.base = [b.sqrt().mean(-1, keepdim=True).square().expand_as(b) for b in self.base]
        self.weight = [b.clone() for b in self.base]
        self.gradient = [torch.zeros_like(w) for w in self.weight]
        self.std = [torch.zeros_like(w) for w in self.weight]
        self._measure()
        self._renew()

    @torch.no_grad()
    def before_step(self) -> None:
        """Row norms of the gradient that this step uses, from factors it has not changed yet."""
        if not (self.method.beta > 0 and self.method.noisy):
            return
        found = self.row_squares(self.gradients())
        finite(self.by_layer(found), self.step)
        self.gradient, self.known = found, True

    def after_step(self) -> None:
        super().after_step()
        if self.step % self.method.refresh == 0:
            self._measure()
        self._renew()

    def _matrix(self, i: int) -> Tensor:
        """W0, (m, n)."""
        return self.layers[i].site.to_matrix(self.weight_of(i).detach())

    def _row_squares(self, i: int) -> Tensor:
        """Of W0, (m,)."""
        dtype = self.layers[i].site.dtype
        return torch.linalg.vector_norm(self._matrix(i), dim=1, dtype=dtype).square()

    def _seen(self, i: int) -> Tensor:
        """W0 A^T, (m, r); in the weight's own dtype, so that no copy of W0 is made."""
        matrix, A = self._matrix(i), self.layers[i].A.detach()
        return (matrix @ A.T.to(matrix.dtype)).to(A.dtype)

    @torch.no_grad()
    def _measure(self) -> None:
        """Squared row norms of the weights as they are now."""
        for k, group in enumerate(self.groups if self.method.noisy else ()):
            A, B = self.stacks(group, self.factors)
            if self.method.variant == "kohya":  # no cross term, and the scale is not there
                seen, scale = torch.zeros_like(B), 1.0
            else:
                seen = torch.stack([self._seen(i) for i in group])
                scale = self.layers[group[0]].scale
            self.weight[k] = weight_row_squares(self.base[k], seen, A, B, scale)

    @torch.no_grad()
    def _renew(self) -> None:
        """New seeds, then noise over every layer."""
        self.before = self.generator.get_state()
        if self.method.noisy:
            seeds = torch.empty(len(self.layers), dtype=torch.int64, device=self.generator.device)
            self.seeds = seeds.random_(generator=self.generator).tolist()
            self._lay()

    def _lay(self) -> None:
        m = self.method
        if m.variant == "kohya" and not self.known:
            return  # that code waits for a gradient
        for k, group in enumerate(self.groups):
            inputs = self.layers[group[0]].site.cols
            self.std[k] = noise_std(
                m.variant, self.weight[k], self.gradient[k], inputs, m.sigma, m.beta
            )
            for i, std in zip(group, self.std[k].unbind(), strict=True):
                self.lay(i, functools.partial(self._perturbed, i, std, self.step, self.seeds[i]))

    @torch.no_grad()
    def _perturbed(
        self, i: int, std: Tensor, step: int, seed: int, out: Tensor | None = None
    ) -> Tensor:
        """W0 + noise in the layer's own layout, the same each time; ``std`` (m,)."""
        site, weight = self.layers[i].site, self.weight_of(i)
        first = site.kind not in ("hf_conv1d", "embedding")  # whether rows are the first axis
        wide = std.view(-1, *[1] * (weight.dim() - 1)) if first else std
        half = weight.dtype != site.dtype
        z = out
        if z is None or half:
            z = torch.empty(site.shape, dtype=site.dtype, device=weight.device)
        if self.draw is None:
            z.normal_(generator=torch.Generator(weight.device).manual_seed(seed))
        else:
            drawn = self.draw(step, site.name, (site.rows, site.cols))
            if drawn.shape != (site.rows, site.cols):
                raise ValueError(
                    f"draw gave shape {tuple(drawn.shape)} for layer {site.name!r}, whose matrix "
                    f"is {site.rows} x {site.cols}"
                )
            z.copy_(site.to_weight(drawn.to(weight.device, site.dtype)))
        torch.addcmul(weight.to(z.dtype), z, wide, out=z)
        z = out.copy_(z) if half and out is not None else z.to(weight.dtype)
        return self.keep_padding(i, z)

    def kept(self) -> dict[str, Tensor]:
        pairs = (("weight", self.weight), ("gradient", self.gradient))
        kept = {f"{name}.{k}": x for name, mine in pairs for k, x in enumerate(mine)}
        return kept | {"generator": self.before}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take on a saved state, and lay the very noise that lay there when it was saved."""
        super().load(state)
        self.generator.set_state(self.before)  # on the CPU, wherever the saved one is
        self._renew()
