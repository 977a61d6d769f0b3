"""Cards, answers and tables say what the records hold, and refuse what they cannot."""

from __future__ import annotations

import pandas as pd
import pytest

from tests.core.claims_toy import claim, conditions
from toolkit.core import evidence, show
from toolkit.labs.views import four_costs, gain_share


def judged(**other) -> dict:
    seeds = range(20)
    measured = evidence.Measured(
        {s: 80.0 + 0.1 * (s % 3) for s in seeds}, {s: 80.3 + 0.1 * (s % 2) for s in seeds}
    )
    declared = claim(conditions=conditions("digits"), **other)
    return evidence.judge(declared, {"digits": measured}).record()


PICTURE = show.Html("<p>picture</p>", "a picture")


def test_a_card_tells_verdict_effect_margin_and_when_to_use():
    record = judged(than=-2.0)
    card = show.card({"rank": record}, PICTURE, ["rank"], use="it is <cheap>.", avoid="it is not.")
    html = card._repr_html_()
    assert record["verdict"] in html
    assert record["text"] in html
    assert "-0.2" in html.split('card-number">')[1]  # the difference itself, not counted from -2
    assert "holds above \u22121" in html
    assert "(n\u00a0=\u00a020)" in html
    assert "it is &lt;cheap&gt;." in html
    assert html.index("picture") < html.index("We found") < html.index("Use it when")
    assert record["text"] in repr(card)


def test_a_card_says_that_blocks_disagree():
    record = judged() | {"verdict": "unstable", "pooled": "holds"}
    html = show.card({"rank": record}, PICTURE, ["rank"], use="a", avoid="b")._repr_html_()
    assert "halves of the seeds disagree, together: holds" in html


def test_a_card_may_say_a_claim_in_words_that_stand_alone():
    lines = {"rank": "On digits a higher rank helps."}
    html = show.card({"rank": judged()}, PICTURE, lines, use="a", avoid="b")._repr_html_()
    assert "On digits a higher rank helps." in html
    assert judged()["text"] not in html


def test_a_card_shows_the_condition_that_made_the_verdict():
    record = judged()
    other = record["conditions"][0] | {"name": "texts", "verdict": "refuted here", "decides": False}
    decides = record["conditions"][0] | {"decides": True, "verdict": "holds"}
    record |= {"verdict": "refuted here", "conditions": [decides, other]}
    html = show.card({"rank": record}, PICTURE, ["rank"], use="a", avoid="b")._repr_html_()
    assert "; but texts: " in html


def test_a_card_refuses_unknown_claims_and_too_many():
    with pytest.raises(KeyError, match="no claim 'x'"):
        show.card({"rank": judged()}, PICTURE, ["x"], use="a", avoid="b")
    for lines in ([], ["rank"] * 4):
        with pytest.raises(ValueError, match="lines names"):
            show.card({"rank": judged()}, PICTURE, lines, use="a", avoid="b")


def test_answers_escape_and_set_words_in_italics():
    shown = show.answer("*LoRA* is < 2 points below")
    assert shown._repr_html_() == '<p class="answer"><em>LoRA</em> is &lt; 2 points below</p>'
    assert repr(shown) == "[LoRA is < 2 points below]"
    with pytest.raises(ValueError, match="without its partner"):
        show.answer("2 * 3")


def test_costs_in_kilobytes_and_multiples():
    one = {"trained": 100, "changed": 2000, "stored_bytes": 400, "training_bytes": 1200}
    full = {name: 10 * value for name, value in one.items()}
    html = show.costs({"LoRA": one, "full": full}, "LoRA")._repr_html_()
    assert '<th scope="row">full</th>' in html
    assert '<td data-label="stored, multiple of LoRA">10</td>' in html
    assert '<td data-label="gradients and optimiser (kB)">12</td>' in html
    with pytest.raises(KeyError, match="is no arm"):
        show.costs({"LoRA": one}, "full")


def test_columns_of_words_are_told_from_columns_of_numbers():
    rows = {"a": ["+0.1 [-0.2, 0.3]", "two"], "b": ["\u2013", "3"]}
    html = show.table("x", ["number", "words"], rows)._repr_html_()
    assert html.count('class="words"') == 3
    assert '<td data-label="number">' in html


def test_a_table_with_a_cell_missing_is_refused():
    with pytest.raises(ValueError, match="row 'a'"):
        show.table("x", ["y", "z"], {"a": [1]})


RUNS = pd.DataFrame(
    [
        (arm, seed, trained, loss + 0.01 * seed)
        for arm, trained, loss in (("nothing", 0, 3.0), ("lora", 10, 2.2), ("full", 100, 2.0))
        for seed in range(8)
    ],
    columns=["arm", "seed", "trained", "loss"],
)


def test_share_of_the_gain_by_hand():
    found = gain_share(RUNS, "loss", of=100).set_index("arm")
    assert found.share["lora"] == pytest.approx(80.0)
    assert found.share["full"] == pytest.approx(100.0)
    assert found.part["lora"] == pytest.approx(10.0)
    assert "nothing" not in found.index


def test_curves_and_dots_draw_every_arm_and_keep_nothing_open():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()  # other tests of this process may have left some
    table = pd.DataFrame(
        [(a, r, s, 10 * r + s) for a in ("lora", "cut") for r in (1, 2, 4) for s in range(3)],
        columns=["arm", "rank", "seed", "test"],
    )
    level = pd.DataFrame({"arm": "full", "rank": None, "seed": range(3), "test": 50.0})
    drawn = show.curves(
        pd.concat([table, level]), "rank", "test", "arm", levels=["full"], log_x=2,
        names={"lora": "LoRA", "cut": "cut"}, xlabel="rank", ylabel="accuracy (%)", alt="three",
    )  # fmt: skip
    assert 'alt="three"' in drawn._repr_html_()
    dots = show.dots({"loss (nats)": RUNS}, {"loss (nats)": "loss"}, "arm",
                     names={"nothing": "as it is", "full": "full"}, alt="two")  # fmt: skip
    assert 'alt="two"' in dots._repr_html_()
    assert plt.get_fignums() == before


def test_the_costs_of_an_arm_hold_what_its_method_keeps_while_it_trains():
    from torch import nn

    from toolkit import AdaLoRA, LoRA

    methods = {"LoRA": LoRA(rank=2), "AdaLoRA": AdaLoRA(rank=2, target_rank=1)}
    found = four_costs(lambda: nn.Sequential(nn.Linear(6, 5)), ["0"], methods)
    assert found["LoRA"]["training_bytes"] == 12 * found["LoRA"]["trained"]
    averages = 8 * found["AdaLoRA"]["trained"]  # two of each number
    assert found["AdaLoRA"]["training_bytes"] >= 12 * found["AdaLoRA"]["trained"] + averages
    assert found["full training"]["trained"] == 6 * 5 + 5
