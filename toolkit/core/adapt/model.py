"""A model with methods on it: train it, save it, merge the new weights, take the methods off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from toolkit.core.adapt import costs, files, handles, peft
from toolkit.core.adapt import guard as guards
from toolkit.core.adapt.forwards import frozen
from toolkit.core.adapt.layer import AdaptedLayer, Placed, Schedule
from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.steps import hooks, wrappers
from toolkit.core.adapt.steps.controller import Controller, Several
from toolkit.core.adapt.steps.whole import of_modules, of_optimizer, whole
from toolkit.core.declare.info import Info


class Adapter(Protocol):
    """What a method builds for one site: an ``nn.Module`` with two routes to one new weight."""

    def __call__(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Output of the adapted layer, computed the cheap way."""

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        """New values of the base layer's parameters, by name: the materialised route."""


class Method(Protocol):
    """A frozen dataclass of hyperparameters that builds the adapter of one site.

    Optional: ``controller(adapted, optimizer, total_steps, **options)`` returns what must happen
    around each optimizer step (:class:`~toolkit.core.adapt.steps.controller.Controller`); it is
    given a :class:`Share` of the model. ``scores``: see :mod:`toolkit.core.adapt.scores`.
    """

    info: ClassVar[Info]

    def build(self, site: Site, generator: torch.Generator | None) -> nn.Module: ...

    def count(self, site: Site) -> int:
        """Numbers trained for a site, from the formula and not by counting tensors."""


@dataclass(frozen=True)
class Share:
    """The sites of one method on a model, as its controller sees them."""

    model: nn.Module
    method: Any
    sites: dict[str, Placed]
    extra: dict[str, nn.Parameter]

    @property
    def adapters(self) -> dict[str, nn.Module]:
        """Site name -> the module the method built for it."""
        return {name: placed.layer.adapter for name, placed in self.sites.items()}

    @property
    def resume(self) -> dict[str, Tensor]:
        """The state of a schedule that waits to go on, or an empty dict."""
        return next(iter(self.sites.values())).layer.schedule.waiting


