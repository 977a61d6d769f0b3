"""Masks on layers so large that only the gradient of their entries is computed; none in a lab."""

import contextlib

import torch
from torch import nn

import toolkit
from toolkit import ID3, SPT, LoRA, SaRA, SparseMask, Train, adapt


class Conv1D(nn.Module):
    """transformers' layer of this name, by its form."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf) / 17)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 300), nn.Tanh(), Conv1D(400, 300)).double()


def one(method, tokens: int = 200) -> None:
    model = network()
    adapted = adapt(model, method, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.attach(optimizer, total_steps=4)
    draw = torch.Generator().manual_seed(2)
    for _ in range(4):
        x = torch.randn(tokens, 300, generator=draw, dtype=torch.float64)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        print(type(method).__name__, f"{float(loss.detach()):.6f}")
    model(x).square().mean().backward(create_graph=True)
    state = model.state_dict()
    print(sorted(state), f"{sum(float(v.double().abs().sum()) for v in state.values()):.4f}")


def filed(name: str, model: nn.Module, adapted) -> None:
    """Save and load, and tell whether the outputs are the same."""
    x = torch.ones(3, 300, dtype=torch.float64)
    adapted.save(f"{name}.safetensors")
    again = network()
    toolkit.load(again, f"{name}.safetensors")
    print(name, torch.equal(again.eval()(x), model.eval()(x)))


def tied() -> None:
    """A network with a shared weight gives the same before and after a mask is asked for."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 5), nn.Linear(5, 5)
    last.weight = first.weight
    model, x = nn.Sequential(first, nn.Tanh(), last), torch.ones(2, 5)
    before = model(x)
    with contextlib.suppress(ValueError):
        adapt(model, SparseMask(share=0.1))
    print("tied", torch.equal(model(x), before))


def files() -> None:
    for method in (SaRA(share=0.01), ID3(budget=9), SparseMask(share=0.01), SPT(rank=2)):
        model = network()
        filed(type(method).__name__, model, adapt(model, method))
    for form in ("lora", "adapter"):
        for alpha in (1e-3, 10.0):
            model = network()
            scores = {n: p.detach().abs() for n, p in model.named_parameters()}
            method = SPT(budget=3000, rank=2, structured=form, alpha=alpha)
            filed(f"SPT {form} {alpha}", model, adapt(model, method.plan(model, scores=scores)))


def scored() -> None:
    """A choice by scores; its file could once not be loaded."""
    model, x = network(), torch.ones(3, 300, dtype=torch.float64)
    method = SparseMask(share=0.01, by="fisher")
    adapted = adapt(model, method, batches=[x], loss=lambda model, x: model(x).sum())
    adapted.save("scored.safetensors")
    with contextlib.suppress(ValueError):
        toolkit.load(network(), "scored.safetensors")
    print("scored", sum(p.numel() for p in adapted.parameters()))


def mapped() -> None:
    """A budget in a mapping, alone and where another method wants the same layers."""
    scoring = {"batches": [torch.ones(3, 300, dtype=torch.float64)], "loss": squared}
    for beside in ({}, {"0": LoRA(rank=2)}, {"0.bias": Train()}):
        model = network()
        with contextlib.suppress(TypeError, ValueError):
            adapt(model, {"*": SPT(budget=3000, rank=2), **beside}, **scoring)
    with contextlib.suppress(ValueError):
        adapt(network(), {"*": LoRA(rank=2), "0": LoRA(rank=2)})


def squared(model: nn.Module, x) -> torch.Tensor:
    return model(x).square().mean()


def biased(folder: str = "biased") -> None:
    """Entries of the biases too, where there are such: at the start the model is as it was."""
    try:
        from toolkit.select.sara.biases import SaRABiases as Method
    except ImportError:
        Method = SaRA
    x, model = torch.ones(130, 300, dtype=torch.float64), network()
    before = model(x)
    for share in ({"share": 0.01}, {"threshold": 0.01}):
        method = Method(switch=1, rank_weight=0.1, like="paper", **share)
        adapted = adapt(model, method)
        print("biased", torch.equal(model(x), before), adapted.report().shape)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
        adapted.attach(optimizer, total_steps=3)
        squared(model, x).backward()
        optimizer.step()
        filed(folder, model.eval(), adapted)
        method.count(adapted.sites["0"].site)
        model = network()
    with contextlib.suppress(ValueError):
        adapt(network(), {"*": Method(share=0.01), "*.bias": Train()})


def main() -> None:
    torch.set_num_threads(1)
    mapped()
    biased()
    one(SparseMask(share=0.01, by="random"))
    one(SparseMask(share=0.01, by="largest"), tokens=100)
    files()
    tied()
    scored()
    one(SaRA(share=0.01, switch=2, rank_weight=0.0))
    one(ID3(budget=1000, schedule="once"))


main()
