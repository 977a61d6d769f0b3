"""The low-rank methods on MiniLM: against Hugging Face ``peft`` where it has them, and LoRA."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import toolkit
from benchmarks.timing import alternate, compare, emit, peak_bytes, tensor_bytes
from toolkit import AdaLoRA, IncreLoRA, LoRA, LoRAGGPO, LoRAPro, TriAdaptLoRA, adapt, catalogue
from toolkit.core.declare.catalogue import hyperparameters

RANK, LAST = 8, 1_000_000


class WithLoss(nn.Module):
    """The encoder with a loss on top, in the form that peft's AdaLoRA adds its penalty to."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SimpleNamespace(loss=out.float().square().mean())


def is_target(name: str, module: nn.Module) -> bool:
    """All linear layers of the encoder's blocks."""
    return isinstance(module, nn.Linear) and name.startswith("encoder.encoder.")


@dataclass
class Arm:
    """A model ready to train, and one step of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]
    allocate: Any = None
    state: Any = None
    step_index: int = 1
    run: Any = None

    def step(self) -> None:
        self.optimizer.zero_grad()
        (self.run or self.model)(**self.batch).loss.backward()
        self.optimizer.step()
        if self.allocate is not None:
            self.allocate(self.step_index)
        self.step_index += 1

    def held(self) -> int:
        return tensor_bytes(self.model, self.optimizer, self.state() if self.state else [])


def ours(base: nn.Module, method: Any, batch: dict[str, Tensor], **options: Any) -> Arm:
    model = copy.deepcopy(base)
    adapted = adapt(model, method, is_target)
    own = isinstance(method, LoRAPro) and method.mode == "full"  # Adam is inside the method
    optimizer = (torch.optim.SGD if own else torch.optim.AdamW)(adapted.parameters(), lr=1e-4)
    adapted.attach(optimizer, total_steps=LAST, **options)
    covers = [getattr(adapter, "cover", None) for adapter in adapted.adapters.values()]

    def state() -> list:
        """The method's own tensors, perturbed weights that stand in for the layers' included."""
        held = [adapted.controller.state()] if adapted.controller else []
        return held + [c.stand_in for c in covers if c is not None and c.stand_in is not None]

    return Arm(model, optimizer, batch, state=state)


def peer_config(method: Any, targets: list[str]) -> Any:
    import peft

    if isinstance(method, LoRA):
        return peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules=targets)
    return peft.AdaLoraConfig(
        init_r=method.rank,
        target_r=method.target_rank,
        lora_alpha=method.alpha,
        orth_reg_weight=method.orthogonality,
        tinit=method.warmup,
        tfinal=method.final,
        deltaT=method.interval,
        total_step=LAST,
        target_modules=targets,
    )


def peers(base: nn.Module, method: Any, batch: dict[str, Tensor]) -> Arm:
    import peft

    model = copy.deepcopy(base)
    targets = [n for n, m in model.named_modules() if is_target(n, m)]
    model = peft.get_peft_model(model, peer_config(method, targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if isinstance(method, LoRA):
        return Arm(model, optimizer, batch)
    allocator = model.base_model.rankallocator
    state = lambda: [allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc]  # noqa: E731
    return Arm(model, optimizer, batch, model.base_model.update_and_allocate, state)


def floor(base: nn.Module, batch: dict[str, Tensor]) -> Arm:
    """The least a step can cost: all is frozen but the bias of the first adapted layer."""
    model = copy.deepcopy(base).requires_grad_(False)
    first = next(m for n, m in model.named_modules() if is_target(n, m))
    first.bias.requires_grad_(True)
    return Arm(model, torch.optim.AdamW([first.bias], lr=1e-4), batch)


# What a method's own line should run instead of its defaults at rank 8, and further lines: what
# follows the slug says what happens in each step. Every arm trains as many numbers as LoRA of rank
# 8, up to one number per rank (the lambdas) or the small cores.
SPECIAL = {
    "adalora": AdaLoRA(rank=RANK, target_rank=RANK, warmup=LAST - 20, final=10),
    "adalora/allocating": AdaLoRA(rank=RANK, target_rank=RANK // 2, warmup=1, final=10),
    "increlora": IncreLoRA(rank=RANK - 1, target_rank=RANK - 1),
    "increlora/scoring": IncreLoRA(rank=RANK - 1, target_rank=RANK, interval=100_000),
    "increlora/scoring-bfloat16": IncreLoRA(rank=RANK - 1, target_rank=RANK, interval=100_000),
    "increlora/growing": IncreLoRA(
        rank=RANK - 1, target_rank=2 * RANK, interval=1, warmup=0, top=1
    ),
    "triadaptlora/growing": TriAdaptLoRA(init_rank=RANK, target_rank=2 * RANK, block=1),
    "lora_pro/efficient": LoRAPro(rank=RANK, mode="efficient"),
    "lora_ggpo/mgpo": LoRAGGPO(rank=RANK, variant="mgpo"),
}
OPTIONS = {"increlora/scoring-bfloat16": {"score_dtype": torch.bfloat16}}
METHODS = {
    "lora": LoRA(rank=RANK),
    "adalora": AdaLoRA(rank=RANK, target_rank=RANK // 2, warmup=1, final=10),
}


def steps(base: nn.Module, batch: dict[str, Tensor], where: str, rounds: int, facts: dict) -> None:
    """Step time and peak memory of each method, and the floor."""
    device = next(base.parameters()).device
    arms: dict[str, Arm] = {"floor": floor(base, batch)}
    for slug, method in METHODS.items():
        arms[slug] = ours(base, method, batch)
        arms[f"{slug}-peer"] = peers(base, method, batch)
    if where.endswith("compiled"):
        for arm in arms.values():
            arm.run = torch.compile(arm.model)
    stepping = {name: arm.step for name, arm in arms.items()}
    times = alternate(stepping, rounds, 1, device, settle=1, repeat=3)
    bound = times["floor"]
    emit(compare(f"floor/step/{where}", bound, times["lora-peer"], "ms", **facts))
    for slug in METHODS:
        emit(compare(f"{slug}/step/{where}", times[slug], times[f"{slug}-peer"], "ms", **facts))
    for slug in METHODS:
        pair = []
        for name in (slug, f"{slug}-peer"):
            arm = arms[name]
            pair.append([(arm.held() + peak_bytes(arm.step, device)) / 2**20 for _ in range(3)])
        emit(compare(f"{slug}/peak-memory/{where}", *pair, "MiB", **facts))


def at_equal_rank(method: type) -> Any:
    """The method with every rank it declares at 8, so that nothing is left to allocate."""
    ranks = {
        h.name: RANK
        for h in hyperparameters(method)
        if h.name == "rank" or (h.name.endswith("_rank") and h.default is not None)
    }
    return method(**ranks)


def against_lora(base: nn.Module, batch: dict, where: str, rounds: int, facts: dict) -> None:
    """Step time and peak memory of every method of the part relative to LoRA's."""
    device = next(base.parameters()).device
    part = [e for e in catalogue() if e.part == "lowrank"]
    methods = {e.slug: at_equal_rank(e.method) for e in part} | SPECIAL
    others = [name for name in methods if name != "lora"]
    arms = {name: ours(base, m, batch, **OPTIONS.get(name, {})) for name, m in methods.items()}
    stepping = {name: arm.step for name, arm in arms.items()}
    times = alternate(stepping, rounds, 1, device, settle=1, repeat=2)
    for name in others:
        slug, _, what = name.partition("/")
        title = f"{slug}/{what}-step-vs-lora" if what else f"{slug}/step-vs-lora"
        emit(compare(f"{title}/{where}", times[name], times["lora"], "ms", **facts))
    for name in others:
        slug, _, what = name.partition("/")
        title = f"{slug}/{what}-peak-memory-vs-lora" if what else f"{slug}/peak-memory-vs-lora"
        pair = [
            [(arm.held() + peak_bytes(arm.step, device)) / 2**20 for _ in range(3)]
            for arm in (arms[name], arms["lora"])
        ]
        emit(compare(f"{title}/{where}", *pair, "MiB", **facts))


