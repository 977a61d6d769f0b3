"""Adapters, prefixes, prompts and mixtures: equations, counts, starts, places, bad input."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit import (
    ASTAdapter,
    ASTPrefix,
    ASTPrompts,
    DenseMoA,
    LoRA,
    SoftMoA,
    Train,
    adapt,
    load,
)
from toolkit.core import nets
from toolkit.core.adapt.sites import Site
from toolkit.core.nets.transformer import Block
from toolkit.core.seeds import generator
from toolkit.insert.petl_ast import beside, learning, sublayers
from toolkit.insert.petl_ast.inner import Bottleneck, Conformer, ConvPass
from toolkit.insert.petl_ast.mixtures import Soft
from toolkit.labs.beds.networks import Sounds, build

D, X = 16, torch.randn(2, 12, 4, generator=generator(0, "frames"))


def sounds() -> nn.Module:
    return build(lambda: Sounds(4, 12, 2, D, 3, 2, 5), generator(0, "net")).eval()


def drawn(model, method, **more):
    return adapt(model, method, generator=generator(1, "init"), **more)


def shaken(adapted, size: float = 0.3):
    """Every number of the adapters moved away from its start."""
    draw = generator(2, "shaken")
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            for p in adapter.parameters():
                p.add_(size * torch.randn(p.shape, generator=draw))
    return adapted


def hf(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A small random model of transformers and its input."""
    t = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "intermediate_size": 24,
    }  # fmt: skip
    torch.manual_seed(0)
    if name.startswith("AST"):
        config = t.ASTConfig(
            **sizes, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8
        )
        x = torch.randn(2, 16, 8, generator=generator(3, "x"))
    else:
        config = t.ViTConfig(**sizes, image_size=8, num_channels=1)
        x = torch.randn(2, 1, 8, 8, generator=generator(3, "x"))
    model = getattr(t, name)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(p.numel(), "p")))
    return model, x


def numbers(output):
    """The tensor of a model's output."""
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    return output


FAMILIES = {
    "bottleneck": ASTAdapter("bottleneck", 4),
    "conformer": ASTAdapter("conformer", 4, kernel=3),
    "even kernel": ASTAdapter("conformer", 4, kernel=8),
    "convpass": ASTAdapter("convpass", 4),
    "houlsby": ASTAdapter("bottleneck", 4, place="both"),
    "attention": ASTAdapter("conformer", 8, kernel=3, place="mhsa", order="sequential"),
    "before": ASTAdapter("bottleneck", 4, place="both", order="sequential_before"),
    "prefix": ASTPrefix(4),
    "deep": ASTPrompts(3),
    "shallow": ASTPrompts(3, deep=False),
    "soft": SoftMoA(adapters=2, reduction=4, slots=2, normalise=True),
    "soft attention": SoftMoA(adapters=2, reduction=4, place="both", inner="convpass"),
    "dense": DenseMoA(adapters=3, reduction=4),
}


# the placements, against the block written down


def plain(block, x, place, order, residual, A):
    """A block of ours with an adapter as a function, from the card's table."""
    n1 = block.norm1(x)

    def at(sub, n):
        if order == "parallel":
            return sub(n) + A(n) + (n if residual else 0)
        if order == "sequential":
            s = sub(n)
            return A(s) + (s if residual else 0)
        if order == "parallel_after":
            s = sub(n)
            return s + A(s)
        a = A(n)
        return sub(a) + a

    def feed(n):
        return block.down(F.gelu(block.up(n)))

    u = x + (at(block.attention, n1) if place in ("mhsa", "both") else block.attention(n1))
    n2 = block.norm2(u)
    return u + (at(feed, n2) if place in ("ffn", "both") else feed(n2))