class Adapted:
    """A model with methods on it. The model itself is changed in place and is ``.model``.

    Made by :func:`toolkit.adapt`. Attributes: ``model``, ``methods`` (a tuple), ``sites`` (name ->
    :class:`~toolkit.core.adapt.layer.Placed`), ``extra`` (name in the base -> parameter that
    simply trains), ``left_out`` (names that a pattern matched and no method can act on, with the
    reason), ``controller`` (after :meth:`attach`), ``state`` ("adapted", "merged" or "unloaded").
    """

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[Any, ...],
        sites: dict[str, Placed],
        extra: dict[str, nn.Parameter],
        before: dict[str, bool],
        kept: Mapping[str, Tensor] | None = None,
        left_out: Mapping[str, str] | None = None,
    ):
        self.model, self.methods, self.sites, self._beside = model, methods, sites, tuple(extra)
        self.left_out = dict(left_out or {})
        self.controller: Controller | None = None
        self.state = "adapted"
        self._before = before  # which parameters of the base trained
        self._kept = dict(kept or {})  # parameters of the base that Train() moves, as they were
        places = handles.buffer_places(model)
        held = {name: module._buffers[key] for name, (module, key) in places.items()}
        self._buffers = {n: None if b is None else b.detach().clone() for n, b in held.items()}
        self._originals: dict[str, nn.Parameter] = {}
        self._alarms: list[Any] = []
        self._guard: guards.Guard | None = None
        self._links = handles.find(model, sites)
        for method in self._scheduled():
            first = next(p for p in sites.values() if p.method is method)
            first.layer.schedule = Schedule()
            self._watch(first.layer.adapter)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        methods = ", ".join(map(repr, self.methods))
        words = [f"{len(self.sites)} layers"] if self.sites else []
        words += [f"{len(self.extra)} parameters beside"] if self.extra else []
        words.append(f"{sum(p.numel() for p in self.parameters()):,} numbers trained")
        words.append(self.state)
        if self._scheduled() and self.state == "adapted":
            words.append("attached" if self.controller is not None else "not attached")
        if self.left_out:
            words.append(f"left out: {', '.join(self.left_out)}")
        return f"Adapted({methods}, {', '.join(words)})"

    @property
    def method(self) -> Any:
        """The method, where there is one only.

        Raises:
            AttributeError: several methods act on this model; see ``methods``.
        """
        if len(self.methods) != 1:
            raise AttributeError(f"this model carries {len(self.methods)} methods; see .methods")
        return self.methods[0]

    @property
    def adapters(self) -> dict[str, nn.Module]:
        """Site name -> the module its method built for it."""
        return {name: placed.layer.adapter for name, placed in self.sites.items()}

    @property
    def extra(self) -> dict[str, nn.Parameter]:
        """Name in the base -> parameter that simply trains, as the model has it now.

        Raises:
            RuntimeError: the model has no parameter of such a name any more.
        """
        return {name: handles.parameter(self.model, name) for name in self._beside}

    @extra.setter
    def extra(self, names: Iterable[str]) -> None:
        self._beside = tuple(names)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that trains: the adapters' tensors, then the parameters that simply train.

        Raises:
            RuntimeError: an adapted layer, or such a parameter, is no longer in the model.
        """
        self.find()
        for name, adapter in self.adapters.items():
            for key, parameter in adapter.named_parameters():
                yield f"{name}.{key}", parameter
        yield from self.extra.items()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def attach(self, optimizer: Any, total_steps: int | None = None, **options: Any) -> Adapted:
        """Let the methods act around every ``optimizer.step()``; a no-op for those that need not.

        Any loop drives them, also one that calls ``optimizer.step(closure)``, as Lightning, skorch
        and Composer do: then the method acts when the closure has run. A step whose gradients are
        missing, sparse, still scaled or not finite is refused before anything has moved.

        The orthogonality penalty of AdaLoRA, IncreLoRA and TriAdaptLoRA enters in the step, so
        after a loop's gradient clipping. To clip it with the rest, attach with ``penalty="loss"``
        and add ``method.orthogonality * adapted.controller.penalty()`` to the loss.

        Growing methods add tensors to the model, so average copies of it (``AveragedModel``) only
        once its ranks stand still.

        Args:
            optimizer: a ``torch.optim.Optimizer`` that holds every tensor of :meth:`parameters`,
                also inside Accelerate's, Lightning's or Fabric's wrapper, or in a SAM that steps
                through a ``base_optimizer``.
            total_steps: optimizer steps of the whole run; methods with a schedule need it.
            options: passed to the method's controller. With several methods that have one, give
                each its own by slug: ``adalora={"scorer": ...}``.

        Raises:
            RuntimeError: attached already, or the model no longer carries the method.
            TypeError: an optimizer that moves tensors otherwise than once a step from one gradient
                (LBFGS, Lookahead, schedule-free ones), which methods that act cannot follow.
            ValueError: the optimizer misses trained tensors, the schedule does not fit, or two
                methods cannot share an optimizer.
        """
        self._need("adapted", "attach")
        self._check()
        if self.controller is not None:
            raise RuntimeError("attach was called before on this model; one optimizer drives it")
        scheduled = self._scheduled()
        if scheduled:
            guards.refuse_sharded(self, scheduled[0].info.title)
        optimizer = wrappers.driven(optimizer) if scheduled else wrappers.unwrap(optimizer)
        hooks.check_holds(optimizer, self.named_parameters())
        taking_over = [m for m in scheduled if getattr(m, "exclusive", False)]
        if taking_over and len(scheduled) > 1:
            raise ValueError(
                f"{taking_over[0].info.title} takes over what the optimizer does, so no other "
                "method can share it; adapt another model with it, or use another of its modes"
            )
        if not scheduled:
            if options:
                names = ", ".join(type(m).__name__ for m in self.methods)
                raise TypeError(f"{names} takes no option {sorted(options)}")
            self._watch_over(optimizer)
            return self
        given = [options] if len(scheduled) == 1 else _shared_out(scheduled, options)
        for method in scheduled:
            title, exclusive = method.info.title, getattr(method, "exclusive", False)
            hooks.check_shares(optimizer, title, exclusive)
        schedules = [self.schedule(method) for method in scheduled]
        containers = [vars(self), *of_modules([*self.adapters.values(), *schedules])]

        def build() -> None:
            parts = []
            try:
                for method, more, schedule in zip(scheduled, given, schedules, strict=True):
                    share = self.share(method)
                    parts.append(method.controller(share, optimizer, total_steps, **more))
                    schedule.attach(parts[-1])
                self.controller = parts[0] if len(parts) == 1 else Several(parts)
                hooks.register(optimizer, self.controller, self.extra)
            except BaseException:
                for part in parts:
                    part.remove()
                raise

        guard = self._watch_over(optimizer)  # its hook comes first, before gradients are read
        try:
            whole([*containers, *of_optimizer(optimizer)], build)
        except BaseException:
            guard.remove()
            self._guard = None
            raise
        self.calm()
        return self

    def find(self) -> None:
        """Raise RuntimeError unless all adapted layers are in the model still."""
        if self.state == "adapted" and not handles.stand(self._links):
            self._links = handles.find(self.model, self.sites)

    def share(self, method: Any) -> Share:
        """The part of the model that one of its methods acts on."""
        sites = {n: p for n, p in self.sites.items() if p.method is method}
        return Share(self.model, method, sites, self.extra)

    @torch.no_grad()
    def merge(self, keep_original: bool = True) -> nn.Module:
        """Write the new weights into plain layers and take the adapters out.

        All new weights are computed before any is written, so one that cannot be formed leaves the
        model as it was. A layer without a bias gets one if a method shifts what leaves it.

        Args:
            keep_original: keep the old weights (in this object) so that :meth:`unmerge` restores
                them bit for bit; False frees them.

        Returns:
            The model, with its own modules and parameter names only.

        Raises:
            RuntimeError, ValueError: merged or unloaded already, or the new weight of a layer,
                which is named, cannot be formed or be put in the old one's place.
            TypeError: a method is no plain weight.
        """
        self._need("adapted", "merge")
        self._check()
        guards.refuse_compiled(self.sites)
        guards.refuse_sharded(self, "merge()")
        self._say_not_attached("merge")
        unmerged = [m for m in self.methods if not m.info.mergeable and self.share(m).sites]
        if unmerged:
            raise TypeError(
                f"{unmerged[0].info.title} is no change of a weight, so it cannot be merged; keep "
                "the adapted model, or unload()"
            )
        tied = [name for name, placed in self.sites.items() if placed.tied]
        if tied:
            warnings.warn(
                f"layers {tied} share their weight with another part of the model; the merged "
                "weight is theirs alone, the other part keeps the old one",
                stacklevel=2,
            )
        new = {name: placed.merged() for name, placed in self.sites.items()}
        for name, placed in self.sites.items():
            base = placed.layer.base
            for key, value in new.pop(name).items():
                old = base._parameters[key]
                if keep_original:
                    self._originals[f"{name}.{key}"] = old
                trains = self._before.get(f"{name}.{placed.site.parameter}", False)
                base._parameters[key] = nn.Parameter(
                    value, requires_grad=self._before.get(f"{name}.{key}", trains)
                )
            placed.put(base)
        self._restore_flags()
        self.state = "merged" if keep_original else "unloaded"
        self._detach()
        return self.model

    def unmerge(self) -> Adapted:
        """Undo :meth:`merge`: old weights, bit for bit, with the adapters beside them.

        Raises:
            RuntimeError: not merged, or merged with ``keep_original=False``, or a layer no longer
                holds the weight that was merged into it.
        """
        self._need("merged", "unmerge")
        handles.find(self.model, self.sites, "base")
        guards.refuse_compiled(self.sites)
        for old in self._originals:
            name, _, key = old.rpartition(".")
            frozen(self.sites[name].layer.base, key, name)
        for name, placed in self.sites.items():
            for key in list(placed.layer.base._parameters):
                if f"{name}.{key}" in self._originals:
                    placed.layer.base._parameters[key] = self._originals.pop(f"{name}.{key}")
            placed.put(placed.layer)
        self.state = "adapted"
        freeze(self)
        return self

    @torch.no_grad()
    def unload(self) -> nn.Module:
        """Take the methods off: the base model, its weights, buffers and trainable flags as before.

        Parameters named by ``train`` keep what they learned. After a merge, unmerge first.
        """
        self._need("adapted", "unload")
        self.find()
        guards.refuse_compiled(self.sites)
        extra = self.extra
        for placed in self.sites.values():
            placed.put(placed.layer.base)
        for name, value in self._kept.items():
            extra[name].copy_(value)
        handles.put_buffers(self.model, self._buffers)
        self._restore_flags()
        self.state = "unloaded"
        self._detach()
        return self.model

    def save(self, path: Any, resume: bool = False) -> None:
        """Write what the task adds to the base as safetensors, for :func:`toolkit.load`."""
        self._need("adapted", "save")
        self._check()
        self._say_not_attached("save")
        files.save(self, path, resume)

    def save_peft(self, folder: Any) -> None:
        """Write the adapters as a folder that Hugging Face ``peft`` loads."""
        self._need("adapted", "save_peft")
        self._check()
        peft.save_peft(self, folder)

    def report(self) -> Any:
        """One row per adapted layer, as a DataFrame: what matched, and what it trains."""
        return costs.report(self)

    def costs(self) -> dict[str, int]:
        """The four costs: see :func:`toolkit.core.adapt.costs.costs`."""
        return costs.costs(self)

    def schedule(self, method: Any) -> Schedule | None:
        """Where the state of a method's controller travels, if it has one."""
        if method not in self._scheduled():
            return None
        return next(iter(self.share(method).sites.values())).layer.schedule

    def moved(self) -> list[str]:
        """Names of the base's parameters that a method lets train, and that unload restores."""
        return list(self._kept)

    def changed_buffers(self) -> dict[str, Tensor]:
        """The base's buffers that are no longer as they were when the model was adapted."""
        then, now = self._buffers, handles.buffers(self.model)
        return {n: b for n, b in now if n in then and not handles.same(b, then[n])}

    def _scheduled(self) -> list[Any]:
        """Methods that act around optimizer steps, in order."""
        return [m for m in self.methods if hasattr(m, "controller") and self.share(m).sites]

    def _watch(self, adapter: nn.Module) -> None:
        """Warn at the first backward pass if nothing was attached by then."""
        told: list[bool] = []

        def alarm(_: Tensor) -> None:
            if not told:
                told.append(True)
                self._say_not_attached("backward")

        first = next(iter(adapter.parameters()), None)
        if first is not None:
            self._alarms.append(first.register_post_accumulate_grad_hook(alarm))

    def calm(self) -> None:
        """Say nothing of a missing attach any more: the tensors come from a file."""
        for alarm in self._alarms:
            alarm.remove()
        self._alarms = []

    def _say_not_attached(self, where: str) -> None:
        if not self._alarms or self.controller is not None:
            return
        self.calm()
        names = ", ".join(m.info.title for m in self._scheduled())
        warnings.warn(
            f"{names} acts inside optimizer.step(), but nothing is attached at this {where}: "
            "without it the adapters train like plain ones. Call adapted.attach(optimizer, "
            "total_steps=...)",
            stacklevel=3,
        )

    def _need(self, state: str, verb: str) -> None:
        if self.state == state:
            return
        remedy = {
            "merged": "call unmerge() first",
            "unloaded": "adapt the model again",
            "adapted": "call merge() first",
        }[self.state]
        raise RuntimeError(f"cannot {verb}: the model is already {self.state}; {remedy}")

    def _restore_flags(self) -> None:
        for name, parameter in handles.parameters(self.model):
            parameter.requires_grad_(self._before.get(name, parameter.requires_grad))

    def _check(self) -> None:
        """Raise RuntimeError unless the model has all that this handle, or its optimizer, holds."""
        self.find()
        guards.check_shapes(self.sites)
        if self._guard is not None:
            self._guard.check()

    def _watch_over(self, optimizer: torch.optim.Optimizer) -> guards.Guard:
        if self._guard is not None:
            self._guard.remove()
        self._guard = guards.Guard(self, optimizer)
        return self._guard

    def _detach(self) -> None:
        self.calm()
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        if self.controller is not None:
            self.controller.remove()
            self.controller = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        # The hooks belong to an optimizer over the original tensors, so a copy starts unattached.
        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            if key == "methods":
                new.methods = value  # frozen; sites refer to these very objects
            else:
                empty = self._unattached()
                setattr(new, key, empty[key] if key in empty else copy.deepcopy(value, memo))
        methods = {id(p): p.method for p in self.sites.values()}
        for name, placed in self.sites.items():
            new.sites[name].method = methods[id(placed)]
        return new

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | self._unattached()

    @staticmethod
    def _unattached() -> dict[str, Any]:
        return {"controller": None, "_alarms": [], "_guard": None}


def freeze(adapted: Adapted) -> None:
    """Let the handle's own tensors train, and nothing else that no other handle trains."""
    modules = [*adapted.model.modules()]
    others = {
        id(p)
        for module in modules
        if isinstance(module, AdaptedLayer)
        for p in module.adapter.parameters()
    }
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in others:
                parameter.requires_grad_(False)
    for parameter in adapted.parameters():
        parameter.requires_grad_(True)


def _shared_out(scheduled: list[Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    slugs = [m.info.slug for m in scheduled]
    if wrong := [k for k, v in options.items() if k not in slugs or not isinstance(v, Mapping)]:
        raise TypeError(
            f"option {wrong[0]!r}: several methods act on this model, so give each its own "
            f"options by name, as {slugs[0]}={{...}}"
        )
    return [dict(options.get(slug, {})) for slug in slugs]
