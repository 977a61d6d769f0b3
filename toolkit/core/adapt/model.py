"""Put a method on a model: ``adapt(model, method, targets)``, and take it off again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core.adapt import sites as layers
from toolkit.core.adapt import targets as target_names
from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.steps import hooks as schedule
from toolkit.core.adapt.targets import Targets
from toolkit.core.declare.info import Info


class Adapter(Protocol):
    """What a method builds for one layer: an ``nn.Module`` with two routes to one new weight."""

    def __call__(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Output of the adapted layer, computed the cheap way."""

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        """New values of the base layer's parameters, by name: the materialised route."""


class Method(Protocol):
    """A frozen dataclass of hyperparameters that builds the adapter of one layer.

    Optional: ``controller(adapted, optimizer, total_steps, **options)`` returns what must happen
    around each optimizer step (see :mod:`toolkit.core.adapt.steps.hooks`).
    """

    info: Info

    def build(self, site: Site, generator: torch.Generator | None) -> nn.Module: ...

    def count(self, site: Site) -> int:
        """Numbers trained for a layer, from the formula and not by counting tensors."""


class AdaptedLayer(nn.Module):
    """A frozen layer and its adapter, in the layer's place.

    Code that reads a parameter of the layer instead of calling it (``nn.MultiheadAttention`` reads
    ``out_proj.weight``, the fast path of ``nn.TransformerEncoderLayer`` reads all) is given the new
    weight, so that the adapter is never skipped in silence.
    """

    def __init__(self, base: nn.Module, adapter: nn.Module):
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapter(self.base, *args, **kwargs)

    def materialised(self, *args: Any, **kwargs: Any) -> Any:
        """The same output through the new weight itself: slower, for checks and for teaching."""
        return functional_call(self.base, self.adapter.merged(self.base), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        base = modules.get("base")
        if base is None:
            raise AttributeError(name)
        if name in base._parameters:
            return self.adapter.merged(base).get(name, base._parameters[name])
        return getattr(base, name)


@dataclass
class Placed:
    """One adapted layer and every place in the model that refers to it."""

    name: str
    site: Site
    layer: AdaptedLayer
    places: list[tuple[nn.Module, str]]
    tied: bool

    def put(self, module: nn.Module) -> None:
        for parent, attribute in self.places:
            parent._modules[attribute] = module


class Adapted:
    """A model with a method on it. The model itself is changed in place and is ``.model``.

    Made by :func:`adapt`. Attributes: ``model``, ``method``, ``sites`` (name -> :class:`Placed`),
    ``extra`` (name in the base -> parameter, for those that ``train`` names), ``controller``
    (after :meth:`attach`), ``state`` ("adapted", "merged" or "unloaded").
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        sites: dict[str, Placed],
        extra: dict[str, nn.Parameter],
        trainable_before: dict[nn.Parameter, bool],
    ):
        self.model = model
        self.method = method
        self.sites = sites
        self.extra = extra
        self.controller: schedule.Controller | None = None
        self.resume: dict[str, Tensor] = {}
        self.state = "adapted"
        self._before = trainable_before
        self._originals: dict[str, nn.Parameter] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        return (
            f"Adapted({self.method!r}, {len(self.sites)} layers, "
            f"{sum(p.numel() for p in self.parameters()):,} numbers trained, {self.state})"
        )

    @property
    def adapters(self) -> dict[str, nn.Module]:
        """Layer name -> the module the method built for it."""
        return {name: placed.layer.adapter for name, placed in self.sites.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that trains: the adapters' tensors, then the parameters named by ``train``."""
        for name, adapter in self.adapters.items():
            for key, parameter in adapter.named_parameters():
                yield f"{name}.{key}", parameter
        yield from self.extra.items()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def attach(self, optimizer: Any, total_steps: int | None = None, **options: Any) -> Adapted:
        """Let the method act around every ``optimizer.step()``; a no-op for methods that need not.

        Args:
            optimizer: a ``torch.optim.Optimizer`` (or Accelerate's wrapper of one) that holds
                every tensor of :meth:`parameters`.
            total_steps: optimizer steps of the whole run; methods with a schedule need it.
            options: passed to the method's controller.

        Raises:
            RuntimeError: attached already, or the model no longer carries the method.
            ValueError: the optimizer misses trained tensors, or the schedule does not fit.
        """
        self._need("adapted", "attach")
        if self.controller is not None:
            raise RuntimeError("attach was called before on this model; one optimizer drives it")
        optimizer = schedule.unwrap(optimizer)
        schedule.check_holds(optimizer, self.named_parameters())
        build = getattr(self.method, "controller", None)
        if build is not None:
            controller = build(self, optimizer, total_steps, **options)
            if self.resume:
                controller.load(self.resume)
            schedule.register(optimizer, controller)
            self.controller = controller
        elif options:
            raise TypeError(f"{type(self.method).__name__} takes no option {sorted(options)}")
        return self

    @torch.no_grad()
    def merge(self, keep_original: bool = True) -> nn.Module:
        """Write the new weights into plain layers and take the adapters out.

        Args:
            keep_original: keep the old weights (in this object) so that :meth:`unmerge` restores
                them bit for bit; False frees them layer by layer.

        Returns:
            The model, with its own modules and parameter names only.

        Raises:
            RuntimeError: merged or unloaded already.
        """
        self._need("adapted", "merge")
        tied = [name for name, placed in self.sites.items() if placed.tied]
        if tied:
            warnings.warn(
                f"layers {tied} share their weight with another part of the model; the merged "
                "weight is theirs alone, the other part keeps the old one",
                stacklevel=2,
            )
        for name, placed in self.sites.items():
            base = placed.layer.base
            for key, value in placed.layer.adapter.merged(base).items():
                old = base._parameters[key]
                if keep_original:
                    self._originals[f"{name}.{key}"] = old
                base._parameters[key] = nn.Parameter(
                    value, requires_grad=self._before.get(old, False)
                )
            placed.put(base)
        self._restore_flags()
        self.state = "merged" if keep_original else "unloaded"
        self._detach()
        return self.model

    def unmerge(self) -> Adapted:
        """Undo :meth:`merge`: old weights, bit for bit, with the adapters beside them.

        Raises:
            RuntimeError: not merged, or merged with ``keep_original=False``.
        """
        self._need("merged", "unmerge")
        for name, placed in self.sites.items():
            for key in list(placed.layer.base._parameters):
                if f"{name}.{key}" in self._originals:
                    placed.layer.base._parameters[key] = self._originals.pop(f"{name}.{key}")
            placed.put(placed.layer)
        self.state = "adapted"
        self._freeze()
        return self

    def unload(self) -> nn.Module:
        """Take the method off: the base model, its weights and its trainable flags as before.

        Parameters named by ``train`` keep what they learned. After a merge, unmerge first.
        """
        self._need("adapted", "unload")
        for placed in self.sites.values():
            placed.put(placed.layer.base)
        self._restore_flags()
        self.state = "unloaded"
        self._detach()
        return self.model

    def save(self, path: Any, resume: bool = False) -> None:
        """Write adapters and ``train`` parameters as safetensors, for :func:`toolkit.load`."""
        from toolkit.core.adapt import files

        self._need("adapted", "save")
        files.save(self, path, resume)

    def save_peft(self, folder: Any) -> None:
        """Write the adapters as a folder that Hugging Face ``peft`` loads."""
        from toolkit.core.adapt import peft as peft_format

        self._need("adapted", "save_peft")
        peft_format.save_peft(self, folder)

    def report(self):
        """One row per adapted layer, as a DataFrame: what matched, and what it trains."""
        from toolkit.core.adapt import costs as report

        return report.report(self)

    def costs(self) -> dict[str, int]:
        """The four costs: see :func:`toolkit.core.adapt.costs.costs`."""
        from toolkit.core.adapt import costs as report

        return report.costs(self)

    def _need(self, state: str, verb: str) -> None:
        if self.state == state:
            return
        remedy = {
            "merged": "call unmerge() first",
            "unloaded": "adapt the model again",
            "adapted": "call merge() first",
        }[self.state]
        raise RuntimeError(f"cannot {verb}: the model is already {self.state}; {remedy}")

    def _freeze(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def _restore_flags(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(self._before.get(parameter, parameter.requires_grad))

    def _detach(self) -> None:
        if self.controller is not None:
            self.controller.remove()
            self.controller = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        # The hooks belong to an optimizer over the original tensors, so a copy starts unattached.
        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            if key == "_before":
                new._before = {copy.deepcopy(p, memo): flag for p, flag in value.items()}
            else:
                setattr(new, key, None if key == "controller" else copy.deepcopy(value, memo))
        return new


def adapt(
    model: nn.Module,
    method: Method,
    targets: Targets = None,
    *,
    train: str | Iterable[str] | Callable[[str], bool] = (),
    generator: torch.Generator | None = None,
) -> Adapted:
    """Freeze a model and put a method on the layers that ``targets`` names, in place.

    Args:
        model: any ``nn.Module``. The same layer used in several places is adapted once.
        method: a method with its hyperparameters, such as ``LoRA(rank=8)``.
        targets: see :func:`toolkit.core.adapt.targets.select`; None takes every linear layer.
        train: patterns of parameters that train beside the adapters, such as ``"head.*"``, or a
            callable of the parameter's name; layers that hold them are not adapted. They are saved
            with the adapters.
        generator: source of the initial draw.

    Returns:
        The handle to train, merge, save or take off the method.

    Raises:
        ValueError, TypeError: nothing matched, or the method does not fit a layer. The model is
            then as it was.
        RuntimeError: the model carries a method already.
    """
    refuse_busy(model)
    extra = trained_beside(model, train)
    holders = {name.rpartition(".")[0] for name in extra}
    chosen = target_names.select(model, targets, method.info.kinds, exclude=holders - {""})
    if "" in chosen:
        raise TypeError(
            "the model is itself the layer to adapt, so it cannot be replaced in place; wrap it, "
            "for example in nn.Sequential(layer)"
        )
    sites_of = {name: layers.describe(layer, name) for name, layer in chosen.items()}
    built = {name: method.build(site, generator) for name, site in sites_of.items()}

    # All checks are behind us: from here on the model changes.
    before = {p: p.requires_grad for p in model.parameters()}
    places = _places(model, chosen)
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                uses[id(p)] = uses.get(id(p), 0) + 1
    sites = {}
    for name, layer in chosen.items():
        tied = uses[id(layer._parameters[sites_of[name].parameter])] > 1
        adapter = AdaptedLayer(layer, built[name])
        placed = Placed(name, sites_of[name], adapter, places[id(layer)], tied)
        placed.put(placed.layer)
        sites[name] = placed
    adapted = Adapted(model, method, sites, extra, before)
    adapted._freeze()
    return adapted


def refuse_busy(model: nn.Module) -> None:
    """Raise RuntimeError when the model carries a method already."""
    busy = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    if busy:
        raise RuntimeError(
            f"the model already carries a method (at {busy[0]!r}); merge() or unload() it first"
        )


def trained_beside(model: nn.Module, train: Any) -> dict[str, nn.Parameter]:
    own = dict(model.named_parameters())
    if callable(train):
        return {name: p for name, p in own.items() if train(name)}
    patterns = [train] if isinstance(train, str) else list(train)
    names = list(own)
    found = {n: own[n] for n in names if any(_covers(n, p) for p in patterns)}
    for pattern in patterns:
        if not any(_covers(n, pattern) for n in found):
            raise ValueError(
                f"train={pattern!r} names no parameter of the model; its last ones are {names[-4:]}"
            )
    return found


def _covers(name: str, pattern: str) -> bool:
    """A pattern covers a parameter by its own name or by that of a module that holds it."""
    parts = name.split(".")
    return any(target_names.matches(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def _places(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[int, list]:
    wanted = {id(layer) for layer in chosen.values()}
    places: dict[int, list] = {key: [] for key in wanted}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if id(child) in wanted:
                places[id(child)].append((parent, attribute))
    return places
