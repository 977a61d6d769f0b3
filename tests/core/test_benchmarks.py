"""A benchmark keeps what it measured when one of its rows fails."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import benchmarks.__main__ as command
from benchmarks import adapters, choices
from benchmarks.rows import each, log
from benchmarks.timing import alternate, compare, emit
from toolkit import LoRA, LoRAGGPO, LoRAMGPO
from toolkit.labs.lab import ROOT
from toolkit.labs.select import which_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_log(monkeypatch):
    monkeypatch.setattr(log, "path", None)
    monkeypatch.setattr(log, "failures", [])


def breaks_after(calls):
    """A function that works ``calls`` times and then raises."""
    left = [calls]

    def call():
        left[0] -= 1
        if left[0] < 0:
            raise FloatingPointError("not finite")

    return call


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_an_arm_that_raises_keeps_the_times_of_the_others(calls):
    counts = []
    arms = {"fine": lambda: counts.append(1), "broken": breaks_after(calls), "last": lambda: None}
    times = alternate(arms, rounds=4, warmup=1, device=CPU)
    assert len(times["fine"]) == len(times["last"]) == 4
    assert len(counts) == 5
    with pytest.raises(RuntimeError, match="broken: FloatingPointError: not finite"):
        times["broken"]
    with pytest.raises(KeyError):
        times["unheard of"]


def test_what_cannot_be_made_leaves_the_others():
    kept = each({"broken": breaks_after(0), "fine": lambda: 3})
    assert kept == {"fine": 3}
    with pytest.raises(RuntimeError, match="broken: FloatingPointError"):
        kept["broken"]


def suite(name, failing):
    """A suite of three rows, of which one fails; with ``failing`` it then fails as a whole."""

    def main(rounds, threads):
        arms = {"one": lambda: None, "two": breaks_after(0), "three": lambda: None}
        times = alternate(arms, rounds, 0, CPU)
        for arm in arms:
            with log.attempt(f"{name}/{arm}"):
                emit(compare(f"{name}/{arm}", times[arm], times["one"], "ms", threads=threads))
        if failing:
            raise ValueError("no network")

    return SimpleNamespace(main=main)


def run(monkeypatch, path, failing):
    for name in ("first", "second"):
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", suite(name, failing))
    monkeypatch.setattr(command, "suites", lambda: ["first", "second"])
    # times of nothing may be 0, and ratios are of no interest here
    monkeypatch.setattr("benchmarks.timing.time", SimpleNamespace(
        perf_counter=iter(range(10**6)).__next__))  # fmt: skip
    return command.main(["--rounds", "2", "--rows", str(path)])


@pytest.mark.parametrize("failing", [False, True])
def test_a_row_that_raises_keeps_the_others_and_is_named_at_the_end(
    failing, monkeypatch, tmp_path, capsys
):
    path = tmp_path / "kept" / "rows.jsonl"
    assert run(monkeypatch, path, failing) == 1
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [r["name"] for r in rows] == ["first/one", "first/three", "second/one", "second/three"]
    assert path.read_text() == shown.out
    named = [line.partition(": ")[2] for line in shown.err.splitlines()]
    wanted = "{0}/two: RuntimeError: two: FloatingPointError: not finite"
    whole = ["{0}: ValueError: no network"] if failing else []
    assert named == [line.format(s) for s in ("first", "second") for line in (wanted, *whole)]


def test_a_run_without_failures_ends_well_and_begins_the_file_anew(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    log.failures.append("of an earlier run")
    monkeypatch.setattr(command, "suites", lambda: [])
    assert command.main(["--rows", str(path)]) == 0
    assert path.read_text() == ""


def test_times_of_choices_name_every_arm_and_full_training_is_one(capsys):
    choices.measure("abstracts", rounds=2, scale="ci", day="today")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["choice"] for row in rows] == list(which_weights.ARMS["abstracts"])
    assert all(row["ours"] > 0 and row["day"] == "today" for row in rows)
    assert rows[-1]["choice"] == "full"
    assert rows[-1]["ratio"] == 1.0


def test_the_times_that_the_page_shows_are_of_its_arms():
    lines = (ROOT / "book" / "results" / "times" / "choices.jsonl").read_text().splitlines()
    kept = [(row["task"], row["choice"]) for row in map(json.loads, lines)]
    assert kept == [(t, arm) for t in which_weights.PAIR for arm in which_weights.ARMS[t]]


class Encoder(nn.Module):
    """Like BERT with random weights: it ends in a layer normalisation that changes nothing."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.encoder = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.norm = nn.LayerNorm(16)

    def forward(self, input_ids, attention_mask):
        h = self.table(input_ids)
        return SimpleNamespace(last_hidden_state=self.norm(h + self.encoder(h)))


def network():
    torch.manual_seed(0)
    ids = torch.randint(20, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return adapters.WithLoss(Encoder(), 16), batch


@pytest.mark.parametrize("like", ["paper", "code"])
def test_a_method_that_moves_by_the_inverse_gradient_trains_on_the_stand_in(like):
    base, batch = network()
    arm = adapters.ours(base, LoRAMGPO(rank=4, like=like), batch)
    for _ in range(60):
        arm.step()
        norms = [p.grad.norm() for p in arm.model.parameters() if p.grad is not None]
        assert torch.stack(norms).norm() > 1e-3  # not rounding


class Broken(LoRA):
    """Fails where it is put on a layer."""

    def build(self, *arguments):
        raise ValueError("no such layer")


def test_one_method_that_fails_keeps_the_rows_of_the_others(monkeypatch, capsys):
    base, batch = network()
    monkeypatch.setattr(adapters, "catalogue", lambda: [
        SimpleNamespace(part="lowrank", slug="lora", method=LoRA),
        SimpleNamespace(part="lowrank", slug="broken", method=Broken),
        SimpleNamespace(part="lowrank", slug="ggpo", method=LoRAGGPO),
    ])  # fmt: skip
    monkeypatch.setattr(adapters, "SPECIAL", {"diverging/late": LoRA(rank=8)})
    real = adapters.ours

    def ours(base, method, batch):
        arm = real(base, method, batch)
        if method is adapters.SPECIAL["diverging/late"]:
            arm.allocate, arm.optimizer.step = None, breaks_after(2)
        return arm

    monkeypatch.setattr(adapters, "ours", ours)
    monkeypatch.setattr(adapters, "peak_bytes", lambda step, device: step() or 1)
    adapters.against_lora(base, batch, "cpu", 2, {})
    rows = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["ggpo/step-vs-lora/cpu", "ggpo/peak-memory-vs-lora/cpu"]
    failed = [line.partition(": ")[::2] for line in log.failures]
    assert [name for name, _ in failed] == [
        "broken/step-vs-lora/cpu",
        "diverging/late-step-vs-lora/cpu",
        "broken/peak-memory-vs-lora/cpu",
        "diverging/late-peak-memory-vs-lora/cpu",
    ]
    causes = ["no such layer", "not finite"] * 2
    assert all(cause in why for (_, why), cause in zip(failed, causes, strict=True))
