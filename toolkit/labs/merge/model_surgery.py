"""What is measured about Model Surgery: a small gated network that answers rude texts rudely.

Each seed draws a language of 85 words with facts in it, trains a network on texts that are half
polite and half rude, and fits a probe. Every arm then gets sixteen strengths to make what follows
rude prompts less rude, at a price of 0.05 nats per word of neutral texts at most; strengths are
chosen on validation texts and told on others.
"""

from __future__ import annotations

from typing import Any

import torch

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.merge.manners import arms
from toolkit.labs.merge.manners.network import judges, manners
from toolkit.merge.model_surgery import ModelSurgery

BINS = 40
"""Of the histogram of cosines, from -1 to 1."""
SHOWN = (0.2, 4.0)
"""Share and strength at which the mechanism is looked at."""
STARTS = {"full": 1e-3, "lora": 4e-3}
"""Middles of the first rates tried."""
KEPT = ("rude", "polite", "damage", "facts")


def tuning_run(arm: str, rate: float, seed: int, scale: str) -> dict[str, Any]:
    """Fine-tuning at one rate: rude words in a hundred on validation texts, within the budget."""
    torch.set_num_threads(1)
    this = arms.study(seed, scale)
    told = judges(this.spoken, seed, scale, "validation")
    before = manners(this.model, told)
    found = arms.validated(arms.trained(this, arm, rate, seed, scale), before, told)
    return {"validation": before["rude"] if found.chosen < 0 else found.rude[found.chosen]}


