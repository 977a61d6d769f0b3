"""Inside and aside: where the modules stand, what they compute, losses and measures of search."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit import Connected, Houlsby, LoRA, adapt, load
from toolkit.core import nets
from toolkit.core.nets.anatomy import Anatomy
from toolkit.insert.connected_peft_ir.asides import Aside
from toolkit.insert.connected_peft_ir.direction import discrepancy
from toolkit.insert.connected_peft_ir.measures import measured
from toolkit.insert.connected_peft_ir.scoring import (
    BiEncoder,
    CrossEncoder,
    info_nce,
    pooled,
    rerank_loss,
)
from toolkit.labs.beds import tiny_text

VARIANTS = ("layer", "sublayer", "stream", "none")
WIDTH, DEPTH = tiny_text.WIDTH, tiny_text.DEPTH


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IDS = torch.randint(40, (2, 7), generator=seeded())
MASK = torch.ones_like(IDS)


def bert() -> nn.Module:
    """Post-LN blocks named and called as BERT's; BERT itself: tests/hf/test_inside_and_aside.py."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_text.Encoder(40).eval()


def out(model: nn.Module, ids=IDS) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=MASK).last_hidden_state


def ours() -> nn.Module:
    return nets.digits_transformer(width=WIDTH, depth=2, heads=2, generator=seeded())