@pytest.mark.parametrize("place", ["ffn", "mhsa", "both"])
@pytest.mark.parametrize(
    ("order", "residual"),
    [
        ("parallel", False), ("parallel", True), ("sequential", True), ("sequential", False),
        ("parallel_after", None), ("sequential_before", None),
    ],
)  # fmt: skip
def test_each_placement_is_the_formula_of_its_row(place, order, residual):
    model = nn.Sequential(build(lambda: Block(D, 2, 24), generator(5, "block")))
    block, x = copy.deepcopy(model[0]), torch.randn(2, 7, D, generator=generator(4, "x"))
    method = ASTAdapter("bottleneck", 4, place=place, order=order, residual=residual)
    adapted = shaken(drawn(model, method))
    at = adapted.adapters["0"].at
    one = next(iter(at.values()))
    for other in at.values():
        other.load_state_dict(one.state_dict())

    def A(z):
        return F.gelu(z @ one.down.T + one.down_bias) @ one.up.T + one.up_bias

    want = plain(block, x, place, order, residual, A)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["ffn", "mhsa", "both"])
def test_two_placements_start_at_the_base_and_two_break_it(place):
    for order, residual in itertools.product(("parallel", "sequential"), (False, True)):
        model = sounds()
        before = model(X)
        drawn(model, ASTAdapter("bottleneck", 4, place=place, order=order, residual=residual))
        gap = (model(X) - before).abs().max()
        keeps = residual == (order == "sequential")
        assert (gap == 0) if keeps else (gap > 1e-3), (order, residual)


def test_left_out_the_residual_is_the_one_that_keeps_the_base():
    for order in ("parallel", "sequential", "parallel_after"):
        assert ASTAdapter(order=order).own == (order != "parallel")


def test_parallel_after_is_sequential_with_a_residual():
    made = []
    for method in (
        ASTAdapter("conformer", 4, kernel=3, order="parallel_after", place="both"),
        ASTAdapter("conformer", 4, kernel=3, order="sequential", residual=True, place="both"),
    ):
        model = sounds()
        shaken(drawn(model, method))
        made.append(model(X))
    assert torch.equal(*made)


# the inner networks


def site(width: int = D):
    where = torch.device("meta" if width != D else "cpu")
    return Site("block", "module", width, 0, "", (), 1, torch.float32, where)