def files(base: nn.Module, batch: dict[str, Tensor], rounds: int, facts: dict) -> None:
    """adapt(), save and load on CPU."""
    import peft

    cpu = torch.device("cpu")
    targets = [n for n, m in base.named_modules() if is_target(n, m)]
    for slug, method in METHODS.items():
        fresh: dict[str, nn.Module] = {}

        def ready(who: str, fresh: dict = fresh) -> None:
            fresh[who] = copy.deepcopy(base)

        made: dict[str, list[float]] = {"ours": [], "peer": []}
        for i in range(rounds):
            # peft changes the model for good, so every round gets fresh copies, made untimed
            for who in ("ours", "peer"):
                ready(who)
            for who in ("ours", "peer") if i % 2 else ("peer", "ours"):
                call = (
                    (lambda m=fresh["ours"], k=method: adapt(m, k, is_target))
                    if who == "ours"
                    else lambda m=fresh["peer"], k=method: peft.get_peft_model(
                        m, peer_config(k, targets)
                    )
                )
                made[who] += alternate({who: call}, 1, 0, cpu)[who]
        emit(compare(f"{slug}/adapt/cpu", made["ours"], made["peer"], "ms", **facts))

        mine, theirs = copy.deepcopy(base), copy.deepcopy(base)
        adapted = adapt(mine, method, is_target)
        wrapped = peft.get_peft_model(theirs, peer_config(method, targets))
        with tempfile.TemporaryDirectory() as folder:
            path, there = Path(folder, "ours.safetensors"), Path(folder, "peer")
            saved = alternate(
                {"ours": lambda p=path, a=adapted: a.save(p),
                 "peer": lambda p=there, w=wrapped: w.save_pretrained(p)},
                rounds, 2, cpu,
            )  # fmt: skip
            emit(compare(f"{slug}/save/cpu", saved["ours"], saved["peer"], "ms", **facts))
            loaded: dict[str, list[float]] = {"ours": [], "peer": []}
            for i in range(rounds):
                for who in ("ours", "peer"):
                    ready(who)
                for who in ("ours", "peer") if i % 2 else ("peer", "ours"):
                    call = (
                        (lambda m=fresh["ours"], p=path: toolkit.load(m, p))
                        if who == "ours"
                        else lambda m=fresh["peer"], p=there: peft.PeftModel.from_pretrained(m, p)
                    )
                    loaded[who] += alternate({who: call}, 1, 0, cpu)[who]
            emit(compare(f"{slug}/load/cpu", loaded["ours"], loaded["peer"], "ms", **facts))


