"""What stands between layers: training steps beside peft's nearest relatives, and inference.

On a small ViT of transformers and on MiniLM: (IA)^3 beside SSF, prompt and prefix tuning beside
prompts and prefixes, LoRA of as many numbers beside adapters, which peft has not. SSF merged beside
its base. BlackVIP's own time per query, for a box that answers at once, beside the forward pass of
a ViT-small on one image.
"""

from __future__ import annotations

import copy
import datetime
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters import Arm, make_batch, network
from benchmarks.rows import each, log
from benchmarks.timing import alternate, compare, emit
from toolkit import SSF, BlackVIP, Connected, adapt
from toolkit.core.nets.anatomy import anatomy
from toolkit.core.runs.provenance import processor
from toolkit.insert.blackvip import BlackBox, Coordinator
from toolkit.insert.petl_ast import ASTAdapter
from toolkit.insert.petl_ast.prefix import ASTPrefix
from toolkit.insert.petl_ast.prompts import ASTPrompts
from toolkit.labs.beds import images
from toolkit.labs.insert.kinds.arms import KINDS, dressed

TOKENS, WIDTH = 16, 8
CPU = torch.device("cpu")


class Seen(nn.Module):
    """A vision transformer with a loss on top: the distance of its tokens to random ones."""

    def __init__(self, encoder: nn.Module, tokens: int, width: int):
        super().__init__()
        self.encoder = encoder
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("target", torch.randn(tokens, width, generator=draw))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        out = self.encoder(pixel_values=pixel_values).last_hidden_state
        return SimpleNamespace(loss=(out - self.target).square().mean())


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """A ViT of 6 blocks and 384 features on 50 tokens, and 16 images."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
        image_size=224, patch_size=32,
    )  # fmt: skip
    encoder = ViTModel(config, add_pooling_layer=False)
    return Seen(encoder, 50, 384), {"pixel_values": torch.randn(16, 3, 224, 224)}


def _linear(model: nn.Module) -> list[str]:
    return anatomy(model).names("attention", "feed_forward")


def _blocks(model: nn.Module) -> list[str]:
    return [block.name for block in anatomy(model).blocks]


OURS: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], Any], str]] = {
    "ssf, scale": (partial(SSF, learn="scale"), _linear, "ia3"),
    "ssf": (SSF, _linear, "ia3"),
    "shallow prompts": (partial(ASTPrompts, tokens=TOKENS, deep=False), _blocks, "prompt tuning"),
    "deep prompts": (partial(ASTPrompts, tokens=TOKENS), _blocks, "prefix tuning"),
    "prefix": (partial(ASTPrefix, tokens=2 * TOKENS), _blocks, "prefix tuning"),
    "serial adapter": (
        partial(ASTAdapter, inner="bottleneck", reduction=384 // WIDTH, order="sequential",
                place="both"),
        _blocks, "lora",
    ),
    "parallel adapter": (
        partial(ASTAdapter, inner="bottleneck", reduction=384 // WIDTH, place="both"),
        _blocks, "lora",
    ),
    "connected": (partial(Connected, "layer", rank=WIDTH), _blocks, "lora"),
}  # fmt: skip
"""Row -> method, where it acts, and its relative in peft."""


def ours(base: nn.Module, row: str, batch: dict[str, Tensor]) -> Arm:
    make, where, _ = OURS[row]
    model = copy.deepcopy(base)
    adapted = adapt(model, make(), where(model))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-4)
    adapted.attach(optimizer)
    return Arm(model, optimizer, batch)


def peer(base: nn.Module, name: str, batch: dict[str, Tensor]) -> Arm:
    """peft's relative: (IA)^3 and LoRA on the same layers, prompts and prefixes of as many."""
    import peft

    model = copy.deepcopy(base)
    layers = _linear(model)
    virtual = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": TOKENS}
    if name == "ia3":
        config: Any = peft.IA3Config(target_modules=layers, feedforward_modules=[])
    elif name == "lora":
        config = peft.LoraConfig(r=WIDTH, target_modules=anatomy(model).names("query", "value"))
    elif name == "prompt tuning":
        config = peft.PromptTuningConfig(**virtual)
    else:
        config = peft.PrefixTuningConfig(**virtual)
    if name in ("ia3", "lora"):
        model = peft.get_peft_model(model, config)
    else:
        model.encoder = peft.get_peft_model(model.encoder, config)
    moving = [p for p in model.parameters() if p.requires_grad]
    return Arm(model, torch.optim.AdamW(moving, lr=1e-4), batch)


def least(base: nn.Module, batch: dict[str, Tensor]) -> Arm:
    """The least that a step costs whose gradient reaches the first block: one number trains there,
    all else is the frozen network's. No method that acts from the first block on can be faster."""
    model = copy.deepcopy(base).requires_grad_(False)
    one = nn.Parameter(torch.zeros(()))
    first = model.get_submodule(_blocks(model)[0])
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0] + one, *inputs[1:]))
    return Arm(model, torch.optim.AdamW([one], lr=1e-4), batch)


