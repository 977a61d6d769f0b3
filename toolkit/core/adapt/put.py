"""Put methods on a model: ``adapt(model, method, targets)``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt import deciding, handles, scores, sites
from toolkit.core.adapt import targets as names
from toolkit.core.adapt.layer import AdaptedLayer, Placed, resume
from toolkit.core.adapt.mask import MaskLayer
from toolkit.core.adapt.model import Adapted, Method, freeze
from toolkit.core.adapt.targets import Targets
from toolkit.core.adapt.unfit import DTYPES, refuse_wrapped
from toolkit.core.declare.catalogue import entry

Methods = Method | Mapping[str, Method]


def adapt(
    model: nn.Module,
    method: Methods,
    targets: Targets = None,
    *,
    train: str | Iterable[str] | Callable[[str], bool] = (),
    generator: torch.Generator | None = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Adapted:
    """Freeze a model and put methods on the sites that are named, in place.

    >>> import torch
    >>> from toolkit import LoRA, Train, adapt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    >>> adapted = adapt(model, {"0": LoRA(rank=2), "1.bias": Train()})
    >>> sorted(adapted.sites), sorted(adapted.extra)
    (['0'], ['1.bias'])

    Args:
        model: any ``nn.Module``. The same layer used in several places is adapted once. It may
            carry other methods already, on other sites.
        method: a method with its hyperparameters, such as ``LoRA(rank=8)``, or several by pattern:
            ``{"*.query": LoRA(rank=4), "*.bias": Train()}``. One that decides over all layers of
            its pattern at once has a function ``decided`` of the model, targets, batches, loss and
            train, which returns the methods by pattern, with ``sites``, the names it decided over.
        targets: for one method: see :func:`toolkit.core.adapt.targets.select`; None takes every
            linear layer.
        train: patterns of parameters that train beside the adapters, such as ``"head.*"``, or a
            callable of the parameter's name; layers whose weight they hold are not adapted. They
            are saved with the adapters and keep what they learned at ``unload``.
        generator: source of the initial draw.
        batches: data for methods that score weights on it, one batch at a time.
        loss: ``(model, batch) -> scalar``, for the same.

    Returns:
        The handle to train, merge, save or take off the methods.

    Raises:
        ValueError, TypeError: nothing matched, two methods want one site, or a method does not fit
            a site, such as a choice of entries a weight that another module shares. The model is
            then as it was.
        RuntimeError: a site carries a method already.
    """
    handles.refuse_spread(model)
    handles.refuse_lazy(model)
    asked = _wanted(method, targets)
    beside = trained_beside(model, train)
    moved: dict[str, nn.Parameter] = {}
    for one, pattern in asked:
        if is_train(one):
            moved |= trained_beside(model, "*" if pattern is None else pattern, "targets")
    weights = {id(p) for p in (beside | moved).values()}
    modules = dict(model.named_modules())
    trained = {name for name, m in modules.items() if _weight(m) in weights} if weights else set()
    trains = (beside | moved).keys().__contains__
    wanted = deciding.decided(method, asked, model, batches, loss, trains, trained - {""})
    chosen: dict[str, tuple[Any, nn.Module]] = {}
    passed: dict[str, str] = {}
    bare = _bare(modules)
    for one, pattern in wanted:
        if is_train(one):
            continue
        _refuse_carried(modules, pattern, one)
        layers = names.select(model, pattern, one.info.kinds, exclude=trained - {""})
        for name, layer in layers.items():
            if name in chosen:
                raise deciding.both_want(chosen[name][0], one, name)
            chosen[name] = one, layer
        passed |= names.left_out(bare, pattern, one.info.kinds, trained | layers.keys())
    passed = {name: why for name, why in passed.items() if name not in chosen}
    _refuse(model, modules, chosen)
    found = {n: sites.site_of(layer, n, one.info.kinds) for n, (one, layer) in chosen.items()}
    for one, _ in wanted:
        kind = getattr(one, "scores", None)
        own = {n: found[n] for n, (m, _) in chosen.items() if m is one}
        if kind and own:
            layers = {n: chosen[n][1] for n in own}
            measured = scores.measured(model, own, layers, kind, batches, loss)
            found |= {n: dataclasses.replace(own[n], scores=s) for n, s in measured.items()}
    with torch.inference_mode(False):  # or nothing of what is built could train, ever
        built = {n: chosen[n][0].build(site, generator) for n, site in found.items()}
        uses = _uses(modules.values())
        _refuse_tied(model, built, uses, weights)
        every = [m for m, _ in wanted]
        return _put(model, every, chosen, found, built, beside, moved, passed, uses)


def _put(
    model: nn.Module, methods: list[Any], chosen: Mapping[str, tuple[Any, nn.Module]],
    found: Mapping[str, sites.Site], built: Mapping[str, nn.Module],
    beside: dict[str, nn.Parameter], moved: dict[str, nn.Parameter], passed: dict[str, str],
    uses: Mapping[int, int],
) -> Adapted:  # fmt: skip
    """All checks are behind us: from here on the model changes."""
    before = {n: p.requires_grad for n, p in handles.parameters(model, twice=True)}
    places = _places(model, [layer for _, layer in chosen.values()])
    placed: dict[str, Placed] = {}
    for name, (method, layer) in chosen.items():
        weight = layer._parameters.get(found[name].parameter)
        tied = weight is not None and uses[id(weight)] > 1
        adapted_layer = AdaptedLayer(layer, built[name])
        placed[name] = Placed(name, found[name], adapted_layer, places[id(layer)], tied, method)
        placed[name].put(adapted_layer)
    unique = tuple({id(m): m for m in methods}.values())
    kept = {name: p.detach().clone() for name, p in moved.items() if name not in beside}
    adapted = Adapted(model, unique, placed, beside | moved, before, kept, passed)
    freeze(adapted)
    if resume not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(resume)
    return adapted


def _uses(modules: Iterable[nn.Module]) -> dict[int, int]:
    """Identity of each parameter -> how many modules hold it."""
    uses: dict[int, int] = {}
    for module in modules:
        for p in module._parameters.values():
            if p is not None:
                uses[id(p)] = uses.get(id(p), 0) + 1
    return uses


def _refuse_tied(
    model: nn.Module, built: Mapping[str, nn.Module], uses: Mapping[int, int], weights: Set[int]
) -> None:
    """Raise ValueError for a choice of entries of a tensor that another module shares, or trains.

    A difference is the layer's own, but the entries of one tensor cannot move in one of its places
    and stay in the other.
    """
    masks = {name: layer for name, layer in built.items() if isinstance(layer, MaskLayer)}
    for name, parameter in ((n, key) for n, mask in masks.items() for key in mask.covers):
        tensor = model.get_submodule(name)._parameters[parameter]
        if id(tensor) in weights:
            raise ValueError(
                f"parameter '{name}.{parameter}' trains as a whole, so no choice of its entries "
                "can be made; leave it out of train and Train(), or choose from weights alone"
            )
        if uses.get(id(tensor), 0) < 2:
            continue
        others = [
            key
            for key, value in handles.parameters(model, twice=True)
            if value is tensor and key != f"{name}.{parameter}"
        ]
        raise ValueError(
            f"layer {name!r} shares its {parameter} with {', '.join(map(repr, others))}, so "
            "no choice of its entries is its own; untie them (give the layer a copy of the "
            "tensor), or leave the layer out of targets"
        )


def _wanted(method: Any, targets: Targets) -> list[tuple[Any, Any]]:
    """Pairs of method and pattern, checked."""
    if isinstance(method, Mapping):
        if targets is not None:
            raise ValueError("targets: the patterns stand beside the methods; leave targets out")
        if not method:
            raise ValueError("method: an empty mapping; write {pattern: method}")
        return [(_method(one), pattern) for pattern, one in method.items()]
    return [(_method(method), targets)]


def _method(method: Any) -> Any:
    if isinstance(method, str):
        try:
            name = entry(method).class_name
        except KeyError as error:
            raise TypeError(f"method={method!r}: {error.args[0]}; pass the method itself") from None
        raise TypeError(f"method={method!r}: pass the method itself: adapt(model, {name}())")
    if isinstance(method, type):
        name = method.__name__
        raise TypeError(f"method={name}: pass an instance: adapt(model, {name}())")
    if not hasattr(method, "info") or not hasattr(method, "build"):
        what = type(method).__name__
        raise TypeError(f"method: {what} adapts no model; pass a method such as LoRA(rank=4)")
    return method


def is_train(method: Any) -> bool:
    """Whether a method only lets parameters of the base train."""
    return method.info.kinds == ("parameter",)


def _refuse(
    model: nn.Module, modules: Mapping[str, nn.Module],
    chosen: Mapping[str, tuple[Any, nn.Module]],
) -> None:  # fmt: skip
    if "" in chosen:
        raise TypeError(
            "the model is itself the layer to adapt, so it cannot be replaced in place; wrap it, "
            "for example in nn.Sequential(layer)"
        )
    refuse_wrapped(model, chosen)
    busy = {
        id(child): name
        for name, module in modules.items()
        if isinstance(module, AdaptedLayer)
        for child in module.modules()
    }
    for _, layer in chosen.values():
        if id(layer) in busy:
            raise RuntimeError(
                f"the model already carries a method (at {busy[id(layer)]!r}); merge() or unload() "
                "it first"
            )
    for name, (one, _) in chosen.items():
        parent = modules[name.rpartition(".")[0]]
        if not one.info.mergeable and isinstance(parent, READERS):
            raise TypeError(
                f"layer {name!r} is read by {type(parent).__name__} and not called, so "
                f"{one.info.title} would not act there; name the whole module in targets"
            )


READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch that read their children's weights instead of calling them."""