def test_the_conformer_is_that_of_torchs_own_layers():
    one = Conformer(ASTAdapter("conformer", 4, kernel=8), site(), generator(0, "c"))
    x = torch.randn(3, 9, D, generator=generator(1, "c"))
    with torch.no_grad():
        for p in one.parameters():
            p.normal_(generator=generator(p.numel(), "c"))
        norm, pw1, pw2 = nn.LayerNorm(D), nn.Conv1d(D, 8, 1), nn.Conv1d(4, D, 1)
        dw, bn = nn.Conv1d(4, 4, 8, groups=4, padding="same"), nn.BatchNorm1d(4)
        norm.load_state_dict(one.norm.state_dict())
        bn.load_state_dict(one.batch_norm.state_dict())
        for conv, w, b in (
            (pw1, one.point1[..., None], one.point1_bias), (dw, one.depth, one.depth_bias),
            (pw2, one.point2[..., None], one.point2_bias),
        ):  # fmt: skip
            conv.weight.copy_(w)
            conv.bias.copy_(b)

        def theirs(z):
            return pw2(F.silu(bn(dw(F.glu(pw1(z.transpose(1, 2)), 1))))).transpose(1, 2)

        torch.testing.assert_close(one(x), theirs(norm(x)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.batch_norm.running_var, bn.running_var)
        one.code = True
        torch.testing.assert_close(one(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_convpass_convolves_and_the_code_drops_it():
    x = torch.randn(3, 9, D, generator=generator(1, "c"))

    def quick(z):
        return z * torch.sigmoid(1.702 * z)

    for like in ("paper", "code"):
        one = ConvPass(ASTAdapter("convpass", 4, like=like), site(), generator(0, "c")).eval()
        with torch.no_grad():
            for p in one.parameters():
                p.normal_(generator=generator(p.numel(), "c"))
        z = quick(x @ one.down.T + one.down_bias)
        if like == "paper":
            z = F.conv1d(z.transpose(1, 2), one.conv, one.conv_bias, padding=1).transpose(1, 2)
        want = quick(z) @ one.up.T + one.up_bias
        torch.testing.assert_close(one(x), want, rtol=1e-4, atol=1e-4)


def test_the_order_of_tokens_matters_to_a_convolution_only():
    x, order = torch.randn(2, 9, D), torch.randperm(9, generator=generator(0, "order"))
    classes = {"bottleneck": Bottleneck, "conformer": Conformer, "convpass": ConvPass}
    for inner, cls in classes.items():
        one = cls(ASTAdapter(inner, 4, kernel=3), site(), generator(0, "c")).eval()
        with torch.no_grad():
            for p in one.parameters():
                p.normal_(generator=generator(p.numel(), "c"))
            gap = (one(x)[:, order] - one(x[:, order])).abs().max()
        assert (gap < 1e-4) == (inner == "bottleneck"), inner


@pytest.mark.parametrize("inner", ["bottleneck", "convpass", "conformer"])
def test_starts(inner):
    def ends(start, like="paper"):
        one = drawn(sounds(), ASTAdapter(inner, 4, start=start, like=like)).adapters["blocks.0"]
        one = one.at["ffn"]
        first, last = ("point1", "point2") if inner == "conformer" else ("down", "up")
        return bool(getattr(one, first).any()), bool(getattr(one, last).any())

    assert ends("identity") == ends(None) == (True, False)
    assert ends("zero") == (False, False)
    assert ends("redrawn") == ends(None, "code") == (True, True)


def test_both_matrices_at_zero_never_train():
    model = sounds()
    adapted = drawn(model, ASTAdapter("bottleneck", 4, start="zero"))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    for name, p in adapted.adapters["blocks.1"].named_parameters():
        assert bool(p.any()) == name.endswith("up_bias"), name


# counts


@pytest.mark.parametrize(
    ("method", "total"),
    [
        (ASTAdapter("bottleneck", 64), 230_544),
        (ASTAdapter("bottleneck", 64, place="both"), 461_088),
        (ASTAdapter("conformer", 96, kernel=8), 250_080),
        (ASTPrefix(24), 12 * 24 * 768),
        (ASTPrompts(25), 12 * 25 * 768),
        (SoftMoA(), 12 * 7 * (2 * 768 * 6 + 6 + 768 + 768)),
        (DenseMoA(), 12 * 7 * (2 * 768 * 6 + 6 + 768 + 769)),
    ],
    ids=str,
)
def test_counts_at_the_width_of_ast(method, total):
    assert 12 * method.count(site(768)) == total


def test_the_width_is_rounded_and_never_nothing():
    assert 12 * ASTAdapter("bottleneck", 100).count(site(768)) == 12 * (2 * 768 * 8 + 8 + 768)
    with pytest.raises(ValueError, match=r"reduction=33.*at most 31"):
        drawn(sounds(), ASTAdapter(reduction=33))


AST, VIT = "ASTForAudioClassification", "ViTForImageClassification"


@pytest.mark.parametrize(
    ("key", "name"),
    [(key, "ours") for key in FAMILIES]
    + [(key, AST) for key in ("conformer", "houlsby", "before", "prefix", "deep", "soft")]
    + [(key, VIT) for key in ("attention", "prefix", "shallow")],
)
def test_every_family_counts_learns_saves_and_comes_off(key, name, tmp_path):
    method = FAMILIES[key]
    model, x = (sounds(), X) if name == "ours" else hf(name)
    base, before = copy.deepcopy(model), numbers(model(x)).detach()
    adapted = drawn(model, method, train=beside(model, method))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    formula = sum(s.method.count(s.site) for s in adapted.sites.values())
    extra = sum(p.numel() for p in adapted.extra.values())
    assert trained == formula + extra == adapted.costs()["trained"]
    if method.info.zero_init and key != "before":
        assert torch.equal(numbers(model(x)), before)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.1)
    adapted.attach(optimizer)
    learning(adapted)
    asleep = {n for n, _ in adapted.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        out = numbers(model(x))
        (out - torch.arange(out.shape[-1])).square().mean().backward()
        awake = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
        asleep -= awake
        optimizer.step()
    # a pooled position may not see the last block's keys of other tokens; all of ours are seen
    assert not asleep, asleep
    model.eval()
    after = numbers(model(x)).detach()
    assert torch.equal(numbers(model(x)), after)
    assert (after[:, :1] - before[:, :1]).abs().max() > 1e-4
    frozen = {n: p for n, p in base.named_parameters() if n not in adapted.extra}
    now = {n.replace(".base.", "."): p for n, p in model.named_parameters()}
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    adapted.save(tmp_path / "a.safetensors")
    again = load(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert torch.equal(numbers(again.model.eval()(x)), after)
    assert torch.equal(numbers(copy.deepcopy(adapted).model(x)), after)
    with pytest.raises(TypeError, match="cannot be merged"):
        adapted.merge()
    adapted.unload()
    if not adapted.extra:
        assert torch.equal(numbers(model(x)), before)


def test_what_the_code_leaves_unused_gets_no_gradient():
    for inner, unused in (("conformer", {"norm.weight", "norm.bias"}),
                          ("convpass", {"conv", "conv_bias"})):  # fmt: skip
        model = sounds()
        adapted = drawn(model, ASTAdapter(inner, 4, like="code"))
        learning(adapted)
        model(X).square().sum().backward()
        one = adapted.adapters["blocks.0"].at["ffn"]
        assert {n for n, p in one.named_parameters() if p.grad is None} == unused


# what trains beside


def test_the_final_norm_the_norm_before_and_the_head_train_beside():
    model, _ = hf("ASTForAudioClassification")
    top = "audio_spectrogram_transformer"
    rest = {f"{top}.layernorm", "classifier.layernorm", "classifier.dense"}

    def modules(*args, **more):
        return {name.rpartition(".")[0] for name in beside(model, *args, **more)}

    assert modules() == rest
    assert modules(head=False) == {f"{top}.layernorm"}
    after = {f"{top}.layers.{i}.layernorm_after" for i in (0, 1)}
    before = {f"{top}.layers.{i}.layernorm_before" for i in (0, 1)}
    assert modules(ASTAdapter()) == rest | after
    assert modules(SoftMoA(place="mhsa")) == rest | before
    assert modules(ASTAdapter(place="both")) == rest | after | before
    assert modules(ASTPrompts()) == rest
    adapted = drawn(model, ASTAdapter(reduction=4), train=beside(model, ASTAdapter()))
    assert set(adapted.extra) == set(beside(hf("ASTForAudioClassification")[0], ASTAdapter()))


def test_norms_after_the_sum_are_not_guessed():
    layer = nn.TransformerEncoderLayer(D, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="name the norms in train"):
        beside(model, ASTAdapter())


def test_batch_norm_measures_while_the_trunk_is_in_evaluation_mode():
    model = sounds()
    adapted = drawn(model, ASTAdapter("conformer", 4, kernel=3))
    one = adapted.adapters["blocks.0"].at["ffn"]
    model.eval()
    with pytest.warns(UserWarning, match=r"learning\(adapted\)"):
        model(X).sum().backward()
    assert one.batch_norm.num_batches_tracked == 0
    assert learning(adapted) is adapted
    assert not model.blocks[0].base.norm1.training
    assert one.batch_norm.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X).sum().backward()
    assert one.batch_norm.num_batches_tracked == 1
    model.eval()
    assert torch.equal(model(X), model(X))
    assert one.batch_norm.num_batches_tracked == 1


# prefix and prompts


def test_a_prefix_adds_keys_and_values_after_the_first():
    model = nn.Sequential(build(lambda: Block(D, 2, 24), generator(5, "block")))
    block, x = copy.deepcopy(model[0]), torch.randn(2, 7, D, generator=generator(4, "x"))
    layer = next(iter(drawn(model, ASTPrefix(6)).adapters.values()))
    a, n = block.attention, block.norm1(x)
    rows = [x.new_zeros(0)] * 2
    for i, (proj, more) in enumerate(((a.key, layer.keys), (a.value, layer.values))):
        z = proj(n)
        rows[i] = torch.cat([z[:, :1], more.expand(2, 3, D), z[:, 1:]], 1)
    q, k, v = (z.view(2, -1, 2, D // 2).transpose(1, 2) for z in (a.query(n), *rows))
    probs = (q @ k.transpose(-1, -2) / (D // 2) ** 0.5).softmax(-1)
    assert probs.shape == (2, 2, 7, 10)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 2, 7))
    u = x + a.output((probs @ v).transpose(1, 2).flatten(-2))
    want = u + block.down(F.gelu(block.up(block.norm2(u))))
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_a_prefix_that_nobody_looks_at_leaves_the_base():
    model = nn.Sequential(build(lambda: Block(D, 1, 24), generator(5, "block")))
    x = torch.randn(2, 7, D, generator=generator(4, "x"))
    with torch.no_grad():
        model[0].attention.query.bias.fill_(3.0)
    before = model(x).detach()
    layer = next(iter(drawn(model, ASTPrefix(4)).adapters.values()))
    with torch.no_grad():
        layer.keys.fill_(-100.0)
    torch.testing.assert_close(model(x), before)


def test_the_uniform_start_has_the_bound_of_the_code():
    bound = (6 / (3 * 16**2 + D)) ** 0.5
    for method in (ASTPrefix(200), ASTPrompts(200)):
        adapter = next(iter(drawn(sounds(), method).adapters.values()))
        for p in adapter.parameters():
            assert 0.95 * bound < p.abs().max() <= bound


def stack(*, tokens: int, kept: bool = True, drop: bool = False, deep: bool = True):
    """AST with prompts: its last hidden state, and the same by hand."""
    model, x = hf("ASTModel")
    plain = copy.deepcopy(model)
    adapted = drawn(model, ASTPrompts(tokens, kept=kept, drop=drop, deep=deep))
    ours = [a.tokens for a in adapted.adapters.values()]
    z = plain.embeddings(x)
    if drop:
        z = torch.cat([z[:, :1], z[:, 2:]], 1)
    lengths = []
    for i, layer in enumerate(plain.layers):
        if i == 0:
            z = torch.cat([z[:, :1], ours[0].expand(2, -1, -1), z[:, 1:]], 1)
        elif deep:
            z = torch.cat([z[:, :1], ours[i].expand(2, -1, -1), z[:, 1 + tokens :]], 1)
        z = layer(z)
        lengths.append(z.shape[1])
    assert len(set(lengths)) == 1
    if deep and not kept:
        z = torch.cat([z[:, :1], z[:, 1 + tokens :]], 1)
    return model(x).last_hidden_state, plain.layernorm(z), adapted


@pytest.mark.parametrize("changes", [
    {}, {"kept": False}, {"drop": True}, {"drop": True, "kept": False}, {"deep": False},
    {"deep": False, "drop": True},
], ids=str)  # fmt: skip
def test_prompts_are_those_of_the_stack_written_down(changes):
    made, want, adapted = stack(tokens=3, **changes)
    torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)
    assert len(adapted.sites) == (1 if changes.get("deep") is False else 2)


def test_without_a_class_token_prompts_come_first():
    layer = drawn(sounds(), ASTPrompts(2)).adapters["blocks.0"]
    assert layer.after == 0
    model, _ = hf("ViTModel")
    assert next(iter(drawn(model, ASTPrompts(2)).adapters.values())).after == 1
    assert drawn(sounds(), ASTPrompts(2, after=4)).adapters["blocks.2"].after == 4


# mixtures


def test_a_soft_mixture_is_dispatch_adapters_and_combine():
    method = SoftMoA(adapters=3, reduction=4, slots=2)
    one, x = Soft(method, site(), generator(0, "s")), torch.randn(2, 7, D)
    with torch.no_grad():
        for p in one.parameters():
            p.normal_(std=0.3, generator=generator(p.numel(), "s"))
    dispatch, combine = one.weights(x)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(2, 3, 2))
    torch.testing.assert_close(combine.flatten(2).sum(-1), torch.ones(2, 7))
    want = torch.zeros_like(x)
    for b, i, p in itertools.product(range(2), range(3), range(2)):
        made = one.adapters[i]((dispatch[b, :, i, p] @ x[b])[None, None])[0, 0]
        want[b] += combine[b, :, i, p][:, None] * made
    torch.testing.assert_close(one(x), want, rtol=1e-4, atol=1e-5)


def test_one_slot_gives_every_token_the_same():
    one = Soft(SoftMoA(adapters=1, reduction=4, start="redrawn"), site(), generator(0, "s"))
    y = one(torch.randn(2, 7, D))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    assert y.any()


@pytest.mark.parametrize(("like", "axis"), [("paper", 0), ("code", 1)])
def test_normalised_slots(like, axis):
    method = SoftMoA(adapters=3, reduction=4, normalise=True, like=like)
    one, x = Soft(method, site(), generator(0, "s")), torch.randn(2, 7, D)
    slots = 2 * F.normalize(one.slots, dim=axis)
    with torch.no_grad():
        one.scale.fill_(2.0)
    logits = torch.einsum("bmd,dnp->bmnp", x, slots)
    torch.testing.assert_close(one.weights(x)[0], logits.softmax(1), rtol=1e-3, atol=1e-5)


def test_a_dense_mixture_is_weighed_by_its_router():
    model = nn.Sequential(build(lambda: Block(D, 2, 24), generator(5, "block")))
    block, x = copy.deepcopy(model[0]), torch.randn(2, 7, D, generator=generator(4, "x"))
    one = shaken(drawn(model, DenseMoA(adapters=2, reduction=4))).adapters["0"].at["ffn"]
    u = x + block.attention(block.norm1(x))
    n = block.norm2(u)
    shares = (n @ one.router.T + one.bias).softmax(-1)
    more = sum(shares[..., i, None] * one.adapters[i](n) for i in range(2))
    want = u + block.down(F.gelu(block.up(n))) + more
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [SoftMoA, DenseMoA])
def test_the_code_adds_a_mixture_at_the_attention_twice(cls):
    base = nn.Sequential(build(lambda: Block(D, 2, 24), generator(5, "block")))
    x = torch.randn(2, 7, D, generator=generator(4, "x"))
    for like, times in (("paper", 0), ("code", 1)):
        model, block = copy.deepcopy(base), base[0]
        method = cls(adapters=2, reduction=4, place="mhsa", like=like)
        one = shaken(drawn(model, method)).adapters["0"].at["mhsa"]
        n = block.norm1(x)
        u = x + block.attention(n) + one(n)
        want = u + block.down(F.gelu(block.up(block.norm2(u)))) + times * one(n)
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


# with other methods, and in other surroundings


def test_methods_inside_the_block_act_too():
    model = sounds()
    adapted = drawn(model, {
        "blocks.?": ASTAdapter("bottleneck", 4, place="both"), "*.query": LoRA(rank=2),
        "*.norm?": Train(),
    })  # fmt: skip
    before = model(X).detach()
    shaken(adapted)
    model(X).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters())
    assert (model(X) - before).abs().max() > 1e-3


def test_lora_on_query_and_value_merges_and_counts_as_on_the_card():
    model = sounds()
    adapted = shaken(drawn(model, LoRA(rank=3), targets=["*.query", "*.value"]))
    assert sum(p.numel() for p in adapted.parameters()) == 3 * 4 * D * 3
    before = model(X)
    torch.testing.assert_close(adapted.merge()(X), before, rtol=1e-4, atol=1e-5)


def test_torchs_own_encoder_layer_is_adapted():
    layer = nn.TransformerEncoderLayer(D, 2, 24, batch_first=True, norm_first=True)
    model = nn.Sequential(layer, nn.Linear(D, 3)).eval()
    x = torch.randn(2, 5, D)
    before = model(x)
    adapted = drawn(model, ASTAdapter("bottleneck", 4, place="both"))
    torch.testing.assert_close(model(x), before)
    shaken(adapted)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(model(x), fast)
    assert (fast - before).abs().max() > 1e-3


def test_half_precision():
    model = sounds().to(torch.bfloat16)
    adapted = shaken(drawn(model, ASTAdapter("conformer", 4, kernel=3)))
    assert model(X.to(torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}


@pytest.mark.weekly
def test_compiled():
    model = sounds()
    shaken(drawn(model, ASTAdapter("bottleneck", 4)))
    want = model(X)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), want)
    torch._dynamo.reset()


