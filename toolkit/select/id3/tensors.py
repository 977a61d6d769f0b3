"""ID3 over tensors that train already: LoRA's factors, heads, or all parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps import hooks, wrappers
from toolkit.select.id3.unmasking import UnmaskingController, still


def unmask(
    method: Any,
    named: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    optimizer: Any,
    total_steps: int,
    **options: Any,
) -> TensorsController:
    """Let only the scalars move that ID3 unmasks, among tensors that an optimizer holds.

    Gradients and moments stay dense, as in the official code; scalars still masked keep their bits
    under weight decay too. One tensor under two names is one.

    >>> import torch
    >>> from toolkit import ID3, LoRA, adapt
    >>> from toolkit.select.id3.tensors import unmask
    >>> adapted = adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoRA(rank=4))
    >>> optimizer = torch.optim.AdamW(adapted.parameters())
    >>> rule = unmask(ID3(budget=6), adapted.named_parameters(), optimizer, total_steps=3)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     adapted(torch.ones(2, 8)).sum().backward()
    ...     optimizer.step()
    >>> rule.chosen
    6

    Args:
        method: an :class:`~toolkit.ID3`.
        named: the candidates, by name.
        optimizer: holds them; what else it holds trains as always.
        total_steps: optimizer steps of the run.
        options: see :class:`~toolkit.select.id3.unmasking.UnmaskingController`.

    Raises:
        ValueError: no candidate, one that does not train or is not in the optimizer, or what the
            controller refuses.
    """
    pairs = named.items() if isinstance(named, Mapping) else named
    tensors = {p: name for name, p in reversed([*pairs])}
    found = {name: p for p, name in reversed(tensors.items())}
    if not found:
        raise ValueError("named holds no tensor to choose from")
    still_ones = [name for name, p in found.items() if not p.requires_grad]
    if still_ones:
        raise ValueError(f"{still_ones[:3]} do not train (requires_grad is False); leave them out")
    optimizer = wrappers.driven(optimizer)
    hooks.check_holds(optimizer, found.items())
    hooks.check_shares(optimizer, method.info.title, False)
    controller = TensorsController(method, found, optimizer, total_steps, **options)
    hooks.register(optimizer, controller)
    return controller


def put(named: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> None:
    """Write :meth:`TensorsController.entries` into tensors of the same names.

    Raises:
        ValueError: a name or an index is not there; nothing is written then.
    """
    names = [key.removesuffix(".index") for key in entries if key.endswith(".index")]
    for name in names:
        index = entries[f"{name}.index"]
        if name not in named or (len(index) and int(index.max()) >= named[name].numel()):
            raise ValueError(f"the entries of {name!r} fit no tensor of that name here")
    with torch.no_grad():
        for name in names:
            flat = named[name].detach().view(-1)
            flat[entries[f"{name}.index"].to(flat.device)] = entries[f"{name}.values"].to(flat)


class Whole:
    """The scalars of one tensor that trains whole: a mask says which may move."""

    def __init__(self, parameter: nn.Parameter, repeat: bool):
        self.parameter, self.repeat = parameter, repeat
        self.size = self.length = parameter.numel()
        self.born = torch.zeros(self.size, dtype=torch.int32, device=parameter.device)
        self.moves = torch.zeros_like(parameter, dtype=torch.bool)
        self.held: Tensor | None = None

    @property
    def count(self) -> int:
        """Scalars that have joined."""
        return int((self.born > 0).sum())

    @property
    def active(self) -> int:
        """Scalars that the coming step moves."""
        return int(self.moves.sum())

    def weight(self) -> Tensor:
        return self.parameter.detach().reshape(-1)

    def gradient(self) -> Tensor | None:
        grad = self.parameter.grad
        return None if grad is None else grad.reshape(-1)

    def taken(self) -> Tensor:
        return self.born > 0

    def moving(self) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing: values and gradients of all scalars are in the tensor itself."""
        return self.born.new_zeros(0, dtype=torch.long), *[self.weight()[:0]] * 2

    def own(self, count: int) -> Tensor:
        """Steps since each scalar joined, the coming one included."""
        return torch.where(self.born > 0, count - self.born, 1).view_as(self.parameter)

    def join(
        self, index: Tensor, gradient: Tensor | None, now: int, optimizer: torch.optim.Optimizer
    ) -> None:
        flat, born = self.moves.reshape(-1).clone(), self.born.clone()
        new = index[~flat[index]]
        born[new] = now
        if self.repeat:
            flat.zero_()
        flat[index] = True
        self.born, self.moves = born, flat.view_as(self.moves)

    def hold(self) -> None:
        self.held = self.parameter.detach().clone()
        if self.parameter.grad is not None:
            self.parameter.grad.mul_(self.moves)

    def take_back(self, length: int, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: the tensor keeps its length."""

    def settle(self, optimizer: torch.optim.Optimizer) -> None:
        self.release(optimizer)

    def release(self, optimizer: torch.optim.Optimizer) -> None:
        if self.held is not None:
            still(self.parameter, self.held, self.moves, optimizer)
            self.held = None

    def state(self) -> dict[str, Tensor]:
        return {"born": self.born, "moving": self.moves.reshape(-1)}

    def load(self, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.born = state["born"].to(self.parameter.device, copy=True)
        self.moves = state["moving"].to(self.parameter.device, copy=True).view_as(self.moves)


class TensorsController(UnmaskingController):
    """The controller of tensors that the optimizer holds whole. ``remove()`` lets them go."""

    def __init__(
        self,
        method: Any,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        **options: Any,
    ):
        self.tensors = dict(named)
        pools = {name: Whole(p, method.strategy != "increment") for name, p in named.items()}
        super().__init__(method, pools, {}, optimizer, total_steps, **options)

    def named(self) -> dict[str, nn.Parameter]:
        return self.tensors

    def masks(self) -> dict[str, Tensor]:
        """Name -> True where a scalar has joined."""
        pools = self.pools.items()
        return {name: (pool.born > 0).view_as(pool.parameter) for name, pool in pools}

    def entries(self) -> dict[str, Tensor]:
        """What has joined, as ``name.index`` and ``name.values``, to be stored: see :func:`put`."""
        found: dict[str, Tensor] = {}
        for name, pool in self.pools.items():
            index = (pool.born > 0).nonzero()[:, 0]
            found |= {f"{name}.index": index, f"{name}.values": pool.weight()[index].clone()}
        return found
