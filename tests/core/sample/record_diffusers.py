"""Record what the schedulers of diffusers make of known predictions: writes ``diffusers.json``.

``python tests/core/sample/record_diffusers.py``, where diffusers is installed. Each of its
schedulers is given our levels in place of its own, which it rounds to single precision.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from toolkit.core.sample.schedule import Betas, Level, LinearVP, Schedule

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "ddpm": lambda: Schedule.of(Betas.linear(), [*range(999, 0, -100), -1]),
    "vp": lambda: Schedule.even(LinearVP(), 7, 1.0, 1e-3),
    "edm": lambda: Schedule.edm(8, 0.02, 20.0),
}
CASES: dict[str, tuple[str, str, dict]] = {
    "ddim": ("DDIMScheduler", "ddpm", {}),
    "dpmpp_2m vp": ("DPMSolverMultistepScheduler", "vp", {}),
    "dpmpp_2m ddpm": ("DPMSolverMultistepScheduler", "ddpm", {}),
    "dpmpp_2m vp, full last": (
        "DPMSolverMultistepScheduler", "vp", {"lower_order_final": False},
    ),
    "heun edm": ("HeunDiscreteScheduler", "edm", {}),
    **{
        f"unipc {order} {variant} {schedule}": (
            "UniPCMultistepScheduler", schedule, {"solver_order": order, "solver_type": variant},
        )
        for order in (1, 2, 3)
        # theirs has no number for bh1 where no noise is left
        for variant, schedule in (("bh1", "vp"), ("bh2", "vp"), ("bh2", "ddpm"))
    },
    "unipc 3 bh2 vp, predictor": (
        "UniPCMultistepScheduler", "vp",
        {"solver_order": 3, "solver_type": "bh2", "disable_corrector": list(range(99))},
    ),
    "unipc 2 bh1 vp, first uncorrected": (
        "UniPCMultistepScheduler", "vp",
        {"solver_order": 2, "solver_type": "bh1", "disable_corrector": [0]},
    ),
}  # fmt: skip


def start(schedule: Schedule, dtype: torch.dtype) -> Tensor:
    """States (2, 3, 1, 1) at the first level."""
    numbers = torch.tensor([[0.3, -1.1, 0.7], [1.9, -0.2, -0.6]], dtype=torch.float64)
    return (numbers * schedule.levels[0].std).to(dtype).view(2, 3, 1, 1)


def clean(x: Tensor, level: Level) -> Tensor:
    """A smooth prediction that is far from linear in the state and depends on the noise."""
    z = x / level.alpha
    return torch.sin(z + z.roll(1, 1) / 2) / (1 + level.sigma) + 0.3


class Wider:
    """PyTorch, whose single precision is another: one scheduler computes in nothing else."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.float32 = dtype

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def run(scheduler_name: str, name: str, options: dict, dtype: torch.dtype) -> Tensor:
    """The states of all levels after the first."""
    import diffusers

    schedule = SCHEDULES[name]()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        kind = getattr(diffusers, scheduler_name)
        sys.modules[kind.__module__].torch = Wider(dtype)
        if scheduler_name == "DDIMScheduler":
            scheduler = kind(
                prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
            )
            scheduler.set_timesteps(schedule.steps)
            assert scheduler.timesteps.tolist() == [int(t) for t in schedule.times[:-1]]
            law = Betas.linear()
            kept = [law.level(t).alpha ** 2 for t in range(1000)]
            scheduler.alphas_cumprod = torch.tensor(kept, dtype=dtype)
        else:
            scheduler = kind(
                prediction_type="epsilon" if "Heun" in scheduler_name else "sample",
                **({"final_sigmas_type": "zero"} if "Heun" not in scheduler_name else {}),
                **options,
            )
            scheduler.set_timesteps(schedule.steps)
            sigmas = torch.tensor(schedule.sigmas, dtype=dtype)
            if "Heun" in scheduler_name:  # it names the inner levels twice
                sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
            elif schedule.sigmas[-1] > 0:
                scheduler.config.final_sigmas_type = "sigma_min"
            scheduler.sigmas = sigmas
            scheduler.set_begin_index(0)
        x, states = start(schedule, dtype), []
        asked = iter(scheduler.timesteps)
        for number, (here, there) in enumerate(
            zip(schedule.levels[:-1], schedule.levels[1:], strict=True)
        ):
            if "Heun" in scheduler_name:
                for level in (here, there)[: 2 if number < schedule.steps - 1 else 1]:
                    noise = (x - clean(x, level)) / level.sigma
                    x = scheduler.step(noise, next(asked), x).prev_sample
            else:
                x = scheduler.step(clean(x, here), next(asked), x).prev_sample
            states.append(x.flatten())
        return torch.stack(states)
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    """Write the last states of every case, in both precisions, and every second one in between."""
    import diffusers

    made: dict[str, object] = {"diffusers": diffusers.__version__}
    for case, arguments in CASES.items():
        made[case] = {
            kind: run(*arguments, getattr(torch, kind)).tolist() for kind in ("float32", "float64")
        }
    text = json.dumps(made).replace(']}, "', ']},\n"')
    Path(__file__).with_name("diffusers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