def test_a_seed_gives_one_start_and_the_world_is_left_alone():
    for method in FAMILIES.values():
        state = torch.get_rng_state()
        one, two = (drawn(sounds(), method) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(p, q)


# bad input


def mixer() -> nn.Module:
    """Blocks without attention."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 24), nn.Linear(24, D)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    return nn.Sequential(Mixing(), Mixing(), nn.LayerNorm(D))


def untouched(model, method, error, match, **more):
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(error, match=match):
        drawn(model, method, **more)
    assert before == [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]


def test_a_place_that_a_model_has_not_is_refused_with_those_it_has():
    for method in (ASTAdapter(reduction=4, place="mhsa"), SoftMoA(reduction=4, place="both")):
        untouched(mixer(), method, ValueError, r'no attention .* places here: "ffn"')
    assert set(sublayers(mixer()[0])) == {"ffn"}
    model = mixer()
    before = model(torch.ones(1, 3, D))
    drawn(model, ASTAdapter(reduction=4))
    assert torch.equal(model(torch.ones(1, 3, D)), before)


def test_a_network_without_tokens_is_refused():
    for method in FAMILIES.values():
        name = type(method).__name__
        untouched(nets.convnet(1, (4, 8), 3), method, ValueError, f"{name} needs a network of to")
    untouched(mixer(), ASTPrefix(), ValueError, "it has no attention")


def test_targets_name_blocks():
    untouched(sounds(), ASTAdapter(reduction=4), ValueError, "acts on blocks.0, blocks.1",
              targets="*.query")  # fmt: skip
    adapted = drawn(sounds(), ASTAdapter(reduction=4), targets=["blocks.0", "blocks.2"])
    assert list(adapted.sites) == ["blocks.0", "blocks.2"]
    assert list(drawn(sounds(), ASTPrefix(2), targets="blocks.1").sites) == ["blocks.1.attention"]


def test_a_distillation_token_must_be_there_to_be_dropped():
    untouched(sounds(), ASTPrompts(2, drop=True), ValueError, "use drop=False")
    model, x = hf("ASTModel")
    untouched(model, ASTPrompts(2, drop=True), ValueError, "name the first block",
              targets="layers.1")  # fmt: skip
    drawn(model, ASTPrompts(2, drop=True))
    with pytest.raises(ValueError, match="such as a mask"):
        model(x, attention_mask=torch.tensor([[1] * 9 + [0]] * 2))


def test_an_attention_that_does_more_takes_no_prefix():
    model = nn.Sequential(build(lambda: Block(D, 2, 24, causal=True), generator(5, "block")))
    drawn(model, ASTPrefix(2))
    with pytest.raises(TypeError, match="does more than softmax"):
        model(torch.randn(2, 7, D))
    model, x = hf("ASTModel")
    drawn(model, ASTPrefix(2))
    with pytest.raises(ValueError, match="given a mask"):
        model(x, attention_mask=torch.tensor([[1] * 9 + [0]] * 2))
    layer = nn.TransformerEncoderLayer(D, 2, 24, batch_first=True)
    untouched(nn.Sequential(layer), ASTPrefix(2), ValueError, "layers of its own")


def test_recomputation_would_lose_the_adapter():
    model, x = hf("ASTModel")
    drawn(model, ASTAdapter(reduction=4))
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        model(x)
    model.gradient_checkpointing_disable()
    model(x)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ASTPrefix(5), "even number"),
        (lambda: ASTAdapter(place="nowhere"), "place must be one of"),
        (lambda: ASTAdapter(inner="lstm"), "inner must be one of"),
        (lambda: ASTAdapter(order="parallel_after", residual=False), "leave residual out"),
        (lambda: ASTAdapter(order="sequential_before", residual=True), "leave residual out"),
        (lambda: ASTAdapter(reduction=0), "reduction must lie in"),
        (lambda: SoftMoA(slots=0), "slots must lie in"),
        (lambda: ASTPrompts(0), "tokens must lie in"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_another_number_of_classes_is_refused_when_loading(tmp_path):
    model = sounds()
    method = ASTAdapter(reduction=4)
    drawn(model, method, train=beside(model, method)).save(tmp_path / "a.safetensors")
    other = build(lambda: Sounds(4, 12, 2, D, 3, 2, 7), generator(0, "net"))
    with pytest.raises(ValueError, match=r"head\.weight.*shape"):
        load(other, tmp_path / "a.safetensors")
