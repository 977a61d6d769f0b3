"""The reference tables: fair searches, paired differences, and what n seeds settle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from toolkit.labs.beds import __main__ as command
from toolkit.labs.beds import arms, reference

RESULTS = Path(__file__).resolve().parents[2] / "book" / "results" / "beds"


def test_the_factor_is_that_of_a_paired_t_test() -> None:
    found = [reference.factor(n) for n in (3, 5, 8, 10, 20)]
    assert found == pytest.approx([3.26, 1.68, 1.16, 1.00, 0.66], abs=0.01)


def test_the_factor_gives_the_power_it_names() -> None:
    from scipy import stats

    draws = np.random.default_rng(0).normal(reference.factor(8), 1, (20_000, 8))
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(
        0.8, abs=0.01
    )


def made() -> dict:
    rng = np.random.default_rng(0)
    jobs = [
        {"args": {"arm": arm, "rate": 1e-3, "seed": seed, "split": split},
         "record": {"test": 10.0 * place + split + rng.normal(), "trained": place}}
        for seed in (4, 2, 7) for split in (0, 1) for place, arm in enumerate(arms.NAMES)
    ]  # fmt: skip
    return {"experiments": {"toy": {"jobs": jobs}}}


def test_splits_are_averaged_and_seeds_paired() -> None:
    found = made()
    values = reference.per_seed(found, "test")
    mine = [j["record"]["test"] for j in found["experiments"]["toy"]["jobs"]
            if j["args"]["arm"] == "lora" and j["args"]["seed"] == 2]  # fmt: skip
    assert values["lora"][0] == pytest.approx(np.mean(mine))
    row = reference.differences(found).iloc[1]
    gap = values["lora"] - values["head"]
    assert float(row["mean"]) == pytest.approx(gap.mean(), abs=1e-3)
    assert float(row["8 seeds settle"]) == pytest.approx(
        reference.factor(8) * gap.std(ddof=1), abs=1e-3
    )


def test_tuning_seeds_are_never_reported() -> None:
    with pytest.raises(ValueError, match="1001"):
        reference.measure("characters", "ci", [0, 1001])
    with pytest.raises(ValueError, match="bed"):
        reference.bed("cola")


def test_the_search_is_the_same_for_every_arm_and_sees_validation_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def adapt(arm, rate, seed, scale, split, parts):
        seen.append((arm, rate, seed, parts))
        best = {"head": 0.08}.get(arm, 0.004)  # for the head two steps beyond the first rates
        return {"validation": abs(np.log(rate / best))}

    module, _ = reference.bed("characters")
    monkeypatch.setattr(module, "adapt", adapt)
    monkeypatch.setattr(module, "START", dict.fromkeys(arms.NAMES[1:], 0.01))
    found = reference.tune("characters", "cpu")
    assert {parts for *_, parts in seen} == {("validation",)}
    assert {seed for _, _, seed, _ in seen} == set(reference.TUNING_SEEDS)
    assert found["head"]["rate"] == pytest.approx(0.08)
    assert not any(arm["edge"] for arm in found.values())
    for arm in arms.NAMES[1:]:
        rates = sorted({rate for name, rate, *_ in seen if name == arm})
        assert np.allclose(np.diff(np.log2(rates)), 1)


def test_a_measurement_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["texts", "--scale", "ci", "--to", str(tmp_path), "--jobs", "1"]
    command.main([*told, "--seeds", "2"])
    printed = capsys.readouterr().out
    assert all(title in printed for title in arms.TITLES.values())
    found = json.loads((tmp_path / "beds" / "texts.ci.json").read_text())
    assert found["schema"] == 2
    assert found["provenance"][0]["threads"] == 1
    jobs = found["experiments"]["texts"]["jobs"]
    assert len(jobs) == 2 * len(arms.NAMES)
    times = tmp_path / "times" / "beds" / "texts.ci.json"
    assert len(json.loads(times.read_text())["jobs"]) == len(jobs)
    command.main([*told, "--seeds", "3"])
    more = json.loads((tmp_path / "beds" / "texts.ci.json").read_text())
    assert more["experiments"]["texts"]["jobs"][: len(jobs)] == jobs  # kept, not run again
    assert len(json.loads(times.read_text())["jobs"]) == 3 * len(arms.NAMES)
    with pytest.raises(SystemExit):
        command.main([*told, "--seeds", "1"])


@pytest.mark.parametrize("name", sorted(reference.TUNED))
def test_committed_rates_are_those_found_and_not_on_the_edge(name: str) -> None:
    tuned = json.loads((RESULTS / f"{name}.cpu.tuning.json").read_text(encoding="utf-8"))
    assert set(tuned) == set(arms.NAMES[1:])
    for arm, found in tuned.items():
        assert reference.TUNED[name][arm] == pytest.approx(found["rate"]), arm
        assert not found["edge"], arm
        assert found["rate"] == pytest.approx(
            float(min(found["scores"], key=found["scores"].__getitem__)), rel=1e-3
        )
        assert found["seeds"] == list(reference.TUNING_SEEDS)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.cpu.json")), ids=lambda path: path.stem)
def test_stored_results_hold_every_arm_at_its_rate_for_every_seed(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    ((name, experiment),) = found["experiments"].items()
    seeds = found["seeds"][name]
    assert len(seeds) >= 8
    assert [job["args"] for job in experiment["jobs"]] == reference.jobs(name, "cpu", seeds)
