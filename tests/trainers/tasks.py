"""The plain loop that other libraries' training programs are compared with."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.small_methods import METHODS as SMALL
from toolkit import LoRAPro, adapt
from toolkit.lowrank.lora_ggpo import LoRAMGPO

METHODS = SMALL | {
    "lora_pro-full": LoRAPro(rank=3),
    "lora_mgpo": LoRAMGPO(rank=3),
}
PENALISED = ("adalora", "increlora", "triadaptlora")
BATCH, EPOCHS = 4, 3
STEPS = 4 * EPOCHS

draw = torch.Generator().manual_seed(0)
X = torch.randn(4 * BATCH, 6, generator=draw)
Y = X[:, :3].argmax(1)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=BATCH)


def network(name: str):
    """An adapted network with a head that trains beside; nothing is attached."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    return adapt(model, METHODS[name], ["0", "2"], train="3", generator=generator)


def driven(name: str, adapted, parameters=None, **options):
    """An optimizer with the method's schedule on it."""
    kind = torch.optim.SGD if name == "lora_pro-full" else torch.optim.AdamW
    optimizer = kind(parameters or adapted.parameters(), lr=0.02)
    adapted.attach(optimizer, total_steps=STEPS, **options)
    return optimizer


def values(adapted) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in adapted.named_parameters()}


def plain(name: str, clip: float | None = None, penalty: str = "step") -> dict[str, torch.Tensor]:
    """Every tensor after the run."""
    adapted = network(name)
    options = {"penalty": penalty} if penalty != "step" else {}
    optimizer = driven(name, adapted, **options)
    for _ in range(EPOCHS):
        for x, y in loader():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(adapted(x), y)
            if penalty == "loss":
                loss = loss + adapted.method.orthogonality * adapted.controller.penalty()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(adapted.parameters(), clip)
            optimizer.step()
    return values(adapted)


def assert_equals(adapted, expected: dict[str, torch.Tensor]) -> None:
    """The same tensors, and a schedule that saw every step."""
    assert values(adapted).keys() == expected.keys()
    torch.testing.assert_close(values(adapted), expected, rtol=1e-6, atol=1e-7)
    if adapted.controller is not None:
        assert adapted.controller.step == STEPS
    if hasattr(adapted.controller, "ranks"):
        assert sum(adapted.controller.ranks().values()) == adapted.controller.target
