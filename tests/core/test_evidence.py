"""Intervals cover, rules decide, claims say and save what was found."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from toolkit.core import evidence
from toolkit.core.evidence import Interval, above, below, equal, within

HOLDS, IN_PART, NOT_SEEN, REFUTED = evidence.VERDICTS


def known(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 5)


# ---------------------------------------------------------------- seeds and streams
def test_seeds_count_from_base_and_refuse_nonsense():
    assert evidence.seeds(3, base=7) == [7, 8, 9]
    with pytest.raises(ValueError, match="n = 0"):
        evidence.seeds(0)
    with pytest.raises(ValueError, match="base = -1"):
        evidence.seeds(2, base=-1)


def test_generator_streams_repeat_and_are_independent():
    def draw(*key):
        return torch.randn(4000, generator=evidence.generator(*key))

    assert torch.equal(draw(3, "init"), draw(3, "init"))
    streams = [draw(0), draw(1), draw(0, "init"), draw(0, "data"), draw(0, "init", 1)]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(5)
    assert correlation.abs().max() < 0.08  # five standard errors of 4000 draws


@pytest.mark.parametrize(("key", "error"), [((-1,), ValueError), ((0, 1.5), TypeError)])
def test_generator_refuses(key, error):
    with pytest.raises(error):
        evidence.generator(*key)


# ---------------------------------------------------------------- intervals
def test_t_interval_matches_the_textbook():
    found = evidence.interval([1.0, 2.0, 3.0])
    assert found.method == "t"
    assert found.n == 3
    assert found.estimate == 2.0
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) times s / sqrt(n), s = 1
    assert found.low == pytest.approx(2 - half)
    assert found.high == pytest.approx(2 + half)


def test_t_interval_of_three_covers_where_a_percentile_bootstrap_would_not():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(1500, 3))
    found = [evidence.interval(row) for row in samples]
    covered = np.mean([i.low <= 0 <= i.high for i in found])
    resampled = samples[:, rng.integers(0, 3, (400, 3))].mean(axis=2)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=1)
    percentile = np.mean((low <= 0) & (high >= 0))
    assert 0.93 <= covered <= 0.97
    assert percentile < 0.85


def test_ten_values_take_the_bootstrap_and_it_repeats():
    values = np.random.default_rng(1).exponential(size=40)
    first, again = evidence.interval(values), evidence.bootstrap(values)
    assert first == again
    assert first.method == "bootstrap"
    assert first.low < first.estimate < first.high
    normal = evidence.interval(values, method="t")
    assert first.high - first.estimate > first.estimate - first.low  # skewed as the data are
    assert first.high - first.low == pytest.approx(normal.high - normal.low, rel=0.35)


def test_level_widens_and_constant_values_have_no_width():
    assert evidence.interval([1, 2, 4], level=0.99).high > evidence.interval([1, 2, 4]).high
    assert evidence.bootstrap([2.0] * 12).low == 2.0 == evidence.bootstrap([2.0] * 12).high


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: evidence.interval([1.0]), "evidence.single"),
        (lambda: evidence.interval([1.0, math.nan]), r"values\[1\] is nan"),
        (lambda: evidence.interval([[1.0, 2.0]]), "one number per repeat"),
        (lambda: evidence.interval([1, 2], level=95), "level = 95"),
        (lambda: evidence.interval([1, 2], method="magic"), "method = 'magic'"),
        (lambda: evidence.bootstrap([1, 2, 3]), "fewer than 10"),
        (lambda: evidence.paired([1, 2], [1, 2, 3]), r"shape \(2,\)"),
        (lambda: evidence.paired({0: 1, 1: 2}, {0: 1, 2: 2}), "same seeds"),
        (lambda: evidence.paired({0: 1, 1: 2}, [1, 2]), "keyed by seed"),
        (lambda: Interval(1, None, 2, 3), "both"),
        (lambda: Interval(1, 3, 2, 3), "above high"),
        (lambda: evidence.exact(math.inf), "finite"),
    ],
)
def test_bad_numbers_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_paired_matches_by_seed_and_is_narrower_than_the_arms():
    noise = np.array([0.0, 5.0, -3.0, 2.0])
    a = dict(enumerate(noise + np.array([1.0, 1.1, 0.9, 1.0])))
    b = {seed: noise[seed] for seed in (3, 1, 0, 2)}
    found = evidence.paired(a, b)
    assert found.estimate == pytest.approx(1.0)
    assert found.low > 0.8
    assert found.high < 1.2
    assert found == evidence.paired(pd.Series(a), pd.Series(b))
    assert found == evidence.paired(list(a.values()), list(noise))


def test_interval_text_shows_two_digits_of_spread():
    assert Interval(0.31234, 0.12, 0.50, 3).text("points") == "0.31 [0.12, 0.50] points (n = 3)"
    assert evidence.exact(1536).text() == "1536 (exact)"
    assert evidence.single(0.5).text("nats") == "0.5 nats (one run)"


# ---------------------------------------------------------------- rules
@pytest.mark.parametrize(
    ("rule", "found", "verdict"),
    [
        (above(0), known(0.1, 0.5), HOLDS),
        (above(0), known(-0.1, 0.5), NOT_SEEN),
        (above(0), known(-0.5, -0.1), REFUTED),
        (above(0, margin=1), known(1.1, 3), HOLDS),
        (above(0, margin=1), known(0.2, 3), IN_PART),
        (above(0, margin=1), known(-0.2, 0.3), NOT_SEEN),
        (above(0, margin=1), known(-0.9, -0.2), NOT_SEEN),
        (above(0, margin=1), known(-3, -1.1), REFUTED),
        (above(0.9), known(0.91, 0.95), HOLDS),
        (above(0.9), known(0.85, 0.95), NOT_SEEN),
        (below(0.1), known(0.01, 0.05), HOLDS),
        (below(0.1), known(0.2, 0.3), REFUTED),
        (below(0, margin=1), known(-3, -0.5), IN_PART),
        (below(0, margin=1), known(-3, -1.5), HOLDS),
        (equal(1, tolerance=0.1), known(0.95, 1.05), HOLDS),
        (equal(1, tolerance=0.1), known(0.5, 1.5), NOT_SEEN),
        (equal(1, tolerance=0.1), known(1.2, 1.5), REFUTED),
        (within(0, 2), known(-3, -1), REFUTED),
        (equal(1536, 0), evidence.exact(1536), HOLDS),
        (equal(1536, 0), evidence.exact(1537), REFUTED),
        (above(0), evidence.single(1.0), IN_PART),
        (above(0), evidence.single(-9.0), NOT_SEEN),
        (above(0, margin=2), evidence.single(1.0), NOT_SEEN),
    ],
)
def test_rule_table(rule, found, verdict):
    assert rule.verdict(found) == verdict


@pytest.mark.parametrize(
    ("verdicts", "need", "expected"),
    [
        ([HOLDS, HOLDS], "all", HOLDS),
        ([HOLDS, NOT_SEEN], "all", IN_PART),
        ([HOLDS, REFUTED], "all", IN_PART),
        ([NOT_SEEN, REFUTED], "all", REFUTED),
        ([NOT_SEEN, NOT_SEEN], "all", NOT_SEEN),
        ([IN_PART], "all", IN_PART),
        ([HOLDS, REFUTED], "any", HOLDS),
        ([IN_PART, REFUTED], "any", IN_PART),
        ([NOT_SEEN, REFUTED], "any", NOT_SEEN),
        ([REFUTED, REFUTED], "any", REFUTED),
    ],
)
def test_combining_conditions(verdicts, need, expected):
    assert evidence.combine(verdicts, need) == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: above(math.nan), "low = nan"),
        (lambda: above(0, margin=-1), "margin = -1"),
        (lambda: within(2, 1), "swap"),
        (lambda: equal(0, -1), "tolerance = -1"),
        (lambda: evidence.combine([]), "one or more"),
        (lambda: evidence.combine(["maybe"]), "maybe"),
        (lambda: evidence.combine([HOLDS], need="most"), "need = 'most'"),
    ],
)
def test_bad_rules_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- claims
@pytest.fixture
def claims():
    made = evidence.Claims("lora", "ci", seeds=[0, 1, 2])
    made.judge(
        "gain", "Wide beats <narrow>.", "+2 points", known(0.5, 1.5), above(0), unit="points"
    )
    made.judge(
        "both",
        "It helps on both sets.",
        None,
        {"digits": known(1, 2), "words": known(-1, 1)},
        above(0),
        note="words is small",
    )
    return made


def test_judge_combines_and_records_each_condition(claims):
    assert claims["gain"].verdict == HOLDS
    assert claims["both"].verdict == IN_PART
    parts = {part["name"]: part["verdict"] for part in claims["both"].conditions}
    assert parts == {"digits": HOLDS, "words": NOT_SEEN}


def test_rules_may_differ_by_condition(claims):
    found = {"a": known(1, 2), "b": known(-2, -1)}
    claim = claims.judge(
        "split", "Up here, down there.", None, found, {"a": above(0), "b": below(0)}
    )
    assert claim.verdict == HOLDS


def test_judging_again_replaces_but_never_another_claim(claims):
    again = claims.judge("gain", "Wide beats <narrow>.", "+2 points", known(-2, -1), above(0))
    assert [c.id for c in claims] == ["gain", "both"]
    assert again.verdict == REFUTED
    with pytest.raises(ValueError, match="another claim"):
        claims.judge("gain", "Something else.", None, known(0, 1), above(0))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"holds": "holds"}, TypeError, "not typed by hand"),
        ({"holds": lambda found: "holds"}, TypeError, "not typed by hand"),
        ({"ours": 0.3}, TypeError, "give an Interval"),
        ({"ours": {}}, ValueError, "conditions"),
        ({"holds": {"a": above(0)}}, ValueError, "one for each"),
        ({"id": "Bad Id"}, ValueError, "hyphens"),
        ({"need": "most"}, ValueError, "need = 'most'"),
    ],
)
def test_judge_refuses(claims, change, error, words):
    call = {"id": "x", "text": "t", "paper": None, "ours": known(0, 1), "holds": above(0)} | change
    with pytest.raises(error, match=words):
        claims.judge(**call)
    assert "x" not in [claim.id for claim in claims]


def test_claims_refuse_unknown_scale_and_slug():
    with pytest.raises(ValueError, match="scale = 'laptop'"):
        evidence.Claims("lora", "laptop")
    with pytest.raises(ValueError, match="slug"):
        evidence.Claims("Lo Ra", "ci")


def test_table_is_accessible_and_escapes(claims):
    page = claims.table()._repr_html_()
    assert page.count('<th scope="col" ') == 4
    assert page.count('<th scope="row" ') == 2
    assert "<caption>" in page
    assert 'tabindex="0"' in page
    assert "<narrow>" not in page
    assert "&lt;narrow&gt;" in page
    assert "</span> holds in part</span>" in page
    assert "gives no figure" in page
    assert "rule: above 0" in page
    assert "words is small" in page
    text = repr(claims.table())
    assert "Wide beats <narrow>.: holds" in text
    assert "digits: " in text


def test_save_writes_the_schema_and_loads_again(claims, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "results"
    monkeypatch.setenv("TOOLKIT_RESULTS", str(folder))
    runs = pd.DataFrame({"rank": np.array([1, 2]), "loss": np.float32([0.5, 0.25])})
    path = claims.save(
        {
            "runs": runs,
            "weights": torch.ones(2),
            "best": np.int64(3),
            "interval": known(0, 1),
            "absent": None,
        }
    )
    assert path == folder / "lora.ci.json"
    assert [p.name for p in folder.iterdir()] == ["lora.ci.json"]
    record = json.loads(path.read_text())
    assert record["schema"] == 1
    assert record["seeds"] == [0, 1, 2]
    assert record["measurements"]["runs"] == [{"rank": 1, "loss": 0.5}, {"rank": 2, "loss": 0.25}]
    assert record["measurements"]["best"] == 3
    assert record["measurements"]["absent"] is None
    assert record["claims"][0]["conditions"][0]["rule"]["kind"] == "above"
    assert evidence.load_results(folder) == [record]


def test_save_writes_nothing_for_a_reader(claims, tmp_path, monkeypatch):
    monkeypatch.delenv("TOOLKIT_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert claims.save() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "error", "where"),
    [
        (pd.DataFrame({"loss": [1.0, math.nan]}), ValueError, r"\['runs'\]\[1\]\['loss'\] is nan"),
        ({"a": [1.0, math.inf]}, ValueError, r"\['a'\]\[1\] is inf"),
        ({"a": object()}, TypeError, r"\['a'\] is a object"),
    ],
)
def test_save_refuses_what_json_cannot_hold(claims, tmp_path, monkeypatch, bad, error, where):
    monkeypatch.setenv("TOOLKIT_RESULTS", str(tmp_path))
    claims.save({"a": 1})
    before = (tmp_path / "lora.ci.json").read_text()
    with pytest.raises(error, match=where):
        claims.save(bad)
    assert [p.name for p in tmp_path.iterdir()] == ["lora.ci.json"]
    assert (tmp_path / "lora.ci.json").read_text() == before


def test_load_results_orders_scales_and_names_bad_files(claims, tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_RESULTS", str(tmp_path))
    for slug, scale in [("lora", "gpu"), ("lora", "ci"), ("adalora", "cpu")]:
        evidence.Claims(slug, scale).save()
    found = [(r["slug"], r["scale"]) for r in evidence.load_results(tmp_path)]
    assert found == [("adalora", "cpu"), ("lora", "ci"), ("lora", "gpu")]
    assert evidence.load_results(tmp_path / "missing") == []
    good = json.loads((tmp_path / "lora.ci.json").read_text())
    for text, words in [
        ("{", "not readable"),
        ("[]", "version 1"),
        (json.dumps(good | {"slug": "x"}), "must agree"),
        (json.dumps(good | {"claims": [{"verdict": "yes"}]}), "unknown verdicts"),
    ]:
        (tmp_path / "lora.ci.json").write_text(text)
        with pytest.raises(ValueError, match=f"lora.ci.json.*{words}"):
            evidence.load_results(tmp_path)


# ---------------------------------------------------------------- tuning
def test_tune_takes_the_best_inner_rate():
    tuned = evidence.tune(lambda rate: [(math.log10(rate) + 2) ** 2] * 3, [1e-1, 1e-3, 1e-2])
    assert tuned.rate == 1e-2
    assert tuned.score == pytest.approx(0)
    assert not tuned.on_edge
    assert list(tuned.scores) == [1e-3, 1e-2, 1e-1]


@pytest.mark.parametrize(("better", "best"), [("min", 0.1), ("max", 10)])
def test_tune_warns_on_either_edge(better, best):
    with pytest.warns(UserWarning, match="edge of the grid"):
        tuned = evidence.tune(float, [0.1, 1, 10], better)
    assert tuned.rate == best
    assert tuned.on_edge


@pytest.mark.parametrize("better", ["min", "max"])
def test_tune_never_chooses_a_diverged_rate(better):
    score = {0.1: 2.0, 1: 1.0, 10: math.nan} if better == "min" else {0.1: 1, 1: 2, 10: math.inf}
    tuned = evidence.tune(score.__getitem__, [0.1, 1, 10], better)
    assert tuned.rate == 1
    assert not tuned.on_edge
    assert math.isinf(tuned.scores[10])


@pytest.mark.parametrize(
    ("rates", "better", "words"),
    [
        ([], "min", "at least one"),
        ([1, 1], "min", "none twice"),
        ([0.0, 1], "min", "positive"),
        ([1, 2], "best", "better"),
        ([1, 2], "min", "every rate"),
    ],
)
def test_tune_refuses(rates, better, words):
    with pytest.raises(ValueError, match=words):
        evidence.tune(lambda rate: math.inf, rates, better)
