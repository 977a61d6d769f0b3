"""Small models with one kind of layer each, of random shapes, for the contracts."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit import adapt
from toolkit.core.adapt.mask import MaskLayer
from toolkit.core.adapt.sites import describe
from toolkit.core.declare.catalogue import catalogue
from toolkit.core.declare.fields import hyperparameters

ADAPTING = ("lowrank", "reparam", "select", "insert", "core")
TOTAL_STEPS = 20


def conv1d_class() -> type[nn.Module]:
    """transformers' Conv1D, or a class of the same form where transformers is missing."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:

        class Conv1D(nn.Module):
            def __init__(self, nf: int, nx: int):
                super().__init__()
                self.nf, self.nx = nf, nx
                self.weight = nn.Parameter(0.02 * torch.randn(nx, nf))
                self.bias = nn.Parameter(torch.zeros(nf))

            def forward(self, x: Tensor) -> Tensor:
                y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
                return y.view(*x.shape[:-1], self.nf)

    return Conv1D


class Attention(nn.Module):
    """Self-attention that returns its output alone."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    """An embedding and the decoder that shares its weight, as in language models."""

    def __init__(self, entries: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(entries, width)
        self.decoder = nn.Linear(width, entries)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.embedding(tokens)))


class Twice(nn.Module):
    """One layer under two names, so that the model calls it twice."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x)))


@dataclass(frozen=True)
class Room:
    """A kind of layer and a recipe ``(draw) -> (model, targets, input maker)``.

    ``draw(low, high)`` gives a random size. The input maker takes a generator and a dtype.
    """

    kind: str
    recipe: Callable[..., tuple[nn.Module, Any, Callable[..., Tensor]]]


def _floats(*shape: int) -> Callable[..., Tensor]:
    return lambda g, dtype: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def _tokens(entries: int, *shape: int) -> Callable[..., Tensor]:
    return lambda g, dtype: torch.randint(entries, shape, generator=g)


def _linear(draw):
    a, b, c = draw(4, 9), draw(4, 9), draw(4, 9)
    shape = (draw(2, 5), a) if draw(0, 1) else (2, draw(2, 4), a)
    bias = bool(draw(0, 1))
    model = nn.Sequential(nn.Linear(a, b, bias=bias), nn.Tanh(), nn.Linear(b, c))
    return model, None, _floats(*shape)


def _hf_conv1d(draw):
    a, b, c = draw(4, 9), draw(4, 9), draw(4, 9)
    layer = conv1d_class()
    model = nn.Sequential(layer(b, a), nn.Tanh(), layer(c, b))
    return model, None, _floats(draw(2, 4), draw(2, 4), a)


def _conv(dims: int):
    def recipe(draw):
        a, b = draw(3, 5), draw(4, 7)
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        options = {"stride": draw(1, 2), "padding": draw(0, 2), "bias": bool(draw(0, 1))}
        model = nn.Sequential(layer(a, b, draw(2, 3), **options), nn.Tanh(), layer(b, 4, 1))
        return model, [layer], _floats(draw(2, 3), a, *(draw(4, 5) for _ in range(dims)))

    return recipe


def _grouped(draw):
    groups = draw(2, 3)
    a, b = groups * draw(1, 2), groups * draw(2, 3)
    mode = ("zeros", "circular", "reflect")[draw(0, 2)]
    options = {"groups": groups, "padding": 1, "padding_mode": mode, "dilation": draw(1, 2)}
    model = nn.Sequential(nn.Conv2d(a, b, (3, 2), **options), nn.Tanh(), nn.Flatten())
    return model, nn.Conv2d, _floats(2, a, 6, 5)


def _embedding(draw):
    entries, width = draw(5, 9), draw(4, 7)
    model = nn.Sequential(nn.Embedding(entries, width), nn.Tanh(), nn.Linear(width, 3))
    return model, "0", _tokens(entries, draw(2, 4), draw(3, 5))


def _attention(draw):
    heads = draw(1, 3)
    width = heads * draw(4, 5)
    return Attention(width, heads), None, _floats(2, draw(2, 4), width)


def _tied(draw):
    entries, width = draw(5, 9), draw(4, 7)
    return Tied(entries, width), "decoder", _tokens(entries, 2, draw(3, 5))


def _twice(draw):
    width = draw(4, 9)
    return Twice(width), None, _floats(draw(2, 5), width)


ROOMS = {
    "linear": Room("linear", _linear),
    "hf_conv1d": Room("hf_conv1d", _hf_conv1d),
    "conv1d": Room("conv", _conv(1)),
    "conv2d": Room("conv", _conv(2)),
    "conv3d": Room("conv", _conv(3)),
    "grouped_conv": Room("conv", _grouped),
    "embedding": Room("embedding", _embedding),
    "attention": Room("attention", _attention),
    "tied": Room("linear", _tied),
    "twice": Room("linear", _twice),
}


