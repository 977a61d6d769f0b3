"""What is measured about DiffuseHigh: digits drawn at twice the size that a denoiser learned.

A seed is a set of noises, the same for all arms, and a set of test images to compare with. Settings
are searched on seeds of their own, as many for each way. The beds and the ways are in
:mod:`toolkit.labs.generate.enlarged`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.sample.metrics import spectrum
from toolkit.core.scale import Scale
from toolkit.core.scale import scale as named_scale
from toolkit.core.seeds import generator
from toolkit.generate.diffusehigh import DiffuseHigh, dwt, swap_low
from toolkit.labs.generate import enlarged
from toolkit.labs.generate.enlarged import Drawn, Reference, bed, judged, method, own_means
from toolkit.labs.generate.film import encode
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

WAYS = {
    "sdedit": "SDEdit, no guidance",
    "third": "guided in the first third",
    "third db4": "the same with db4",
    "every": "guided in every step",
    "own": "native pixels held in every step",
}
"""Ways to take the last steps; each with every number of steps and every strength."""
ARMS = ("direct", "bicubic", "sharpened", "sdedit", "unsharpened", "full")
"""As published, on both beds."""
BEST = {"best sharpened": "sharpened", "best sdedit": "sdedit", "best third": "third",
        "best own": "own"}  # fmt: skip
"""Arms of the known bed whose settings were searched, and the way they are of."""
BED_NAMES = {"open": "28 to 56 pixels", "known": "14 to 28 pixels"}
SHOWN_SEED = 800
"""Of the pictures; no number of theirs is told."""


def steps_tried(scale: Scale) -> tuple[int, ...]:
    """Numbers of steps, of 20, that the search tries."""
    return scale.pick(ci=(4, 6), cpu=(4, 5, 6, 7, 8), gpu=(4, 5, 6, 7, 8))


def strengths_tried(scale: Scale) -> tuple[float, ...]:
    """Strengths of the sharpening that the search tries with each number of steps."""
    return scale.pick(ci=(1.0,), cpu=(0, 1.0, 2.0, 4.0, 8.0), gpu=(0, 1.0, 2.0, 4.0, 8.0))


def settings(way: str, scale: Scale) -> list[tuple[int, float]]:
    """Pairs of steps and strength, as many for each way. Without a network there are no steps,
    and the strengths go up evenly to 10."""
    made = list(itertools.product(steps_tried(scale), strengths_tried(scale)))
    if way == "sharpened":
        return [(0, 10.0 * (i + 1) / len(made)) for i in range(len(made))]
    return made


def shown_settings(scale: Scale) -> list[tuple[int, float]]:
    """Pairs of steps and strength of which pictures are kept."""
    steps, strengths = scale.pick(
        ci=((4, 6), (1.0,)), cpu=((4, 6, 8), (0.0, 1.0, 4.0)), gpu=((4, 6, 8), (0.0, 1.0, 4.0))
    )
    return list(itertools.product(steps, strengths))


def setting(way: str, steps: int, strength: float) -> DiffuseHigh:
    """The method of a way."""
    guided = {"sdedit": 0, "every": steps, "own": steps}.get(way, max(1, round(steps / 3)))
    wavelet = "db4" if way.endswith("db4") else "haar"
    made = method(renoised=steps, guided=guided, strength=strength, wavelet=wavelet)
    return own_means(made) if way == "own" else made


def drawn_by(way: str, steps: int, strength: float, drawn: Drawn) -> torch.Tensor:
    """Pictures of a way."""
    if way == "sharpened":
        return drawn.enlarged(strength)
    return drawn.high(setting(way, steps, strength))


def search_run(way: str, seed: int, scale: str) -> dict[str, Any]:
    """Every setting of one way on the known bed: lists ``frechet``, ``agreement`` and ``fine``."""
    torch.set_num_threads(1)
    this, S = bed("known", scale), named_scale(scale)
    count = S.pick(ci=8, cpu=60, gpu=200)
    drawn, reference = Drawn(this, seed, count), Reference(this, seed, count)
    found = [judged(drawn_by(way, *s, drawn), drawn, reference) for s in settings(way, S)]
    return {name: [one[name] for one in found] for name in ("frechet", "agreement", "fine")}


def compared(where: str, seed: int, scale: str, best: list[float]) -> dict[str, Any]:
    """All arms on one seed of a bed.

    Args:
        where: the bed.
        seed: of noises and test images.
        scale: of the bed.
        best: on the known bed, steps and strength of each arm of :data:`BEST`, one after another.

    Returns:
        For each arm, after its name and a colon, what :func:`enlarged.judged` says and the list
        ``power``, its spectrum. ``native: whole`` and ``native: read``. ``truth: ...`` of test
        images against others; on the open bed its distance only. On the known bed, for the ways
        ``sdedit``, ``third`` and ``every``, the list ``drift``: how far the block means of
        predictions lie from the guide's at each step, before they are replaced, in dB.
    """
    torch.set_num_threads(1)
    this = bed(where, scale)
    count = named_scale(scale).pick(ci=10, cpu=150, gpu=500)
    if where == "open":
        count = named_scale(scale).pick(ci=10, cpu=32, gpu=100)
    drawn, reference = Drawn(this, seed, count), Reference(this, seed, count)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "direct": drawn.direct,
        "bicubic": drawn.enlarged,
        "sharpened": lambda: drawn.enlarged(1.0),
        "sdedit": lambda: drawn.high(method(guided=0)),
        "unsharpened": lambda: drawn.high(method(strength=0.0)),
        "full": lambda: drawn.high(method()),
    }
    for (name, way), steps, strength in zip(BEST.items(), best[::2], best[1::2], strict=False):
        ways[name] = functools.partial(drawn_by, way, int(steps), strength, drawn)
    found: dict[str, Any] = {"truth: frechet": reference.distance(reference.again)}
    for name, make in ways.items():
        pictures = make()
        found |= {
            f"{name}: {key}": value for key, value in judged(pictures, drawn, reference).items()
        }
        found[f"{name}: power"] = powers(this.inner(pictures.clamp(0, 1)))
    read = enlarged.denoiser.features(enlarged.to_state(_plain(this, drawn)), scale)[1].argmax(1)
    found["native: read"] = 100 * float((read == drawn.labels).double().mean())
    found["native: whole"] = enlarged.whole(drawn.native)
    if where == "known":
        half = reference.images[:count]
        found |= {"truth: fine": enlarged.fine(half), "truth: whole": enlarged.whole(half),
                  "truth: power": powers(half)}  # fmt: skip
        for way in ("sdedit", "third", "every"):
            found[f"{way}: drift"] = drift(drawn, setting(way, method().renoised, 1.0))
    return found


def _plain(this: enlarged.Bed, drawn: Drawn) -> torch.Tensor:
    """Native pictures at the size of the test images."""
    if drawn.native.shape[-1] == this.truth.shape[-1]:
        return drawn.native
    return this.inner(drawn.enlarged())


def powers(pictures: torch.Tensor) -> list[float]:
    """The spectrum, to three digits."""
    return [float(f"{value:.3g}") for value in spectrum(pictures)[1].tolist()]


def drift(drawn: Drawn, how: DiffuseHigh) -> list[float]:
    """Root mean squared distance of predictions' block means from the guide's, in dB, at each step
    of a stage over the first pictures; they are looked at before anything is replaced."""
    rows, seen = slice(0, enlarged.BATCH), []
    guide = F.avg_pool2d(how.guide(drawn.native[rows], 2 * drawn.bed.side).picture, 2)

    def watched(x: torch.Tensor, level: Any, labels: torch.Tensor) -> torch.Tensor:
        said = drawn.bed.network(x, level, labels)
        means = F.avg_pool2d(enlarged.to_picture(said), 2)
        seen.append((means - guide).square().mean())
        return said

    how.stage(
        watched, drawn.schedule, drawn.native[rows], 2 * drawn.bed.side, drawn.noise[rows],
        labels=drawn.labels[rows], encode=enlarged.to_state, decode=enlarged.to_picture,
    )  # fmt: skip
    return [10 * math.log10(float(value)) for value in seen]


def pictures(where: str, scale: str) -> dict[str, Any]:
    """Pictures to look at, as text: on the open bed each arm's, on the known one each setting's."""
    torch.set_num_threads(1)
    S, this = named_scale(scale), bed(where, scale)
    drawn = Drawn(this, SHOWN_SEED, S.pick(ci=6, cpu=8, gpu=8))

    def text(made: torch.Tensor) -> str:
        return encode(enlarged.to_state(made), 16)

    found = {"native": text(drawn.native), "direct": text(this.inner(drawn.direct())),
             "bicubic": text(this.inner(drawn.enlarged()))}  # fmt: skip
    if where == "open":
        ways = {"sharpened": drawn.enlarged(1.0), "sdedit": drawn.high(method(guided=0)),
                "unsharpened": drawn.high(method(strength=0.0)),
                "full": drawn.high(method())}  # fmt: skip
        return found | {name: text(made) for name, made in ways.items()}
    for way in ("sdedit", "third", "every"):
        for steps, strength in shown_settings(S):
            made = this.inner(drawn_by(way, steps, strength, drawn))
            found[f"{way}: {steps}: {strength:g}"] = text(made)
    return found


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: the search, the arms on both beds, and pictures."""
    ways = (*WAYS, "sharpened")
    seeds = search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3))
    jobs = [{"way": way, "seed": seed, "scale": scale.name} for way in ways for seed in seeds]
    tried = runs.table("search", search_run, jobs)
    best: list[float] = []
    for way in BEST.values():
        rows = tried[tried.way == way].frechet.tolist()
        scores = [sum(map(math.log, values)) for values in zip(*rows, strict=True)]
        best += settings(way, scale)[scores.index(min(scores))]
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    for where in enlarged.BEDS:
        runs.blocks(where, blocks)
        runs.table(where, compared, [
            {"where": where, "seed": seed, "scale": scale.name,
             "best": [float(b) for b in best] if where == "known" else []}
            for block in blocks for seed in block
        ])  # fmt: skip
    runs.table("pictures", pictures,
               [{"where": where, "scale": scale.name} for where in enlarged.BEDS])  # fmt: skip