def steps(base: nn.Module, batch: dict[str, Tensor], where: str, rounds: int, facts: dict) -> None:
    """Step time of every method: ratio = peft's relative / ours. The row ``least`` has the frozen
    network's own step in place of ours, so its ratio is the highest that can be reached."""
    peers = ["ia3", "lora"] + (["prompt tuning", "prefix tuning"] if where == "bert" else [])
    # BERT's attention ends in a norm of its own, so prefixes are refused there
    rows = [row for row in OURS if (where, row) != ("bert", "prefix")]
    makers = {row: partial(ours, base, row, batch) for row in rows}
    makers |= {name: partial(peer, base, name, batch) for name in peers}
    arms = each(makers | {"least": partial(least, base, batch)})
    times = alternate({name: arm.step for name, arm in arms.items()}, rounds, 1, CPU, 1, 2)
    times.failed |= arms.failed
    for row in rows:
        relative = OURS[row][2]
        if relative not in peers:
            continue
        title = f"{row}/step-vs-{relative}/{where}"
        with log.attempt(title):
            emit(compare(title, times[row], times[relative], "ms", **facts))
    for relative in peers:
        title = f"least/step-vs-{relative}/{where}"
        with log.attempt(title):
            emit(compare(title, times["least"], times[relative], "ms", **facts))


@torch.no_grad()
def inference(base: nn.Module, batch: dict[str, Tensor], rounds: int, facts: dict) -> None:
    """A forward pass with SSF on every place, and with it merged: ratio = base / ours."""
    from toolkit.insert.ssf import places

    plain = copy.deepcopy(base).eval()
    worn, merged = copy.deepcopy(base).eval(), copy.deepcopy(base).eval()
    adapt(worn, SSF(noise=0.02), places(worn, head=[]))
    adapt(merged, SSF(noise=0.02), places(merged, head=[])).merge()
    calls = {
        name: lambda model=model: model(**batch)
        for name, model in (("base", plain), ("worn", worn), ("merged", merged))
    }
    times = alternate(calls, 2 * rounds, 2, CPU, 1, 2)
    for name in ("merged", "worn"):
        title = f"ssf/inference-{name}/vit"
        emit(compare(title, times[name], times["base"], "ms", **facts))


@torch.no_grad()
def queries(rounds: int, facts: dict) -> None:
    """BlackVIP's own time per query, and a ViT-small's per image: ratio = ViT-small / ours."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    small = ViTModel(config, add_pooling_layer=False).eval()
    images, labels = torch.rand(4, 3, 224, 224), torch.zeros(4, dtype=torch.int64)
    features, even = torch.randn(4, 768), torch.full((1, 10), 0.1)
    box = BlackBox(lambda x: even.expand(len(x), -1))
    draw = torch.Generator().manual_seed(0)
    tuner = BlackVIP().start(Coordinator(generator=draw), lambda x: features, generator=draw)
    asked = 2 * BlackVIP().directions * len(images)
    calls = {
        "ours": lambda: tuner.step(box, images, labels, z=features),
        "vit": lambda: small(pixel_values=images),
    }
    times = alternate(calls, rounds, 2, CPU, 1, 1)
    per_query = [t / asked for t in times["ours"]]
    per_image = [t / len(images) for t in times["vit"]]
    row = compare("blackvip/own-time-per-query/vit-small", per_query, per_image, "ms", **facts)
    emit(row | {"share": round(row["ours"] / row["peer"], 4)})


@torch.no_grad()
def page(rounds: int, facts: dict) -> None:
    """Inference of every arm of *Beside, before or between?*, on its network: ratio = base / ours.

    Processor time, which counts little of what else the machine does. Kept in
    ``book/results/times/insert.jsonl``; no claim rests on it.
    """
    digits = torch.rand(500, 28, 28)

    def seconds(model: nn.Module) -> float:
        start = time.process_time()
        model(digits)
        return time.process_time() - start

    models = {("none", "base", False): images.network("vit", "cpu").eval()}
    for budget, kinds in KINDS.items():
        for arm, kind in kinds.items():
            for merged in (False, True) if kind.merges else (False,):
                model = images.network("vit", "cpu").eval()
                made = dressed(budget, arm, model)
                adapted = adapt(model, made.method, made.targets)
                if merged:
                    adapted.merge()
                models[budget, arm, merged] = model
    times: dict[Any, list[float]] = {key: [] for key in models}
    keys = list(models)
    for i in range(1 + rounds):
        turn = i % len(keys)
        for key in keys[turn:] + keys[:turn]:
            took = seconds(models[key])
            if i:
                times[key].append(took)
    for budget, arm, merged in keys[1:]:
        key = budget, arm, merged
        title = f"page/{arm}, {budget}{', merged' if merged else ''}/inference/cpu"
        row = {"budget": budget, "arm": arm, "merged": merged}
        emit(compare(title, times[key], times[keys[0]], "ms", **row, **facts))


def main(rounds: int = 15, threads: int = 2) -> None:
    """Print one JSON line per comparison."""
    import peft
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts = {
        "threads": threads, "day": day, "processor": processor("cpu"), "torch": torch.__version__,
        "peft": peft.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    base, batch = vit()
    with log.attempt("inference"):
        inference(base, batch, rounds, facts)
    with log.attempt("steps/vit"):
        steps(base, batch, "vit", rounds, facts)
    bert, weights = network("cpu")
    with log.attempt("steps/bert"):
        steps(bert, make_batch(16, 64, "cpu"), "bert", rounds, facts | {"weights": weights})
    with log.attempt("queries"):
        queries(rounds, facts)
    with log.attempt("page"):
        page(rounds, facts)


if __name__ == "__main__":
    main()