@functools.cache
def _made(room: str, shape: int) -> tuple[nn.Module, Any, Callable[..., Tensor]]:
    """Model, targets and input maker of a room, drawn once; the model is for copying only."""
    rng = random.Random(f"{room} {shape}")
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(rng.randrange(2**31))
    try:
        return ROOMS[room].recipe(rng.randint)
    finally:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class Case:
    """A method in a room of one random shape. Everything it makes is the same each time."""

    method: Any
    room: str
    shape: int = 0

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return copy.deepcopy(_made(self.room, self.shape)[0]).to(dtype)

    @property
    def targets(self) -> Any:
        return _made(self.room, self.shape)[1]

    def input(self, number: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + number)
        return _made(self.room, self.shape)[2](generator, dtype)

    def adapt(self, model: nn.Module | None = None, dtype=torch.float32, seed: int = 5):
        model = self.base(dtype) if model is None else model
        generator = torch.Generator().manual_seed(seed)
        return adapt(model, self.method, self.targets, generator=generator)

    def optimizer(self, adapted, lr: float = 0.05, weight_decay: float = 0.0):
        """AdamW over the trained tensors, with the method's schedule on it."""
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=lr, weight_decay=weight_decay)
        adapted.attach(optimizer, total_steps=TOTAL_STEPS)
        return optimizer

    def loss(self, model, number: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return objective(model(self.input(number, dtype)))

    def trained(self, steps: int = 3, dtype: torch.dtype = torch.float32):
        """An adapted model a few steps from its start, so that nothing is zero any more."""
        adapted = self.adapt(dtype=dtype)
        optimizer = self.optimizer(adapted)
        for number in range(steps):
            optimizer.zero_grad()
            self.loss(adapted.model, number, dtype).backward()
            optimizer.step()
        optimizer.zero_grad()
        return adapted

    @contextlib.contextmanager
    def borrowed(self, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
        """The trained model that the contracts of this case share.

        Gradients are cleared when it comes back; a model that came back otherwise changed is not
        lent again, so no contract sees what another left.
        """
        key = (self, dtype)
        if key not in _lent:
            while len(_lent) > 3:  # contracts come case by case
                del _lent[next(iter(_lent))]
            adapted = self.trained(dtype=dtype)
            _lent[key] = adapted, _facts(adapted)
        adapted, facts = _lent[key]
        try:
            yield adapted
        finally:
            for parameter in adapted.model.parameters():
                parameter.grad = None
            if not _same(_facts(adapted), facts):
                del _lent[key]


_lent: dict[tuple[Case, torch.dtype], tuple[Any, list]] = {}


def _facts(adapted: Any) -> list:
    """Everything of a model that a contract could change: names, identities, values, flags."""
    model = adapted.model
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return [
        adapted.state,
        [(n, id(m), m.training, len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        [(n, id(t), t.requires_grad) for n, t in tensors],
        [t.detach().clone() for _, t in tensors],
    ]


def _same(a: list, b: list) -> bool:
    return a[:3] == b[:3] and all(torch.equal(x, y) for x, y in zip(a[3], b[3], strict=True))


def objective(output: Tensor) -> Tensor:
    """Mean squared distance to a fixed wave, which no model here meets at the start."""
    wave = torch.sin(torch.arange(output.numel(), dtype=torch.float32))
    return (output - wave.to(output.dtype).view(output.shape)).square().mean()


def _chooses(method_class: type) -> bool:
    """Whether a method moves entries of the weight itself, which refuses a shared one."""
    layer = nn.Linear(9, 7)
    built = small(method_class).build(describe(layer, "layer"))
    return isinstance(built, MaskLayer)


def small(method_class: type) -> Any:
    """The method with ranks that fit layers of a few units.

    A method whose defaults need more than that says so in a class attribute ``tiny``.
    """
    chosen = {}
    for h in hyperparameters(method_class):
        if h.name == "rank":
            chosen["rank"] = 3
        elif h.name.endswith("_rank") and h.default is not None:
            chosen[h.name] = 2
    return method_class(**chosen | getattr(method_class, "tiny", {}))


def cases(shapes: int = 3, rooms: tuple[str, ...] = tuple(ROOMS)) -> list[Case]:
    """Every adapting method of the catalogue in every room it accepts."""
    return [
        Case(small(e.method), room, shape)
        for e in catalogue()
        if e.part in ADAPTING
        for room in rooms
        if ROOMS[room].kind in e.kinds and not (room == "tied" and _chooses(e.method))
        # the baselines are one class each over kinds that tests/core/test_kinds.py tries as well
        for shape in range(1 if e.part == "core" else shapes)
    ]
