"""Adapters from disk onto a fresh base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt import facts as reading
from toolkit.core.adapt import files, handles
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.put import adapt, is_train, refuse_busy
from toolkit.core.adapt.sites import fits, kind_of
from toolkit.core.declare.catalogue import entry, find_class


def load(model: nn.Module, path: Any) -> Adapted:
    """Put saved adapters on a fresh base model, in place.

    Args:
        model: the base the adapters were trained on, plain.
        path: a file written by :meth:`toolkit.Adapted.save`.

    Returns:
        The adapted model. A schedule saved with ``resume=True`` goes on at the next ``attach``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no adapter of this project, is damaged, or belongs to another
            architecture, or to another base where it holds entries of the weights; or the model
            has no memory yet (``meta``) or is sharded. The model is then as it was.
        RuntimeError: the model carries a method already.
    """
    path = Path(path)
    facts, tensors = reading.read(path)
    refuse_busy(model)
    handles.refuse_spread(model)
    handles.refuse_meta(model)
    _check_fits(model, path, facts, tensors)
    wanted = _methods(path, facts)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in facts["layers"]}
    ends = sorted(states, key=len, reverse=True)  # a site may lie inside another
    for key, value in tensors.items():
        if key.startswith("adapter."):
            path_in_model = key.removeprefix("adapter.")
            name = next((n for n in ends if path_in_model.startswith(f"{n}.")), None)
            if name is None:
                raise ValueError(f"{path}: tensor {key!r} belongs to no adapted layer of the file")
            states[name][path_in_model.removeprefix(f"{name}.")] = value
    beside = set(facts["train"]) - set(facts["moved"])
    adapted = put(model, wanted, beside, str(path))
    try:
        for name, adapter in adapted.adapters.items():
            fill(adapter, states[name], f"{path}: layer {name!r}")
            layer = adapted.sites[name].layer
            files.refuse_other(layer, facts["layers"][name], f"{path}: layer {name!r}")
    except Exception:
        adapted.unload()
        raise
    start = "buffer."
    kept = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    with torch.no_grad():
        for name, value in adapted.extra.items():
            value.copy_(tensors[f"train.{name}"])
        handles.put_buffers(model, kept)
    for i, method in enumerate(adapted.methods):
        schedule, start = adapted.schedule(method), f"schedule.{i}."
        if schedule is not None:
            schedule.waiting = {
                k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)
            }
    adapted.calm()
    return adapted


def put(model: nn.Module, wanted: Any, beside: set[str], where: str) -> Adapted:
    """:func:`adapt` with what a file asks for.

    Raises:
        ValueError: it cannot be put on this model.
    """
    try:
        # what a method chose by its scores is in the file, so any scores do
        return adapt(model, wanted, train=beside.__contains__, batches=[None], loss=_size)
    except Exception as error:  # of a method that does not take what the file says
        raise ValueError(f"{where}: its method does not fit this model ({error})") from error


def _size(model: nn.Module, _: None) -> Tensor:
    """A loss that reaches every weight."""
    return torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad]).sum()


def _methods(path: Path, facts: dict[str, Any]) -> dict[Any, Any]:
    """Which sites of the file each of its methods acts on, as :func:`adapt` takes it."""
    wanted: dict[Any, Any] = {}
    for one in facts["methods"]:
        try:
            cls, sites = entry(one["slug"]).method, frozenset(one["sites"])
            if one["class"] != cls.__name__:
                cls = find_class(one["class"]) or cls
            method = cls(**one["hyperparameters"])
        except Exception as error:  # a method may check its hyperparameters as it likes
            raise ValueError(
                f"{path} holds a method that this version does not have ({error}); load it with "
                "the version that wrote it"
            ) from error
        if is_train(method):
            wanted[frozenset(facts["moved"]).__contains__] = method
        else:
            wanted[among(sites)] = method
    if not wanted:
        raise ValueError(f"{path}: its fact 'methods' is empty; save it again")
    return wanted


def among(names: frozenset[str]) -> Callable[[str, nn.Module], bool]:
    """Targets: exactly these names."""
    return lambda name, _: name in names


@torch.no_grad()
def fill(adapter: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy tensors into an adapter, or raise ValueError naming the first that does not fit."""
    own = adapter.state_dict()
    site = getattr(adapter, "site", None)
    side = max([site.rows, site.cols] if site is not None else [0])
    for key, value in state.items():
        like = own.get(key, next(iter(own.values())))
        check(value, like, f"{where}: {key}")
        if not value.numel() and max(value.shape, default=0) > side:
            raise ValueError(
                f"{where}: {key} is empty, yet of shape {tuple(value.shape)}, longer than the layer"
            )
    accept = getattr(adapter, "resize", None)
    if accept is not None:
        try:
            accept(state)
        except (RuntimeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: its tensors do not fit together ({error})") from error
    own = adapter.state_dict()
    if own.keys() != state.keys():
        raise ValueError(
            f"{where}: holds tensors {sorted(state)}, the method needs {sorted(own)}; "
            "was the file written by another method or version?"
        )
    for key, value in state.items():
        if own[key].shape != value.shape:
            raise ValueError(
                f"{where}: {key} has shape {tuple(value.shape)}, the layer needs "
                f"{tuple(own[key].shape)}"
            )
    for key, value in state.items():
        own[key].copy_(value)


def check(value: Tensor, like: Tensor, where: str, finite: bool = True) -> None:
    """Raise ValueError unless a tensor is of the sort of numbers that another one holds.

    Args:
        value: from a file.
        like: what it stands for here; a float may be of another precision.
        where: for the message.
        finite: whether inf is refused as nan is.
    """
    sort = "floats" if like.is_floating_point() else str(like.dtype).removeprefix("torch.")
    fits = value.is_floating_point() if sort == "floats" else value.dtype == like.dtype
    if not fits:
        raise ValueError(f"{where} is of {value.dtype}, but {sort} are needed")
    if value.is_floating_point():
        wide = value if value.element_size() > 1 else value.float()
        if bool(wide.isnan().any()) or (finite and bool(wide.isinf().any())):
            raise ValueError(
                f"{where} holds numbers that are not finite; the run that wrote it diverged, or "
                "the file is damaged"
            )


def _check_fits(
    model: nn.Module, path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    modules = dict(model.named_modules())
    wrong = []
    for name, layer in facts["layers"].items():
        if name not in modules:
            wrong.append(f"no layer {name!r}")
            continue
        module, kind = modules[name], layer["kind"]
        weight = module._parameters.get(layer["parameter"])
        shape = () if weight is None else tuple(weight.shape)
        if shape != tuple(layer["shape"]):
            wrong.append(f"{name!r} has shape {shape}, the file {tuple(layer['shape'])}")
        elif not fits(module, (kind,)):
            wrong.append(f"{name!r} is of kind {kind_of(module)}, not {kind}")
    own = dict(handles.parameters(model))
    for name in facts["train"]:
        wrong += _misfit(name, own.get(name), tensors.get(f"train.{name}"), "parameter")
    buffers = dict(handles.buffers(model))
    empty = handles.buffer_places(model).keys() - buffers.keys()
    for key, value in tensors.items():
        if key.startswith("buffer."):
            name = key.removeprefix("buffer.")
            if name not in empty:
                wrong += _misfit(name, buffers.get(name), value, "buffer")
    every = dict(handles.parameters(model, twice=True))
    for name, others in facts.get("tied", {}).items():
        wrong += [
            f"{name!r} and {other!r} are not one tensor here"
            for other in others
            if name in own and every.get(other) is not own[name]
        ]
    if wrong:
        raise ValueError(
            f"{path} was saved for another architecture: {'; '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
        )
    for key, value in tensors.items():
        sort, _, name = key.partition(".")
        if sort == "train" and name in facts["train"]:
            check(value, own[name], f"{path}: {key}")
        elif sort == "buffer":
            check(value, buffers.get(name, value), f"{path}: {key}", finite=False)
        elif sort == "schedule" and _owner(name) < len(facts["methods"]):
            continue
        elif sort != "adapter":
            raise ValueError(f"{path}: tensor {key!r} belongs to nothing that the file names")


def _owner(name: str) -> float:
    """The number of the method whose schedule a tensor belongs to."""
    number = name.partition(".")[0]
    return int(number) if number.isdecimal() and len(number) < 5 else float("inf")


def _misfit(name: str, own: Tensor | None, saved: Tensor | None, what: str) -> list[str]:
    if own is None:
        return [f"no {what} {name!r}"]
    if saved is None or saved.shape != own.shape:
        shape = None if saved is None else tuple(saved.shape)
        return [f"{name!r} has shape {tuple(own.shape)}, the file {shape}"]
    return []
