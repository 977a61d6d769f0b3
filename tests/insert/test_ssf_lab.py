"""What SSF's lab relies on: nested draws, equal counts, warps that pairs undo or cannot."""

from __future__ import annotations

import copy

import pytest
import torch

from toolkit import SSF, adapt
from toolkit.insert.ssf import put_pairs, vit_count
from toolkit.labs.insert import ssf as lab
from toolkit.labs.insert.channels import shots, warped


def test_few_images_are_among_many_and_classes_are_equal():
    few, many = (shots.drawn(3, k, "rotated", "ci") for k in (2, 4))
    assert few[1].bincount().tolist() == [2] * 10
    rows = {x.numpy().tobytes() for x in many[0]}
    assert all(x.numpy().tobytes() in rows for x in few[0])
    assert not torch.equal(shots.drawn(4, 2, "rotated", "ci")[0], few[0])
    with pytest.raises(ValueError, match="shots=900: class 0 has"):
        shots.drawn(3, 900, "rotated", "ci")


def test_ssf_and_lora_train_as_many_numbers_and_halves_half():
    trained = {how: shots.learn(how, 1e-2, 0, 2, "rotated", "ci")[2] for how in shots_arms()}
    this, head = shots.size("ci"), 10 * (shots.size("ci").width + 1)
    assert trained["ssf"] - head == vit_count(this.width, this.depth)
    assert trained["lora"] == trained["noisy"] == trained["ssf"]
    assert trained["scale"] == trained["shift"] == (trained["ssf"] - head) // 2 + head
    assert trained["head"] == head


def shots_arms() -> list[str]:
    return [*lab.TURNED, *lab.EXTRA]


@pytest.mark.parametrize("warp", warped.WARPS)
def test_a_warp_is_undone_by_its_inverse_pairs_where_there_are_any(warp):
    task = warped.task(warp, 0, 10)
    x = task.test[0]
    assert (task.warped(x) - task.base(x)).abs().max() > 0.1
    assert bool(task.pairs) == (warp == "channels")
    assert task.train[1].bincount().tolist() == [warped.PER_CLASS] * 10
    if task.pairs:
        mended = adapt(copy.deepcopy(task.warped), SSF(), warped.SITES)
        put_pairs(mended, {name: pair.inverse() for name, pair in task.pairs.items()})
        torch.testing.assert_close(mended(x), task.base(x), rtol=1e-3, atol=1e-3)


def test_ssf_and_lora_have_as_many_numbers_on_the_warped_network():
    task = warped.task("channels", 0, 10)
    counts = {how: warped.repaired(task, how, 1e-2, 0, 1)[2] for how in ("ssf", "lora", "scale")}
    assert counts == {"ssf": 256, "lora": 256, "scale": 128}


def test_parts_of_the_pairs_cover_all_sites_and_leave_the_others():
    _, adapted, _ = shots.learn("ssf", 0.1, 0, 2, "rotated", "ci")
    names = list(adapted.adapters)
    kinds = [shots.among(names, group) for group in shots.GROUPS if group != "all"]
    every = [name for kind in kinds for name in kind]
    assert sorted(every) == sorted(shots.among(names, "all")) == sorted(names)
    whole, part = (shots.partly(adapted, "norms", t) for t in (1.0, 0.0))
    for name in names:
        assert torch.equal(whole[name].gamma, part[name].gamma) == ("norm" not in name)


def test_the_pair_that_undoes_inverted_grey_is_exact():
    model = shots.network("ci").double()
    adapted = adapt(copy.deepcopy(model), SSF(), ["embed"])
    put_pairs(adapted, {"embed": shots.upright_again(model)})
    x = torch.rand(3, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(adapted(1 - x), model(x))


def test_the_head_may_have_a_rate_of_its_own():
    def states(**more):
        return shots.learn("ssf", 1e-2, 0, 2, "rotated", "ci", **more)[0].state_dict()

    def head(state):
        return {name: value for name, value in state.items() if name.startswith("head")}

    one, same, still = states(), states(head_rate=1e-2), states(head_rate=0.0)
    assert all(torch.equal(one[name], same[name]) for name in one)
    before = shots.network("ci").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in head(still).items())
    moved = [value for name, value in still.items() if name.endswith("gamma")]
    assert moved
    assert all((value != 1).any() for value in moved)
