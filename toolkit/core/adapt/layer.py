"""An adapted layer in its layer's place, and what travels in its ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core.adapt import checkpoint
from toolkit.core.adapt.computed import computed
from toolkit.core.adapt.forwards import frozen, has_own_hooks, refuse_offloaded
from toolkit.core.adapt.own import Own, refuse_pruning
from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.unfit import refuse_weight

_OF_ACCELERATE = ("_hf_hook", "_old_forward")
"""What accelerate keeps on a layer that it hooks. Found on the adapted one, it would take that
one's forward for the frozen layer's."""


class AdaptedLayer(nn.Module):
    """A frozen layer and its adapter, in the layer's place.

    Code that reads a parameter of the layer instead of calling it (``nn.MultiheadAttention`` reads
    ``out_proj.weight``, the fast path of ``nn.TransformerEncoderLayer`` reads all) is given the new
    weight, so that the adapter is never skipped in silence. It cannot be written to.
    """

    def __init__(self, base: nn.Module, adapter: nn.Module):
        super().__init__()
        self._parameters = Own(base, getattr(getattr(adapter, "site", None), "name", ""))
        self.base = base
        self.adapter = adapter
        self.train(base.training)
        self.replaced = False  # whether a load put other tensors in the place of the old ones
        self.register_state_dict_post_hook(checkpoint.shorten)
        self.register_load_state_dict_post_hook(checkpoint.report_short)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts = self._modules  # quicker than through __getattr__
        adapter = parts["adapter"]
        if "_hf_hook" in adapter.__dict__:
            refuse_offloaded(adapter)
        return adapter(parts["base"], *args, **kwargs)

    def materialised(self, *args: Any, **kwargs: Any) -> Any:
        """The same output through the new weight itself: slower, for checks and for teaching."""
        return functional_call(self.base, self.adapter.merged(self.base), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        base = modules.get("base")
        if base is None or name in _OF_ACCELERATE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        site = getattr(self.adapter, "site", None)
        if name in base._parameters or (site is not None and name == site.parameter):
            if not torch.compiler.is_compiling():
                refuse_pruning(self.__dict__["_parameters"], name)
            new = self.adapter.merged(base)
            if name not in new or new[name] is base._parameters[name]:
                return base._parameters[name]
            return computed(new[name], site.name if site else "", name)
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and name in base._parameters:
            if value is base._parameters[name]:  # weights are tied again: nothing changes
                return
            raise AttributeError(
                f"{name} of this adapted layer is that of the frozen layer and its adapter "
                f"together, so it cannot be set; set base.{name}, or merge() or unload() first"
            )
        if base is not None and name in base._buffers:
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def _fqn_modifiers(self) -> Mapping[str, str]:
        return checkpoint.modifiers(self)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        checkpoint.lengthen(self, state_dict, prefix)
        checkpoint.listen(self, prefix, rest[-3:])
        self.replaced |= rest[0].get("assign_to_params_buffers", False)
        # growth and compaction change how many tensors an adapter has: first take on their number
        resize = getattr(self.adapter, "resize", None)
        if resize is not None:
            start = f"{prefix}adapter."
            own = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
            if own:
                resize(own)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@dataclass
class Placed:
    """One adapted layer and every place in the model that refers to it."""

    name: str
    site: Site
    layer: AdaptedLayer
    places: list[tuple[nn.Module, str]]
    tied: bool
    method: Any

    def merged(self) -> dict[str, Tensor]:
        """New values of the base's parameters, each fit to stand in the old one's place.

        Raises:
            RuntimeError, ValueError: one cannot be formed; the message names the layer.
            TypeError: the adapter is no change of a weight.
        """
        base = self.layer.base
        if has_own_hooks(self.layer) or "forward" in self.layer.__dict__:
            raise RuntimeError(
                f"layer {self.name!r} cannot be merged, so none was: hooks or another forward were "
                "put on it after it was adapted, and would go with the adapter. Remove them, or "
                "put them on its base"
            )
        try:
            with torch.inference_mode(False), torch.no_grad():
                new = self.layer.adapter.merged(base)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
            raise RuntimeError(
                f"layer {self.name!r} cannot be merged, so none was: {error}"
            ) from error
        for key, value in new.items():
            if base._parameters.get(key, value) is None:
                continue  # a place for a bias, and nothing there: merging makes one
            old = frozen(base, key, self.name)
            refuse_weight(old, f"{self.name!r} ({type(base).__name__})")
            if value.shape != old.shape:
                raise RuntimeError(
                    f"layer {self.name!r} cannot be merged, so none was: its new {key} has shape "
                    f"{tuple(value.shape)}, the old one {tuple(old.shape)}"
                )
        return new

    def put(self, module: nn.Module) -> None:
        for parent, attribute in self.places:
            parent._modules[attribute] = module


class Schedule(nn.Module):
    """A controller's state in the model's ``state_dict``, so that any trainer resumes it.

    It is a child of the first layer that the controller acts on. A state that is loaded goes on in
    the controller once the whole model is loaded, or waits in ``waiting`` for one to be attached.
    """

    def __init__(self) -> None:
        super().__init__()
        self.controller: Controller | None = None
        self.waiting: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # a controller holds an optimizer over the original tensors: a copy goes on from its state
        if self.controller is None:
            return self.__dict__
        state = {key: value.detach().clone() for key, value in self.controller.state().items()}
        return self.__dict__ | {"controller": None, "waiting": state}

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint walks to each entry of a state dict by its name
        known = not name.startswith("_") and "waiting" in self.__dict__
        if known and any(name in key.split(".") for key in self._state()):
            return self
        return super().__getattr__(name)

    def _state(self) -> dict[str, Tensor]:
        return self.waiting if self.controller is None else self.controller.state()

    def attach(self, controller: Controller) -> None:
        """Carry the state of a controller from now on, and give it what waits.

        Raises:
            ValueError: what waits is of another method or of other layers.
        """
        if self.waiting:
            checkpoint.resume(controller, self.waiting)
        self.controller, self.waiting = controller, {}

    def go_on(self) -> None:
        """Give the controller what was loaded."""
        if self.controller is not None and self.waiting:
            state, self.waiting = self.waiting, {}
            checkpoint.resume(self.controller, state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for key, value in self._state().items():
            destination[prefix + key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local: Any, strict: Any, missing: Any,
        unexpected: Any, errors: Any,
    ) -> None:  # fmt: skip
        found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        self.waiting = {key: value.detach().clone() for key, value in found.items()}
        if not found and self.controller is not None:
            missing.append(f"{prefix}step")


def resume(module: nn.Module, _: Any) -> None:
    """Hook after ``load_state_dict`` of a whole model: all adapters are there, so go on."""
    for child in module.modules():
        if isinstance(child, Schedule):
            child.go_on()
