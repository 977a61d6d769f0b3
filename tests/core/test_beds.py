"""The shared test beds: same draws for every arm, right measures, no peeking at test data."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from toolkit import AdaLoRA, LoRA
from toolkit.core import data, evidence, nets
from toolkit.core.train import rates
from toolkit.core.train.fit import dress, fit, optimise
from toolkit.labs import trials
from toolkit.labs.beds import sentences as text_beds
from toolkit.labs.beds import tasks as beds


def test_planted_teachers_are_those_of_the_adalora_chapter() -> None:
    student, teacher = beds.planted_task(20)
    other = nets.planted_teacher((0, 6, 0, 2, 0), generator=evidence.generator(20, "teacher"))
    for one, two in zip((student, teacher), other, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)
        )
    assert not any(p.requires_grad for p in teacher.parameters())


def test_planted_error_is_zero_for_the_teacher_and_one_for_its_mean() -> None:
    _, teacher = beds.planted_task(3)
    assert beds.planted_error(teacher, teacher, 3) == 0.0
    x = torch.randn(200_000, 32, generator=torch.Generator().manual_seed(1))
    mean = teacher(x).mean(0)
    always = nn.Linear(32, 8)
    with torch.no_grad():
        always.weight.zero_()
        always.bias.copy_(mean)
    assert beds.planted_error(always, teacher, 3) == pytest.approx(1, abs=0.01)
    assert beds.planted_error(always, teacher, 3, "validation") != beds.planted_error(
        always, teacher, 3, "test"
    )


def test_full_fine_tuning_follows_a_hand_written_loop() -> None:
    _, record = beds.planted_train(None, 1e-3, 4, steps=20)
    student, teacher = beds.planted_task(4)
    x = torch.randn(20, 128, 32, generator=evidence.generator(4, "train"))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 20)
        optimizer.zero_grad()
        (student(x[step]) - teacher(x[step])).square().mean().backward()
        optimizer.step()
    assert record["test"] == pytest.approx(beds.planted_error(student, teacher, 4), rel=1e-4)
    assert record["trained"] == sum(p.numel() for p in student.parameters())


def test_training_lowers_the_error_and_tells_ranks() -> None:
    method = AdaLoRA(rank=3, total_rank=5, warmup=10, final=20, interval=5)
    adapted, record = beds.planted_train(method, 1e-2, 0, steps=100)
    student, teacher = beds.planted_task(0)
    assert record["test"] < 0.9 * beds.planted_error(student, teacher, 0)
    assert sum(record["ranks"]) <= 5
    assert record["trained"] == sum(p.numel() for p in adapted.parameters())


def test_digits_have_the_noise_asked_for() -> None:
    task = beds.digits_task(1, examples=200, noise=0.3, pretraining=5)
    changed = (task.y != task.clean).float().mean().item()
    assert 0.2 < changed < 0.3  # 60 redrawn labels, a tenth of them right by chance
    assert task.x.shape == (200, 64)
    assert torch.equal(beds.digits_task(1, examples=200, pretraining=5).clean, task.clean)
    none = beds.digits_task(1, pretraining=5)
    assert torch.equal(none.y, none.clean)
    assert len(none.y) + len(none.validation[1]) + len(none.test[1]) == 1797


def test_digits_parts_do_not_overlap() -> None:
    task = beds.digits_task(0, pretraining=5)
    rows = [{tuple(r) for r in x.tolist()} for x in (task.x, task.validation[0], task.test[0])]
    doubles = sum(len(a & b) for i, a in enumerate(rows) for b in rows[:i])
    images = data.digits()
    every = np.concatenate([images.x_train, images.x_test]).reshape(-1, 64)
    assert doubles <= len(every) - len({tuple(r) for r in every.tolist()})


def test_the_network_of_the_digits_knows_turned_digits_only() -> None:
    task = beds.digits_task(0)
    turned = task.test[0].view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
    assert beds.accuracy(task.model, (turned, task.test[1])) > 90
    assert beds.accuracy(task.model, task.test) < 40


def test_adapting_does_not_touch_the_cached_network() -> None:
    before = beds.digits_task(0, pretraining=5).model.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    beds.digits_train(None, 1e-2, 0, steps=3, examples=64)
    after = beds.digits_task(0, pretraining=5).model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize(("argument", "value"), [("examples", 0), ("examples", 1078), ("noise", 2)])
def test_digits_refuse_what_they_cannot_give(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=argument):
        beds.digits_task(0, **{argument: value})


def test_a_step_of_ones_own_replaces_the_step() -> None:
    seen = []

    def two_passes(loss, optimizer, adapted):
        loss()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        seen.append(adapted)
        return value

    usual = beds.digits_train(LoRA(rank=2), 1e-2, 0, steps=6, examples=64)[2]
    own = beds.digits_train(LoRA(rank=2), 1e-2, 0, steps=6, examples=64, step=two_passes)[2]
    assert own == usual
    assert len(seen) == 6


def test_gradient_descent_on_request() -> None:
    optimizer = optimise([nn.Parameter(torch.ones(2))], 0.1, sgd=True)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0


def test_decays_start_at_one_and_end_near_zero() -> None:
    for decay in (rates.linear, rates.cosine):
        values = [decay(t, 100) for t in range(100)]
        assert values[0] == 1
        assert 0 < values[-1] < 0.02
        assert values == sorted(values, reverse=True)


def parabola(best: float, rate: float, seed: int) -> dict[str, float]:
    miss = (math.log10(rate) - math.log10(best)) ** 2
    return {"validation": miss + 1e-3 * seed, "test": -miss}


def test_tuning_walks_on_while_the_best_lies_on_the_edge() -> None:
    arms = {"middle": {"best": 1e-2}, "far": {"best": 1e-3}, "farther": {"best": 1e-6}}
    found, every = trials.tune_all(parabola, arms, 1e-2, [0, 1])
    assert found["middle"].rate == pytest.approx(1e-2)
    assert len(found["middle"].scores) == 3
    assert found["far"].rate == pytest.approx(1e-3)
    assert not found["far"].on_edge
    assert len(found["farther"].scores) == 5
    assert found["farther"].on_edge
    assert len(every) == 2 * (3 + 5 + 5)


def test_tuning_never_looks_at_the_test_result() -> None:
    def trap(rate: float, seed: int) -> dict[str, float]:
        return {"validation": abs(math.log10(rate) + 2), "test": rate}

    found, _ = trials.tune_all(trap, {"a": {}}, 1e-2, [0])
    assert found["a"].rate == pytest.approx(1e-2)


def test_a_diverged_run_is_never_taken() -> None:
    def diverges(rate: float, seed: int) -> dict[str, float]:
        return {"validation": math.nan if rate > 0.011 else 1.0}

    found, _ = trials.tune_all(diverges, {"a": {}}, 1e-2, [0], better="max", extensions=0)
    assert found["a"].rate <= 1e-2 * 1.01


def test_a_run_that_refuses_to_go_on_counts_as_diverged() -> None:
    def refuses(rate: float, seed: int) -> dict[str, float]:
        if rate > 0.011:
            raise FloatingPointError("gradient")
        return {"validation": 1.0}

    found, every = trials.tune_all(refuses, {"a": {}}, 1e-2, [0], better="max", extensions=0)
    assert found["a"].rate <= 1e-2 * 1.01
    assert every.validation.isna().sum() == 1


def test_rows_keep_the_order_of_the_jobs() -> None:
    jobs = [{"best": 1e-2, "rate": r, "seed": s} for r in (1e-3, 1e-1) for s in (5, 6)]
    table = trials.run_all(parabola, jobs, processes=2)
    assert list(table.seed) == [5, 6, 5, 6]
    assert isinstance(table, pd.DataFrame)
    assert set(table.columns) == {"best", "rate", "seed", "validation", "test"}


def tiny_task() -> text_beds.TextTask:
    draws = torch.Generator().manual_seed(0)

    def part(n: int) -> text_beds.Sentences:
        lengths = torch.randint(3, 9, (n,), generator=draws).tolist()
        hidden = [torch.randn(length, 384, generator=draws) for length in lengths]
        return text_beds.Sentences(hidden, torch.randint(2, (n,), generator=draws))

    return text_beds.TextTask("sst2", part(32), part(8), part(8))


@pytest.fixture
def random_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two upper blocks with random weights, where the pretrained ones are not to be had."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536
    )

    def blocks(tiny: bool = False) -> text_beds.UpperBlocks:
        torch.manual_seed(0)
        return text_beds.UpperBlocks(transformers.BertModel(config).encoder.layer)

    monkeypatch.setattr(text_beds, "upper_blocks", blocks)


@pytest.mark.parametrize("method", [LoRA(rank=2), None])
def test_text_training_moves_the_blocks_and_repeats(random_blocks: None, method: object) -> None:
    task = tiny_task()
    with torch.random.fork_rng():
        runs = [text_beds.text_train(task, method, 1e-3, 0, steps=3, batch=8) for _ in range(2)]
        fresh = text_beds.upper_blocks()
    assert runs[0][2] == runs[1][2]
    assert set(runs[0][2]) == {"validation", "test", "trained"}
    x, mask = torch.randn(2, 5, 384), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        assert not torch.equal(runs[0][0](x, mask), fresh(x, mask))
    if method is not None:
        assert len(runs[0][1].sites) == 2 * len(text_beds.KINDS)


def test_padding_does_not_change_what_the_blocks_say(random_blocks: None) -> None:
    task = tiny_task()
    with torch.random.fork_rng():
        model = text_beds.upper_blocks().eval()
    head = nn.Linear(384, 2)
    together = text_beds._padded(task.test, list(range(8)))
    with torch.no_grad():
        scores = text_beds._scores(model, head, *together[:2])
        for i in range(8):
            alone = text_beds._scores(model, head, *text_beds._padded(task.test, [i])[:2])
            torch.testing.assert_close(alone[0], scores[i], rtol=1e-4, atol=1e-4)


def test_the_split_at_the_frozen_blocks_is_the_encoder_itself() -> None:
    try:
        encoder, _ = text_beds.encoder()
    except (ImportError, RuntimeError, ValueError):
        pytest.skip("the pretrained encoder is not installed")
    ids = torch.tensor([[101, 2023, 2003, 1037, 3231, 102], [101, 7592, 102, 0, 0, 0]])
    mask = (ids != 0).long()
    hidden = text_beds._lower(encoder, [ids[0].tolist(), ids[1, :3].tolist()])
    padded = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    with torch.no_grad():
        whole = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        parts = text_beds.upper_blocks()(padded, mask.bool())
    torch.testing.assert_close(parts[mask.bool()], whole[mask.bool()], rtol=1e-3, atol=1e-4)


def test_unknown_text_task_is_named() -> None:
    with pytest.raises(ValueError, match="sst3"):
        text_beds.text_task("sst3", train=2, validation=1, test=1, seed=0)


def test_named_parameters_train_alone_or_beside_a_method() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    handle, parameters = dress(model, None, 0, train=("2",))
    assert handle is None
    assert [id(p) for p in parameters] == [id(p) for p in model[2].parameters()]
    assert not model[0].weight.requires_grad
    with pytest.raises(ValueError, match="nowhere"):
        dress(model, None, 0, train=("nowhere",))
    handle, parameters = dress(model, LoRA(rank=1), 0, train=("2",))
    assert list(handle.sites) == ["0"]
    assert any(p is model[2].weight for p in parameters)


def test_statistics_stay_when_the_model_is_not_put_into_training_mode() -> None:
    for training in (False, True):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
        batches = [(torch.randn(8, 3) + 5, torch.zeros(8, dtype=torch.int64))] * 2
        fit(
            model, None, 1e-3, 0, batches, nn.functional.cross_entropy, steps=2,
            decay=rates.cosine, train=("1",), training=training,
        )  # fmt: skip
        assert (model[0].running_mean.abs().max() > 0.1) == training