def _refuse_carried(modules: Mapping[str, nn.Module], pattern: Targets, method: Any) -> None:
    """Raise RuntimeError where a pattern names a site that carries a method already."""
    chosen = names.predicate(pattern, method.info.kinds)
    for name, module in modules.items():
        if isinstance(module, AdaptedLayer) and chosen(name, module.base):
            raise RuntimeError(
                f"the model already carries a method (at {name!r}); merge() or unload() it first"
            )


def refuse_busy(model: nn.Module) -> None:
    """Raise RuntimeError when the model carries a method already."""
    busy = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    if busy:
        raise RuntimeError(
            f"the model already carries a method (at {busy[0]!r}); merge() or unload() it first"
        )


def _weight(module: nn.Module) -> int:
    """Identity of the weight matrix that a module itself holds, or of None."""
    own = sites.own_parameters(module)
    return id(own.get("weight", own.get("in_proj_weight")))


def trained_beside(
    model: nn.Module, train: Any, argument: str = "train"
) -> dict[str, nn.Parameter]:
    """The parameters of the base that patterns or a callable name, by name.

    A tied tensor goes by its first name; a warning says what else moves with it.

    Raises:
        ValueError: a pattern names no parameter.
    """
    if callable(train):
        chosen = {name: p for name, p in handles.parameters(model) if train(name)}
        for name, parameter in chosen.items():
            _refuse_untrainable(name, parameter, f"{argument}={train!r}")
        return chosen
    patterns = [train] if isinstance(train, str) else list(train)
    if not patterns:
        return {}
    every = dict(handles.parameters(model, twice=True))
    named = [n for n in every if any(_covers(n, p) for p in patterns)]
    for name in named:
        _refuse_untrainable(name, every[name], f"{argument}={train!r}")
    for pattern in patterns:
        if not any(_covers(n, pattern) for n in named):
            raise ValueError(
                f"{argument}={pattern!r} names no parameter of the model; its last ones are "
                f"{list(every)[-4:]}"
            )
    wanted = {id(every[name]) for name in named}
    found = {name: p for name, p in handles.parameters(model) if id(p) in wanted}
    for first, others in handles.also_called(model).items():
        unnamed = {first, *others} - set(named)
        if first in found and unnamed:
            warnings.warn(
                f"{argument}={train!r}: {sorted({first, *others} & set(named))} and "
                f"{sorted(unnamed)} are one tensor, so both move; untie them to train one alone",
                stacklevel=4,
            )
    return found


