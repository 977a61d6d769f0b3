"""Merging: M2N2's populations side by side against one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.rows import log
from benchmarks.timing import alternate, compare, emit
from toolkit import M2N2
from toolkit.core import data
from toolkit.core.seeds import generator
from toolkit.merge.m2n2 import correctness, flatten, unflatten


def digits(count: int) -> tuple[Tensor, Tensor]:
    """So many of scikit-learn's digits, 64 pixels from 0 to 16, and their labels."""
    found = data.digits(test=1)
    x, y = torch.as_tensor(found.x_train[:count]), torch.as_tensor(found.y_train[:count])
    return 16 * x.flatten(1), y


def network(width: int, seed: int) -> nn.Sequential:
    """A perceptron of one hidden layer, with the start of the published experiment."""
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.01, generator=generator(seed, "start"))
    return model.requires_grad_(False)


def specialists(width: int, x: Tensor, y: Tensor) -> tuple[Tensor, nn.Module]:
    """Two networks as vectors (2, D), of which one knows small digits, the other large ones."""
    made = []
    for seed, mine in enumerate((y < 5, y >= 5)):
        model = network(width, seed).requires_grad_(True)
        adam = torch.optim.Adam(model.parameters(), lr=0.003)
        for _ in range(10):
            adam.zero_grad()
            nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
            adam.step()
        made.append(model.requires_grad_(False))
    return flatten(made), made[0]


def alone(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The score function of one network at a time, without a batch of networks."""

    def score(parameters: Tensor) -> Tensor:
        state = unflatten(parameters[0], model)
        return (functional_call(model, state, (x,)).argmax(-1) == y)[None]

    return score


def evaluations(
    rounds: int, runs: int, children: int, *, width: int, examples: int, places: int, chunk: int
) -> tuple[dict[str, list[float]], int]:
    """Seconds for each evaluation, the whole step included, side by side and one by one.

    Also in how many runs both ways find equally good models: rounding may turn a near tie.
    """
    x, y = digits(examples)
    parents, model = specialists(width, x, y)
    method = M2N2(size=places)
    together, single = correctness(model, x, y, chunk), alone(model, x, y)

    def lanes() -> Any:
        own = [generator(seed, "run") for seed in range(runs)]
        return method.evolve(parents, together, children, own, every=children)[1].best

    def one_by_one() -> Any:
        own = (generator(seed, "run") for seed in range(runs))
        ends = (method.evolve(parents, single, children, g, every=children) for g in own)
        return torch.cat([history.best for _, history in ends])

    same = int((lanes() == one_by_one()).all(1).sum())
    times = alternate({"lanes": lanes, "one": one_by_one}, rounds, 1, torch.device("cpu"))
    each = runs * (children + len(parents))
    return {arm: [t / each for t in times[arm]] for arm in ("lanes", "one")}, same


def m2n2(rounds: int, threads: int) -> None:
    """M2N2 on small networks: ratio = one by one / side by side, for each evaluation.

    The facts have the same for the published experiment, whose network is so large that nearly all
    of the time is arithmetic, which lanes do not save.
    """
    name = "m2n2/evaluation/cpu"
    with log.attempt(name):
        size = {"width": 32, "examples": 300, "places": 6}
        times, same = evaluations(rounds, 64, 10, **size, chunk=64)
        wide = {"width": 256, "examples": 1437, "places": 20}
        published, _ = evaluations(min(rounds, 5), 8, 5, **wide, chunk=1)
        lanes, one = (statistics.median(published[arm]) for arm in ("lanes", "one"))
        emit(compare(
            name, times["lanes"], times["one"], "ms", runs=64, same=same, **size,
            published_size=list(wide.values()), published_ours=round(1e3 * lanes, 4),
            published_peer=round(1e3 * one, 4), published_ratio=round(one / lanes, 4),
            threads=threads, torch=torch.__version__,
        ))  # fmt: skip
