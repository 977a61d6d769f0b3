"""What is measured on *Fewer steps, sharper, larger, along the way*: what a call of a network buys.

One network draws digits (:mod:`toolkit.labs.beds.denoiser`). Solvers, schedules and an adaptor of
one step start at the same noises and levels; their images are compared with all test images, and
their states with a fine run. What one method does alone is measured in its own lab.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.sample.guidance import guided
from toolkit.core.sample.loop import sample
from toolkit.core.sample.metrics import frechet
from toolkit.core.sample.plans import DDIM, DPMpp2M, Plan, UniPC
from toolkit.core.sample.schedule import LinearVP, Network, Schedule
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.generate.dc_solver import DCSolver, reference_states
from toolkit.labs.beds import denoiser
from toolkit.labs.generate import film, hipa
from toolkit.labs.generate.onestep.runs import OneStep, trained
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

LAW = LinearVP()
HIGH, LOW = 80.0, 0.01
"""Noise over signal at both ends of every schedule."""
PLANS: dict[str, Plan] = {
    "ddim": DDIM(), "dpmpp_2m": DPMpp2M(), "unipc": UniPC(2), "dc_solver": DCSolver(),
}  # fmt: skip
PLAIN = ("ddim", "dpmpp_2m", "unipc")
"""Solvers without a search."""
CALLS = (4, 6, 10)
"""Calls of the network, one a step."""
JUDGED = 6
"""Calls at which schedules are chosen and claims judged."""
NOISES = 10
"""Of a search for ratios, as DC-Solver's code has it."""
SCHEDULES = ("edm", "log_snr", "time")
ADAPTOR = "high, rank 4"
"""HiPA with all terms of its loss, as its own lab trains it on handwriting."""


def sizes(scale: str) -> tuple[int, int, int]:
    """Samples, steps of the fine run, iterations of a search."""
    return (20, 4, 1) if scale == "ci" else (250, 40, 40)


def schedule(name: str, steps: int) -> Schedule:
    """Levels between the same ends: EDM's, or even in log-SNR or in time.

    Raises:
        ValueError: an unknown name.
    """
    start, stop = LAW.time(HIGH), LAW.time(LOW)
    if name == "edm":
        return Schedule.edm(steps, LOW, HIGH, to_zero=False).under(LAW)
    if name == "log_snr":
        return Schedule.even_log_snr(LAW, steps, start, stop)
    if name == "time":
        return Schedule.even(LAW, steps, start, stop)
    raise ValueError(f"name: one of {', '.join(SCHEDULES)}, got {name!r}")


class Sampler:
    """The bed's network with the noises and labels of one seed.

    Args:
        seed: of the noises.
        scale: of the sizes.
    """

    def __init__(self, seed: int, scale: str) -> None:
        self.seed, self.scale = seed, scale
        self.count, self.fine, self.iterations = sizes(scale)
        self.network = denoiser.network(scale).requires_grad_(False)
        self.labels = torch.arange(self.count) % denoiser.CLASSES
        self.noise = self._noise(self.count, "told")

    def _noise(self, count: int, stream: str) -> Tensor:
        side = denoiser.size(self.scale).side
        draws = generator(self.seed, "which_sampler", stream)
        return torch.randn(count, 1, side, side, generator=draws)

    def asked(self, labels: Tensor) -> Network:
        """The denoiser with labels built in."""
        return guided(self.network, labels)

    def run(self, plan: Plan, levels: Schedule) -> Tensor:
        """Images from the seed's noises."""
        x = sample(self.asked(self.labels), levels, plan, self.noise * levels.levels[0].std).x
        return x / levels.levels[-1].alpha

    def plan(self, solver: str, levels: Schedule) -> Plan:
        """A solver; DC-Solver with ratios searched on noises of their own."""
        plan = PLANS[solver]
        if not isinstance(plan, DCSolver):
            return plan
        labels = torch.arange(NOISES) % denoiser.CLASSES
        network, start = self.asked(labels), self._noise(NOISES, "search") * levels.levels[0].std
        parts = max(2, round(5 * self.fine / levels.steps))
        goal = reference_states(network, levels, start, LAW, parts, DPMpp2M())
        found = plan.search(network, levels, start, goal, iterations=self.iterations)
        return plan.given(found.ratios.tolist())

    def drawn(self, solver: str, name: str, calls: int) -> Tensor:
        """Images of a solver with so many calls on a schedule."""
        levels = schedule(name, calls)
        return self.run(self.plan(solver, levels), levels)

    @functools.cached_property
    def truth(self) -> Tensor:
        """Images of the fine run."""
        return self.run(UniPC(3), schedule("log_snr", self.fine))

    def worth(self, images: Tensor) -> dict[str, float]:
        """``frechet`` distance to all test images, and the share that is ``read`` as its label."""
        seen, scores = denoiser.features(images, self.scale)
        right = (scores.argmax(1) == self.labels).double().mean()
        return {"frechet": frechet(seen, _real(self.scale)), "read": 100 * float(right)}


