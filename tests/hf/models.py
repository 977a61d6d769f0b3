"""Small random models of transformers' own classes; nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """A convolutional net in the manner of timm: stem, depthwise stage, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.pointwise(self.depthwise(x))).mean((2, 3)))


class Words(nn.Module):
    """Embedding, one hidden layer, a head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.words(tokens))).mean(1))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=30,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def convnet() -> nn.Module:
    torch.manual_seed(1)
    return ConvNet().eval()


def words() -> nn.Module:
    torch.manual_seed(1)
    return Words()


def tokens(entries: int = 30, number: int = 0) -> Tensor:
    return torch.randint(entries, (4, 7), generator=torch.Generator().manual_seed(number))


def images() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        output = model(x)
    return getattr(output, "logits", output)


def begin(adapted, x: Tensor) -> None:
    """Let a method that starts with nothing to train choose, in a step that moves nothing."""
    if any(p.numel() for p in adapted.parameters()):
        return
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.attach(optimizer, total_steps=1)
    output = adapted.model(x)
    getattr(output, "logits", output).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def shake(parameters, seed: int = 0, size: float = 0.1) -> None:
    """Move parameters from their start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn(p.shape, generator=generator))
