"""LoRA-GGPO's noise over the layers, drawn anew after each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.lowrank.lora_ggpo.grouped import GroupedController
from toolkit.lowrank.lora_ggpo.noise import noise_std, weight_row_squares

Draw = Callable[[int, str, tuple[int, int]], Tensor]


class NoiseController(GroupedController):
    """Fresh noise over every layer after each step; the same for all micro-batches of a step.

    Attributes: ``step``, ``weight`` and ``gradient`` (squared row norms, one (k, m) tensor per
    group), ``std`` (the same shape: of the noise that lies there now), ``seeds`` (one per layer).

    Args:
        generator: source of the noise's seeds; None makes one from the method's ``seed``. Give
            each process its own for noise that differs between processes.
        draw: called with (step, layer name, (m, n)), returns standard normal numbers (m, n) to use
            instead. For comparisons.
    """

    def __init__(
        self,
        method: Any,
        adapted: Any,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator | None = None,
        draw: Draw | None = None,
    ):
        super().__init__(method, adapted, optimizer)
        if generator is None:
            generator = torch.Generator().manual_seed(method.seed)
        self.generator, self.draw = generator, draw
        self.reads = method.beta > 0 and method.noisy
        self.before = self.generator.get_state()
        self.base = [torch.stack([self._rows(i) for i in g.members]) for g in self.groups]
        if method.variant == "kohya":
            # one number for a layer: the mean norm of its rows
            self.base = [b.sqrt().mean(-1, keepdim=True).square().expand_as(b) for b in self.base]
        self.gradient = [torch.zeros_like(b) for b in self.base]
        self.seen_gradient = False
        self.weight = [b.clone() for b in self.base]
        self.std = [torch.zeros_like(b) for b in self.base]
        self.seeds = [0] * len(self.layers)
        self._refresh()
        self._arm()

    def _rows(self, i: int) -> Tensor:
        site = self.sites_of[i]
        matrix = site.to_matrix(self.bases[i]._parameters[site.parameter].detach())
        return torch.linalg.vector_norm(matrix, dim=1, dtype=site.dtype).square()

    def _refresh(self) -> None:
        """Squared row norms of the weights as they are now."""
        if not self.method.noisy:
            return
        for k, group in enumerate(self.groups):
            A, B = self.stack(group, "A"), self.stack(group, "B")
            if self.method.variant == "kohya":  # no cross term, and the scale is not there
                seen, scale = torch.zeros_like(B), 1.0
            else:
                seen, scale = torch.stack([self._seen(i) for i in group.members]), group.scale
            self.weight[k] = weight_row_squares(self.base[k], seen, A, B, scale)

    def _seen(self, i: int) -> Tensor:
        """W0 A^T, (m, r); in the weight's own dtype, so that no copy of W0 is made."""
        site, A = self.sites_of[i], self.layers[i].A.detach()
        matrix = site.to_matrix(self.bases[i]._parameters[site.parameter].detach())
        return (matrix @ A.T.to(matrix.dtype)).to(A.dtype)

    @torch.no_grad()
    def before_step(self) -> None:
        """Row norms of the gradient that this step uses, from factors it has not changed yet."""
        if not self.reads:
            return
        grads = self.gradients()
        if grads is None:
            found = [torch.zeros_like(g) for g in self.gradient]
        else:
            found = self.approximate(grads)
            self.check_finite((g, f.sum(-1)) for g, f in zip(self.groups, found, strict=True))
            self.seen_gradient = True
        self.gradient = found

    @torch.no_grad()
    def after_step(self) -> None:
        self.step += 1
        if self.step % self.method.refresh == 0:
            self._refresh()
        self._arm()

    @torch.no_grad()
    def _arm(self) -> None:
        """New seeds, then noise over every layer."""
        if not self.method.noisy:
            return
        self.before = self.generator.get_state()
        self._draw_seeds()
        self._lay()

    def _draw_seeds(self) -> None:
        seeds = torch.empty(len(self.layers), dtype=torch.int64, device=self.generator.device)
        self.seeds = seeds.random_(generator=self.generator).tolist()

    def _lay(self) -> None:
        m = self.method
        if m.variant == "kohya" and not self.seen_gradient:
            return  # that code waits for a gradient
        for k, group in enumerate(self.groups):
            self.std[k] = noise_std(
                m.variant, self.weight[k], self.gradient[k], group.cols, m.sigma, m.beta
            )
            for i, std in zip(group.members, self.std[k].unbind(), strict=True):
                make = self._maker(i, std)
                parameter = self.sites_of[i].parameter
                self.layers[i].cover.lay(self.bases[i], parameter, make, m.keep_noise)

    def _maker(self, i: int, std: Tensor) -> Callable[[], Tensor]:
        site, base, step, seed = self.sites_of[i], self.bases[i], self.step, self.seeds[i]

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
            source = torch.Generator(device).manual_seed(seed)
            z = out
            if z is None:
                z = torch.empty(site.shape, dtype=site.dtype, device=device)
            return z.normal_(generator=source)
        z = self.draw(step, site.name, (site.rows, site.cols))
        if z.shape != (site.rows, site.cols):
            raise ValueError(
                f"draw gave shape {tuple(z.shape)} for layer {site.name!r}, whose matrix is "
                f"{site.rows} x {site.cols}"
            )
        z = site.to_weight(z.to(device, site.dtype))
        return z.contiguous().clone() if out is None else out.copy_(z)

    def state(self) -> dict[str, Tensor]:
        state = {
            "step": torch.tensor(self.step),
            "seen": torch.tensor(self.seen_gradient),
            "generator": self.before,
        }
        for k in range(len(self.groups)):
            state[f"weight.{k}"], state[f"gradient.{k}"] = self.weight[k], self.gradient[k]
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take on a saved state, and lay the very noise that lay there when it was saved."""
        keys = [f"{n}.{k}" for k in range(len(self.groups)) for n in ("weight", "gradient")]
        self.check_same(state, ["step", "seen", "generator", *keys])
        self.step, self.seen_gradient = int(state["step"]), bool(state["seen"])
        for k in range(len(self.groups)):
            self.weight[k] = state[f"weight.{k}"].to(self.weight[k])
            self.gradient[k] = state[f"gradient.{k}"].to(self.gradient[k])
        if self.method.noisy:
            self.generator.set_state(state["generator"])
            self.before = state["generator"]
            self._draw_seeds()
            self._lay()