@functools.lru_cache(maxsize=2)
def _real(scale: str) -> Tensor:
    return denoiser.features(denoiser.load(scale).test[0], scale)[0]


def schedule_run(solver: str, name: str, seed: int, scale: str) -> dict[str, float]:
    """The Fréchet distance of a solver on one schedule, to choose by."""
    torch.set_num_threads(1)
    one = Sampler(seed, scale)
    return {"frechet": one.worth(one.drawn(solver, name, JUDGED))["frechet"]}


def pictures_run(chosen: list[str], rate: float, seed: int, scale: str) -> dict[str, Any]:
    """Everything from the noises of one seed.

    Args:
        chosen: the schedule of each of :data:`PLANS`.
        rate: of the adaptor's training.
        seed: of the noises, the searches and the adaptor.
        scale: of the sizes.

    Returns:
        ``"<solver>, <calls>: frechet"``, ``read`` and ``error``, the mean squared distance from
        the fine run, on the chosen schedule. ``"<solver> on <schedule>: frechet"`` and ``error``,
        with the judged number of calls. ``fine: ...``, ``one step: ...``, ``adaptor: ...``.
        ``"<name>: shown"``: ten images as text.
    """
    torch.set_num_threads(1)
    one, found = Sampler(seed, scale), {}
    own = dict(zip(PLANS, chosen, strict=True))

    def put(name: str, images: Tensor, shown: bool = False) -> None:
        worth = one.worth(images)
        worth["error"] = float((images - one.truth).double().square().mean())
        found.update({f"{name}: {key}": float(f"{value:.5g}") for key, value in worth.items()})
        if shown:
            found[f"{name}: shown"] = film.encode(images[:10], 16)  # type: ignore[assignment]

    put("fine", one.truth, True)
    for solver in PLANS:
        for name in SCHEDULES:
            images = one.drawn(solver, name, JUDGED)
            put(f"{solver} on {name}", images)
            if name == own[solver]:
                put(f"{solver}, {JUDGED}", images, True)
        for calls in CALLS:
            if calls != JUDGED:
                put(f"{solver}, {calls}", one.drawn(solver, own[solver], calls), True)
    top = schedule("edm", 1).levels[0]
    start = one.noise * top.sigma
    arm = hipa.HANDWRITING[ADAPTOR]
    model, _ = trained("handwriting", arm.rank, arm.loss, arm.weight, rate, seed, scale)
    for name, network in {"one step": OneStep(denoiser.network(scale)), "adaptor": model}.items():
        with torch.no_grad():
            put(name, network((start, one.labels)), True)
    return found


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the page: which schedule suits which solver, the adaptor's rate, which is
    HiPA's own search, then all of it on each noise."""
    blocks = two_blocks(scale.pick(ci=4, cpu=8, gpu=20))
    tried = [{"solver": s, "name": n, "seed": seed, "scale": scale.name}
             for s in PLANS for n in SCHEDULES
             for seed in search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3))]  # fmt: skip
    found = runs.table("schedules", schedule_run, tried)
    mean = found.groupby(["solver", "name"]).frechet.mean()
    chosen = [str(mean[solver].idxmin()) for solver in PLANS]
    seeds, arm = [seed for block in blocks for seed in block], hipa.HANDWRITING[ADAPTOR]
    of_arm = {"world": "handwriting", "rank": arm.rank, "loss": arm.loss, "weight": arm.weight,
              "scale": scale.name}  # fmt: skip
    rate = runs.tune(
        "adaptor", hipa.tuning_run, {ADAPTOR: of_arm}, {ADAPTOR: arm.start},
        seeds=search_seeds(), reported=seeds, judged="validation", better="min", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )[ADAPTOR].rate  # fmt: skip
    runs.blocks("pictures", blocks)
    runs.table("pictures", pictures_run, [
        {"chosen": chosen, "rate": rate, "seed": seed, "scale": scale.name} for seed in seeds
    ])  # fmt: skip


