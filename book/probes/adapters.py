"""What chapters leave out of putting methods on, saving, loading and taking them off."""

import hashlib
import warnings

import torch
from torch import nn
from torch.nn.utils import prune

import toolkit
from toolkit import LoRA, adapt, load, load_peft

warnings.simplefilter("ignore")
torch.set_num_threads(1)
METHODS = {
    "LoRA": {"rank": 3},
    "AdaLoRA": {"rank": 3, "target_rank": 1, "warmup": 1, "final": 2, "interval": 2},
    "IncreLoRA": {"target_rank": 2, "top": 2, "interval": 2, "warmup": 1, "restart_warmup": 2},
    "TriAdaptLoRA": {"target_rank": 2, "block": 1, "warmup": 1},
    "LoRAPro": {"rank": 3, "mode": "efficient"},
    "LoRAGGPO": {"rank": 3, "sigma": 0.1},
    "SparseMask": {"share": 0.1},
    "IA3": {},
    "DoRA": {"rank": 2},
    "Houlsby": {"width": 2},
}


NOT_IN_PEFT = ("IncreLoRA", "TriAdaptLoRA", "SparseMask", "IA3", "DoRA", "Houlsby")


def network(norm=nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 3)).double()


def checksum(tensors) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def trained(method, norm=nn.BatchNorm1d) -> tuple:
    """A network adapted and trained for six steps, half of them after resuming."""
    model = network(norm)
    adapted = adapt(model, method, targets=["0", "3"], generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.attach(optimizer, total_steps=6)
    steps(model, optimizer, 0, 3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    moments = optimizer.state_dict()
    model.load_state_dict(state)
    optimizer.load_state_dict(moments)
    steps(model, optimizer, 3, 6)
    return model, adapted


def steps(model: nn.Module, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 6, generator=draw, dtype=torch.float64)
        labels = torch.randint(3, (16,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def told(what: str, run) -> None:
    """Print what a call gives, or the kind of its refusal."""
    try:
        print(what, run())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        print(what, type(error).__name__, str(error).split(":")[0][:60])


def one(name: str) -> None:
    method = getattr(toolkit, name)(**METHODS[name])
    model, adapted = trained(method)
    file = f"{name}.safetensors"
    told(f"{name} trained", lambda: checksum(model.state_dict()))
    told(f"{name} numbers", lambda: sum(p.numel() for p in adapted.parameters()))
    told(f"{name} save", lambda: adapted.save(file) and None)

    def again() -> str:
        other = network()
        load(other, file)
        return checksum(other.state_dict())

    told(f"{name} load", again)

    def to_peft() -> str:
        trained(method, nn.LayerNorm)[1].save_peft(name)
        other = network(nn.LayerNorm)
        load_peft(other, name)
        return checksum(other.state_dict())

    if name not in NOT_IN_PEFT:
        told(f"{name} peft", to_peft)
    told(f"{name} report", lambda: adapted.report().shape)
    told(f"{name} other model", lambda: load(nn.Sequential(nn.Linear(2, 2)), file))
    told(f"{name} merge", lambda: checksum(adapted.merge().state_dict()))
    model, adapted = trained(method)
    told(f"{name} unload", lambda: checksum(adapted.unload().state_dict()))


def refusals() -> None:
    """What would take over a parameter of an adapted layer, above its adapter or below."""
    takes = {
        "weight norm": torch.nn.utils.weight_norm,
        "spectral norm": torch.nn.utils.spectral_norm,
        "parametrization": torch.nn.utils.parametrizations.weight_norm,
        "pruning": lambda layer: prune.identity(layer, "weight"),
    }
    for name, take in takes.items():
        layer = adapt(network(), LoRA(rank=2)).model[0]
        try:
            take(layer)
        except (KeyError, TypeError, ValueError, RuntimeError):
            print(name, "refused")
        layer.own = nn.Parameter(torch.zeros(1))
        del layer.own
        take(layer.base)
        told(f"{name} below", lambda layer=layer: layer.weight)
    layer = adapt(network(), LoRA(rank=2)).model[0]
    told("no parameter", lambda: layer._parameters["nothing"])


def main() -> None:
    for name in METHODS:
        one(name)
    refusals()
    told("no match", lambda: adapt(network(), LoRA(rank=2), targets=["nothing"]))
    told("class", lambda: adapt(network(), LoRA))


main()
