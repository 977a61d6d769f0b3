"""Masks on layers so large that only the gradient of their entries is computed; none in a lab."""

import torch
from torch import nn

from toolkit import ID3, SaRA, SparseMask, adapt


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


def main() -> None:
    torch.set_num_threads(1)
    one(SparseMask(share=0.01, by="random"))
    one(SparseMask(share=0.01, by="largest"), tokens=100)
    one(SaRA(share=0.01, switch=2, rank_weight=0.0))
    one(ID3(budget=1000, schedule="once"))


main()
