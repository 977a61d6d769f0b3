"""Methods with one defect each, all LoRA but for it. None is in the catalogue.

``BROKEN`` maps a contract to the methods that must break it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt import lowrank as factored
from toolkit.core.adapt.steps.controller import Controller
from toolkit.lowrank.adalora import AdaLoRA
from toolkit.lowrank.lora import LoRA, LoRALayer


def method(layer: type[nn.Module], base: type = LoRA, **overrides: Any) -> Any:
    """LoRA of rank 3 that builds ``layer`` and has some attributes replaced."""

    def build(self, site, generator=None):
        return layer(self, site, generator)

    attributes = {"build": build, **overrides}
    made = type(layer.__name__ + "Method", (base,), attributes)
    return dataclass(frozen=True)(made)(rank=3)


class NotZeroAtInit(LoRALayer):
    def __init__(self, method, site, generator):
        super().__init__(method, site, generator)
        self.B.data += 0.01


class DeadTensor(LoRALayer):
    def __init__(self, method, site, generator):
        super().__init__(method, site, generator)
        self.C = nn.Parameter(torch.zeros(2, dtype=site.dtype))


class Thaws(LoRALayer):
    def forward(self, base, *args, **kwargs):
        base.weight.requires_grad_(True)
        return super().forward(base, *args, **kwargs)


class MutatesBase(LoRALayer):
    def forward(self, base, *args, **kwargs):
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                base.weight.mul_(1.001)
        return super().forward(base, *args, **kwargs)


class MergesWithWrongScale(LoRALayer):
    def merged(self, base):
        return factored.merged(base, self.site, self.A, self.B, 1.1 * self.scale)


class MergesToAView(LoRALayer):
    def merged(self, base):
        return {k: v.T.contiguous().T for k, v in super().merged(base).items()}


class ForgetsOnSave(LoRALayer):
    """Trains a gain, but keeps it out of its state dict."""

    def __init__(self, method, site, generator):
        super().__init__(method, site, generator)
        self.gain = nn.Parameter(torch.ones((), dtype=site.dtype))
        self.register_state_dict_post_hook(lambda _, state, prefix, __: state.pop(prefix + "gain"))

    def forward(self, base, x):
        return base(x) + self.gain * self.scale * F.linear(F.linear(x, self.A), self.B)


class _Halved(torch.autograd.Function):
    """Identity whose gradient is half of the right one."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class WrongGradient(LoRALayer):
    def forward(self, base, x):
        return base(x) + self.scale * F.linear(F.linear(x, _Halved.apply(self.A)), self.B)


class _Square(torch.autograd.Function):
    """x + x^2 with a right gradient that forgets its own dependence on x."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x + x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 2 * ctx.x)


class WrongSecondGradient(LoRALayer):
    def forward(self, base, x):
        return base(x) + self.scale * F.linear(F.linear(x, self.A), _Square.apply(self.B))


class DrawsFromTheWorld(LoRALayer):
    def __init__(self, method, site, generator):
        super().__init__(method, site, generator)
        self.A.data.copy_(torch.randn(self.A.shape))


class NoisyForward(LoRALayer):
    def forward(self, base, x):
        return super().forward(base, x) + 0.01 * torch.randn(()) * self.B.sum()


class NeedsFloat32(LoRALayer):
    def forward(self, base, x):
        return base(x) + self.scale * (x @ self.A.T) @ self.B.T


class HalfPrecisionState(LoRALayer):
    def __init__(self, method, site, generator):
        super().__init__(method, site, generator)
        self.to(torch.bfloat16)


class BreaksUnderAutocast(LoRALayer):
    def forward(self, base, x):
        y = base(x)
        return y.addmm(x @ self.A.T, self.scale * self.B.T) if y.dim() == 2 else y


class BreaksCompiled(LoRALayer):
    def forward(self, base, x):
        if torch.compiler.is_compiling():
            return base(x)
        return super().forward(base, x)


class NeedsNumbers(LoRALayer):
    """Branches on a value, which function transforms cannot do."""

    def forward(self, base, x):
        if float(self.B.abs().sum()) == 0:
            return base(x) + 0 * self.A.sum()
        return super().forward(base, x)


class SharesAcrossCopies(LoRALayer):
    def __deepcopy__(self, memo):
        return self


class LeavesAMark(LoRALayer):
    """Puts a hook's worth of state on the base layer: it stays in eval mode for ever."""

    def forward(self, base, x):
        base.train(not base.training)
        return super().forward(base, x)