def _both(**of: Any) -> tuple[Condition, ...]:
    """The two beds; what is claimed of them stands on the one where the method is at home."""
    return tuple(
        Condition(BED_NAMES[where], n=20, decides=where == of["decides"], **of[where])
        for where in ("open", "known")
    )


CLAIMS = (
    Claim(
        "structure",
        "Drawn directly at twice the size digits fall apart; drawn by DiffuseHigh they do not.",
        whose="paper",
        where="abstract and introduction",
        quantity="digits read as their class, DiffuseHigh minus direct sampling",
        unit="points",
        margin=10.0,
        reason="one digit in ten; the network's own pictures are misread about as often",
        conditions=_both(
            decides="open",
            open={"spread": 9.0, "support": (-100, 100)},
            known={"spread": 5.0, "support": (-100, 100)},
        ),
    ),
    Claim(
        "guidance",
        "Without wavelet guidance shapes deform.",
        whose="paper",
        where="project page, component study (pictures only)",
        quantity="agreement with the native picture, guided minus SDEdit of the same steps",
        unit="dB",
        margin=1.0,
        reason="a quarter more squared error is hardly seen",
        conditions=_both(decides="known", open={"spread": 1.2}, known={"spread": 1.2}),
    ),
    Claim(
        "sharpening",
        "Without sharpening pictures are blurrier.",
        whose="paper",
        where="project page, component study (pictures only)",
        quantity="energy above the native picture's highest frequency, sharpened over unsharpened",
        unit="%",
        margin=10.0,
        reason="a tenth of the energy is a twentieth of the contrast of edges",
        scale="log",
        conditions=_both(decides="known", open={"spread": 8.0}, known={"spread": 6.0}),
    ),
    Claim(
        "enlarging",
        "Its pictures lie closer to true ones than those that were merely enlarged.",
        whose="ours",
        quantity="Fréchet distance to test images, DiffuseHigh below bicubic",
        unit="%",
        margin=10.0,
        reason="the pilot's sets of true images differ by as much",
        scale="log",
        better="less",
        conditions=(Condition(BED_NAMES["known"], n=20, spread=10.0, decides=True),),
    ),
    Claim(
        "searched",
        "Guidance lowers the distance also where SDEdit's steps and sharpening are searched.",
        whose="ours",
        quantity="Fréchet distance, best guided setting below best SDEdit, of as many settings",
        unit="%",
        margin=10.0,
        reason="as for enlarging",
        scale="log",
        better="less",
        conditions=(Condition(BED_NAMES["known"], n=20, spread=12.0, decides=True),),
    ),
    Claim(
        "network",
        "The network adds what sharpening alone cannot.",
        whose="ours",
        quantity="Fréchet distance, best guided setting below best sharpening, of as many settings",
        unit="%",
        margin=10.0,
        reason="as for enlarging",
        scale="log",
        better="less",
        conditions=(Condition(BED_NAMES["known"], n=20, spread=12.0, decides=True),),
    ),
)


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    search = sorted({int(seed) for seed in found["search"].seed})

    def one(where: str, quantity: str, ours: str, theirs: str, control: str,
            nothing: str) -> Measured:  # fmt: skip
        ours_, theirs_, control_, nothing_ = (
            found.values(where, f"{name}: {quantity}") for name in (ours, theirs, control, nothing)
        )
        return Measured(ours_, theirs_, control=control_, nothing=nothing_,
                        blocks=found.blocks(where), tuning_seeds=search)  # fmt: skip

    def both(*words: str) -> dict[str, Measured]:
        return {BED_NAMES[where]: one(where, *words) for where in enlarged.BEDS}

    def distance(ours: str, theirs: str) -> dict[str, Measured]:
        return {BED_NAMES["known"]: one("known", "frechet", ours, theirs, "truth", "bicubic")}

    return {
        "structure": both("read", "full", "direct", "bicubic", "direct"),
        "guidance": both("agreement", "full", "sdedit", "sharpened", "direct"),
        "sharpening": both("fine", "full", "unsharpened", "sharpened", "bicubic"),
        "enlarging": distance("full", "bicubic"),
        "searched": distance("best third", "best sdedit"),
        "network": distance("best third", "best sharpened"),
    }


def facts(found: Found) -> list[Fact]:
    """Identities, checked on random pictures and with the network of one seed."""
    draws = generator(0, "facts")
    guide, other = torch.rand(2, 8, 1, 16, 16, generator=draws, dtype=torch.float64)
    held = swap_low(other, dwt(guide, "haar").low, "haar")
    off = float((F.avg_pool2d(held, 2) - F.avg_pool2d(guide, 2)).abs().max())
    this = bed("known", found.scale)
    drawn = Drawn(this, SHOWN_SEED, 4)
    every = setting("every", method().renoised, 1.0)
    made = drawn.high(every)
    wanted = every.guide(drawn.native, 2 * this.side).picture
    # the last prediction is the picture itself, since the last level holds no noise
    end = float((F.avg_pool2d(made, 2) - F.avg_pool2d(wanted, 2)).abs().max())
    return [
        Fact("means", "With Haar, replacing the low band sets the means of 2 x 2 pixels and "
             "nothing else.", off < 1e-12, off, "largest distance"),
        Fact("exact", "Guided in every step, the result has the guide's means of 2 x 2 pixels.",
             end < 1e-5, end, "largest distance"),
    ]  # fmt: skip


LAB = Lab(
    slug="diffusehigh",
    part="generate",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
