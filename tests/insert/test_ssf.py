"""What only SSF must satisfy: merging everywhere, closed-form gradients, places, pairs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from toolkit import SSF, LoRA, adapt, load
from toolkit.core import nets
from toolkit.insert.ssf import (
    Pair,
    give_affine,
    groups,
    interpolated,
    pairs,
    places,
    put_pairs,
    vit_count,
)

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def moved(adapted, seed: int = 3) -> None:
    """Pairs (and whatever else trains) far from their start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            p += 0.4 * torch.randn(p.shape, generator=draw, dtype=p.dtype)


def vit(width: int = 16, depth: int = 2) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    return nets.digits_transformer(width, depth, 4, 10, 2, generator=draw, dtype=DOUBLE)


def official(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The published rule: the last axis if its size is that of the pair, else axis 1."""
    if x.shape[-1] == scale.shape[0]:
        return x * scale + shift
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


# --- the map and its merging ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (2, 3, 6)),
        (nn.Linear(6, 5, bias=False), (2, 3, 6)),
        (nn.Conv2d(4, 6, 3), (2, 4, 7, 9)),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 7, 9)),
        (nn.Conv1d(4, 6, 3), (2, 4, 9)),
        (nn.LayerNorm(6), (2, 3, 6)),
        (nn.LayerNorm(6, bias=False), (2, 3, 6)),
        (nn.BatchNorm2d(6), (3, 6, 7, 9)),
        (nn.GroupNorm(2, 6), (3, 6, 7, 9)),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_pair_scales_and_shifts_channels_and_merges_exactly(layer, shape, training):
    model = nn.Sequential(copy.deepcopy(layer)).to(DOUBLE).train(training)
    plain, x = copy.deepcopy(model), drawn(*shape)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = adapt(model, SSF(), "0")
    assert torch.equal(model(x), plain(x))
    moved(adapted)
    pair = pairs(adapted)["0"]
    axis = 1 if len(shape) == 4 or isinstance(layer, nn.Conv1d) else -1
    y = model(x)
    torch.testing.assert_close(y, pair.apply(plain(x), axis), rtol=0, atol=1e-12)
    if len(shape) != 3 or axis == -1:
        torch.testing.assert_close(y, official(plain(x), *pair), rtol=0, atol=1e-12)
    adapted.merge()
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="already merged"):
        adapted.merge()
    adapted.unmerge().unload()
    new = model.state_dict()
    assert new.keys() == old.keys()
    assert all(
        torch.equal(new[k], old[k]) for k in old if "running" not in k and "batches" not in k
    )


def test_merging_a_batch_norm_in_training_changes_neither_output_nor_running_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(DOUBLE).train()
    adapted = adapt(model, SSF(), ["0", "1"])
    moved(adapted)
    merged = copy.deepcopy(adapted).merge()
    for step in range(3):
        x = drawn(5, 3, 6, 6, seed=step)
        torch.testing.assert_close(merged(x), model(x), rtol=0, atol=1e-11)
    left, right = model[1].base, merged[1]
    torch.testing.assert_close(left.running_mean, right.running_mean, rtol=0, atol=1e-11)
    torch.testing.assert_close(left.running_var, right.running_var, rtol=0, atol=1e-11)


def test_a_batch_norm_in_training_takes_away_what_the_pair_before_it_did():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-12)).to(DOUBLE).train()
    x, plain = drawn(5, 3, 6, 6), copy.deepcopy(model)
    adapted = adapt(model, SSF(), "0")
    put_pairs(adapted, {"0": Pair(drawn(4).abs() + 0.5, drawn(4, seed=1))})
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-10)
    assert (model.eval()(x) - plain.eval()(x)).abs().max() > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_fused_query_key_value_is_one_pair_of_three_widths(bias):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, bias=bias).to(DOUBLE)
    if bias:
        with torch.no_grad():
            layer.self_attn.in_proj_bias += drawn(24, seed=7)  # which starts at 0
    model = nn.Sequential(layer).eval()
    x, plain = drawn(2, 5, 8), copy.deepcopy(model)
    adapted = adapt(model, SSF(), places(model, head=[]))
    assert [n.removeprefix("0.") for n in adapted.adapters] == [
        "self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2",
    ]  # fmt: skip
    assert sum(p.numel() for p in adapted.parameters()) == 2 * (24 + 8 + 16 + 8 + 8 + 8)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    moved(adapted)
    y = model(x)
    with torch.no_grad():  # the fast path reads weights instead of calling layers
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    pair, attention = pairs(adapted)["0.self_attn"], copy.deepcopy(plain[0].self_attn)
    adapted.merge()
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model[0].self_attn.in_proj_weight, pair.gamma[:, None] * attention.in_proj_weight
    )
    rows = model[0].self_attn.in_proj_bias
    torch.testing.assert_close(rows, pair.apply(rows * 0 if not bias else attention.in_proj_bias))


def test_a_whole_transformer_merges_counts_and_comes_back(tmp_path):
    model = vit()
    plain, x = copy.deepcopy(model), drawn(4, 8, 8).abs()
    adapted = adapt(model, SSF(), places(model), train="head.*")
    assert torch.equal(model(x), plain(x))
    count = sum(p.numel() for layer in adapted.adapters.values() for p in layer.parameters())
    assert count == vit_count(16, 2) == (22 * 2 + 4) * 16
    assert vit_count(768, 12) == 205_824
    assert all(s.method.count(s.site) == 2 * s.site.rows for s in adapted.sites.values())
    model(x).square().sum().backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learning == {n for n, _ in model.named_parameters() if "gamma" in n or "beta" in n} | {
        "head.weight", "head.bias",
    }  # fmt: skip
    moved(adapted)
    y = model(x)
    adapted.save(tmp_path / "pairs.safetensors")
    torch.testing.assert_close(
        load(copy.deepcopy(plain), tmp_path / "pairs.safetensors").model(x), y
    )
    merged = adapted.merge(keep_original=False)
    torch.testing.assert_close(merged(x), y, rtol=0, atol=1e-10)
    assert merged.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("axis", [-1, 1])
def test_gradients_are_sums_over_all_but_the_channels(axis):
    layer, shape = (
        (nn.Linear(5, 4), (2, 3, 5)) if axis == -1 else (nn.Conv2d(3, 4, 2), (2, 3, 5, 6))
    )
    model = nn.Sequential(layer).to(DOUBLE)
    x, plain = drawn(*shape), copy.deepcopy(model)
    adapted = adapt(model, SSF(), "0")
    moved(adapted)
    inside = plain(x).detach()
    g = drawn(*inside.shape, seed=5)
    model(x).backward(g)
    rest = [i for i in range(g.dim()) if i != (axis % g.dim())]
    found = adapted.adapters["0"]
    torch.testing.assert_close(found.gamma.grad, (g * inside).sum(rest))
    torch.testing.assert_close(found.beta.grad, g.sum(rest))


def test_the_gradient_that_goes_on_is_scaled():
    model = nn.Sequential(nn.Linear(5, 4)).to(DOUBLE)
    plain, x, g = copy.deepcopy(model), drawn(3, 5).requires_grad_(True), drawn(3, 4, seed=1)
    adapted = adapt(model, SSF(), "0")
    moved(adapted)
    model(x).backward(g)
    gamma = pairs(adapted)["0"].gamma
    torch.testing.assert_close(x.grad, (gamma * g) @ plain[0].weight)


def test_scales_of_zero_on_the_last_layer_leave_its_shift_alone():
    model = vit(depth=1)
    adapted = adapt(model, SSF(), places(model))
    shift = drawn(16, seed=2)
    put_pairs(adapted, {"blocks.0.down": Pair(torch.zeros(16, dtype=DOUBLE), shift)})
    block = model.blocks[0]
    given = drawn(2, 5, 16)
    torch.testing.assert_close(block.down(block.up(given)), shift.expand(2, 5, 16))


@pytest.mark.parametrize("site", ["key", "query"])
def test_a_shift_of_keys_alone_cancels_in_the_softmax(site):
    model = vit(depth=1)
    plain, x = copy.deepcopy(model), drawn(3, 8, 8).abs()
    adapted = adapt(model, SSF(learn="shift"), f"*.{site}")
    moved(adapted)
    same = torch.allclose(model(x), plain(x), rtol=0, atol=1e-10)
    assert same == (site == "key")


# --- starts and halves ---------------------------------------------------------------------------


def test_the_noisy_start_is_a_normal_law_round_the_base():
    model = nn.Sequential(nn.Linear(4, 20_000))
    adapted = adapt(model, SSF(noise=0.02), generator=torch.Generator().manual_seed(0))
    pair = pairs(adapted)["0"]
    for values, middle in ((pair.gamma, 1.0), (pair.beta, 0.0)):
        assert abs(values.mean() - middle) < 1e-3
        assert abs(values.std() - 0.02) < 1e-3
    again = adapt(
        nn.Sequential(nn.Linear(4, 20_000)), SSF(noise=0.02),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(pairs(again)["0"].gamma, pair.gamma)


@pytest.mark.parametrize(("learn", "count"), [("both", 10), ("scale", 5), ("shift", 5)])
def test_halves_train_alone_and_merge(learn, count, tmp_path):
    model = nn.Sequential(nn.Linear(3, 5)).to(DOUBLE)
    plain, x = copy.deepcopy(model), drawn(4, 3)
    adapted = adapt(model, SSF(learn=learn))
    assert sum(p.numel() for p in adapted.parameters()) == count
    assert SSF(learn=learn).count(adapted.sites["0"].site) == count
    moved(adapted)
    pair, y = pairs(adapted)["0"], model(x)
    assert bool((pair.gamma == 1).all()) == (learn == "shift")
    assert bool((pair.beta == 0).all()) == (learn == "scale")
    torch.testing.assert_close(y, pair.apply(plain(x)))
    adapted.save(tmp_path / "half.safetensors")
    torch.testing.assert_close(load(plain, tmp_path / "half.safetensors").model(x), y)
    torch.testing.assert_close(adapted.merge()(x), y, rtol=0, atol=1e-12)


# --- pairs as numbers ----------------------------------------------------------------------------


def test_pairs_compose_invert_and_interpolate():
    one, two, y = Pair(drawn(4), drawn(4, seed=1)), Pair(drawn(4, seed=2), drawn(4, seed=3)), None
    y = drawn(3, 4, seed=4)
    torch.testing.assert_close(two.after(one).apply(y), two.apply(one.apply(y)))
    torch.testing.assert_close(one.inverse().apply(one.apply(y)), y)
    torch.testing.assert_close(one.at(0.25).apply(y), 0.75 * y + 0.25 * one.apply(y))
    square = drawn(2, 4, 4, seed=5)  # channel axis and last axis of one size: named, not guessed
    torch.testing.assert_close(
        one.apply(square, 1)[:, 2], one.gamma[2] * square[:, 2] + one.beta[2]
    )
    with pytest.raises(ValueError, match="name the channel axis"):
        one.apply(drawn(2, 4, 5))
    with pytest.raises(ValueError, match="channel 1 is scaled by 0"):
        Pair(torch.tensor([1.0, 0.0]), torch.zeros(2)).inverse()


def test_the_inverse_pair_undoes_a_distortion_of_a_linear_network():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).to(DOUBLE)
    x, right = drawn(4, 5), copy.deepcopy(model)
    distortion = Pair(drawn(6).abs() + 0.2, drawn(6, seed=1))
    with torch.no_grad():
        model[0].weight *= distortion.gamma[:, None]
        model[0].bias.copy_(distortion.apply(model[0].bias))
    assert (model(x) - right(x)).abs().max() > 0.1
    adapted = adapt(model, SSF(), "0")
    put_pairs(adapted, {"0": distortion.inverse()})
    torch.testing.assert_close(model(x), right(x), rtol=0, atol=1e-12)


def test_interpolated_pairs_come_back_also_after_an_error():
    model = vit(depth=1)
    plain, x = copy.deepcopy(model), drawn(3, 8, 8).abs()
    adapted = adapt(model, SSF(), places(model))
    moved(adapted)
    y = model(x)
    with interpolated(adapted, 0.0) as seen:
        torch.testing.assert_close(seen(x), plain(x))
    assert torch.equal(model(x), y)
    with pytest.raises(ZeroDivisionError), interpolated(adapted, 0.5):
        1 / 0  # noqa: B018
    assert torch.equal(model(x), y)
    with interpolated(adapted, 1.0):
        torch.testing.assert_close(model(x), y)


def test_pairs_that_do_not_fit_are_refused_and_nothing_is_written():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5)).to(DOUBLE)
    adapted = adapt(model, {"0": SSF(), "2": SSF(learn="scale")})
    good = Pair(drawn(5), drawn(5))
    for given, word in [
        ({"0": good, "1": good}, "'1' carries no SSF"),
        ({"0": good, "2": Pair(drawn(4), drawn(4))}, r"gamma of '2' has shape \(4,\)"),
        ({"0": good, "2": good}, "learns one of scale and shift"),
    ]:
        with pytest.raises(ValueError, match=word):
            put_pairs(adapted, given)
        assert torch.equal(pairs(adapted)["0"].gamma, torch.ones(5, dtype=DOUBLE))
    other = adapt(nn.Sequential(nn.Linear(3, 5)), LoRA(rank=1))
    with pytest.raises(ValueError, match="no site carries SSF"):
        pairs(other)


def test_only_matrices_decay():
    model = vit(depth=1)
    adapted = adapt(model, SSF(), places(model), train="head.*")
    wide, narrow = groups(adapted, 0.05)
    assert [p.shape for p in wide["params"]] == [model.head.weight.shape]
    assert len(narrow["params"]) == 2 * len(adapted.sites) + 1
    assert (wide["weight_decay"], narrow["weight_decay"]) == (0.05, 0.0)


# --- places --------------------------------------------------------------------------------------


def test_a_convolutional_network_takes_pairs_everywhere_but_at_its_head():
    draw = torch.Generator().manual_seed(0)
    model = nets.convnet(1, (4, 6), 3, generator=draw, dtype=DOUBLE)
    kinds = {type(m) for n, m in model.named_modules() if n in places(model)}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d}
    x = drawn(3, 1, 8, 8)
    adapted = adapt(model.eval(), SSF(), places(model))
    moved(adapted)
    y = model(x)
    torch.testing.assert_close(adapted.merge()(x), y, rtol=0, atol=1e-10)


def test_a_network_without_a_known_head_is_asked_for_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"head: Sequential has no layer named .*head='2'"):
        places(model)
    assert places(model, head="2") == ["0"]
    assert places(model, head=[]) == ["0", "2"]
    with pytest.raises(ValueError, match="head='nope' names no module"):
        places(model, head="nope")
    with pytest.raises(ValueError, match="no place for SSF outside its head"):
        places(nn.Sequential(nn.Linear(3, 4)), head="0")


class WithNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.act = nn.Linear(4, 4), nn.GELU()
        self.bare = nn.LayerNorm(4, elementwise_affine=False)
        self.root, self.table = nn.RMSNorm(4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.root(self.bare(self.act(self.body(x)))))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("act", r"act: GELU.*Places in this model: body, head$"),
        ("table", r"table: .*Places in this model: body, head$"),
        ("bare", r"'bare' is a norm without weights: give_affine"),
        ("root", r"'root' \(RMSNorm\), a norm without a place for a bias.*learn=\"scale\""),
        ("nope", r"matches no layer.*Places in this model: body, head$"),
    ],
)
def test_where_no_pair_can_stand_the_places_are_named_and_nothing_changes(target, words):
    model = WithNorms()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises((TypeError, ValueError), match=words):
        adapt(model, SSF(), ["body", target])
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


def test_a_norm_can_be_given_weights_and_a_scale_alone_needs_no_bias():
    model = WithNorms().to(DOUBLE)
    x, before = drawn(3, 4), None
    before = model(x)
    assert give_affine(model) == ["bare"]
    torch.testing.assert_close(model(x), before)
    assert give_affine(model) == []
    adapted = adapt(model, {"bare": SSF(), "root": SSF(learn="scale")})
    moved(adapted)
    y = model(x)
    torch.testing.assert_close(adapted.merge()(x), y, rtol=0, atol=1e-12)
    norms = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.GroupNorm(2, 4, affine=False))
    assert give_affine(norms) == ["0", "1"]
    assert places(norms, head=[]) == ["0", "1"]
