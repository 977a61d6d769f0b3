"""What a network computes, as a digest: its code and its data, but for the weights it starts from.

Functions count by their bytecode, the values they carry and the globals they name, classes by their
functions, objects by what pickling would keep of them. Code of PyTorch and other installed packages
counts by name and version.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device)
PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
DESCRIPTORS = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
INSTALLED = tuple(Path(sysconfig.get_path(kind)).resolve() for kind in PLACES)
READ = {"LOAD_GLOBAL", "LOAD_NAME"}  # what reads a global; co_names holds attributes as well
OWN = "toolkit"  # follows the code of today also where it is installed
UNREAD = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl"}
REPLACED = {"_parameters", "_buffers", "_modules", "training"}


def fingerprint(network: nn.Module) -> str:
    """The digest of a network.

    Raises:
        ValueError: it holds something whose code or data cannot be told, named by its place.
    """
    reader = _Reader()
    reader.add(network, "network")
    return reader.digest.hexdigest()


class _Reader:
    def __init__(self) -> None:
        self.digest = hashlib.blake2b()
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no number of an object is given to another one

    def word(self, *facts: Any) -> None:
        self.digest.update(repr(facts).encode())

    def add(self, value: Any, place: str) -> None:
        """Read one value, and all that it leads to, once."""
        if isinstance(value, PLAIN):
            return self.word(type(value).__name__, value)
        if type(value) is tuple:  # whether two constants are one object is the compiler's business
            return self.all(value, place)
        if id(value) in self.seen:
            return self.word("again", self.seen[id(value)])
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        if isinstance(value, Tensor):
            self.tensor(value, place)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self.word("array", value.dtype.str, value.shape)
            self.digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, types.ModuleType):
            self.module(value, place)
        elif isinstance(value, type):
            self.kind(value, place)
        elif isinstance(value, types.FunctionType):
            self.function(value, place)
        elif isinstance(value, types.CodeType):
            self.code(value, {}, place)
        elif isinstance(value, types.MethodType):
            self.all((value.__func__, value.__self__), place)
        elif isinstance(value, types.CellType):
            self.all([value.cell_contents] if _filled(value) else [], place)
        elif isinstance(value, (staticmethod, classmethod)):
            self.add(value.__func__, place)
        elif isinstance(value, property):
            self.all((value.fget, value.fset), place)
        elif isinstance(value, DESCRIPTORS):
            self.word("descriptor", value.__objclass__.__qualname__, value.__name__)
        elif isinstance(value, functools.partial):
            self.all((value.func, value.args, value.keywords), place)
        elif isinstance(value, torch.jit.ScriptModule):
            self.word("script", str(value.inlined_graph))
            self.layer(value, place)
        elif isinstance(value, nn.Module):
            self.layer(value, place)
        else:
            self.object(value, place)

    def all(self, values: Collection[Any], place: str) -> None:
        self.word("parts", len(values))
        for number, value in enumerate(values):
            self.add(value, f"{place}[{number}]")

    def tensor(self, value: Tensor, place: str) -> None:
        self.word("tensor", value.dtype, tuple(value.shape), value.layout, value.requires_grad)
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise _unknown(value, place)
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        self.digest.update(data.numpy().tobytes())

    def layer(self, value: nn.Module, place: str) -> None:
        """A module: its class, its settings, its parts; weights by shape, as lanes replace them."""
        self.add(type(value), place)
        state = value._parameters | {
            n: t for n, t in value._buffers.items() if n not in value._non_persistent_buffers_set
        }
        for name, t in state.items():
            self.word(name, t is not None and (t.dtype, tuple(t.shape), t.requires_grad))
            # a tied weight is the same tensor again
            self.word(t is not None and self.seen.setdefault(id(t), len(self.seen)))
        for name in sorted(value._non_persistent_buffers_set):
            self.add(value._buffers[name], f"{place}.{name}")
        for name, part in value._modules.items():
            self.word(name)
            self.add(part, f"{place}.{name}")
        for name, part in vars(value).items():
            if name not in REPLACED:
                self.word(name)
                # hooks are kept by numbers that count all hooks of the process
                hooks = name.startswith("_") and "hooks" in name and isinstance(part, Mapping)
                self.add([*part.values()] if hooks else part, f"{place}.{name}")

    def kind(self, value: type, place: str) -> None:
        self.word("class", value.__module__, value.__qualname__)
        if self.installed(value.__module__):
            return
        self.all(value.__bases__, place)
        for name, part in vars(value).items():
            if name not in UNREAD:
                self.word(name)
                self.add(part, f"{place}.{name}")

    def function(self, value: types.FunctionType, place: str) -> None:
        self.word("function", value.__module__, value.__qualname__)
        carried = (value.__defaults__, value.__kwdefaults__, value.__closure__)
        for part in carried:
            self.add(part, place)
        if not self.installed(value.__module__ or ""):
            self.code(value.__code__, value.__globals__, place)

    def code(self, value: types.CodeType, around: Mapping[str, Any], place: str) -> None:
        self.word(value.co_code, value.co_names, value.co_argcount, value.co_kwonlyargcount)
        for constant in value.co_consts:
            if isinstance(constant, types.CodeType):
                self.code(constant, around, place)
            else:
                self.add(constant, place)
        for name in dict.fromkeys(
            i.argval for i in dis.get_instructions(value) if i.opname in READ
        ):
            if name in around:
                self.word(name)
                self.add(around[name], name)

    def module(self, value: types.ModuleType, place: str) -> None:
        self.word("module", value.__name__)
        if self.installed(value.__name__):
            return
        try:
            self.digest.update(inspect.getsource(value).encode())
        except (OSError, TypeError) as error:
            raise _unknown(value, place) from error

    def installed(self, module: str) -> bool:
        """Whether the name of a module, and a version beside it, says what its code is."""
        top = module.partition(".")[0]
        package = sys.modules.get(top)
        file = getattr(package, "__file__", None)
        if package is None or top in (OWN, "__main__"):
            return False
        if file:
            path = Path(file).resolve()
            # packages may also be found by a .pth file of another environment
            apart = {"site-packages", "dist-packages"}.isdisjoint(path.parts)
            if apart and not any(path.is_relative_to(place) for place in INSTALLED):
                return False
        self.word(top, str(getattr(package, "__version__", "")))
        return True

    def object(self, value: Any, place: str) -> None:
        """Any other object, by what pickling would keep."""
        if type(value) is list:
            self.word("list")
            return self.all(value, place)
        if type(value) in (dict, types.MappingProxyType):
            self.word("dict")
            return self.all([*value.items()], place)
        if isinstance(value, Set):
            parts = []
            for one in value:
                inner = _Reader()
                inner.add(one, place)
                parts.append(inner.digest.hexdigest())
            return self.word("set", sorted(parts))
        if isinstance(value, enum.Enum):
            return self.word("enum", type(value).__qualname__, value.name)
        try:
            told = value.__reduce_ex__(4)
        except Exception as error:
            raise _unknown(value, place) from error
        if isinstance(told, str):  # a name in its module, as of built-in functions
            owner = getattr(value, "__module__", None) or type(value).__module__
            self.word("name", owner, told)
            if not self.installed(owner) and hasattr(value, "__wrapped__"):
                self.add(value.__wrapped__, place)  # a cache around a function
            return None
        self.all([list(p) if hasattr(p, "__next__") else p for p in told], place)
        return None


def _filled(cell: types.CellType) -> bool:
    """Whether a variable that a function carries has a value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _unknown(value: Any, place: str) -> ValueError:
    return ValueError(
        f"folder: {place} of the network is a {type(value).__name__}, whose data cannot be told, "
        "so kept files could be of another network: leave folder out."
    )
