"""Merging checkpoints of 1 GB against mergekit, on the same files.

Each merge runs in a process of its own, so that peaks of memory are its own; importing is not
timed. mergekit is a peer that is installed by hand: ``pip install -e .[mergekit]``.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.rows import log
from toolkit.core.states.merging import merge
from toolkit.core.states.stored import stored

MODELS = 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
    "intermediate_size": 4096, "num_hidden_layers": 14, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 8000, "tie_word_embeddings": False,
    "torch_dtype": "float32", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
}  # fmt: skip
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("average", {}, {"merge_method": "linear"}),
    "ties": ("ties", {"density": 0.5, "over": "tensor"},
             {"merge_method": "ties", "parameters": {"normalize": True}}),
    "dare": ("dare", {"drop": 0.5}, {"merge_method": "dare_linear"}),
}  # fmt: skip


def checkpoints(room: Path, layers: int) -> list[Path]:
    """A base and its models: folders with 16.8 million numbers per layer."""
    config = CONFIG | {"num_hidden_layers": layers}
    hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (words, hidden), "lm_head.weight": (words, hidden),
              "model.norm.weight": (hidden,)}  # fmt: skip
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    g = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    made = []
    for i in range(MODELS + 1):
        folder = room / f"model{i}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        moved = base
        if i:
            moved = {n: w + 1e-3 * torch.randn(w.shape, generator=g) for n, w in base.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        made.append(folder)
    return made


def ours(folders: list[Path], rule: str, settings: dict, out: Path, threads: int) -> tuple:
    """Seconds and peak of memory in MiB of one merge by the toolkit."""
    from toolkit.core.declare.catalogue import entry

    torch.set_num_threads(threads)
    method = entry(rule).method(**settings)
    start = time.perf_counter()
    merge(folders[0], folders[1:], method, out=out, progress=False)
    return time.perf_counter() - start, _peak()


def theirs(folders: list[Path], recipe: dict, out: Path, threads: int) -> tuple:
    """The same of one merge by mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.set_num_threads(threads)
    models = [
        {"model": str(folder), "parameters": {"weight": 1.0, "density": 0.5}}
        for folder in folders[1:]
    ]
    told = {"models": models, "dtype": "float32", **recipe}
    if recipe["merge_method"] != "linear":
        told["base_model"] = str(folders[0])
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    start = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(told), str(out), options)
    return time.perf_counter() - start, _peak()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(work: Callable, *args: Any) -> tuple:
    """Run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *args).result()


def apart(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of two merged models, and the share of numbers beyond 1e-6."""
    a, b = stored(one, "one"), stored(other, "other")
    most, beyond, count = 0.0, 0, 0
    for name in a.facts:
        difference = (a.read(name) - b.read(name)).abs()
        most = max(most, float(difference.max()))
        beyond += int((difference > 1e-6).sum())
        count += difference.numel()
    return {"largest_difference": most, "share_beyond_1e-6": beyond / count}


def main(rounds: int = 3, threads: int = 2, layers: int = CONFIG["num_hidden_layers"]) -> None:
    """Print a row per rule: seconds, peaks of memory, and how far the results lie apart."""
    rounds = min(rounds, 5)
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        folders = checkpoints(room, layers)
        size = (folders[0] / "model.safetensors").stat().st_size / 2**20
        seconds: dict[str, float] = {}
        for row, (rule, settings, recipe) in PAIRS.items():
            with log.attempt(f"merge/{row}/cpu"):
                mine, peers = [], []
                for turn in range(rounds):
                    for folder in ("ours", "theirs"):
                        shutil.rmtree(room / folder, ignore_errors=True)
                    pair = [
                        lambda: mine.append(alone(ours, folders, rule, settings, room / "ours", threads)),
                        lambda: peers.append(alone(theirs, folders, recipe, room / "theirs", threads)),
                    ]
                    for run in pair if turn % 2 else reversed(pair):
                        run()
                seconds[row] = median(s for s, _ in mine)
                peer = median(s for s, _ in peers)
                facts = apart(room / "ours", room / "theirs") if row != "dare" else {}
                log.emit({
                    "name": f"merge/{row}/cpu", "ours": seconds[row], "peer": peer, "unit": "s",
                    "ratio": peer / seconds[row], "rounds": rounds, "threads": threads,
                    "checkpoint_MiB": size, "models": MODELS, **facts,
                })  # fmt: skip
                ours_peak, their_peak = (median(p for _, p in runs) for runs in (mine, peers))
                log.emit({
                    "name": f"merge/{row}-peak-memory/cpu", "ours": ours_peak, "peer": their_peak,
                    "unit": "MiB", "ratio": their_peak / ours_peak,
                })  # fmt: skip
        for rule in ("pcb_merging", "ties", "magnitude"):
            with log.attempt(f"merge/{rule}-vs-linear/cpu"):
                runs = []
                for _ in range(rounds):
                    shutil.rmtree(room / "ours", ignore_errors=True)
                    runs.append(alone(ours, folders, rule, {}, room / "ours", threads)[0])
                own = median(runs)
                log.emit({
                    "name": f"merge/{rule}-vs-linear/cpu", "ours": own, "peer": seconds["linear"],
                    "unit": "s", "ratio": seconds["linear"] / own, "rounds": rounds,
                })  # fmt: skip


