"""LoRA-GGPO's noise over the layers, drawn anew after each step."""

from __future__ import annotations

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
        if generator is None:
            generator = torch.Generator().manual_seed(method.seed)
        self.generator, self.draw = generator, draw
        self.before = generator.get_state()  # the seeds that lie there now come after it
        self.base = [torch.stack([self._rows(i) for i in g]) for g in self.groups]
        if method.variant == "kohya":
            # one number for a layer: the mean norm of its rows
            self.base = [b.sqrt().mean(-1, keepdim=True).square().expand_as(b) for b in self.base]
        self.weight = [b.clone() for b in self.base]
        self.gradient, self.std = ([torch.zeros_like(b) for b in self.base] for _ in range(2))
        self.seen_gradient, self.seeds = False, [0] * len(self.layers)
        if method.noisy:
            self._measure()
            self._renew()

    @torch.no_grad()
    def before_step(self) -> None:
        """Row norms of the gradient that this step uses, from factors it has not changed yet."""
        if not (self.method.beta > 0 and self.method.noisy):
            return
        grads = self.gradients()
        if grads is None:
            self.gradient = [torch.zeros_like(g) for g in self.gradient]
            return
        found = self.row_squares(grads)
        finite(self.by_layer(found), self.step)
        self.gradient, self.seen_gradient = found, True

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        if self.method.noisy:
            if self.step % self.method.refresh == 0:
                self._measure()
            self._renew()

    def _matrix(self, i: int) -> Tensor:
        site = self.layers[i].site
        return site.to_matrix(self.bases[i]._parameters[site.parameter].detach())

    def _rows(self, i: int) -> Tensor:
        dtype = self.layers[i].site.dtype
        return torch.linalg.vector_norm(self._matrix(i), dim=1, dtype=dtype).square()

    @torch.no_grad()
    def _measure(self) -> None:
        """Squared row norms of the weights as they are now."""
        for k, group in enumerate(self.groups):
            A, B = (self.stack(leaf, group, self.factors) for leaf in "AB")
            if self.method.variant == "kohya":  # no cross term, and the scale is not there
                seen, scale = torch.zeros_like(B), 1.0
            else:
                seen = torch.stack([self._seen(i) for i in group])
                scale = self.layers[group[0]].scale
            self.weight[k] = weight_row_squares(self.base[k], seen, A, B, scale)

    def _seen(self, i: int) -> Tensor:
        """W0 A^T, (m, r); in the weight's own dtype, so that no copy of W0 is made."""
        matrix, A = self._matrix(i), self.layers[i].A.detach()
        return (matrix @ A.T.to(matrix.dtype)).to(A.dtype)

    @torch.no_grad()
    def _renew(self) -> None:
        """New seeds, then noise over every layer."""
        self.before = self.generator.get_state()
        seeds = torch.empty(len(self.layers), dtype=torch.int64, device=self.generator.device)
        self.seeds = seeds.random_(generator=self.generator).tolist()
        self._lay()

    def _lay(self) -> None:
        m = self.method
        if m.variant == "kohya" and not self.seen_gradient:
            return  # that code waits for a gradient
        for k, group in enumerate(self.groups):
            inputs = self.layers[group[0]].site.cols
            self.std[k] = noise_std(
                m.variant, self.weight[k], self.gradient[k], inputs, m.sigma, m.beta
            )
            for i, std in zip(group, self.std[k].unbind(), strict=True):
                layer, make = self.layers[i], self._maker(i, std)
                layer.cover.lay(self.bases[i], layer.site.parameter, make, m.keep_noise)

    def _maker(self, i: int, std: Tensor) -> Callable[..., Tensor]:
        """What forms W0 + noise, the same each time; ``std`` (m,)."""
        site, base, step, seed = self.layers[i].site, self.bases[i], self.step, self.seeds[i]

        @torch.no_grad()
        def make(out: Tensor | None = None) -> Tensor:
            weight = base._parameters[site.parameter]
            if site.kind in ("hf_conv1d", "embedding"):
                wide = std[None, :]
            else:
                wide = std.view(-1, *[1] * (weight.dim() - 1))
            half = weight.dtype != site.dtype
            z = self._normal(site, step, seed, weight.device, None if half else out)
            torch.addcmul(weight.to(z.dtype), z, wide, out=z)
            return z if not half else z.to(weight.dtype) if out is None else out.copy_(z)

        return make

    def _normal(
        self, site: Any, step: int, seed: int, device: torch.device, out: Tensor | None
    ) -> Tensor:
        """Standard normal numbers in the layer's own layout."""
        if self.draw is None:
            if out is None:
                out = torch.empty(site.shape, dtype=site.dtype, device=device)
            return out.normal_(generator=torch.Generator(device).manual_seed(seed))
        z = self.draw(step, site.name, (site.rows, site.cols))
        if z.shape != (site.rows, site.cols):
            raise ValueError(
                f"draw gave shape {tuple(z.shape)} for layer {site.name!r}, whose matrix is "
                f"{site.rows} x {site.cols}"
            )
        z = site.to_weight(z.to(device, site.dtype))
        return z.contiguous().clone() if out is None else out.copy_(z)

    def state(self) -> dict[str, Tensor]:
        seen = torch.tensor(self.seen_gradient)
        state = super().state() | {"seen": seen, "generator": self.before}
        state |= {f"weight.{k}": x for k, x in enumerate(self.weight)}
        return state | {f"gradient.{k}": x for k, x in enumerate(self.gradient)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take on a saved state, and lay the very noise that lay there when it was saved."""
        super().load(state)
        self.seen_gradient = bool(state["seen"])
        for name, mine in (("weight", self.weight), ("gradient", self.gradient)):
            mine[:] = [state[f"{name}.{k}"].to(x) for k, x in enumerate(mine)]
        if self.method.noisy:
            self.generator.set_state(state["generator"])
            self._renew()