def operation(seed: int, scale: str, full: float, lora: float) -> dict[str, Any]:
    """All arms on the network of one seed, and what the probe and the edit look like.

    Args:
        seed: of language, network, probe and texts.
        scale: of the sizes.
        full, lora: rates of fine-tuning.

    Returns:
        For each arm, after its name and a colon: ``rude``, ``polite`` (words in a hundred after
        rude prompts), ``damage`` (nats per word of neutral texts) and ``facts`` (right in a
        hundred) on test texts at the chosen strength; ``chosen``; and the lists ``rudes``,
        ``polites`` and ``damages`` over the strengths on validation texts. For doing nothing the
        first four. ``held_out``, ``angle``: of the probe. ``cosines``: rows in each of 40 bins.
        ``layers``: rows chosen in each layer. ``polite_before`` ...: see
        :func:`~toolkit.labs.merge.manners.arms.opened`.
    """
    torch.set_num_threads(1)
    this = arms.study(seed, scale)
    told, test = (judges(this.spoken, seed, scale, part) for part in ("validation", "test"))
    before, base_test = manners(this.model, told), manners(this.model, test)
    nothing = arms.tested(this.model, test, base_test)
    found: dict[str, Any] = {f"nothing: {name}": nothing[name] for name in KEPT}
    found |= {"held_out": 100 * this.held_out, "angle": this.angle}
    for arm in arms.ARMS:
        if arm in arms.TUNED:
            rate = full if arm == "full" else lora
            ways = arms.trained(this, arm, rate, seed, scale)
        else:
            ways = arms.altered(this, arm, seed, scale)
        seen = arms.validated(ways, before, told)
        after = nothing
        if seen.chosen >= 0:
            with ways[seen.chosen]() as network:
                after = arms.tested(network, test, base_test)
        found |= {f"{arm}: {name}": after[name] for name in KEPT}
        found |= {f"{arm}: chosen": seen.chosen, f"{arm}: rudes": seen.rude,
                  f"{arm}: polites": seen.polite, f"{arm}: damages": seen.damage}  # fmt: skip
    share, strength = SHOWN
    scores = ModelSurgery(share=share).scores(this.model, this.directions["probe"])
    edit = arms.surgery(this, "published", share, strength, seed)
    pooled = torch.cat(list(scores.values()))
    return found | {
        "cosines": torch.histc(pooled, BINS, -1.0, 1.0).tolist(),
        "layers": [len(edit.rows.get(name, ())) for name in scores],
        **arms.opened(this, edit, seed, scale),
    }


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the lab: the search for rates of fine-tuning, then all arms on each network."""
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=40))
    seeds = [seed for block in blocks for seed in block]
    tuned = runs.tune(
        "operations", tuning_run, {arm: {"scale": scale.name} for arm in arms.TUNED}, STARTS,
        seeds=search_seeds(), reported=seeds, judged="validation", better="min", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks("operations", blocks)
    rates = {arm: tuned[arm].rate for arm in arms.TUNED}
    runs.table("operations", operation, [{"seed": s, "scale": scale.name, **rates} for s in seeds])


CLAIMS = (
    Claim(
        "effect",
        "The published edit makes what follows rude prompts less rude, at a price of five per cent "
        "of neutral perplexity at most.",
        whose="paper",
        where="abstract",
        figure="toxicity reduced by up to 90.0 %",
        unit="words in a hundred",
        better="less",
        margin=4.0,
        quantity="rude words in a hundred, edited network below the network as it is",
        reason="a tenth of the rude words there are; the paper speaks of nine tenths",
        conditions=(Condition("rude prompts", n=20, spread=6.0, decides=True),),
    ),
    Claim(
        "facts",
        "General skill is kept: of the facts fewer than five in a hundred are lost.",
        whose="paper",
        where="abstract",
        unit="points",
        than=-5.0,
        margin=2.0,
        quantity="facts right, edited network minus the network as it is, from 5 points below",
        reason="two points are little more than one fact of the 64",
        conditions=(Condition("facts", n=20, spread=3.0, decides=True),),
    ),
    Claim(
        "rows",
        "Rows that point against the probe are a better choice than as many random rows.",
        whose="ours",
        unit="words in a hundred",
        better="less",
        margin=4.0,
        quantity="rude words in a hundred, opposed rows below random rows, both along the probe",
        reason="a tenth of the rude words there are",
        conditions=(Condition("rude prompts", n=20, spread=6.0, decides=True),),
    ),
    Claim(
        "direction",
        "It is the probe's direction that counts: along a random one the same rows do worse.",
        whose="ours",
        unit="words in a hundred",
        better="less",
        margin=4.0,
        quantity="rude words in a hundred, along the probe below along a random direction",
        reason="a tenth of the rude words there are",
        conditions=(Condition("rude prompts", n=20, spread=6.0, decides=True),),
    ),
    Claim(
        "tuning",
        "LoRA, fine-tuned on the polite texts that the probe has seen, does better than the edit.",
        whose="ours",
        unit="words in a hundred",
        better="less",
        margin=4.0,
        quantity="rude words in a hundred, LoRA below the published edit",
        reason="a tenth of the rude words there are",
        conditions=(Condition("rude prompts", n=20, spread=6.0, decides=True),),
    ),
)


def outcomes(found: Found) -> Any:
    """One row for each arm and seed: ``rude``, ``polite``, ``damage``, ``facts``, ``chosen``."""
    import pandas as pd

    table, rows = found["operations"], []
    for run in table.to_dict("records"):
        for arm in ("nothing", *arms.ARMS):
            row = {name: run[f"{arm}: {name}"] for name in KEPT}
            rows.append(
                {"arm": arm, "seed": run["seed"], "chosen": run.get(f"{arm}: chosen"), **row}
            )
    return pd.DataFrame(rows)


def strengths(found: Found) -> Any:
    """One row for each arm, seed and strength on validation texts: ``rude``, ``polite``,
    ``damage``, and of an edit ``share`` and ``strength``; ``place`` counts the strengths."""
    import pandas as pd

    settings, rows = arms.settings(found.scale), []
    for run in found["operations"].to_dict("records"):
        for arm in arms.ARMS:
            seen = [run[f"{arm}: {name}"] for name in ("rudes", "polites", "damages")]
            for place, (rude, polite, damage) in enumerate(zip(*seen, strict=True)):
                share, strength = settings[place] if arm in arms.EDITS else (None, None)
                rows.append({"arm": arm, "seed": run["seed"], "place": place, "rude": rude,
                             "polite": polite, "damage": damage, "share": share,
                             "strength": strength})  # fmt: skip
    return pd.DataFrame(rows)


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    blocks, search = found.blocks("operations"), search_seeds()

    def arm(name: str, column: str = "rude") -> dict[int, float]:
        return found.values("operations", f"{name}: {column}")

    def less_rude(ours: str, theirs: str) -> dict[str, Measured]:
        return {"rude prompts": Measured(
            arm(ours), arm(theirs), control=arm("full"), nothing=arm("nothing"), blocks=blocks,
            tuning_seeds=search)}  # fmt: skip

    return {
        "effect": less_rude("published", "nothing"),
        "facts": {"facts": Measured(
            arm("published", "facts"), arm("nothing", "facts"), blocks=blocks,
            tuning_seeds=search)},
        "rows": less_rude("published", "random rows"),
        "direction": less_rude("published", "random direction"),
        "tuning": less_rude("lora", "published"),
    }  # fmt: skip


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them on the network of one seed."""
    this = arms.study(0, found.scale)
    v, method = this.directions["probe"], ModelSurgery(share=SHOWN[0])
    alpha = method.alpha_for(this.model, v, SHOWN[1])
    method = ModelSurgery(share=SHOWN[0], alpha=alpha)
    edit = method.edit(this.model, v)
    old = {name: tensor.clone() for name, tensor in this.model.state_dict().items()}
    held = edit.apply(this.model)
    new = {name: tensor.clone() for name, tensor in this.model.state_dict().items()}
    moved = sum(int((new[n] != old[n]).any(1).sum()) for n in old if old[n].dim() == 2)
    others = sum(not torch.equal(new[n], old[n]) for n in old if n not in edit.rows)
    again = ModelSurgery(share=SHOWN[0], alpha=-alpha).rows(this.model, v)
    same = sum(len(set(again.get(n, torch.tensor([])).tolist()) & set(at.tolist()))
               for n, at in edit.rows.items())  # fmt: skip
    held.undo()
    back = all(torch.equal(t, old[n]) for n, t in this.model.state_dict().items())
    return [
        Fact("moved", "Exactly the chosen rows differ after the edit, and no other tensor does.",
             moved == len(edit) and others == 0, moved, "rows"),
        Fact("undone", "Undone, every number is as it was, to the bit.", back),
        Fact("again", "Chosen anew on the edited network, the rows are others: the list must be "
             "kept.", same < len(edit), same, f"rows of {len(edit)} are chosen again"),
    ]  # fmt: skip


LAB = Lab(
    slug="model_surgery",
    part="merge",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
)