UNIT = "Fréchet distance"
SEVENTH = "a sixth of what UniPC has with six calls; twice what two sets of noises differ by"
CLAIMS = (
    Claim(
        "dc", "With six calls, DC-Solver's pictures are nearer to real digits than UniPC's.",
        whose="paper", where="table of FFHQ, as a summary gives it",
        figure="FID 10.38 against 18.66 with 5 calls",
        unit=UNIT, better="less", margin=0.1, reason=SEVENTH,
        quantity="Fréchet distance to all test images, DC-Solver below UniPC, each on its best "
        "schedule",
        conditions=(Condition("digits", n=8, spread=0.06, decides=True),),
    ),
    Claim(
        "one", "One call with a trained adaptor (HiPA) beats four calls of the best plain solver.",
        whose="ours", unit=UNIT, better="less", margin=0.5,
        quantity="Fréchet distance to all test images, HiPA's one call below the plain solver that "
        "is best with four calls on other seeds",
        reason="a third of what DDIM with six calls is behind",
        conditions=(Condition("digits", n=8, spread=0.5, decides=True),),
    ),
    Claim(
        "error", "What ends nearer to the fine run is nearer to real digits.",
        whose="ours", unit="rank correlation", margin=0.35,
        reason="a smaller correlation explains less than an eighth of the spread",
        quantity="over four solvers on three schedules with six calls: mean squared distance from "
        "the fine run against Fréchet distance",
        conditions=(
            Condition("digits", n=8, spread=0.25, support=(-1.0, 1.0), decides=True),
        ),
    ),
    Claim(
        "schedule", "The solver matters more than the schedule.",
        whose="ours", unit=UNIT, margin=0.2,
        reason="a third of what UniPC has with six calls",
        quantity="what DDIM is behind UniPC, each on its best schedule, minus what UniPC loses on "
        "its worst schedule; six calls",
        conditions=(Condition("digits", n=8, spread=0.2, decides=True),),
    ),
    Claim(
        "six", "Six calls of UniPC are as good as forty: they cost at most 0.3.",
        whose="ours", unit=UNIT, than=-0.3, margin=0.1, reason=SEVENTH,
        quantity="Fréchet distance of the fine run minus that of UniPC with six calls on its best "
        "schedule, from 0.3 below",
        conditions=(Condition("digits", n=8, spread=0.1, decides=True),),
    ),
)  # fmt: skip


def schedules(found: Found) -> dict[str, str]:
    """Solver -> the schedule that was chosen for it."""
    mean = found["schedules"].groupby(["solver", "name"]).frechet.mean()
    return {solver: str(mean[solver].idxmin()) for solver in PLANS}


def worst(found: Found, solver: str) -> str:
    """The schedule on which a solver was worst in the search."""
    mean = found["schedules"].groupby(["solver", "name"]).frechet.mean()
    return str(mean[solver].idxmax())


def correlations(found: Found) -> dict[int, float]:
    """Seed -> rank correlation of error and Fréchet distance over solvers and schedules."""
    import pandas as pd

    told = {}
    for row in found["pictures"].to_dict("records"):
        both = [
            [row[f"{solver} on {name}: {key}"] for solver in PLANS for name in SCHEDULES]
            for key in ("error", "frechet")
        ]
        one, other = (pd.Series(values).rank() for values in both)
        told[int(row["seed"])] = float(one.corr(other))
    return told


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    blocks, search = found.blocks("pictures"), search_seeds()

    def of(name: str) -> dict[int, float]:
        return found.values("pictures", f"{name}: frechet")

    def told(ours: dict[int, float], theirs: dict[int, float] | None = None, **more: Any) -> Any:
        return {"digits": Measured(ours, theirs, blocks=blocks, tuning_seeds=search, **more)}

    best, bad = of(f"unipc, {JUDGED}"), of(f"unipc on {worst(found, 'unipc')}")
    behind = {s: v - best[s] for s, v in of(f"ddim, {JUDGED}").items()}
    return {
        "dc": told(of(f"dc_solver, {JUDGED}"), best, control=of("fine"), nothing=of("one step")),
        "one": told(of("adaptor"), of(f"{few(found)}, {min(CALLS)}"), control=of("fine"),
                    nothing=of("one step")),
        "error": told(correlations(found)),
        "schedule": told(behind, {s: v - best[s] for s, v in bad.items()}),
        "six": told(of("fine"), best),
    }  # fmt: skip


def few(found: Found) -> str:
    """The plain solver that the search prefers with six calls."""
    mean = found["schedules"].groupby(["solver", "name"]).frechet.mean()
    return min(PLAIN, key=lambda solver: float(mean[solver].min()))


def facts(found: Found) -> list[Fact]:
    """Counts, checked by computing them."""
    one = Sampler(0, "ci")
    asked = {}
    for solver, plan in PLANS.items():
        made = plan.given([1.0] * JUDGED) if isinstance(plan, DCSolver) else plan
        levels = schedule("log_snr", JUDGED)
        asked[solver] = sample(one.asked(one.labels), levels, made, one.noise).calls
    ends = {
        (round(levels.sigmas[0], 6), round(levels.sigmas[-1], 6))
        for levels in (schedule(name, n) for name in SCHEDULES for n in CALLS)
    }
    return [
        Fact("calls", "Every solver asks the network as often as is said.",
             set(asked.values()) == {JUDGED}, JUDGED, "calls"),
        Fact("ends", "Every schedule starts and ends at the same noise.", ends == {(HIGH, LOW)}),
    ]  # fmt: skip


LAB = Lab(
    slug="which_sampler",
    part="generate",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
