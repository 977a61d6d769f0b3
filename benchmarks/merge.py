"""Merging checkpoints of 1 GB against mergekit, on the same files; and M2N2's populations.

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
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import populations
from benchmarks.rows import log
from benchmarks.timing import compare, emit
from toolkit.core.states.merging import merge
from toolkit.core.states.stored import stored

MODELS = 3
Run = tuple[float, float, float]
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


def ours(folders: list[Path], out: Path, rule: str, settings: dict, threads: int) -> Run:
    """One merge by the toolkit."""
    from toolkit.core.declare.catalogue import entry

    torch.set_num_threads(threads)
    method = entry(rule).method(**settings)
    return timed(lambda: merge(folders[0], folders[1:], method, out=out, progress=False))


def theirs(folders: list[Path], out: Path, recipe: dict, threads: int) -> Run:
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
    return timed(lambda: run_merge(MergeConfiguration.model_validate(told), str(out), options))


def timed(work: Callable[[], object]) -> Run:
    """Seconds, processor seconds, and the process's peak of memory in MiB."""
    start, busy = time.perf_counter(), time.process_time()
    work()
    spent = time.perf_counter() - start, time.process_time() - busy
    return *spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fresh(out: Path, work: Callable, folders: list[Path], *args: Any) -> Run:
    """A merge in a process of its own, into a folder that is not there."""
    shutil.rmtree(out, ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, folders, out, *args).result()


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


def main(rounds: int = 3, threads: int = 2, layers: int = 14) -> None:
    """Print rows: seconds and peaks of memory per rule, and how far the results lie apart."""
    populations.m2n2(rounds, threads)
    rounds = min(rounds, 5)
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        folders = checkpoints(room, layers)
        facts = {
            "rounds": rounds, "threads": threads, "models": MODELS,
            "checkpoint_MiB": (folders[0] / "model.safetensors").stat().st_size / 2**20,
        }  # fmt: skip
        linear: list[Run] = []
        for row, (rule, settings, recipe) in PAIRS.items():
            with log.attempt(f"merge/{row}/cpu"):
                mine: list[Run] = []
                peers: list[Run] = []
                for _ in range(rounds):
                    mine.append(fresh(room / "ours", ours, folders, rule, settings, threads))
                    peers.append(fresh(room / "theirs", theirs, folders, recipe, threads))
                linear = linear or mine
                between = {} if row == "dare" else apart(room / "ours", room / "theirs")
                compared(f"merge/{row}", mine, peers, facts | between)
        for rule in ("ties", "magnitude_merge"):
            with log.attempt(f"merge/{rule}-vs-linear/cpu"):
                runs = [fresh(room / "ours", ours, folders, rule, {}, threads)
                        for _ in range(rounds)]  # fmt: skip
                compared(f"merge/{rule}-vs-linear", runs, linear, facts)


def compared(name: str, mine: list[Run], peers: list[Run], facts: dict[str, Any]) -> None:
    """Rows of seconds, of processor seconds (which other work disturbs less), and of memory."""
    for what, i, unit in (("", 0, "s"), ("-processor", 1, "s"), ("-peak-memory", 2, "MiB")):
        one, two = ([run[i] for run in runs] for runs in (mine, peers))
        emit(compare(f"{name}{what}/cpu", one, two, unit, **(facts if not what else {})))
