"""The sampling loop's own time per step, against the schedulers of diffusers.

The network is a function that returns the same zeros, so what is timed is the solver alone: 20
steps on 64 images of 3 x 32 x 32 numbers. Ours includes planning the steps and looking for answers
that are not finite; theirs is ``scheduler.step`` on a scheduler whose times are set.

One row more has no peer: what a search of DC-Solver takes (10 noises, 40 iterations, 6 calls)
beside sampling 512 images with what it found, on the network of the MNIST denoiser.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import log
from benchmarks.timing import Arm, alternate, compare, emit
from toolkit.core.sample.loop import sample
from toolkit.core.sample.plans import DDIM, DPMpp2M, Heun, Plan, UniPC
from toolkit.core.sample.schedule import LinearVP, Schedule
from toolkit.generate.dc_solver import DCSolver, reference_states
from toolkit.labs.beds import denoiser

STEPS = 20
SHAPE = (64, 3, 32, 32)
WARMUP, SETTLE, REPEAT = 2, 1, 2
PEERS: dict[str, tuple[Plan, str, dict[str, Any]]] = {
    "ddim": (DDIM(), "DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": (DPMpp2M(), "DPMSolverMultistepScheduler", {}),
    "unipc 2": (UniPC(2), "UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc 3": (UniPC(3), "UniPCMultistepScheduler", {"solver_order": 3}),
    "heun": (Heun(), "HeunDiscreteScheduler", {}),
}


def ours(plan: Plan, start: Tensor, zeros: Tensor) -> Callable[[], object]:
    """All steps by our loop."""
    schedule = Schedule.even(LinearVP(), STEPS, 1.0, 1e-3)
    return lambda: sample(lambda x, level: zeros, schedule, plan, start)


def theirs(name: str, options: dict[str, Any], start: Tensor, zeros: Tensor, runs: int) -> Arm:
    """All steps by a scheduler of diffusers, which is good for so many runs."""
    import diffusers

    kind = getattr(diffusers, name)
    predicts = "epsilon" if "Heun" in name else "sample"
    made = kind(prediction_type=predicts, **options)
    made.set_timesteps(STEPS, device=start.device)
    made.set_begin_index(0) if hasattr(made, "set_begin_index") else None
    ready = [copy.deepcopy(made) for _ in range(runs)]

    def run() -> Tensor:
        scheduler, x = ready.pop(), start
        for time in scheduler.timesteps:
            x = scheduler.step(zeros, time, x, return_dict=False)[0]
        return x

    return run


def searching(device: torch.device, samples: int = 512, side: int = 28) -> dict[str, Arm]:
    """``search``: DC-Solver's for 6 calls, its reference included; ``sampling``: of 512 images.

    The network is as large as the MNIST denoiser and not trained, which costs the same.
    """
    network = denoiser.empty("cpu").requires_grad_(False).to(device)
    schedule, law = Schedule.even(LinearVP(), 6, 1.0, 1e-3), LinearVP()
    draws = torch.Generator().manual_seed(0)
    noise, few = (torch.randn(n, 1, side, side, generator=draws).to(device) for n in (samples, 10))
    told, plan = {n: torch.arange(n, device=device) % 10 for n in (samples, 10)}, DCSolver("1.1")

    def search() -> object:
        goal = reference_states(network, schedule, few, law, 8, DPMpp2M(), labels=told[10])
        return plan.search(network, schedule, few, goal, labels=told[10])

    def sampling() -> object:
        return [
            sample(network, schedule, plan, x, labels=y)
            for x, y in zip(noise.split(64), told[samples].split(64), strict=True)
        ]

    return {"search": search, "sampling": sampling}


def main(rounds: int, threads: int) -> None:
    """One row per solver and device: milliseconds per step, ratio = peer / ours."""
    torch.set_num_threads(threads)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    runs = (rounds + WARMUP) * (SETTLE + REPEAT)
    for device in map(torch.device, devices):
        start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
        zeros = torch.zeros_like(start)
        for name, (plan, peer, options) in PEERS.items():
            with log.attempt(f"{name}/step/{device}"), torch.no_grad():
                arms = {
                    "ours": ours(plan, start, zeros),
                    "peer": theirs(peer, options, start, zeros, runs),
                }
                times = alternate(arms, rounds, WARMUP, device, SETTLE, REPEAT)
                per_step = [[seconds / STEPS for seconds in times[arm]] for arm in arms]
                emit(compare(f"{name}/step/{device}", *per_step, "ms", threads=threads))
        with log.attempt(f"dc_solver/search/{device}"), torch.no_grad():
            seconds = alternate(searching(device), min(rounds, 3), 1, device)
            row = compare(
                f"dc_solver/search/{device}", seconds["search"], seconds["sampling"], "s",
                threads=threads, peer_is="sampling 512 images",
            )  # fmt: skip
            emit(row)
