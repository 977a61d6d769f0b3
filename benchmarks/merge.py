"""Merging: M2N2's populations side by side against one after the other."""

from __future__ import annotations

import copy
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


def specialists(width: int, x: Tensor, y: Tensor, runs: int) -> tuple[Tensor, nn.Module]:
    """Two networks for each run, (runs, 2, D), of which one knows small digits, one large ones."""
    made = []
    for seed in range(2 * runs):
        model, mine = network(width, seed), (y < 5) == (seed % 2 == 0)
        adam = torch.optim.Adam(model.requires_grad_(True).parameters(), lr=0.003)
        for _ in range(10):
            adam.zero_grad()
            nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
            adam.step()
        made.append(model.requires_grad_(False))
    vectors = flatten(made)
    return vectors.view(runs, 2, -1), copy.deepcopy(made[0])


def alone(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The score function of one network at a time, without a batch of networks."""

    def score(parameters: Tensor) -> Tensor:
        state = unflatten(parameters[0], model)
        return (functional_call(model, state, (x,)).argmax(-1) == y)[None]

    return score


def evaluations(
    name: str, runs: int, children: int, rounds: int, threads: int, **size: int
) -> None:
    """Time for each evaluation, the whole step included: ratio = one by one / lanes."""
    x, y = digits(size["examples"])
    parents, model = specialists(size["width"], x, y, runs)
    method = M2N2(size=size["places"])
    together, single = correctness(model, x, y), alone(model, x, y)

    def lanes() -> Any:
        own = [generator(seed, "run") for seed in range(runs)]
        return method.evolve(parents, together, children, own, every=children)

    def one_by_one() -> Any:
        return [
            method.evolve(parents[r], single, children, generator(r, "run"), every=children)
            for r in range(runs)
        ]

    side, apart = lanes()[1].best, torch.cat([history.best for _, history in one_by_one()])
    same = int((side == apart).all(1).sum())  # rounding may turn a near tie of two classes
    times = alternate({"lanes": lanes, "one": one_by_one}, rounds, 1, torch.device("cpu"))
    each = {arm: [t / (runs * children) for t in times[arm]] for arm in ("lanes", "one")}
    emit(compare(
        name, each["lanes"], each["one"], "ms", runs=runs, same=same, children=children,
        threads=threads, torch=torch.__version__, **size,
    ))  # fmt: skip


def m2n2(rounds: int, threads: int) -> None:
    """M2N2 on digits, and on the published experiment's network, where arithmetic is nearly all."""
    name = "m2n2/evaluation/cpu"
    with log.attempt(name):
        evaluations(name, 64, 20, rounds, threads, width=32, examples=300, places=6)
    name = "m2n2/evaluation-published-size/cpu"
    with log.attempt(name):
        evaluations(name, 8, 10, min(rounds, 5), threads, width=256, examples=1437, places=20)


def main(rounds: int = 5, threads: int = 2) -> None:
    """Print one JSON line per comparison."""
    torch.set_num_threads(threads)
    m2n2(rounds, threads)


if __name__ == "__main__":
    main()
