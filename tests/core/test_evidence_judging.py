"""Runs become a judged claim, and experiments that could not have told are found."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from tests.core.claims_toy import arms, claim, conditions, values
from toolkit.core import evidence
from toolkit.core.evidence import Condition, Measured, best_fixed, judge


def judged(measured, **changes):
    return judge(claim(**changes), {"digits": measured})


def part(made, index=0):
    return made.conditions[index]


# ---------------------------------------------------------------- the six words, from runs
@pytest.mark.parametrize(
    ("mean", "sd", "n", "word"),
    [
        (3.0, 0.5, 20, "holds"),
        (0.9, 0.5, 20, "direction only"),
        (0.1, 0.5, 20, "no difference that matters"),
        (-3.0, 0.5, 20, "refuted here"),
        (0.5, 3.0, 20, "open"),
        (3.0, 0.5, 8, "holds"),
        (3.0, 0.5, 7, "open"),
        (-30.0, 0.5, 3, "open"),
    ],
)
def test_verdicts_from_runs(mean, sd, n, word):
    made = judged(arms(mean, sd, n))
    assert made.verdict == made.pooled == word
    assert part(made)["estimate"] == pytest.approx(mean)
    assert part(made)["sd"] == pytest.approx(sd)
    assert part(made)["n"] == n
    assert (made.n_needed is None) == (word != "open")


def test_open_says_how_many_would_settle_it():
    made = judged(arms(0.6, 3.0, 20))
    again = judged(arms(0.6, 3.0, made.n_needed))
    before = judged(arms(0.6, 3.0, made.n_needed - 1))
    assert again.verdict != "open" == before.verdict
    assert f"about {made.n_needed} repeats" in part(made)["reason"]
    assert "more than 1,000" in part(judged(arms(0.5, 90.0)))["reason"]
    few = judged(arms(3.0, 0.5, 5))
    assert part(few)["reason"].startswith("fewer than 8")
    assert few.n_needed == 8


def test_direction_and_starting_point():
    losses = arms(-3.0)
    assert judged(losses, better="less").verdict == "holds"
    assert part(judged(losses, better="less"))["estimate"] == pytest.approx(3.0)
    near = judged(arms(-0.2), than=-3.0)  # at most 2 below
    assert near.verdict == "holds"
    words = repr(evidence.ClaimsTable([near]))
    assert "margin: 1 point beyond \u22123" in words
    assert "ours: digits: -0.20 [" in words  # what was measured, not counted from -3
    alone = Measured(dict(enumerate(values(72.0).tolist())))
    assert judged(alone, than=70.0).verdict == "holds"
    assert judged(alone, than=74.0, better="less").verdict == "holds"


def test_scales():
    rng = np.random.default_rng(0)
    base = np.exp(rng.normal(-3, 2, 20))
    ratio = np.exp(values(math.log(1.3), 0.05))
    errors = Measured(dict(enumerate(base * ratio)), dict(enumerate(base)))
    change = {"scale": "log", "unit": "%", "margin": 5.0, "conditions": conditions("digits")}
    made = judged(errors, **change)
    assert part(made)["estimate"] == pytest.approx(30.0)
    assert made.verdict == "holds"
    swapped = Measured(errors.theirs, errors.ours)
    assert part(judged(swapped, better="less", **change))["estimate"] == pytest.approx(30.0)
    with pytest.raises(ValueError, match=r"digits'.*unit is 'points'"):
        judged(errors, scale="log")
    bounded = {"scale": "bounded", "conditions": conditions("digits", support=(-60, 60))}
    assert judged(arms(3.0), **bounded).verdict == "holds"
    with pytest.raises(ValueError, match=r"digits'.*outside bounds"):
        judged(arms(60.0, 2.0), **bounded)


# ---------------------------------------------------------------- not testable
def test_arms_that_are_bit_for_bit_equal_are_no_measured_zero():
    same = {seed: 90.0 + seed for seed in range(20)}
    for exact in (False, True):
        made = judged(Measured(same, dict(same), exact=exact))
        assert made.verdict == "not testable here"
        assert "bit for bit" in part(made)["reason"]


def test_zero_spread_is_no_evidence_unless_it_was_declared():
    ours, theirs = ({s: 90.0 + s + gap for s in range(20)} for gap in (3.0, 0.0))
    made = judged(Measured(ours, theirs))
    assert made.verdict == "not testable here"
    assert "not declared exact" in part(made)["reason"]
    known = judged(Measured(ours, theirs, exact=True))
    assert known.verdict == "holds"
    assert part(known)["method"] == "exact"
    with pytest.raises(ValueError, match="declared exact but differs"):
        judged(arms(3.0, exact=True))


@pytest.mark.parametrize(
    ("gain", "sd", "testable"), [(9.0, 1.0, True), (1.2, 3.0, False), (0.5, 0.01, False)]
)
def test_the_positive_control_must_beat_doing_nothing_by_the_margin(gain, sd, testable):
    nothing = dict(enumerate(np.linspace(40, 42, 10)))
    control = {s: nothing[s] + gain + (v := values(0, sd, 10))[s] * 1.0 for s in nothing}
    assert v.size == 10
    made = judged(arms(3.0, control=control, nothing=nothing))
    assert made.verdict == ("holds" if testable else "not testable here")
    assert testable or "positive control" in part(made)["reason"]
    # a loss goes down: the same control, seen from the other side
    low = judged(arms(-3.0, control=nothing, nothing=control), better="less")
    assert low.verdict == made.verdict


def test_a_control_without_two_runs_tells_nothing():
    made = judged(arms(3.0, control={0: 9.0, 1: None}, nothing={0: 1.0, 1: 1.0}))
    assert made.verdict == "not testable here"


# ---------------------------------------------------------------- runs that failed
def test_failed_runs_are_counted_and_shown_and_never_averaged():
    whole = arms(3.0, n=20)
    ours, theirs = dict(whole.ours), dict(whole.theirs)
    ours[2], ours[5], theirs[5] = math.nan, None, math.inf
    del theirs[7]
    made = judged(Measured(ours, theirs))
    assert part(made)["n"] == 17
    assert part(made)["failed"] == {"ours": 2, "theirs": 2, "of": 20}
    rest = [s for s in range(20) if s not in (2, 5, 7)]
    mean = np.mean([whole.ours[s] - whole.theirs[s] for s in rest])
    assert part(made)["estimate"] == pytest.approx(mean)
    shown = repr(evidence.ClaimsTable([made]))
    assert "2 of 20 runs of our arm failed" in shown
    assert "2 of 20 runs of the other arm failed" in shown
    assert "20 repeats were declared" in shown


def test_no_run_or_one_run():
    none = judged(Measured({0: math.nan, 1: None}, {0: 1.0, 1: 2.0}))
    assert none.verdict == "not testable here"
    assert "no result" in repr(evidence.ClaimsTable([none]))
    one = judged(Measured({0: 9.0}, {0: 1.0}))
    assert (one.verdict, part(one)["method"]) == ("open", "single")
    assert "(one run)" in repr(evidence.ClaimsTable([one]))


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: arms(1, tuning_seeds=[3, 100]), ValueError, r"seeds \[3\] were tuned on"),
        (lambda: arms(1, control={0: 1.0}), ValueError, "go together"),
        (lambda: arms(1, blocks=[range(10), range(9, 20)]), ValueError, "share seeds"),
        (lambda: arms(1, blocks=[range(10), range(10, 19)]), ValueError, r"differ by \[19\]"),
        (lambda: arms(1, blocks=[range(20)]), ValueError, "two or more"),
        (lambda: arms(1, blocks=[range(19), [19]]), ValueError, "two or more"),
        (lambda: Measured([1.0, 2.0]), TypeError, "mapping from seed"),
        (lambda: Measured({0: "90"}), TypeError, r"ours\[0\] is a str"),
        (lambda: Measured({0: True}), TypeError, r"ours\[0\] is a bool"),
        (lambda: Measured({}), ValueError, "holds no runs"),
        (lambda: Measured(pd.Series([1.0, 2.0], index=[0, 0])), TypeError, "Series"),
    ],
)
def test_bad_runs_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_tuning_seeds_are_refused_in_the_other_arm_and_in_a_grid_too():
    with pytest.raises(ValueError, match=r"seeds \[9\] were tuned on"):
        Measured({0: 1.0}, {9: 1.0}, tuning_seeds=[9])
    with pytest.raises(ValueError, match=r"seeds \[9\] were tuned on"):
        Measured({0: 1.0}, {"a": {9: 1.0}}, tuning_seeds=[9])
    with pytest.raises(ValueError, match=r"seeds \[9\] were tuned on"):
        Measured({0: 1.0}, control={9: 1.0}, nothing={8: 1.0}, tuning_seeds=[9])


def test_series_are_runs():
    whole = arms(3.0)
    made = judged(Measured(pd.Series(whole.ours), pd.Series(whole.theirs)))
    assert made.conditions == judged(whole).conditions


def test_the_same_runs_are_not_two_conditions():
    two = claim(conditions=conditions("digits", "letters"))
    with pytest.raises(ValueError, match=r"'letters' holds the same runs as 'digits'"):
        judge(two, {"digits": arms(3.0), "letters": arms(3.0)})
    with pytest.raises(ValueError, match="same runs"):  # other seed numbers do not hide it
        judge(two, {"digits": arms(3.0), "letters": arms(3.0, start=500)})
    assert judge(two, {"digits": arms(3.0), "letters": arms(3.0, seed=1)}).verdict == "holds"


def test_names_of_conditions_must_agree():
    with pytest.raises(ValueError, match="exactly the declared"):
        judge(claim(), {"letters": arms(3.0)})
    with pytest.raises(TypeError, match="give Measured"):
        judge(claim(), {"digits": {0: 1.0}})


# ---------------------------------------------------------------- several conditions
def test_conditions_combine_and_each_keeps_its_own_n():
    three = claim(conditions=(*conditions("digits", decides=True), *conditions("words", "speech")))
    runs = {"digits": arms(3.0), "words": arms(-3.0, n=8), "speech": arms(3.0, n=5)}
    made = judge(three, runs)
    assert made.verdict == "mixed"
    assert [p["n"] for p in made.conditions] == [20, 8, 5]
    assert [p["decides"] for p in made.conditions] == [True, False, False]
    shown = repr(evidence.ClaimsTable([made]))
    assert "◆ digits: " in shown
    assert all(f"(n = {n})" in shown for n in (20, 8, 5))


# ---------------------------------------------------------------- two blocks of seeds
def blocks(first, second, sd=0.3, n=10):
    a, b = arms(first, sd, n, seed=1), arms(second, sd, n, seed=2, start=100)
    return Measured(
        {**a.ours, **b.ours}, {**a.theirs, **b.theirs}, blocks=[list(a.ours), list(b.ours)]
    )


def test_blocks_that_disagree_make_a_claim_unstable_and_keep_the_pooled_verdict():
    made = judged(blocks(3.0, -1.0))
    assert made.verdict == "unstable"
    assert made.pooled in evidence.VERDICTS
    assert part(made)["blocks"] == ["holds", "refuted here"]
    assert f"all seeds together: {made.pooled}" in repr(evidence.ClaimsTable([made]))


def test_blocks_that_agree_or_cannot_tell_do_not():
    assert judged(blocks(3.0, 2.5)).verdict == "holds"
    open_block = judged(blocks(3.0, 0.8, sd=2.9))
    assert "open" in part(open_block)["blocks"]
    assert open_block.verdict == open_block.pooled
    still = blocks(3.0, -1.0)
    for seed in list(still.ours)[10:]:
        still.ours[seed], still.theirs[seed] = 50.0, 51.0
    assert judged(still).verdict != "unstable"  # a block without spread decides nothing


def test_blocks_of_four_seeds_decide_without_the_rule_of_eight():
    made = judged(blocks(3.0, -3.0, sd=0.2, n=4))
    assert part(made)["n"] == 8
    assert made.verdict == "unstable"


def test_claims_can_be_unstable_where_no_condition_is():
    first = {"verdict": "", "blocks": ["no difference that matters", "open"]}
    other = {"verdict": "", "blocks": ["open", "refuted here"]}
    assert evidence.judging.blocks_disagree([first, other])
    assert not evidence.judging.blocks_disagree([first])


# ---------------------------------------------------------------- against a grid
def grid(*means):
    return {
        value: dict(enumerate(values(mean, 0.4, 20, seed).tolist()))
        for seed, (value, mean) in enumerate(zip((0.1, 0.3, 0.5, 0.9), means, strict=True))
    }


def test_a_rule_is_judged_against_the_best_fixed_value_not_the_ends():
    rule = dict(enumerate(values(72.0, 0.4, 20, 9).tolist()))
    middle = grid(60.0, 61.0, 74.0, 60.0)
    ends = conditions("digits", grid=(0.1, 0.3, 0.5, 0.9))
    made = judged(Measured(rule, middle), conditions=ends)
    assert made.verdict == "refuted here"
    assert part(made)["fixed"] == {"value": 0.5, "of": 4, "on_edge": False}
    assert "the best of 4 fixed values, 0.5" in repr(evidence.ClaimsTable([made]))
    # against the two ends alone it would have held, and is refused
    with pytest.raises(ValueError, match="run every declared value"):
        judged(Measured(rule, {0.1: middle[0.1], 0.9: middle[0.9]}), conditions=ends)
    with pytest.raises(ValueError, match="against a grid"):
        judged(Measured(rule, middle[0.1]), conditions=ends)
    with pytest.raises(ValueError, match="three or more"):
        judged(Measured(rule, {0.1: middle[0.1], 0.9: middle[0.9]}))


def test_best_fixed_takes_the_direction_and_names_the_edge():
    assert best_fixed(grid(1, 2, 9, 3)).value == 0.5
    least = best_fixed(grid(1, 2, 9, 3), "less")
    assert (least.value, least.on_edge) == (0.1, True)
    broken = grid(1, 2, 9, 3)
    broken[0.5][3] = None
    assert best_fixed(broken).value == 0.9
    assert best_fixed(broken).means[0.5] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g[0.3].pop(3), r"grid\[0.3\] was not run on the same seeds"),
        (lambda g: [runs.update({0: None}) for runs in g.values()], "every fixed value"),
    ],
)
def test_best_fixed_refuses_unequal_numbers_of_runs(change, words):
    made = grid(1, 2, 3, 4)
    change(made)
    with pytest.raises(ValueError, match=words):
        best_fixed(made, seeds=range(20))


def test_best_fixed_wants_the_seeds_of_the_rule():
    with pytest.raises(ValueError, match="as often as"):
        best_fixed(grid(1, 2, 3, 4), seeds=range(40))


# ---------------------------------------------------------------- records
def test_a_record_is_plain_json_and_holds_what_was_declared():
    made = judged(blocks(3.0, 2.5))
    record = json.loads(json.dumps(made.record(), allow_nan=False))
    assert record["hash"] == evidence.declare([claim()]).claims["rank"]
    assert record["where"] == "section 4.2, table 3"
    assert record["margin"] == 1.0
    assert record["conditions"][0]["n"] == 20
    assert repr(evidence.ClaimsTable([record])) == repr(evidence.ClaimsTable([made]))


def test_judge_all_wants_every_claim_and_its_own_declaration():
    claims = [claim(), claim(id="other", conditions=(Condition("words", 20, 1.0),))]
    runs = {"rank": {"digits": arms(3.0)}, "other": {"words": arms(0.2)}}
    made = evidence.judge_all(claims, runs)
    assert [m.verdict for m in made] == ["holds", "no difference that matters"]
    assert not any(m.late for m in made)
    with pytest.raises(ValueError, match="exactly those"):
        evidence.judge_all(claims, {"rank": runs["rank"]})
    declaration = evidence.register(evidence.declare(claims), commit="")
    assert [m.committed for m in evidence.judge_all(claims, runs, declaration)] == [False, False]
    with pytest.raises(ValueError, match="register"):
        evidence.judge_all(claims[:1], {"rank": runs["rank"]}, declaration)