class LoadsAnyShape(LoRALayer):
    """Takes on whatever shape a file has, so that a wrong file is found too late or never."""

    def resize(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            setattr(self, key, nn.Parameter(value.clone()))
        for key in set(self.state_dict()) - set(state):
            delattr(self, key)


@dataclass(frozen=True)
class AcceptsAnything(LoRA):
    """Checks none of its hyperparameters, nor the rank against the layer."""

    def __post_init__(self) -> None:
        pass

    def build(self, site, generator=None):
        return LoRALayer(self, site, generator)


class _Blind(Controller):
    """A controller that allocates on whatever gradients there are, or none."""

    def __init__(self, layers):
        self.layers, self.allocating, self.step = layers, True, 0

    def before_step(self):
        pass

    def after_step(self):
        for layer in self.layers:
            if layer.P.grad is None or layer.P.grad.isnan().any():
                layer.E.data.zero_()

    def state(self):
        return {"step": torch.tensor(self.step)}

    def load(self, state):
        self.step = int(state["step"])


@dataclass(frozen=True)
class AllocatesBlindly(AdaLoRA):
    def controller(self, adapted, optimizer, total_steps, **options):
        return _Blind(list(adapted.adapters.values()))


class UnevenAcrossProcesses(LoRALayer):
    """Each process scales its gradient by its own rank."""

    def forward(self, base, x):
        y = super().forward(base, x)
        if torch.distributed.is_initialized():
            y = y * (1 + torch.distributed.get_rank())
        return y


def _area(self, site) -> int:
    """As if r (m + n) were r m n."""
    return self.rank * site.rows * site.cols


# contract -> methods that must break it
BROKEN: dict[str, list[Any]] = {
    "equals_base_at_init": [method(NotZeroAtInit)],
    "every_tensor_learns": [method(DeadTensor)],
    "frozen_stays": [method(Thaws), method(MutatesBase)],
    "merged_equals_unmerged": [method(MergesWithWrongScale), method(MergesToAView)],
    "routes_agree": [method(MergesWithWrongScale), method(WrongGradient)],
    "unload_restores": [method(MutatesBase), method(LeavesAMark)],
    "save_load_round_trip": [method(ForgetsOnSave)],
    "counted_as_formula": [method(LoRALayer, count=_area), method(DeadTensor)],
    "gradients_are_right": [method(WrongGradient)],
    "second_gradients_are_right": [method(WrongSecondGradient)],
    "deterministic_under_a_seed": [method(DrawsFromTheWorld), method(NoisyForward)],
    "deepcopy_is_independent": [method(SharesAcrossCopies)],
    "works_in_bfloat16": [method(NeedsFloat32), method(HalfPrecisionState)],
    "works_under_autocast": [method(BreaksUnderAutocast), method(DeadTensor)],
    "works_compiled": [method(BreaksCompiled)],
    "works_with_function_transforms": [method(NeedsNumbers)],
    "works_on_two_processes": [method(UnevenAcrossProcesses)],
    "refuses_bad_hyperparameters": [AcceptsAnything(rank=3)],
    "warns_of_a_rank_above_the_layer": [AcceptsAnything(rank=3)],
    "refuses_a_tampered_file": [method(LoadsAnyShape)],
    "refuses_to_allocate_without_gradients": [AllocatesBlindly(rank=3, target_rank=2)],
}
