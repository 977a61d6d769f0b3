"""The low-rank methods on MiniLM: against Hugging Face ``peft`` where it has them, and LoRA."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import toolkit
from benchmarks.rows import Kept, each, log
from benchmarks.timing import alternate, compare, emit, peak_bytes, tensor_bytes
from toolkit import AdaLoRA, IncreLoRA, LoRA, LoRAMGPO, LoRAPro, TriAdaptLoRA, adapt, catalogue
from toolkit.core.declare.catalogue import hyperparameters

RANK, LAST = 8, 1_000_000


class WithLoss(nn.Module):
    """The encoder with a loss on top, in the form that peft's AdaLoRA adds its penalty to.

    The loss is the distance to random targets, one vector per position. The mean square of the
    output would not do: the last layer normalisation of random weights holds it at 1, so its
    gradient is rounding, and LoRA-MGPO, which moves by the inverse of the gradient's norm, leaves
    what a number can hold.

    Args:
        encoder: returns ``last_hidden_state`` (batch, length, width).
        width: of the hidden states.
        length: the most positions of a batch.
    """

    def __init__(self, encoder: nn.Module, width: int, length: int = 128):
        super().__init__()
        self.encoder = encoder
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("target", torch.randn(length, width, generator=draw))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        gap = out.float() - self.target[: out.shape[1]]
        return SimpleNamespace(loss=gap.square().mean())


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
    "lora_ggpo/mgpo": LoRAMGPO(rank=RANK),
}
OPTIONS = {"increlora/scoring-bfloat16": {"score_dtype": torch.bfloat16}}
METHODS = {
    "lora": LoRA(rank=RANK),
    "adalora": AdaLoRA(rank=RANK, target_rank=RANK // 2, warmup=1, final=10),
}


def steps(base: nn.Module, batch: dict[str, Tensor], where: str, rounds: int, facts: dict) -> None:
    """Step time and peak memory of each method, and the floor."""
    device = next(base.parameters()).device
    makers = {"floor": partial(floor, base, batch)}
    for slug, method in METHODS.items():
        makers[slug] = partial(ours, base, method, batch)
        makers[f"{slug}-peer"] = partial(peers, base, method, batch)
    arms = each(makers)
    if where.endswith("compiled"):
        for arm in arms.values():
            arm.run = torch.compile(arm.model)
    stepping = {name: arm.step for name, arm in arms.items()}
    times = alternate(stepping, rounds, 1, device, settle=1, repeat=3)
    times.failed |= arms.failed
    for slug in ("floor", *METHODS):
        peer = "lora-peer" if slug == "floor" else f"{slug}-peer"
        timed(f"{slug}/step/{where}", times, slug, peer, facts)
    for slug in METHODS:
        weighed(f"{slug}/peak-memory/{where}", arms, slug, f"{slug}-peer", device, facts)


def timed(title: str, times: Kept, name: str, peer: str, facts: dict) -> None:
    """The row of two arms' times."""
    with log.attempt(title):
        emit(compare(title, times[name], times[peer], "ms", **facts))


def weighed(
    title: str, arms: Kept, name: str, peer: str, device: torch.device, facts: dict
) -> None:
    """The row of two arms' peak memory."""
    with log.attempt(title):
        pair = [
            [(arm.held() + peak_bytes(arm.step, device)) / 2**20 for _ in range(3)]
            for arm in (arms[name], arms[peer])
        ]
        emit(compare(title, *pair, "MiB", **facts))


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
    makers = {
        name: lambda n=name, m=m: ours(base, m, batch, **OPTIONS.get(n, {}))
        for name, m in methods.items()
    }
    others = [name for name in makers if name != "lora"]
    arms = each(makers)
    stepping = {name: arm.step for name, arm in arms.items()}
    times = alternate(stepping, rounds, 1, device, settle=1, repeat=2)
    times.failed |= arms.failed
    for name in others:
        slug, _, what = name.partition("/")
        title = f"{slug}/{what}-step-vs-lora" if what else f"{slug}/step-vs-lora"
        timed(f"{title}/{where}", times, name, "lora", facts)
    for name in others:
        slug, _, what = name.partition("/")
        title = f"{slug}/{what}-peak-memory-vs-lora" if what else f"{slug}/peak-memory-vs-lora"
        weighed(f"{title}/{where}", arms, name, "lora", device, facts)


def files(base: nn.Module, rounds: int, facts: dict) -> None:
    """adapt(), save and load on CPU."""
    for slug, method in METHODS.items():
        with log.attempt(f"{slug}/adapt/cpu"):
            adapting(base, slug, method, rounds, facts)
        with log.attempt(f"{slug}/save and load/cpu"):
            saving(base, slug, method, rounds, facts)


def by_turns(calls: dict[str, Any], base: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Seconds of calls that change the network they are given.

    Every call gets a fresh copy, made untimed; the order turns.
    """
    made: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        fresh = {name: copy.deepcopy(base) for name in calls}
        for name in calls if i % 2 else reversed(calls):
            call = partial(calls[name], fresh[name])
            made[name] += alternate({name: call}, 1, 0, torch.device("cpu"))[name]
    return made


def adapting(base: nn.Module, slug: str, method: Any, rounds: int, facts: dict) -> None:
    """The row of adapt()."""
    import peft

    targets = [n for n, m in base.named_modules() if is_target(n, m)]
    calls = {
        "ours": lambda model: adapt(model, method, is_target),
        "peer": lambda model: peft.get_peft_model(model, peer_config(method, targets)),
    }
    made = by_turns(calls, base, rounds)
    emit(compare(f"{slug}/adapt/cpu", made["ours"], made["peer"], "ms", **facts))


def saving(base: nn.Module, slug: str, method: Any, rounds: int, facts: dict) -> None:
    """The rows of save and load."""
    import peft

    targets = [n for n, m in base.named_modules() if is_target(n, m)]
    adapted = adapt(copy.deepcopy(base), method, is_target)
    wrapped = peft.get_peft_model(copy.deepcopy(base), peer_config(method, targets))
    with tempfile.TemporaryDirectory() as folder:
        path, there = Path(folder, "ours.safetensors"), Path(folder, "peer")
        saves = {"ours": lambda: adapted.save(path), "peer": lambda: wrapped.save_pretrained(there)}
        saved = alternate(saves, rounds, 2, torch.device("cpu"))
        emit(compare(f"{slug}/save/cpu", saved["ours"], saved["peer"], "ms", **facts))
        loads = {
            "ours": lambda model: toolkit.load(model, path),
            "peer": lambda model: peft.PeftModel.from_pretrained(model, there),
        }
        loaded = by_turns(loads, base, rounds)
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
    return WithLoss(encoder, encoder.config.hidden_size).to(device).train(), weights


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
    with log.attempt("step/cpu"):
        steps(base, make_batch(16, 64, "cpu"), "cpu", rounds, facts)
    with log.attempt("vs-lora/cpu"):
        against_lora(base, make_batch(16, 64, "cpu"), "cpu", rounds, facts)
    files(base, rounds, facts)
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
            with log.attempt(f"step/{where}"):
                steps(base, batch, where, rounds, facts)


def make_batch(size: int, length: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30_000, (size, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