def shaken(adapted):
    draw = seeded(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return adapted


@pytest.mark.parametrize("variant", VARIANTS)
def test_starts_at_the_base_counts_saves_and_comes_off(variant, tmp_path):
    model = bert()
    before = out(model)
    adapted = adapt(model, Connected(variant=variant, rank=3, inside_rank=2), generator=seeded())
    assert torch.equal(out(model), before)
    asides = {"layer": 1, "sublayer": 2, "stream": 1, "none": 0}[variant]
    numbers = DEPTH * (asides * (2 * 3 * WIDTH + 3 + WIDTH) + 2 * (2 * 2 * WIDTH + 2 + WIDTH))
    assert sum(p.numel() for p in adapted.parameters()) == numbers
    assert sum(p.method.count(p.site) for p in adapted.sites.values()) == numbers
    block = adapt(bert(), Houlsby(parallel=True), "encoder.layer.0").sites["encoder.layer.0"].site
    assert DEPTH * Connected(variant=variant, rank=3, inside_rank=2).count(block) == numbers
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(dict(bert().named_parameters()))
    after = out(shaken(adapted).model)
    assert (after - before).abs().max() > 1e-3
    adapted.save(tmp_path / "a.safetensors")
    again = load(bert(), tmp_path / "a.safetensors")
    assert torch.equal(out(again.model), after)
    assert torch.equal(out(copy.deepcopy(adapted).model), after)
    assert torch.equal(out(pickle.loads(pickle.dumps(adapted)).model), after)
    with pytest.raises(TypeError, match="no change of a weight"):
        adapted.merge()
    assert torch.equal(out(model), after)
    adapted.unload()
    assert torch.equal(out(model), before)


def bottleneck(x, adapter):
    return F.linear(F.gelu(F.linear(x, adapter.down, adapter.down_bias)), adapter.up,
                    adapter.up_bias)  # fmt: skip


def by_hand(model, adapters, variant, inject="every"):
    """The blocks of a BERT, each module in its place, from the equations."""
    h = model.embeddings(input_ids=IDS)
    stream = torch.zeros_like(h)
    for number, layer in enumerate(model.encoder.layer):
        name = f"encoder.layer.{number}"
        aside = adapters.get(name)
        x = h + stream if variant == "stream" and inject == "every" else h
        mixed = layer.attention.self(x, None)
        z = layer.attention.output.dense(mixed)
        z = z + bottleneck(z, adapters[f"{name}.attention.output.dense"]) + x
        if variant == "sublayer":
            z = z + bottleneck(x, adapters[f"{name}.attention.output"])
        u = layer.attention.output.LayerNorm(z)
        z = layer.output.dense(F.gelu(layer.intermediate.dense(u)))
        z = z + bottleneck(z, adapters[f"{name}.output.dense"]) + u
        if variant == "sublayer":
            z = z + bottleneck(u, adapters[f"{name}.output"])
        y = layer.output.LayerNorm(z)
        if variant == "layer":
            y = y + bottleneck(h, aside)
        if variant == "stream":
            stream = stream + bottleneck(h + stream, aside)
        h = y
    return h + stream


@pytest.mark.parametrize(
    ("variant", "inject"), [*((v, "every") for v in VARIANTS), ("stream", "top")]
)
def test_computes_its_equations(variant, inject):
    model = bert()
    adapted = shaken(adapt(model, Connected(variant=variant, rank=3, inject=inject)))
    told = by_hand(bert(), adapted.adapters, variant, inject)
    torch.testing.assert_close(out(model), told, atol=2e-6, rtol=1e-5)


def test_without_aside_it_is_the_plain_adapter_and_without_inside_aside_only():
    model, other = bert(), bert()
    adapted = adapt(model, Connected(variant="none", rank=3), generator=seeded())
    plain = adapt(other, Houlsby(width=3), ["*.output.dense"], generator=seeded())
    assert list(adapted.sites) == list(plain.sites)
    assert torch.equal(out(shaken(adapted).model), out(shaken(plain).model))
    alone = adapt(bert(), Connected(variant="layer", inside="none"))
    assert list(alone.sites) == [f"encoder.layer.{i}" for i in range(DEPTH)]


class Zero(nn.Module):
    """A block whose frozen part gives nothing."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nets.transformer.Attention(WIDTH, 2)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        return 0 * x


@pytest.mark.parametrize("variant", ["layer", "stream"])
def test_a_path_of_trained_modules_leads_from_the_loss_to_the_first(variant):
    model = nn.Sequential(*(Zero() for _ in range(4)))
    adapted = shaken(adapt(model, Connected(variant=variant, rank=3, inside="none")))
    model(torch.randn(2, 5, WIDTH, generator=seeded())).square().sum().backward()
    assert adapted.adapters["0"].down.grad.abs().max() > 0
    other = nn.Sequential(*(Zero() for _ in range(4)))
    scattered = shaken(adapt(other, Connected(variant="none", rank=3)))
    y = other(torch.randn(2, 5, WIDTH, generator=seeded(), requires_grad=True)).square().sum()
    y.backward()
    assert all(p.grad is None or not p.grad.any() for p in scattered.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_our_own_pre_norm_blocks(variant, tmp_path):
    x = torch.rand(3, 8, 8, generator=seeded())
    model, before = ours(), ours()(x)
    adapted = adapt(model, Connected(variant=variant, rank=3), train="head.*")
    assert torch.equal(model(x), before)
    after = shaken(adapted).model(x)
    adapted.save(tmp_path / "a.safetensors")
    assert torch.equal(load(ours(), tmp_path / "a.safetensors").model(x), after)
    if variant == "sublayer":
        block, plain = adapted.adapters["blocks.0"], ours().blocks[0]
        h = torch.randn(2, 5, WIDTH, generator=seeded())
        a = adapted.adapters
        y = plain.norm1(h)
        z = plain.attention(y)
        u = h + z + bottleneck(z, a["blocks.0.attention.output"])
        u = u + bottleneck(y, a["blocks.0.attention"])
        y = plain.norm2(u)
        z = plain.down(F.gelu(plain.up(y)))
        told = u + z + bottleneck(z, a["blocks.0.down"]) + bottleneck(y, block)
        torch.testing.assert_close(model.blocks[0](h), told)
    adapted.unload()
    assert not any("Tap" in type(m).__name__ for m in model.modules())


def test_other_modules_beside_it():
    model = bert()
    both = {"*.query": LoRA(rank=2), "encoder.layer.?": Connected(inside="none", rank=2)}
    adapted = adapt(model, both, generator=seeded())
    assert len(adapted.sites) == 2 * DEPTH
    with pytest.raises(ValueError, match="both want"):
        adapt(bert(), {"*.output.dense": LoRA(rank=2), "encoder.layer.?": Connected(rank=2)})


def test_places_that_are_not_there_are_refused_and_listed():
    model = bert()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"names no block; the blocks are encoder\.layer\.0"):
        adapt(model, Connected(), targets="decoder.*")
    with pytest.raises(ValueError, match="no block that is recognised"):
        adapt(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Connected())
    post = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    with pytest.raises(ValueError, match="no place for an aside around the feed-forward"):
        adapt(post, Connected(variant="sublayer"))
    with pytest.raises(TypeError, match="over all blocks at once"):
        Connected().build(Site())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    only = adapt(model, Connected(rank=2), targets=["encoder.layer.1"])
    assert all(name.startswith("encoder.layer.1") for name in only.sites)


class Site:
    name = "x"


def test_blocks_said_by_hand():
    model = ours()
    told = Anatomy.by_hand(
        model, "blocks.*", query="attention.query", output="attention.output", up="up", down="down"
    )
    adapted = adapt(model, Connected(variant="layer", rank=2), targets=told)
    assert {"blocks.0", "blocks.1", "blocks.0.down"} <= adapted.sites.keys()


def test_a_stream_that_is_lost_is_told():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = ours().blocks

        def forward(self, x):
            for block in self.blocks:
                x = block(x).clone()
            return x

    model = Between()
    adapt(model, Connected(variant="stream", rank=2))
    with pytest.raises(RuntimeError, match="the stream is lost"):
        model(torch.randn(1, 4, WIDTH))


def test_a_norm_that_is_not_called_is_told():
    class Skips(nets.transformer.Block):
        def forward(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.down(F.gelu(self.up(x)))

    model = ours()
    model.blocks[1].__class__ = Skips
    adapt(model, Connected(variant="sublayer", rank=2))
    with pytest.raises(RuntimeError, match=r"block 'blocks\.1' did not call the norm before its"):
        model(torch.rand(1, 8, 8))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rank": 0}, "rank"), ({"rank": -1}, "rank"), ({"variant": "iaa-s"}, "variant"),
        ({"inside": "lora"}, "inside"), ({"variant": "none", "inside": "none"}, "nothing anywhere"),
        ({"std": 0.0}, "std"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Connected(**fields)
    with pytest.raises(TypeError):
        Connected(rank=2.5)
    assert Aside().rank == 8


def test_info_nce():
    draw = seeded()
    q, p = torch.randn(2, 5, 6, generator=draw)
    n = torch.randn(5, 3, 6, generator=draw)
    assert info_nce(q[:1], p[:1]).item() == 0
    same = info_nce(q, torch.ones(5, 6))
    assert same.item() == pytest.approx(math.log(5))
    wanted = F.cross_entropy(q @ p.T / 0.1, torch.arange(5))
    torch.testing.assert_close(info_nce(q, p, temperature=0.1), wanted)
    every = info_nce(q, p, n)
    torch.testing.assert_close(every, info_nce(q, p, n[:, [2, 0, 1]]))
    scores = torch.cat([(q * p).sum(1)[:, None], torch.einsum("nd,nkd->nk", q, n)], 1)
    alone = info_nce(q, p, n, in_batch=False, reduction="none")
    torch.testing.assert_close(alone, F.cross_entropy(scores, torch.zeros(5).long(),
                                                      reduction="none"))  # fmt: skip
    wide = torch.cat([q @ p.T, q @ n.flatten(0, 1).T], 1)
    torch.testing.assert_close(info_nce(q, p, n, shared=True),
                               F.cross_entropy(wide, torch.arange(5)))  # fmt: skip
    # document 1 answers query 0 too: it is no negative of query 0, and still one of the others
    relevant = torch.zeros(5, 5, dtype=torch.bool)
    relevant[0, 1] = True
    got = info_nce(q, p, relevant=relevant, reduction="none")
    left = (q @ p.T)[0][[0, 2, 3, 4]]
    assert got[0].item() == pytest.approx((left.logsumexp(0) - left[0]).item(), rel=1e-5)
    torch.testing.assert_close(got[1:], info_nce(q, p, reduction="none")[1:])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: info_nce(torch.empty(0, 4), torch.empty(0, 4)), "queries: there is none"),
        (lambda: info_nce(torch.ones(2, 4), torch.ones(3, 4)), "positives"),
        (lambda: info_nce(torch.ones(2, 4), torch.ones(2, 4), temperature=0.0), "temperature"),
        (lambda: info_nce(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4)), "negatives"),
        (lambda: info_nce(torch.ones(2, 4), torch.ones(2, 4), relevant=torch.ones(3, 3)), "releva"),
        (lambda: rerank_loss(torch.ones(2, 0)), "one candidate"),
        (lambda: rerank_loss(torch.ones(2, 3), 3), "3 candidates"),
        (lambda: pooled(torch.ones(2, 2, 4), torch.tensor([[1, 1], [0, 0]])), "text 1 has no"),
        (lambda: pooled(torch.ones(0, 3, 4), torch.ones(0, 3)), "there is no text"),
        (lambda: pooled(torch.ones(2, 3, 4), torch.ones(2, 3), "max"), "mean"),
        (lambda: measured(torch.ones(2, 0), torch.ones(2, 0)), "one candidate"),
        (lambda: measured(torch.ones(2, 3), torch.ones(2, 2)), "grades"),
        (lambda: measured(torch.ones(2, 3), torch.ones(2, 3), 0), "most"),
    ],
)  # fmt: skip
def test_what_is_empty_or_does_not_fit_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_bi_encoder_and_cross_encoder_share_the_modules():
    one, two = BiEncoder(bert()), CrossEncoder(bert(), WIDTH, seeded())
    first = adapt(one, Connected(rank=2), generator=seeded())
    second = adapt(two, Connected(rank=2), train="head.*", generator=seeded())
    kinds = [[type(a) for a in adapted.adapters.values()] for adapted in (first, second)]
    assert kinds[0] == kinds[1]
    vectors = one(IDS, MASK)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    info_nce(vectors, one(IDS.flip(1), MASK)).backward()
    pair = torch.cat([IDS, IDS.flip(1)], 1)[None].expand(3, 2, 14)
    scores = two(pair, torch.ones_like(pair))
    assert scores.shape == (3, 2)
    rerank_loss(scores, torch.tensor([0, 1, 0])).backward()
    assert "head.weight" in second.extra
    assert second.extra["head.weight"].grad.any() or second.extra["head.bias"].grad is not None
    with pytest.raises(ValueError, match="one candidate"):
        two(pair[:, :0], pair[:, :0])
    with pytest.raises(ValueError, match="no token"):
        one(IDS, torch.zeros_like(IDS))


def test_measures_on_rankings_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    grades = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    found = measured(scores, grades, most=2)
    assert found["mrr"].tolist() == [0.5, 0, 0]  # ties: as they stand, so the third is third
    assert found["recall"].tolist() == [0.5, 0, 0]
    assert found["map"].tolist() == pytest.approx([(1 / 2 + 2 / 4) / 2, 1 / 3, 0])
    many = measured(torch.zeros(1, 3000), torch.arange(3000)[None] == 6)
    assert many["mrr"].item() == pytest.approx(1 / 7)
    two = 1 / math.log2(3)
    assert found["ndcg"].tolist() == pytest.approx([two / (1 + two), 0, 0])


def test_direction_is_right_where_it_is_known():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    x = torch.eye(2, dtype=torch.float64)
    straight, _ = discrepancy(lambda: x @ w, [w], [torch.tensor([0.3, -0.1]).double()])
    assert straight == pytest.approx(0, abs=1e-9)
    # f = w^2: predicted 2 w d, actual 2 w d + d^2
    d = torch.tensor([1.0, -1.0], dtype=torch.float64)
    bent, factor = discrepancy(lambda: w**2, [w], [d])
    a, b = torch.tensor([2.0, -4.0]), torch.tensor([3.0, -3.0])
    assert bent == pytest.approx(1 - float(F.cosine_similarity(a, b, dim=0)), abs=1e-6)
    assert (w.tolist(), factor) == ([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="no change"):
        discrepancy(lambda: x @ w, [w], [torch.zeros(2).double()])
