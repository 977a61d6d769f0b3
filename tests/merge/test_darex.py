"""What only DAREx must satisfy: its rule, its theory, its q, its optimizer, its files."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from toolkit import DAREx
from toolkit.core.baselines.dare import DARE
from toolkit.core.baselines.magnitude_merge import Magnitude
from toolkit.core.seeds import generator
from toolkit.core.states.merging import merge
from toolkit.core.states.streams import PIECE
from toolkit.merge.darex import prune
from toolkit.merge.darex.activations import differences, inputs, signals
from toolkit.merge.darex.adamr import AdamR
from toolkit.merge.darex.analytic import contributions, grid, layer_q, least_q, row_q
from toolkit.merge.darex.importance import Wanda
from toolkit.merge.darex.search import (
    coarse_to_fine,
    output_change,
    over_masks,
    top_change,
    without_outlier,
)
from toolkit.merge.darex.stored import Pruned
from toolkit.merge.darex.theory import bound, moments, phi, q_star


def drawn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(seed: int = 0, classes: int = 3) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(),
        nn.Linear(7, classes),
    )  # fmt: skip
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=100 * seed + number))
        model[1].running_mean.copy_(drawn(9, seed=seed + 50))
        model[1].num_batches_tracked.fill_(seed)
    return model


def pair(dtype=torch.float32) -> tuple[dict, dict]:
    base = network(1).to(dtype).state_dict()
    tuned = {
        name: value + 0.1 * drawn(*value.shape, seed=n).to(dtype)
        if value.is_floating_point() else value + 3
        for n, (name, value) in enumerate(base.items())
    }  # fmt: skip
    return base, tuned


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


MATRICES = ("0.weight", "3.weight", "5.weight")


class TestRule:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_ends(self, dtype):
        base, tuned = pair(dtype)
        assert same(prune(base, tuned, DAREx(drop=0.0, q=1.0)), tuned)
        nothing = prune(base, tuned, DAREx(drop=1.0))
        assert all(torch.equal(nothing[n], base[n]) for n in MATRICES)
        assert all(torch.equal(nothing[n], tuned[n]) for n in set(tuned) - set(MATRICES))
        assert {t.dtype for n, t in nothing.items() if n in MATRICES} == {dtype}

    def test_one_minus_p_is_dare_with_the_same_masks(self):
        base, tuned = pair()
        ours = prune(base, tuned, DAREx(drop=0.7, prune="all"), seed=4)
        theirs = prune(base, tuned, DARE(drop=0.7), seed=4)
        for name in base:
            torch.testing.assert_close(ours[name], theirs[name])
        assert same(ours, prune(base, tuned, DAREx(drop=0.7, q=1 - 0.7, prune="all"), seed=4))
        assert not same(ours, prune(base, tuned, DAREx(drop=0.7, prune="all"), seed=5))

    def test_given_masks_to_the_bit(self):
        base, tuned = pair()
        masks = {n: drawn(*base[n].shape, seed=7) > 0.3 for n in MATRICES}
        rule = DAREx(drop=0.6, q=0.55).with_masks(masks)
        found = prune(base, tuned, rule)
        for name in MATRICES:
            delta = (tuned[name] - base[name]) * masks[name]
            assert torch.equal(found[name], base[name] + delta / 0.55)
        other = {n: m.clone() for n, m in masks.items()}
        assert same(found, prune(base, tuned, DAREx(drop=0.6, q=0.55).with_masks(other)))
        assert all(torch.equal(masks[n], other[n]) for n in masks), "given masks were written to"

    def test_a_mask_drawn_with_a_generator_of_ones_own(self):
        base, tuned = pair()
        draws = torch.Generator().manual_seed(2)
        masks = {n: torch.bernoulli(torch.full(base[n].shape, 0.4), generator=draws).bool()
                 for n in MATRICES}  # fmt: skip
        found = prune(base, tuned, DAREx(drop=0.6).with_masks(masks))
        for name, mask in masks.items():
            assert torch.equal(found[name][~mask], base[name][~mask])

    def test_share_kept_is_binomial_and_heads_stay(self):
        base = {"w": torch.zeros(500, 400), "head.weight": torch.zeros(2, 400)}
        tuned = {"w": torch.ones(500, 400), "head.weight": torch.ones(5, 400)}
        found = prune(base, tuned, DAREx(drop=0.9))
        kept, count = int((found["w"] != 0).sum()), 200_000
        assert abs(kept - 0.1 * count) < 5 * math.sqrt(count * 0.09)
        assert torch.equal(found["head.weight"], tuned["head.weight"])
        spared = prune(base, {**tuned, "head.weight": torch.ones(2, 400)},
                       DAREx(drop=0.9).keeping("*head*"))  # fmt: skip
        assert torch.equal(spared["head.weight"], torch.ones(2, 400))

    def test_statistics_are_the_fine_tuned_models(self):
        base, tuned = pair()
        found = prune(base, tuned, DAREx(drop=0.5, prune="all"))
        for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            assert torch.equal(found[name], tuned[name])
        assert found["1.num_batches_tracked"].dtype == torch.int64

    def test_layers_their_biases_and_the_rest(self):
        base, tuned = pair()
        layers = {"0.weight": 0.5, "3.weight": 0.8}
        rule = DAREx(drop=0.6, prune="all").with_layers(layers)
        assert rule.divisor("0.weight") == rule.divisor("0.bias") == 0.5
        assert rule.divisor("1.weight") == rule.divisor("5.bias") == pytest.approx(0.65)
        ones = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in base.items()}
        found = prune(base, tuned, rule.with_masks(ones))
        for name, q in (("0.weight", 0.5), ("0.bias", 0.5), ("3.bias", 0.8), ("1.weight", 0.65)):
            want = base[name] + (tuned[name] - base[name]) / q
            torch.testing.assert_close(found[name], want)

    def test_several_models_add_up(self):
        base, tuned = pair()
        other = {n: t + 0.2 if t.is_floating_point() else t for n, t in base.items()}
        ones = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in base.items()}
        rule = DAREx(drop=0.5).with_masks(ones, ones)
        found = merge(base, [tuned, other], rule, weights=[0.5, 2.0])
        name = "3.weight"
        want = base[name] + (tuned[name] - base[name]) + 4 * (other[name] - base[name])
        torch.testing.assert_close(found[name], want)
        small = merge(base, [tuned, other], rule, weights=[0.5, 2.0])["3.bias"]
        want = base["3.bias"] + 0.5 * (tuned["3.bias"] - base["3.bias"]) + 2 * 0.2
        torch.testing.assert_close(small, want)

    def test_a_recipe_repeats_the_merge(self, tmp_path):
        base, tuned = pair()
        rule = DAREx(drop=0.6).with_layers({"0.weight": 0.5, "3.weight": 0.8}).keeping("5.*")
        out = merge(base, [tuned], rule, out=tmp_path / "out", progress=False, buffers=1)
        settings = json.loads((out / "merge_recipe.json").read_text())["settings"]
        again = DAREx.restored(settings)
        assert again.settings() == rule.settings() != DAREx(drop=0.6).settings()
        assert same(merge(base, [tuned], again), merge(base, [tuned], rule))
        assert DAREx.restored(DAREx(drop=0.6).settings()) == DAREx(drop=0.6)
        masks = {n: torch.ones(base[n].shape, dtype=torch.bool) for n in MATRICES}
        with pytest.raises(ValueError, match="with_masks"):
            DAREx.restored(rule.with_masks(masks).settings())

    def test_copies_leave_the_rule_alone(self):
        rule = DAREx(drop=0.6)
        assert rule.with_q(0.7).q == 0.7
        assert rule.with_layers({"a": 1.0}).with_q(0.5).layers == {}
        assert rule.q is None
        assert not rule.layers

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: DAREx(drop=1.2), "drop"),
            (lambda: DAREx(drop=-0.1), "drop"),
            (lambda: DAREx(q=0.0), "q must lie"),
            (lambda: DAREx(q=-1.0), "q must lie"),
            (lambda: DAREx().with_q(0.0), "q must lie"),
            (lambda: DAREx().with_layers({"a": 0.0}), "positive"),
            (lambda: DAREx().with_layers({"a": math.inf}), "finite"),
            (lambda: DAREx().with_layers({}), "at least for one"),
            (lambda: prune(*pair(), DAREx().with_layers({"x": 1.0})), "names no tensor"),
            (lambda: prune(*pair(), DAREx().with_masks({"0.weight": torch.ones(2) > 0})), "fit"),
            (lambda: prune({"a": torch.zeros(2, 2)}, {"b": torch.zeros(2, 2)}, DAREx()), "targets"),
            (lambda: merge({"a": torch.zeros(2, 2)}, [{"a": torch.zeros(3, 2)}], DAREx()), "a:"),
        ],
    )
    def test_refusals(self, call, words):
        with pytest.raises(ValueError, match=words):
            call()

    def test_masks_must_be_bools(self):
        with pytest.raises(TypeError, match="bools"):
            DAREx().with_masks({"a": torch.ones(2)})


class TestTheory:
    @pytest.mark.parametrize(("n", "drop", "q"), [(1, 0.3, 0.7), (5, 0.9, 0.25), (8, 0.5, 0.5)])
    def test_moments_of_all_masks(self, n, drop, q):
        c = drawn(n, dtype=torch.float64)
        masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)
        chance = (masks * (1 - drop) + (1 - masks) * drop).prod(dim=1)
        H = ((1 - masks / q) * c).sum(dim=1)
        mean = (chance * H).sum()
        found = moments(c, drop, q)
        torch.testing.assert_close(found.mean, mean)
        torch.testing.assert_close(found.variance, (chance * (H - mean).square()).sum())
        torch.testing.assert_close(found.square, (chance * H.square()).sum())

    def test_dare_has_no_bias(self):
        found = moments(drawn(3, 6), 0.9)
        assert float(found.mean.abs().max()) < 1e-6
        torch.testing.assert_close(found.variance, 9 * drawn(3, 6).square().sum(1))

    @pytest.mark.parametrize("drop", [0.2, 0.5, 0.9, 0.99])
    def test_bound_holds(self, drop):
        c = drawn(40, dtype=torch.float64)
        masks = torch.rand(20000, 40, generator=torch.Generator().manual_seed(0)) >= drop
        H = ((1 - masks / (1 - drop)) * c).sum(dim=1)
        assert float((H.abs() > bound(c, drop, 0.05)).double().mean()) <= 0.05

    def test_phi(self):
        assert phi(0.5) == 0.5
        assert phi(0.5 + 1e-7) == pytest.approx(0.5, abs=1e-6)
        assert phi(0.0) == phi(1.0) == 0.0
        assert phi(0.9) == pytest.approx(-0.8 / math.log(1 / 9))
        assert phi(0.1) == pytest.approx(phi(0.9))
        c = torch.tensor([3.0, 4.0])
        want = math.sqrt(phi(0.9)) / 0.1 * 5 * math.sqrt(math.log(40))
        assert float(bound(c, 0.9)) == pytest.approx(want)

    @pytest.mark.parametrize("drop", [0.5, 0.9, 0.99])
    def test_q_star_is_the_best_of_a_grid(self, drop):
        c = drawn(30, 12, dtype=torch.float64) + 0.8
        best = q_star(float(c.sum(1).square().sum()), float(c.square().sum()), drop)
        assert best >= 1 - drop
        tried = torch.arange(1 - drop, 3.0, 1e-3, dtype=torch.float64)
        cost = torch.stack([moments(c, drop, float(q)).square.sum() for q in tried])
        assert abs(float(tried[cost.argmin()]) - best) <= 1e-3

    def test_q_star_at_its_ends(self):
        assert q_star(1e12, 1.0, 0.9) == pytest.approx(0.1)
        assert q_star(0.5, 2.0, 0.9) > 1
        assert q_star(0.0, 1.0, 0.9) == math.inf
        assert q_star(0.0, 0.0, 0.9) == pytest.approx(0.1)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: moments(torch.ones(2), 1.5), "drop"),
            (lambda: moments(torch.ones(2), 1.0), "nothing is kept"),
            (lambda: moments(torch.ones(2), 0.5, 0.0), "positive"),
            (lambda: bound(torch.ones(2), 0.5, 1.0), "gamma"),
            (lambda: q_star(-1.0, 1.0, 0.5), "not negative"),
            (lambda: q_star(1.0, 1.0, 2.0), "drop"),
        ],
    )
    def test_refusals(self, call, words):
        with pytest.raises(ValueError, match=words):
            call()


def by_rows(c, drop, eta, gamma, stop):
    """Equation 3 of the paper in plain Python: a list of q, one per row."""
    rows = [[float(v) for v in row] for row in c]
    best, found, done = [math.inf] * len(rows), [1 - drop] * len(rows), [False] * len(rows)
    for q in grid(drop):
        for i, row in enumerate(rows):
            linear = eta * (1 - (1 - drop) / q) * sum(row)
            curve = eta**2 * phi(drop) * sum(v * v for v in row) / (4 * q * q)
            value = abs(linear + curve + math.log(2 / gamma))
            done[i] = done[i] or value >= best[i]
            if value <= best[i]:
                best[i], found[i] = value, q
        if sum(done) / len(rows) >= stop:
            break
    return found


class TestAnalytic:
    def test_grid(self):
        assert grid(0.9)[0] == pytest.approx(0.1)
        assert grid(0.99)[:2] == pytest.approx([0.01, 0.011])
        assert grid(0.99)[-1] == pytest.approx(0.998)
        assert len(grid(0.99)) == 989
        assert grid(0.9995)[0] == pytest.approx(0.0005)
        assert grid(0.0005) == pytest.approx([0.9995])

    @pytest.mark.parametrize("stop", [0.4, 0.8, 1.0])
    @pytest.mark.parametrize("eta", [0.2, 1.0])
    def test_rows_as_in_plain_python(self, eta, stop):
        c = drawn(9, 14, dtype=torch.float64) - 0.4
        found = row_q(c, 0.9, eta, stop=stop)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(by_rows(c, 0.9, eta, 0.05, stop))

    def test_scale_of_contributions_and_eta(self):
        c = drawn(7, 5, dtype=torch.float64) - 0.5
        torch.testing.assert_close(row_q(4 * c, 0.9, 0.5 / 4), row_q(c, 0.9, 0.5))

    def test_equal_values_take_the_last(self):
        assert row_q(torch.zeros(3, 4), 0.9, stop=1.0).unique().tolist() == pytest.approx([0.101])

    def test_half_precision_ends_early_as_the_official_code_does(self):
        c = 0.1 * drawn(64, 50, dtype=torch.float64)
        half = row_q(c, 0.95, dtype=torch.float16)
        assert half.dtype == torch.float64
        assert float(half.mean()) < 0.5 * float(row_q(c, 0.95).mean())

    def test_early_stop_cuts_rows_that_run_on(self):
        # nine rows that end at once, and one that would run to the end of the grid
        c = torch.cat([0.01 * torch.ones(9, 4), -torch.ones(1, 4)]).double()
        assert float(row_q(c, 0.9, stop=1.0)[-1]) > float(row_q(c, 0.9, stop=0.8)[-1])

    def test_layers_and_their_biases(self):
        model, base = network(2), network(1)
        deltas = differences(base.state_dict(), model.state_dict())
        seen = inputs(model, [drawn(5, 6)])
        found = layer_q(deltas, {n: s.mean for n, s in seen.items()}, 0.9, 0.3)
        assert set(found) == set(MATRICES)
        c = contributions(deltas["0.weight"], seen["0.weight"].mean, deltas["0.bias"])
        assert c.shape == (9, 7)
        assert torch.equal(c[:, -1], deltas["0.bias"].double())
        assert found["0.weight"] == pytest.approx(float(row_q(c, 0.9, 0.3).mean()))

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: row_q(torch.ones(2, 2), 1.0), "drop"),
            (lambda: row_q(torch.ones(2, 2), 0.9, 0.0), "eta"),
            (lambda: row_q(torch.ones(2, 2), 0.9, gamma=0.0), "gamma"),
            (lambda: row_q(torch.ones(2), 0.9), "matrix"),
            (lambda: row_q(torch.full((2, 2), math.nan), 0.9), "finite"),
            (lambda: layer_q({}, {"a.weight": torch.ones(2)}, 0.9), "deltas has no"),
        ],
    )
    def test_refusals(self, call, words):
        with pytest.raises(ValueError, match=words):
            call()


class TestActivations:
    def test_plain_mean_over_samples_and_tokens(self):
        layer = nn.Linear(4, 3)
        first, second = drawn(2, 5, 4, seed=1), drawn(7, 4, seed=2)
        found = inputs(layer, [first, (second,)])["weight"]
        rows = torch.cat([first.reshape(-1, 4), second]).double()
        torch.testing.assert_close(found.mean, rows.mean(0))
        torch.testing.assert_close(found.size, rows.square().mean(0).sqrt())

    def test_signals_are_the_sums_over_rows(self):
        model, base = network(2).double(), network(1).double()
        deltas = differences(base.state_dict(), model.state_dict())
        x = drawn(11, 6, dtype=torch.float64)
        total, energy = signals(model, deltas, [{"input": x[:4]}, {"input": x[4:]}])["0.weight"]
        c = deltas["0.weight"][None] * x[:, None, :]
        with_bias = torch.cat([c, deltas["0.bias"].expand(11, 9)[..., None]], dim=-1)
        assert total == pytest.approx(float(with_bias.sum(-1).square().sum(-1).mean()))
        assert energy == pytest.approx(float(with_bias.square().sum((-1, -2)).mean()))
        assert least_q({"0.weight": (total, energy)}, 0.9)["0.weight"] == q_star(total, energy, 0.9)

    def test_the_model_is_left_as_it_was(self):
        model = network(2).train()
        model[1].eval()
        before = copy.deepcopy(model.state_dict())
        inputs(model, [drawn(5, 6)])
        assert same(model.state_dict(), before)
        assert model.training
        assert not model[1].training
        with pytest.raises(RuntimeError):
            inputs(model, [drawn(5, 4)])
        assert not any(m._forward_hooks for m in model.modules())

    def test_refusals(self):
        with pytest.raises(ValueError, match="no linear layer"):
            inputs(network(2), [])
        with pytest.raises(ValueError, match="not finite"):
            inputs(nn.Linear(2, 2), [torch.full((1, 2), math.nan)])


class TestSearch:
    def test_coarse_then_fine(self):
        asked = []
        found = coarse_to_fine(lambda q: asked.append(q) or -((q - 0.234) ** 2), 0.1, 1.0, step=0.1)
        # 0.2 is best, then four without: 0.3 to 0.6
        assert asked[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        # from max(0.1 + 0.01, 0.2 - 0.09) in hundredths, ended by four without after 0.23
        assert asked[6:] == pytest.approx([0.11 + 0.01 * i for i in range(17)])
        assert found.best == pytest.approx(0.23)
        assert list(found.scores) == list(dict.fromkeys(asked))

    def test_equal_scores(self):
        asked = []
        found = coarse_to_fine(lambda q: asked.append(q) or 1.0, 0.1, 0.5, step=0.1)
        assert found.best == pytest.approx(0.1)
        assert max(asked) >= 0.5  # equal to the best is no step without a new best

    def test_paper_stays_below_its_end(self):
        asked = []
        coarse_to_fine(lambda q: asked.append(q) or q, 0.01, 0.1, step=0.05, like="paper")
        assert max(asked) <= 0.1 + 1e-9
        asked.clear()
        coarse_to_fine(lambda q: asked.append(q) or q, 0.01, 0.1, step=0.05)
        assert max(asked) == pytest.approx(0.155)

    def test_outlier(self):
        assert without_outlier([1.0, 2.0, 9.0, 2.5]) == [1.0, 2.0, 2.5]
        assert without_outlier([1.0, 9.0]) == [1.0, 9.0]

    def test_over_masks_finds_the_least_change(self):
        base, tuned = network(1).eval(), network(1).eval()
        with torch.no_grad():
            tuned[3].weight.add_(0.3 * drawn(7, 9, seed=3))
        x, copied = drawn(40, 6), copy.deepcopy(base)
        want = tuned(x).detach()

        def judge(state):
            copied.load_state_dict(state)
            return -float(output_change(want, copied(x).detach()))

        score = over_masks(base, tuned, DAREx(drop=0.5).with_q, judge, trim=True)
        each = [judge(prune(base, tuned, DAREx(drop=0.5, q=0.9), seed=s)) for s in range(4)]
        assert score(0.9) == pytest.approx(sum(without_outlier(each)) / 3)
        found = coarse_to_fine(score, 0.5, 1.0, step=0.1)
        assert found.best > 0.5
        assert found.scores[found.best] >= score(0.5)

    def test_top_change(self):
        before = torch.tensor([[5.0, 1.0, 4.0, 0.0]])
        after = torch.tensor([[4.0, 9.0, 6.0, 9.0]])
        assert float(top_change(before, after, top=2)) == pytest.approx((1 + 4) / 2)

    @pytest.mark.parametrize(
        ("options", "words"),
        [({"low": 1.0, "high": 0.5}, "low"), ({"step": 0.0}, "step"), ({"decay": 2.0}, "decay")],
    )
    def test_refusals(self, options, words):
        with pytest.raises(ValueError, match=words):
            coarse_to_fine(float, **{"low": 0.1, "high": 1.0, **options})
        with pytest.raises(ValueError, match="not a number"):
            coarse_to_fine(lambda q: math.nan, 0.1, 1.0)


class TestImportance:
    def test_rows_keep_their_largest(self):
        base, tuned = (
            {"w": torch.zeros(2, 4)},
            {"w": torch.tensor([[4, -3, 2, 1.0], [1, 1, -9, 2]])},
        )
        found = prune(base, tuned, Wanda(drop=0.5))["w"]
        assert found.tolist() == [[4, -3, 0, 0], [0, 0, -9, 2]]
        sized = Wanda(drop=0.5).with_inputs({"w": torch.tensor([0.0, 1, 1, 10])})
        assert prune(base, tuned, sized)["w"].tolist() == [[0, -3, 0, 1], [0, 0, -9, 2]]
        whole = Wanda(drop=0.5, over="tensor").with_inputs({"w": torch.tensor([1.0, 1, 1, 0])})
        assert prune(base, tuned, whole)["w"].tolist() == [[4, -3, 2, 0], [0, 0, -9, 0]]

    def test_without_inputs_it_is_magnitude(self):
        base, tuned = pair()
        ours = prune(base, tuned, Wanda(drop=0.75, over="tensor"))
        theirs = prune(base, tuned, Magnitude(density=0.25, over="tensor"))
        for name in ("3.weight", "0.weight"):
            kept = base[name].numel() - int(0.75 * base[name].numel())
            assert int((ours[name] != base[name]).sum()) == kept
            theirs_kept = int((theirs[name] != base[name]).sum())
            assert abs(theirs_kept - kept) <= 1  # roundings of one share
        assert torch.equal(ours["3.bias"], tuned["3.bias"])

    def test_ends_and_pieces(self):
        base, tuned = {"w": torch.zeros(3, PIECE // 2)}, {"w": drawn(3, PIECE // 2)}
        assert same(prune(base, tuned, Wanda(drop=0.0)), tuned)
        assert same(prune(base, tuned, Wanda(drop=1.0)), base)
        found = prune(base, tuned, Wanda(drop=0.9))["w"]
        most = tuned["w"].abs().topk(PIECE // 2 - int(0.9 * (PIECE // 2)), dim=1).values[:, -1:]
        assert torch.equal(found, torch.where(tuned["w"].abs() >= most, tuned["w"], 0.0))

    def test_refusals(self):
        base, tuned = {"w": torch.zeros(2, 4)}, {"w": torch.ones(2, 4)}
        with pytest.raises(ValueError, match="one size per input"):
            prune(base, tuned, Wanda().with_inputs({"w": torch.ones(3)}))
        with pytest.raises(ValueError, match="with_inputs"):
            Wanda.restored(Wanda().with_inputs({"w": torch.ones(3)}).settings())
        assert Wanda.restored(Wanda(drop=0.3).settings()) == Wanda(drop=0.3)


def small(dtype=torch.float64):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.copy_(drawn(*p.shape, seed=n))
    return model


def by_hand(model, base, count, *, lr, decay, betas=(0.9, 0.999), eps=1e-8, amsgrad=False,
            norm="l2", first=0, state=None):  # fmt: skip
    """The card's equations over all tensors at once."""
    parameters = list(model.parameters())
    state = {} if state is None else state
    m = state.setdefault("m", [torch.zeros_like(p) for p in parameters])
    v = state.setdefault("v", [torch.zeros_like(p) for p in parameters])
    most = state.setdefault("most", [torch.zeros_like(p) for p in parameters])
    for t in range(first + 1, first + count + 1):
        model.zero_grad()
        F.mse_loss(model(drawn(8, 6, seed=t - 1).to(parameters[0])),
                   drawn(8, 3, seed=90).to(parameters[0])).backward()  # fmt: skip
        with torch.no_grad():
            hats = []
            for i, p in enumerate(parameters):
                m[i] = betas[0] * m[i] + (1 - betas[0]) * p.grad
                v[i] = betas[1] * v[i] + (1 - betas[1]) * p.grad**2
                most[i] = torch.maximum(most[i], v[i])
                hats.append((most[i] if amsgrad else v[i]) / (1 - betas[1] ** t))
            mean = math.sqrt(sum(float(h.sum()) for h in hats) / sum(h.numel() for h in hats))
            for i, p in enumerate(parameters):
                way = p - base[i]
                way = way.sign() if norm == "l1" else way
                p -= lr * decay / mean * way
                p -= lr * (m[i] / (1 - betas[0] ** t)) / (hats[i].sqrt() + eps)
    return state


