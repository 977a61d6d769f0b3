"""Results files load in one form, tables say what was found, and the ledger counts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.core.claims_toy import arms, claim, conditions
from toolkit.core import evidence
from toolkit.core.evidence import ClaimsTable, Fact, ledger

ROOT = Path(__file__).resolve().parents[2]


def second(slug="toy", scale="cpu", claims=(), facts=(), **more):
    """A results file of schema 2."""
    return {
        "schema": 2,
        "slug": slug,
        "scale": scale,
        "claims": [made.record() for made in claims],
        "facts": [fact.record() for fact in facts],
        **more,
    }


def put(folder, record):
    (folder / f"{record['slug']}.{record['scale']}.json").write_text(json.dumps(record))


def holding(**changes):
    return evidence.judge(claim(**changes), {"digits": arms(3.0)})


def test_importing_evidence_loads_nothing_heavy():
    code = (
        "import sys; from toolkit.core import evidence, show\n"  # as each rendering of the book
        "heavy = {'torch', 'scipy', 'pandas', 'matplotlib', 'sklearn', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- loading
def test_results_load_in_one_form(tmp_path):
    put(tmp_path, second(claims=[holding()], facts=[Fact("count", "So many.", True, 384)]))
    (made,) = evidence.load_results(tmp_path)
    assert (made["schema"], made["slug"], made["scale"]) == (2, "toy", "cpu")
    assert made["claims"] == [holding().record()]
    assert made["facts"] == [
        {"id": "count", "text": "So many.", "passed": True, "value": 384, "unit": ""}
    ]
    assert evidence.load_results(tmp_path / "missing") == []


def test_results_are_ordered_by_slug_and_scale(tmp_path):
    for slug, scale in [("lora", "gpu"), ("lora", "ci"), ("adalora", "cpu")]:
        put(tmp_path, second(slug, scale))
    found = [(r["slug"], r["scale"]) for r in evidence.load_results(tmp_path)]
    assert found == [("adalora", "cpu"), ("lora", "ci"), ("lora", "gpu")]


def spoil(record, *path, value):
    *inner, last = path
    place = record
    for key in inner:
        place = place[key]
    place[last] = value
    return record


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (lambda r: "{", "not readable JSON"),
        (lambda r: "[]", "version 2"),
        (lambda r: spoil(r, "schema", value=3), "version 2"),
        (lambda r: spoil(r, "slug", value="other"), "name and content must agree"),
        (lambda r: spoil(r, "scale", value="laptop"), "name and content must agree"),
        (lambda r: spoil(r, "claims", 0, value={}), "damaged: lacks 'conditions'"),
        (lambda r: spoil(r, "claims", value={"a": 1}), "damaged"),
        (lambda r: spoil(r, "claims", 0, "verdict", value="open"), "'holds' follows"),
        (lambda r: spoil(r, "claims", 0, "margin", value=0), "smallest difference"),
        (lambda r: spoil(r, "claims", 0, "margin", value=5.0), "'no difference that matters'"),
        (
            lambda r: spoil(r, "claims", 0, "conditions", 0, "verdict", value="direction only"),
            "condition 'digits' says 'direction only'",
        ),
        (lambda r: spoil(r, "claims", 0, "conditions", 0, "n", value=5), "'open' follows"),
    ],
)
def test_damaged_and_edited_files_are_named(tmp_path, spoiled, words):
    put(tmp_path, second(claims=[holding()]))
    path = tmp_path / "toy.cpu.json"
    made = spoiled(json.loads(path.read_text()))
    path.write_text(made if isinstance(made, str) else json.dumps(made))
    with pytest.raises(ValueError, match=rf"toy\.cpu\.json.*{words}"):
        evidence.load_results(tmp_path)


def test_files_of_the_first_edition_are_refused(tmp_path):
    put(tmp_path, {"schema": 1, "slug": "old", "scale": "ci", "claims": []})
    with pytest.raises(ValueError, match=r"old\.ci\.json is not a results file of version 2"):
        evidence.load_results(tmp_path)


# ---------------------------------------------------------------- tables
def test_table_is_accessible_and_escapes():
    made = [
        holding(id="own", whose="ours", where=None, figure=None, text="Wide beats <narrow>."),
        evidence.judge(claim(where=None, figure=None), {"digits": arms(-3.0)}),
        holding(id="code", whose="code", where="layers.py, forward"),
    ]
    table = ClaimsTable(made, [Fact("count", "It trains r(m + n) numbers.", True, 384, "numbers")])
    page = table._repr_html_()
    assert page.count('<th scope="col" ') == 6
    assert page.count('<th scope="row" ') == 3
    assert "<caption>" in page
    assert 'tabindex="0"' in page
    assert "<narrow>" not in page
    assert "&lt;narrow&gt;" in page
    assert re.search(r'data-label="Whose">our own question<', page)
    assert re.search(r'data-label="Where">not read<', page)
    assert re.search(r'data-label="Margin">1 point<br><small>two pages', page)
    assert "</span> refuted here</span>" in page
    assert "384 numbers" in page
    assert page.index("the paper") < page.index("the published code") < page.index("our own")
    text = repr(table)
    assert "source: the paper; not read" in text
    assert "fact: It trains r(m + n) numbers.: true 384 numbers" in text


def test_table_marks_the_deciding_condition_late_claims_and_dropped_ones():
    two = claim(conditions=(*conditions("digits", decides=True), *conditions("words")))
    runs = {"digits": arms(3.0), "words": arms(2.0, seed=1)}
    made = evidence.judge(two, runs, late=True, committed=False)
    page = ClaimsTable([made], dropped=["gone"])._repr_html_()
    assert '<abbr title="the condition that decides">◆</abbr> digits' in page
    assert page.count("(decides)") == 1
    assert "late: added or changed after the first measurement" in page
    assert "declared, not committed" in page
    assert "Declared before measuring, then dropped: gone" in page


def test_the_table_counts_a_ratio_from_nothing_whichever_way_is_better():
    """Two per cent more loss, claimed to be at most three: the quotient is 1 / 1.02 either way."""
    theirs = {seed: 1.0 + 0.01 * seed for seed in range(20)}
    worse = {seed: 1.02 * (1 + 1e-4 * (-1) ** seed) * value for seed, value in theirs.items()}
    less = claim(unit="%", scale="log", better="less", than=-3.0)
    made = evidence.judge(less, {"digits": evidence.Measured(worse, theirs)})
    assert made.record()["conditions"][0]["estimate"] == pytest.approx(100 / 1.02 - 97, abs=1e-3)
    assert "-1.96" in repr(ClaimsTable([made]))


def test_every_verdict_has_its_own_sign():
    words = (*evidence.CLAIM_VERDICTS, "true")
    signs = {evidence.table.LOOK[word][1] for word in words}
    assert len(signs) == len(words)
    assert all(word in evidence.verdict_html(word) for word in words)


def test_nothing_says_that_a_source_gives_no_figure():
    words = "gives no " + "figure"
    files = [*ROOT.glob("toolkit/**/*.py"), *ROOT.glob("book/_ext/**/*.py")]
    files += [*ROOT.glob("book/_static/*.[cj]s*"), *ROOT.glob("book/*.md")]
    assert len(files) > 50
    assert [f.name for f in files if words in f.read_text(encoding="utf-8")] == []
    tables = [
        repr(ClaimsTable(r["claims"])) + ClaimsTable(r["claims"])._repr_html_()
        for r in evidence.load_results(ROOT / "book/results")
    ]
    assert not [table for table in tables if words in table]


# ---------------------------------------------------------------- what the ledger counts
def test_the_ledger_counts(tmp_path):
    made = [
        holding(),
        evidence.judge(claim(id="down"), {"digits": arms(-3.0)}, late=True),
        evidence.judge(claim(id="nothing"), {"digits": arms(0.1)}, committed=False),
        evidence.judge(claim(id="few"), {"digits": arms(3.0, n=5)}),
    ]
    put(tmp_path, second(claims=made, facts=[Fact("a", "A.", True), Fact("b", "B.", False)]))
    put(tmp_path, second("other", declaration={"dropped": ["x"]}))
    found = evidence.count(evidence.load_results(tmp_path))
    assert found.claims == 4
    assert found.verdicts["holds"] == found.verdicts["open"] == 1
    assert sum(found.verdicts.values()) == 4
    assert tuple(found.verdicts) == evidence.CLAIM_VERDICTS
    assert (found.late, found.uncommitted, found.unstable, found.dropped) == (1, 1, 0, 1)
    assert (found.facts, found.facts_failed) == (2, 1)
    one = evidence.verdicts.false_chance(0.5, 20, 1.0)
    assert found.false == pytest.approx(3 * one)
    assert found.missed == pytest.approx(3 * 0.025)


def test_chances_of_several_conditions_are_bounds():
    two = claim(conditions=conditions("digits", "words"))
    runs = {"digits": arms(3.0, sd=0.5), "words": arms(3.0, sd=1.5, n=12, seed=1)}
    record = evidence.judge(two, runs).record()
    each = [
        evidence.verdicts.false_chance(0.5, 20, 1.0),
        evidence.verdicts.false_chance(1.5, 12, 1),
    ]
    # a false claim needs both conditions, a missed one needs either
    assert ledger.claim_false_chance(record) == pytest.approx(min(each))
    assert ledger.claim_missed_chance(record) == pytest.approx(0.05)
    same = dict.fromkeys(range(20), 50.0)
    untestable = evidence.judge(two, runs | {"words": evidence.Measured(same, same)}).record()
    assert ledger.claim_false_chance(untestable) == 0 == ledger.claim_missed_chance(untestable)
    dead = {"control": {0: 1.0, 1: 1.5}, "nothing": {0: 1.0, 1: 1.2}}
    failing = evidence.judge(two, runs | {"words": arms(3.0, sd=1.5, seed=1, **dead)}).record()
    assert failing["conditions"][1]["sd"] > 0
    assert ledger.claim_false_chance(failing) == 0 == ledger.claim_missed_chance(failing)


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_two_conditions_are_wrong_no_more_often_than_the_ledger_says(shared):
    """Simulated claims with two conditions, independent and nearly the same."""
    rng = np.random.default_rng(3)
    n, draws = 12, 20_000
    common, own = rng.normal(size=(draws, n)), rng.normal(size=(2, draws, n))
    values = shared * common + (1 - shared) * own + 0.01 * own
    spread = values.std()
    counts = {}
    for effect in (0.0, 1.0):
        ends = [evidence.intervals.working(v + effect).ends(n) for v in values]
        words = [
            evidence.combine([evidence.verdict(*pair, 1.0, n) for pair in row])
            for row in zip(*(zip(low, high, strict=True) for low, high in ends), strict=True)
        ]
        counts[effect] = {word: words.count(word) / draws for word in set(words)}
    false = sum(counts[0.0].get(word, 0) for word in ("holds", "direction only"))
    missed = sum(counts[1.0].get(w, 0) for w in ("refuted here", "no difference that matters"))
    error = 4 * (0.025 / draws) ** 0.5
    bound = evidence.verdicts.false_chance(spread, n, 1.0)
    assert false <= bound + error
    assert missed <= 2 * evidence.verdicts.missed_chance(n) + error
    if shared:  # then the first bound is met
        assert false > 0.7 * bound
    else:  # then the second
        assert missed > 0.04