def network(device: str) -> tuple[nn.Module, str]:
    """MiniLM with its real weights, or with random ones of the same shape where there are none.

    Times do not depend on the values, and each line says which it was.
    """
    from toolkit.core import nets

    try:
        encoder, _ = nets.pretrained("minilm")
        weights = "pretrained"
    except (ImportError, OSError, RuntimeError, ValueError):
        from transformers import BertConfig, BertModel

        encoder = BertModel(
            BertConfig(
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
            )
        )
        weights = "random"
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return WithLoss(encoder).to(device).train(), weights


def main(rounds: int = 15, threads: int = 2) -> None:
    """Print one JSON line per comparison."""
    import peft
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base, weights = network("cpu")
    versions = {
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }
    facts = {"weights": weights, "threads": threads, "batch": 16, "length": 64, **versions}
    steps(base, make_batch(16, 64, "cpu"), "cpu", rounds, facts)
    against_lora(base, make_batch(16, 64, "cpu"), "cpu", rounds, facts)
    files(base, make_batch(16, 64, "cpu"), rounds, facts)
    if torch.cuda.is_available():
        base = base.to("cuda", torch.bfloat16)
        facts = {
            "weights": weights,
            "device": torch.cuda.get_device_name(),
            "dtype": "bfloat16",
            "batch": 256,
            "length": 128,
            **versions,
        }
        batch = make_batch(256, 128, "cuda")
        for where in ("gpu-eager", "gpu-compiled"):
            steps(base, batch, where, rounds, facts)


def make_batch(size: int, length: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30_000, (size, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