class TestAdamR:
    @staticmethod
    def step(model, optimizer, count, first=0):
        for number in range(first, first + count):
            optimizer.zero_grad()
            p = next(model.parameters())
            x, y = drawn(8, 6, seed=number).to(p), drawn(8, 3, seed=90).to(p)
            F.mse_loss(model(x), y).backward()
            optimizer.step()

    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_without_pull_it_is_adam(self, amsgrad):
        one, two = small(torch.float32), small(torch.float32)
        ours = AdamR(one.parameters(), lr=0.05, decay=0.0, amsgrad=amsgrad)
        theirs = torch.optim.Adam(two.parameters(), lr=0.05, amsgrad=amsgrad)
        for number in range(6):
            self.step(one, ours, 1, number)
            self.step(two, theirs, 1, number)
            assert same(one.state_dict(), two.state_dict())

    @pytest.mark.parametrize("norm", ["l2", "l1"])
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_as_by_hand(self, amsgrad, norm):
        one, two = small(), small()
        base = [drawn(*p.shape, seed=40 + n).double() for n, p in enumerate(one.parameters())]
        ours = AdamR(one.parameters(), base, lr=0.05, decay=0.2, norm=norm, amsgrad=amsgrad)
        self.step(one, ours, 8)
        by_hand(two, base, 8, lr=0.05, decay=0.2, norm=norm, amsgrad=amsgrad)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_groups_share_one_mean(self):
        one, two = small(), small()
        a = AdamR([{"params": one[0].parameters()}, {"params": one[2].parameters(), "decay": 0.2}],
                  lr=0.05, decay=0.2)  # fmt: skip
        b = AdamR(two.parameters(), lr=0.05, decay=0.2)
        self.step(one, a, 5)
        self.step(two, b, 5)
        assert same(one.state_dict(), two.state_dict())

    def test_still_at_the_base_without_gradients(self):
        model = small()
        optimizer = AdamR(model.parameters(), lr=0.1, decay=1.0)
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert same(model.state_dict(), before)

    def test_no_gradient_and_no_base_mean_no_pull(self):
        model = small()
        first, *rest = list(model.parameters())
        optimizer = AdamR([first, *rest], [None, *(torch.zeros_like(p) for p in rest)],
                          lr=0.1, decay=0.5)  # fmt: skip
        before = [p.detach().clone() for p in (first, *rest)]
        for p in (first, *rest[1:]):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.equal(first, before[0])
        assert torch.equal(rest[0], before[1])  # has no gradient
        torch.testing.assert_close(rest[1].detach(), before[2] * (1 - 0.1 * 0.5))

    @pytest.mark.parametrize("copied", [False, True])
    def test_goes_on_from_a_state_dict(self, tmp_path, copied):
        one, two = small(), small()
        base = [torch.zeros_like(p) for p in one.parameters()]
        straight = AdamR(one.parameters(), base, lr=0.05, decay=0.2, amsgrad=True)
        self.step(one, straight, 6)
        half = AdamR(two.parameters(), base, lr=0.05, decay=0.2, amsgrad=True)
        self.step(two, half, 3)
        torch.save([two.state_dict(), half.state_dict()], tmp_path / "half.pt")
        weights, state = torch.load(tmp_path / "half.pt", weights_only=True)
        other = small()
        other.load_state_dict(weights)
        again = AdamR(other.parameters(), lr=0.05, decay=0.2, amsgrad=True)  # knows no base
        again.load_state_dict(state)
        if copied:
            other, again = copy.deepcopy((other, again))
        self.step(other, again, 3, 3)
        assert same(other.state_dict(), one.state_dict())

    def test_the_base_is_a_copy(self):
        model = small()
        base = [p.detach().clone() for p in model.parameters()]
        optimizer = AdamR(model.parameters(), lr=0.05, decay=0.1)
        self.step(model, optimizer, 2)
        for p, before in zip(model.parameters(), base, strict=True):
            assert torch.equal(optimizer.pulled[p], before)

    def test_differences_shrink(self):
        sizes = []
        for decay in (0.0, 0.1, 1.0):
            model = small()
            start = [p.detach().clone() for p in model.parameters()]
            self.step(model, AdamR(model.parameters(), lr=0.02, decay=decay), 60)
            sizes.append(sum(float((p - b).detach().square().sum())
                             for p, b in zip(model.parameters(), start, strict=True)))  # fmt: skip
        assert sizes[0] > 1.2 * sizes[1] > 1.2 * 1.2 * sizes[2]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"decay": -1.0}, "decay"),
            ({"norm": "l3"}, "norm"),
            ({"base": [torch.zeros(1)]}, "1 tensors for 4"),
            ({"base": [torch.zeros(1)] * 4}, "shape"),
        ],
    )
    def test_refusals(self, options, words):
        with pytest.raises(ValueError, match=words):
            AdamR(small().parameters(), **options)

    def test_sparse_gradients_are_refused_before_anything_moves(self):
        table = nn.Embedding(4, 2, sparse=True)
        optimizer = AdamR(table.parameters(), torch.zeros(1, 4, 2))
        table(torch.tensor([1])).sum().backward()
        before = table.weight.detach().clone()
        with pytest.raises(RuntimeError, match="dense"):
            optimizer.step()
        assert torch.equal(table.weight, before)