def _refuse_untrainable(name: str, parameter: nn.Parameter, who: str) -> None:
    """Raise ValueError for a parameter that cannot take a gradient step."""
    if parameter.dtype not in DTYPES and not parameter.is_complex():
        raise ValueError(
            f"{who} names {name!r}, which is held in {parameter.dtype} (quantised), so it cannot "
            "train; name others, or take the model in full precision"
        )
    if parameter.is_inference():
        raise ValueError(
            f"{who} names {name!r}, which was made inside torch.inference_mode(), so it cannot "
            "train; make the model outside, or copy it there with copy.deepcopy"
        )


def _covers(name: str, pattern: str) -> bool:
    """A pattern covers a parameter by its own name or by that of a module that holds it."""
    parts = name.split(".")
    return any(names.matches(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def _bare(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of a model by name, without those that carry a method or belong to one."""
    carried = {
        id(child)
        for module in modules.values()
        if isinstance(module, AdaptedLayer)
        for child in module.modules()
    }
    return {name: module for name, module in modules.items() if id(module) not in carried}


def _places(model: nn.Module, layers: list[nn.Module]) -> dict[int, list]:
    places: dict[int, list] = {id(layer): [] for layer in layers}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if id(child) in places:
                places[id(child)].append((parent, attribute))
    return places
