"""The methods that choose which weights move, on MiniLM: against full training and peft's SHiRA."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters import Arm, is_target, make_batch, network
from benchmarks.rows import Kept, each, log
from benchmarks.timing import alternate, compare, emit, tensor_bytes
from toolkit import SparseMask, adapt, catalogue
from toolkit.core.adapt.rechosen import RechosenLayer
from toolkit.core.adapt.steps.rechoice import ChoiceController

SHARE, LAST = 0.01, 1_000_000


class Again(SparseMask):
    """A random choice that is made anew in every step: what a choice made again costs at most."""

    def build(self, site: Any, generator: torch.Generator | None = None) -> RechosenLayer:
        score = torch.rand((site.rows, site.cols), generator=generator)
        mask = score < self.share
        return RechosenLayer(site, mask)

    def controller(self, share: Any, optimizer: Any, total_steps: Any) -> ChoiceController:
        return AgainController(self, share, optimizer)


class AgainController(ChoiceController):
    """Exchanges half of the entries that move, after every step."""

    def after_step(self) -> None:
        choices = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            stays = layer.index.long()[::2]
            size = layer.site.rows * layer.site.cols
            fresh = torch.randint(size, (len(layer.index) - len(stays),))
            choices[name] = torch.cat([stays, fresh]).unique()
        self.rechoose(choices)
        super().after_step()


def settings(entry: Any) -> dict[str, Any]:
    """Hyperparameters at 1 % of the entries, as far as a method declares them by these names.

    A method that needs others says so in a class attribute ``benchmark``.
    """
    known = {h.name for h in entry.hyperparameters}
    wanted = {"share": SHARE, "rank_weight": 0.0}
    chosen = {name: value for name, value in wanted.items() if name in known}
    return chosen | getattr(entry.method, "benchmark", {})


def _made(entry: Any) -> Any:
    return entry.method(**settings(entry))


def methods() -> dict[str, Callable[[], Any]]:
    """Name -> what makes the method: those of the part at 1 %, and the plain choices."""
    found: dict[str, Callable[[], Any]] = {}
    for entry in catalogue():
        if entry.part == "select":
            found[entry.slug] = partial(_made, entry)
    for by in ("random", "smallest", "largest", "fisher", "gradient"):
        found[by] = partial(SparseMask, share=SHARE, by=by)
    return found | {"choice made again": partial(Again, share=SHARE)}


def scoring(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What methods get that score weights on data."""
    return {"batches": [batch], "loss": lambda model, one: model(**one).loss}


def ours(base: nn.Module, make: Callable[[], Any], batch: dict[str, Tensor]) -> Arm:
    model, method = copy.deepcopy(base), make()
    more = scoring(batch) if getattr(method, "scores", None) else {}
    adapted = adapt(model, method, is_target, **more)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-4)
    adapted.attach(optimizer, total_steps=LAST)
    return Arm(model, optimizer, batch, state=lambda: [])


def full(base: nn.Module, batch: dict[str, Tensor]) -> Arm:
    model = copy.deepcopy(base).requires_grad_(True)
    return Arm(model, torch.optim.AdamW(model.parameters(), lr=1e-4), batch)


def shira(base: nn.Module, batch: dict[str, Tensor]) -> Arm:
    """peft's SHiRA with as many entries as a share of 1 %, as near as its rank allows."""
    import peft

    model = copy.deepcopy(base)
    targets = [n for n, m in model.named_modules() if is_target(n, m)]
    rank = max(1, round(SHARE * _entries(base) / _sides(base)))
    model = peft.get_peft_model(model, peft.ShiraConfig(r=rank, target_modules=targets))
    return Arm(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), batch)


def _layers(base: nn.Module) -> list[nn.Linear]:
    return [m for n, m in base.named_modules() if is_target(n, m) and isinstance(m, nn.Linear)]


def _entries(base: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in _layers(base))


def _sides(base: nn.Module) -> int:
    return sum(sum(layer.weight.shape) for layer in _layers(base))


def steps(base: nn.Module, batch: dict[str, Tensor], rounds: int, facts: dict) -> Kept:
    """Step time of every method beside full training and SHiRA: ratio = peer / ours."""
    makers: dict[str, Any] = {
        "full": partial(full, base, batch),
        "shira": partial(shira, base, batch),
    }
    makers |= {name: partial(ours, base, make, batch) for name, make in methods().items()}
    arms = each(makers)
    stepping = {name: arm.step for name, arm in arms.items()}
    times = alternate(stepping, rounds, 1, torch.device("cpu"), settle=1, repeat=2)
    times.failed |= arms.failed
    for name in [n for n in makers if n != "full"]:
        for peer in ("full", "shira"):
            if name == peer:
                continue
            with log.attempt(f"{name}/step-vs-{peer}/cpu"):
                emit(compare(f"{name}/step-vs-{peer}/cpu", times[name], times[peer], "ms", **facts))
    return arms


def held(arms: Kept, facts: dict) -> None:
    """Bytes of gradients and of the optimizer: ratio = full training / ours."""
    whole = _training_bytes(arms["full"])
    for name in [n for n in arms if n != "full"]:
        with log.attempt(f"{name}/training-bytes/cpu"):
            mine = _training_bytes(arms[name])
            row = {"name": f"{name}/training-bytes/cpu", "ours": mine, "peer": whole, "unit": "B"}
            emit(row | {"ratio": round(whole / mine, 2), **facts})


def _training_bytes(arm: Arm) -> int:
    """Gradients of what trains, and the state of the optimizer, after a step."""
    arm.step()
    held = [p for group in arm.optimizer.param_groups for p in group["params"]]
    if any(p.grad is None for p in held):  # the choice was made again: as many as it has now
        return sum(p.nbytes for p in held) + tensor_bytes(arm.optimizer)
    return tensor_bytes(arm.optimizer, [p.grad for p in held])


def saving(base: nn.Module, batch: dict[str, Tensor], rounds: int, facts: dict) -> None:
    """Size and time of the file of one task, beside SHiRA's: ratio = SHiRA / ours, per entry."""
    model = copy.deepcopy(base)
    adapted = adapt(model, methods()["sara"](), is_target)
    adapted.calm()
    peer = shira(base, batch)
    count = sum(p.numel() for p in adapted.parameters())
    there = sum(p.numel() for p in peer.model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        path, their = Path(folder, "ours.safetensors"), Path(folder, "peer")
        calls = {
            "ours": lambda: adapted.save(path),
            "peer": lambda: peer.model.save_pretrained(their),
        }
        times = alternate(calls, rounds, 1, torch.device("cpu"))
        emit(compare("sara/save/cpu", times["ours"], times["peer"], "ms", **facts))
        size = sum(f.stat().st_size for f in their.iterdir() if f.suffix == ".safetensors")
        mine = path.stat().st_size
        emit({
            "name": "sara/save-size/cpu", "ours": mine, "peer": size, "unit": "B",
            "ratio": round((size / there) / (mine / count), 4), "entries": count,
            "peer_entries": there, **facts,
        })  # fmt: skip


def main(rounds: int = 15, threads: int = 2) -> None:
    """Print one JSON line per comparison."""
    import peft

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base, weights = network("cpu")
    facts = {"weights": weights, "threads": threads, "batch": 16, "length": 64, "share": SHARE,
             "torch": torch.__version__, "peft": peft.__version__}  # fmt: skip
    batch = make_batch(16, 64, "cpu")
    arms = steps(base, batch, rounds, facts)
    held(arms, facts)
    with log.attempt("sara/save/cpu"):
        saving(base, batch, max(rounds, 3), facts)


if __name__ == "__main__":
    main()