class TestStored:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("everything", ["matrices", "all"])
    def test_bit_for_bit_through_a_file(self, tmp_path, dtype, everything):
        base, tuned = pair(dtype)
        rule = DAREx(drop=0.7, prune=everything).with_layers({"0.weight": 0.4, "3.weight": 0.5})
        made = Pruned.between(base, tuned, rule, seed=8)
        made.save(tmp_path / "small.safetensors")
        found = Pruned.load(tmp_path / "small.safetensors")
        assert same(found.applied(base), prune(base, tuned, rule, seed=8))
        assert found.bytes == made.bytes
        other = Pruned(rule.with_q(0.9), *list(vars(found).values())[1:])
        assert same(other.applied(base), prune(base, tuned, rule.with_q(0.9), seed=8))

    def test_in_pieces_and_short(self, tmp_path):
        base = {"w": drawn(3, PIECE // 2 + 7), "b": drawn(5), "head.weight": torch.zeros(2, 2)}
        tuned = {"w": base["w"] + 1, "b": drawn(5, seed=3), "head.weight": torch.ones(4, 2)}
        made = Pruned.between(base, tuned, DAREx(drop=0.99))
        assert same(made.applied(base), prune(base, tuned, DAREx(drop=0.99)))
        made.save(tmp_path / "small.safetensors")
        dense = sum(t.nbytes for t in tuned.values())
        assert (tmp_path / "small.safetensors").stat().st_size < 0.012 * dense + 1000
        assert set(made.kept) == {"w"}

    def test_tied_weights(self):
        table = drawn(6, 4)
        base = {"a.weight": table, "b.weight": table}
        new = table + 0.5
        made = Pruned.between(base, {"a.weight": new, "b.weight": new}, DAREx(drop=0.5))
        found = made.applied(base)
        assert set(made.kept) == {"a.weight"}
        assert found["b.weight"] is found["a.weight"]

    def test_refusals(self, tmp_path):
        base, tuned = pair()
        rule = DAREx(drop=0.7)
        made = Pruned.between(base, tuned, rule)
        with pytest.raises(ValueError, match="hash"):
            made.applied({**base, "0.weight": base["0.weight"] + 1})
        with pytest.raises(ValueError, match="no tensor"):
            made.applied({n: t for n, t in base.items() if n != "0.weight"})
        short = {n: t[:-1] if n == "0.weight" else t for n, t in made.kept.items()}
        long = {n: torch.cat([t, t]) if n == "0.weight" else t for n, t in made.kept.items()}
        for kept in (short, long):
            with pytest.raises(ValueError, match="generator"):
                Pruned(rule, 0, kept, made.whole, made.bases, made.order).applied(base)
        masks = {n: torch.ones(base[n].shape, dtype=torch.bool) for n in MATRICES}
        with pytest.raises(ValueError, match="by hand"):
            Pruned.between(base, tuned, rule.with_masks(masks))
        with pytest.raises(FileNotFoundError):
            Pruned.load(tmp_path / "none.safetensors")
        path = tmp_path / "small.safetensors"
        made.save(path)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match="save it again"):
            Pruned.load(path)


def test_masks_do_not_depend_on_the_default_dtype():
    base, tuned = pair()
    want = prune(base, tuned, DAREx(drop=0.5))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = prune(base, tuned, DAREx(drop=0.5))
    finally:
        torch.set_default_dtype(before)
    assert same(found, want)


def test_masks_come_from_the_streams_of_the_pipeline():
    base, tuned = pair()
    found = prune(base, tuned, DAREx(drop=0.5, q=1.0), seed=6)
    draws = generator(6, "merge", "3.weight", 0)
    mask = torch.rand(63, generator=draws).view(7, 9) >= 0.5
    assert torch.equal(found["3.weight"], torch.where(mask, tuned["3.weight"], base["3.weight"]))
