"""The bed of experts: what is drawn, what is merged, what a search takes."""

from __future__ import annotations

import pytest
import torch

from toolkit.core.baselines.task_arithmetic import TaskArithmetic
from toolkit.core.baselines.ties import TIES
from toolkit.labs.beds import expert_sentences, experts


@pytest.fixture(scope="module", params=experts.NAMES)
def found(request) -> experts.Experts:
    return experts.load(request.param, 2e-3, 3, "ci")


def test_experts_differ_from_the_base_and_do_better_on_their_own_task(found) -> None:
    assert all(not torch.equal(model, found.base) for model in found.models)
    base = found.scores(found.base, "test", range(len(found.tasks)))
    assert sum(found.own("test")) < sum(base)


def test_a_seed_draws_the_order_and_the_same_experts_again(found) -> None:
    bed = "images" if len(found.tasks) == 4 else "texts"
    again = experts.load(bed, 2e-3, 3, "ci", count=1)
    assert again.tasks == found.tasks
    assert torch.equal(again.models[0], found.models[0])
    orders = {experts.load(bed, 2e-3, seed, "ci", count=0).tasks for seed in range(6)}
    assert len(orders) > 1


def test_a_search_takes_the_least_validation_score_of_all_it_tried(found) -> None:
    rules = [TIES(density=0.2), TIES(density=1.0)]
    best = found.search(rules, (0.5, 1.0), 2)
    assert len(best.scores) == 4
    assert found.mean(best.merged, "validation", 2) == min(best.scores)
    place = best.scores.index(min(best.scores))
    assert (best.rule, best.scale) == (place // 2, (0.5, 1.0)[place % 2])


def test_scaling_what_is_added_is_the_rule_at_that_scale(found) -> None:
    whole = found.merged(TaskArithmetic(scale=1.0), 2)
    half = found.merged(TaskArithmetic(scale=0.5), 2)
    assert torch.allclose(torch.lerp(found.base, whole, 0.5), half, atol=1e-6)


def test_no_image_judges_two_tasks() -> None:
    hands = experts._dealt(40, 4, 10, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(hands).sort().values, torch.arange(40))


def test_an_unknown_bed_is_refused() -> None:
    with pytest.raises(ValueError, match="bed: choose one of images, texts"):
        experts.load("sounds", 1e-3, 0, "ci")


@pytest.fixture(scope="module")
def sentences() -> experts.Experts:
    return expert_sentences.load(1e-3, 3, "ci")


def test_sentence_experts_share_frozen_blocks_and_keep_their_own_heads(sentences) -> None:
    assert sorted(sentences.tasks) == sorted(expert_sentences.TASKS)
    whole = expert_sentences.text_beds.encoder(True)[0]
    upper = sum(p.numel() for p in whole.encoder.layer[expert_sentences.LOWER :].parameters())
    assert {len(model) for model in (sentences.base, *sentences.models)} == {upper}
    assert all(not torch.equal(model, sentences.base) for model in sentences.models)
    heads = dict(zip(sentences.tasks, sentences.judge.heads, strict=True))
    assert heads["retrieval"] is None
    assert not torch.equal(heads["reviews"].weight, heads["questions"].weight)


def test_lower_and_upper_blocks_are_the_encoder(sentences) -> None:
    whole, tokenizer = expert_sentences.text_beds.encoder(True)
    text = "the film is good and the plot too"
    tokens = torch.tensor(tokenizer([text])["input_ids"])
    hidden = expert_sentences._below([text, "the film"], "ci", 12)
    made = expert_sentences.embedded(expert_sentences.network("ci"), hidden)
    with torch.no_grad():
        wanted = whole(tokens).last_hidden_state.mean(1)[0]
    assert torch.allclose(made[0], wanted, atol=1e-5)


def test_a_seed_tunes_the_same_sentence_expert_again(sentences) -> None:
    again = expert_sentences.load(1e-3, 3, "ci", count=1)
    assert again.tasks == sentences.tasks[:1]
    assert torch.equal(again.models[0], sentences.models[0])


def test_no_query_trains_and_judges() -> None:
    task = expert_sentences.task("retrieval", 3, "ci")
    parts = [{tuple(map(tuple, h.tolist())) for h in part.hidden} for part in task[1:]]
    assert list(map(len, parts)) == list(expert_sentences.SIZES["ci"].queries)
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_list_loss_and_ndcg_of_a_known_ranking() -> None:
    documents = torch.eye(12)
    query = torch.zeros(1, 12)
    query[0, 0], query[0, 1] = 3.0, 4.0  # cosines .6 and .8, all others 0
    relevant = torch.zeros(1, 12, dtype=torch.bool)
    relevant[0, 0] = True
    worth = 1 / torch.log2(torch.tensor(3.0))
    assert torch.allclose(expert_sentences.ndcg(query, documents, relevant), worth)
    total = torch.tensor([12.0, 16.0, *[0.0] * 10]).logsumexp(0) - 12
    assert torch.allclose(expert_sentences.list_loss(query, documents, relevant), total)
    relevant[0, 1] = True
    assert torch.allclose(expert_sentences.ndcg(query, documents, relevant), torch.ones(1))


def test_questions_are_told_by_their_mark_which_is_taken_away() -> None:
    asks = "What is it you would see?"
    text = f"ANN:\n{asks} I go to\nsee her now.\nO!\n\nBOB:\n{asks}"
    assert expert_sentences.asked(text) == [
        ("what is it you would see", 1), ("i go to see her now", 0)
    ]  # fmt: skip


def test_bad_requests_of_sentences_are_refused() -> None:
    with pytest.raises(ValueError, match="name: choose one of reviews, questions, retrieval"):
        expert_sentences.task("verse", 0, "ci")
    with pytest.raises(ValueError, match="rate: must be positive"):
        expert_sentences.load(-1.0, 0, "ci", count=1)
    with pytest.raises(ValueError, match="scale: choose"):
        expert_sentences.size("huge")
