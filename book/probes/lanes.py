"""Chains of linear layers in lanes, which take a path of their own."""

import hashlib

import torch
from torch import nn

from toolkit.core.lanes import Lane, train

torch.set_num_threads(1)


def network(generator: torch.Generator) -> nn.Module:
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def checksum(states) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(states.items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 6, generator=draw), torch.randint(3, (96,), generator=draw)
    for optimizer in ("sgd", "adamw"):
        for batch in (16, 32):
            lanes = [
                Lane(seed=seed, steps=40, batch=batch, lr=rate)
                for rate in (1e-3, 1e-1)
                for seed in (0, 1)
            ]
            found = train(network, lanes, x, y, optimizer=optimizer, progress=False)
            print(optimizer, batch, checksum(found.states))


main()
