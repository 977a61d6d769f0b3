"""Measure two or more arms fairly: in turn, in one process, medians with spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.rows import Kept, log

Arm = Callable[[], object]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    arms: Mapping[str, Arm],
    rounds: int,
    warmup: int,
    device: torch.device,
    settle: int = 0,
    repeat: int = 1,
) -> Kept:
    """Seconds per call of every arm in every round: name -> list.

    An arm that raises is left out from there on; asking for its times raises its error.

    The order turns, so no arm always follows another. In each turn an arm makes ``settle`` untimed
    calls and then ``repeat`` timed ones: the first call after another arm pays for memory that the
    other's pattern of allocations left behind, which a training run does not.
    """
    names = list(arms)
    times = Kept()
    times |= {name: [] for name in names}
    for i in range(warmup + rounds):
        turn = names[i % len(names) :] + names[: i % len(names)]
        for name in turn:
            if name in times.failed:
                continue
            try:
                elapsed = _seconds(arms[name], device, settle, repeat)
            except Exception as error:
                times.fail(name, error)
                continue
            if i >= warmup:
                times[name].append(elapsed)
    return times


def _seconds(arm: Arm, device: torch.device, settle: int, repeat: int) -> float:
    """Seconds per call of one arm, after ``settle`` untimed calls."""
    for _ in range(settle):
        arm()
    gc.disable()
    try:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeat):
            arm()
        synchronise(device)
        return (time.perf_counter() - start) / repeat
    finally:
        gc.enable()


def spread(values: list[float]) -> float:
    """Distance of the quartiles as a share of the median."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def compare(name: str, ours: list[float], peer: list[float], unit: str, **facts) -> dict:
    """One comparison; ratio = peer / ours, the median over rounds, with its quartiles."""
    factor = {"ms": 1e3, "MiB": 1.0, "s": 1.0}[unit]
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "name": name,
        "ours": round(statistics.median(ours) * factor, 4),
        "peer": round(statistics.median(peer) * factor, 4),
        "unit": unit,
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "spread_ours": round(spread(ours), 4) if len(ours) > 1 else 0.0,
        "spread_peer": round(spread(peer), 4) if len(peer) > 1 else 0.0,
        "rounds": len(ours),
        **facts,
    }


def emit(row: dict) -> None:
    """Print a row, and keep it if rows are kept."""
    log.emit(row)


def peak_bytes(step: Arm, device: torch.device) -> int:
    """Most bytes that one call holds at a time, above what was held before it.

    On CPU from the allocator's own events, because resident memory of a process cannot tell two
    arms apart; on a GPU from the allocator's counter.
    """
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler of this torch version records no memory events")
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def tensor_bytes(*holders: object) -> int:
    """Bytes of all tensors in modules, optimizers, dicts and lists, each storage once."""
    seen: dict[int, int] = {}

    def visit(x: object) -> None:
        if isinstance(x, torch.Tensor):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, torch.nn.Module):
            for t in (*x.parameters(), *x.buffers()):
                visit(t)
                if t.grad is not None:
                    visit(t.grad)
        elif isinstance(x, torch.optim.Optimizer):
            visit(dict(x.state))
        elif isinstance(x, dict):
            for value in x.values():
                visit(value)
        elif isinstance(x, list | tuple):
            for value in x:
                visit(value)

    for holder in holders:
        visit(holder)
    return sum(seen.values())
