"""Training many small networks as lanes, against training them one after another."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import alternate, compare, emit
from toolkit.core import nets
from toolkit.core.lanes import Lane, train
from toolkit.core.lanes.nets import lane
from toolkit.core.seeds import generator

Make = Callable[[torch.Generator], nn.Module]


def mlp(draw: torch.Generator) -> nn.Module:
    return nets.mlp([64, 64, 64, 64, 10], generator=draw)


def cnn(draw: torch.Generator) -> nn.Module:
    return nets.convnet(1, (8, 16, 32), 10, generator=draw)


def separate(
    make: Make,
    lanes: list[Lane],
    x: Tensor,
    y: Tensor,
    *,
    states: dict[str, Tensor] | None = None,
    rows: Tensor | None = None,
    loss: Callable[..., Tensor] | None = None,
) -> list[nn.Module]:
    """The same runs, one network after another, with PyTorch's own fused optimiser.

    ``states``, ``rows`` and ``loss`` are those of ``toolkit.core.lanes.train``.
    """
    done = []
    size = len(x) if rows is None else rows.shape[1]
    for m, one in enumerate(lanes):
        model = make(generator(one.seed, "weights")).to(x.device)
        if states is not None:
            model.load_state_dict(lane(states, m))
        number = torch.tensor([m], device=x.device)
        descent = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=one.lr, momentum=one.momentum,
            weight_decay=one.weight_decay, fused=True,
        )  # fmt: skip
        per_epoch = size // one.batch
        for step in range(one.steps):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order = torch.randperm(size, generator=generator(one.order, "order", epoch))
                order = order.to(x.device) if rows is None else rows[m][order.to(x.device)]
            pick = order[place * one.batch : (place + 1) * one.batch]
            descent.param_groups[0]["lr"] = one.rate(step)
            descent.zero_grad()
            if loss is None:
                F.cross_entropy(model(x[pick]), y[pick]).backward()
            else:
                loss(model(x[pick])[None], y[pick][None], number).mean().backward()
            descent.step()
        done.append(model)
    return done


def largest_difference(make: Make, lanes: list[Lane], x: Tensor, y: Tensor) -> float:
    """Largest difference of a final weight between the two ways, in float64."""
    twice: Make = lambda draw: make(draw).double()  # noqa: E731
    few = [copy.copy(one) for one in lanes[:4]]
    states = train(twice, few, x.double(), y).states
    gaps = [
        (lane(states, m)[name] - tensor).abs().max().item()
        for m, model in enumerate(separate(twice, few, x.double(), y))
        for name, tensor in model.state_dict().items()
    ]
    return max(gaps)


def one(name: str, make: Make, count: int, side: tuple[int, ...], where: str, rounds: int,
        threads: int, steps: int = 60) -> None:  # fmt: skip
    """One comparison: ``count`` lanes against as many separate runs."""
    device = torch.device("cuda" if where.startswith("gpu") else "cpu")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(640, *side, generator=draw).to(device)
    y = torch.randint(10, (640,), generator=draw).to(device)
    lanes = [Lane(seed=i, order=i, steps=steps, batch=32, lr=0.01) for i in range(count)]
    # a run of its own is timed on a part of the lanes and scaled: all of them would take minutes
    some = lanes[: max(8, count // 8)]
    arms = {
        "lanes": lambda: train(make, lanes, x, y, compile=where.endswith("compiled")),
        "separate": lambda: separate(make, some, x, y),
    }
    times = alternate(arms, rounds, 1, device)
    ours = [t / steps for t in times["lanes"]]
    peer = [t / steps * count / len(some) for t in times["separate"]]
    emit(compare(
        f"{name}/train/{where}", ours, peer, "ms", lanes=count, batch=32, steps=steps,
        threads=threads, separate_runs_timed=len(some), torch=torch.__version__,
        largest_weight_difference=largest_difference(make, lanes, x.cpu(), y.cpu()),
    ))  # fmt: skip


def wide_network(count: int, rounds: int) -> None:
    """On a GPU: the lanes' throughput beside one network of the same FLOPs (``count`` times the
    batch), as a share of it."""
    device = torch.device("cuda")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(640, 1, 8, 8, generator=draw).to(device)
    y = torch.randint(10, (640,), generator=draw).to(device)
    lanes = [Lane(seed=i, order=i, steps=20, batch=32, lr=0.01) for i in range(count)]
    model = cnn(draw).to(device)
    descent = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    big_x = x.repeat(count * 32 // 640 + 1, 1, 1, 1)[: count * 32]
    big_y = y.repeat(count * 32 // 640 + 1)[: count * 32]

    def big() -> None:
        for _ in range(20):
            descent.zero_grad()
            F.cross_entropy(model(big_x), big_y).backward()
            descent.step()

    times = alternate({"lanes": lambda: train(cnn, lanes, x, y), "big": big}, rounds, 1, device)
    emit(compare("cnn/throughput-of-one-large/gpu", times["lanes"], times["big"], "ms"))


def main(rounds: int = 5, threads: int = 2) -> None:
    """Print one JSON line per comparison; ratio = separate runs / lanes."""
    torch.set_num_threads(threads)
    rounds = min(rounds, 5)
    one("mlp", mlp, 128, (64,), "cpu", rounds, threads)
    one("cnn", cnn, 64, (1, 8, 8), "cpu", rounds, threads)
    if torch.cuda.is_available():
        for where in ("gpu", "gpu-compiled"):
            one("cnn", cnn, 256, (1, 8, 8), where, rounds, threads)
        wide_network(256, rounds)


if __name__ == "__main__":
    main()
