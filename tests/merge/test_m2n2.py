"""What only M2N2 must satisfy: crossover, shared fitness, attraction, archives in lanes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from toolkit import M2N2
from toolkit.core.seeds import generator
from toolkit.merge import m2n2
from toolkit.merge.m2n2 import Draw, Population, attraction, crossover, fitness, slerp, update
from toolkit.merge.m2n2.niches import choose, worst

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def table(*shape: int, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return uniform < share


# ---------------------------------------------------------------- crossover
def by_hand(a, b, t):
    """Spherical interpolation in plain NumPy, coordinate by coordinate."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    omega = math.acos(max(-1, min(1, a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))))
    t = np.broadcast_to(t, a.shape)
    if math.sin(omega) <= 1e-6:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / math.sin(omega)


def test_slerp_goes_from_one_vector_to_the_other() -> None:
    a, b = drawn(2, 50)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    same = b * a.norm() / b.norm()
    for t in (0.2, 0.7):
        assert torch.isclose(slerp(a, same, t).norm(), a.norm())
        np.testing.assert_allclose(slerp(a, b, t), by_hand(a, b, t), rtol=1e-12)
    each = torch.linspace(0, 1, 50, dtype=DOUBLE)
    np.testing.assert_allclose(slerp(a, b, each), by_hand(a, b, each), rtol=1e-12)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_parallel_vectors_are_mixed_linearly(dtype: torch.dtype) -> None:
    a = drawn(300).to(dtype)
    tolerance = {DOUBLE: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for other, t in ((a, 0.3), (2 * a, 0.3), (-a, 0.25)):
        got = slerp(a, other, t)
        assert got.dtype == dtype
        expected = (1 - t) * a.double() + t * other.double()
        assert (got.double() - expected).abs().max() < tolerance * a.double().abs().max()


def test_many_pairs_at_once_are_the_pairs_alone() -> None:
    a, b = drawn(4, 30), drawn(4, 30, seed=1)
    w, split = torch.rand(4, dtype=DOUBLE), torch.tensor([0, 7, 29, 30])
    for angle in ("full", "segment"):
        together = crossover(a, b, w, split, angle)
        for i in range(4):
            alone = crossover(a[i], b[i], float(w[i]), int(split[i]), angle)
            assert torch.allclose(together[i], alone, rtol=1e-12)


def test_the_split_point_turns_the_ratio() -> None:
    a, b = drawn(2, 40)
    w, m = 0.3, 11
    t = np.where(np.arange(40) < m, w, 1 - w)
    np.testing.assert_allclose(crossover(a, b, w, m), by_hand(a, b, t), rtol=1e-10)
    for angle in ("full", "segment"):
        assert torch.allclose(crossover(a, b, w, 40, angle), slerp(a, b, w))
        assert torch.allclose(crossover(a, b, w, 0, angle), slerp(a, b, 1 - w))
        assert torch.allclose(crossover(b, a, 1 - w, m, angle), crossover(a, b, w, m, angle))
    assert torch.equal(crossover(a, b, w), slerp(a, b, w))
    parts = [by_hand(a[:m], b[:m], w), by_hand(a[m:], b[m:], 1 - w)]
    np.testing.assert_allclose(crossover(a, b, w, m, "segment"), np.concatenate(parts), rtol=1e-10)
    assert (crossover(a, b, w, m, "segment") - crossover(a, b, w, m)).abs().max() > 1e-3
    a[:m] = 0  # a segment without direction
    assert crossover(a, b, w, m, "segment").isfinite().all()


# ---------------------------------------------------------------- competition and attraction
def shares(scores, alpha, capacity):
    """Fitness and attraction by loops."""
    s = np.asarray(scores, float)
    z = s.sum(0)
    z = np.where(z > 0, z, 1) ** alpha
    f = (s / z * capacity).sum(1)
    g = np.array([[(capacity * np.maximum(k - a, 0) / z).sum() for k in s] for a in s])
    return f, g


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("graded", [False, True])
def test_fitness_and_attraction_follow_their_equations(alpha: float, graded: bool) -> None:
    scores = table(7, 60)
    if graded:
        scores = torch.where(scores, drawn(7, 60, seed=3).sigmoid(), 0.0)
    best = scores.double().amax(0).numpy()
    for capacity, given in ((best, None), (best + 1, torch.from_numpy(best + 1))):
        f, g = shares(scores, alpha, capacity)
        assert torch.allclose(fitness(scores, alpha, given).double(), torch.tensor(f), rtol=1e-6)
        for first in range(7):
            got = attraction(scores, first, alpha, given)
            assert torch.allclose(got.double(), torch.tensor(g[first]), rtol=1e-6)
            assert got[first] == 0
    many = torch.stack([scores, scores.flip(0)])
    assert torch.allclose(fitness(many, alpha)[1], fitness(scores, alpha).flip(0))
    both = attraction(many, torch.tensor([2, 4]), alpha)
    assert torch.allclose(both[1].flip(0), attraction(scores, 2, alpha))
    assert fitness(scores, alpha).dtype == (DOUBLE if graded else torch.float32)


def test_total_fitness_is_coverage_or_all_correct_answers() -> None:
    scores = table(9, 200, share=0.1)
    covered = int(scores.any(0).sum())
    assert covered < 200
    assert float(fitness(scores, 1.0).sum()) == pytest.approx(covered, rel=1e-6)
    assert torch.equal(fitness(scores, 0.0), scores.sum(1).float())


def test_leaving_costs_what_only_that_model_solves() -> None:
    scores = table(5, 80, seed=4, share=0.25)
    for k in range(5):
        rest = scores[torch.arange(5) != k]
        alone = int((scores[k] & ~rest.any(0)).sum())
        lost = fitness(scores, 1.0).sum() - fitness(rest, 1.0).sum()
        assert float(lost) == pytest.approx(alone, abs=1e-4)


def test_coverage_may_fall() -> None:
    """Who alone solves one example is less fit than two that share four."""
    scores = torch.zeros(2, 5, dtype=torch.bool)
    scores[0, 0], scores[1, 1:] = True, True
    _, after = update(drawn(2, 3), scores, drawn(3), scores[1])
    assert int(scores.any(0).sum()) == 5
    assert int(after.any(0).sum()) == 4


def test_who_leaves() -> None:
    archive, child = drawn(3, 4), drawn(4, seed=1)
    scores = torch.eye(3, 5, dtype=torch.bool)
    nothing = torch.zeros(5, dtype=torch.bool)
    same = update(archive, scores, child, nothing)
    assert torch.equal(same[0], archive)
    assert torch.equal(same[1], scores)
    equal = torch.tensor([False, False, False, True, False])
    assert int(worst(scores, equal)) == 0  # all four are as fit: the first goes
    new, rows = update(archive, scores, child, equal)
    assert torch.equal(new[0], child)
    assert torch.equal(rows[0], equal)
    assert torch.equal(new[1:], archive[1:])
    thirds = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    assert int(worst(thirds, torch.tensor([0, 0, 0, 1]).bool())) == 0  # 3 x 1/3 is 1


def test_places_are_drawn_in_proportion() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    uniform = (torch.arange(1000, dtype=DOUBLE) / 1000).clamp_max(1 - 2**-53)
    got = choose(weights.expand(1000, 5), uniform)
    assert got.bincount(minlength=5).tolist() == [0, 250, 0, 750, 0]


# ---------------------------------------------------------------- populations
def plain(length: int, examples: int):
    """Scores of vectors: on which random half-spaces they lie."""
    planes, shift = drawn(length, examples, seed=8), drawn(examples, seed=9)

    def score(parameters: torch.Tensor) -> torch.Tensor:
        return (parameters.double() @ planes - shift) > 1

    return score


def reference(parents, score, method, draws):
    """The published loop for one run, on draws that are given, in plain NumPy."""
    archive = np.zeros((method.size, parents.shape[1]))
    scores = np.zeros((method.size, score(parents).shape[1]))

    def insert(child, row):
        wide = np.concatenate([scores, row[None]])
        f, _ = shares(wide, method.alpha, 1.0)
        leaves = int(np.argmin(f.astype(np.float32)))
        if leaves < method.size:
            scores[leaves], archive[leaves] = row, child

    for parent in parents:
        insert(parent.numpy(), score(parent[None])[0].numpy())
    for draw in draws:
        a, b = archive[draw["first"]], archive[draw["second"]]
        t = np.where(np.arange(len(a)) < draw["split"], draw["w"], 1 - draw["w"])
        child = by_hand(a, b, t) + draw["noise"]
        insert(child, score(torch.from_numpy(child)[None])[0].numpy())
    return archive, scores


def test_given_draws_give_the_published_loop() -> None:
    method, score = M2N2(size=5, mutation=0.1), plain(12, 40)
    parents = drawn(2, 12, seed=5)
    population = method.start(parents[None], score)
    draws, own = [], [generator(3, "draws")]
    for _ in range(40):
        draw = method.draw(population, own)
        draws.append({name: v[0].numpy() for name, v in draw._asdict().items()})
        method.step(population, score, draw)
    archive, scores = reference(parents, score, method, draws)
    np.testing.assert_allclose(population.archive[0], archive, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(population.scores[0], scores)
    assert len({int(d["first"]) for d in draws}) > 2
    assert all(d["first"] != d["second"] for d in draws)


@pytest.mark.parametrize(
    "method",
    [
        M2N2(size=4),
        M2N2(size=4, alpha=0.0, attraction=False),
        M2N2(size=4, split=False, mutation=0.05),
        M2N2(size=4, angle="segment", alpha=0.5),
    ],
)
def test_runs_side_by_side_are_the_runs_alone(method: M2N2) -> None:
    parents, score = drawn(3, 2, 10, seed=6), plain(10, 30)

    def own() -> list[torch.Generator]:
        return [generator(seed, "run") for seed in range(3)]

    population, history = method.evolve(parents, score, 25, own(), every=5)
    again, other = method.evolve(parents, score, 25, own(), every=5)
    assert torch.equal(population.archive, again.archive)
    assert torch.equal(history.best, other.best)
    for run in range(3):
        alone, one = method.evolve(parents[run], score, 25, generator(run, "run"), every=5)
        assert torch.allclose(alone.archive[0], population.archive[run], rtol=1e-12)
        assert torch.allclose(one.coverage[0], history.coverage[run])
        assert torch.allclose(one.disagreement[0], history.disagreement[run])
    assert history.evaluations == [0, 5, 10, 15, 20, 25]
    shorter, _ = method.evolve(parents, score, 10, own())
    assert not torch.equal(shorter.archive, population.archive)


def test_history_says_what_is_in_the_archive() -> None:
    method, score = M2N2(size=6), plain(15, 50)
    moments = []
    population, history = method.evolve(
        drawn(2, 15, seed=7), score, 30, generator(0), watch=lambda p: moments.append(p.best())
    )
    solved = population.scores[0].bool()
    assert torch.equal(
        solved[population.filled[0]], score(population.archive[0])[population.filled[0]]
    )
    assert history.best[0, -1] == solved.float().mean(1).max()
    assert history.coverage[0, -1] == solved.any(0).float().mean()
    pairs = [(solved[i] != solved[j]).float().mean() for i in range(6) for j in range(i)]
    assert torch.isclose(history.disagreement[0, -1], torch.stack(pairs).mean())
    two = score(drawn(2, 15, seed=7))
    assert torch.isclose(history.disagreement[0, 0], (two[0] != two[1]).float().mean())
    assert len(moments) == len(history.evaluations) == 31
    best = solved.float().mean(1).argmax()
    assert torch.equal(moments[-1][0], population.archive[0, best])


def test_a_model_that_dominates_still_finds_a_partner() -> None:
    rows = {0: [1, 1, 1, 0], 1: [1, 0, 0, 0]}
    vectors = torch.eye(2, 3, dtype=DOUBLE)

    def score(parameters):
        return torch.tensor([rows[int(p[0] < p[1])] for p in parameters]).bool()

    method = M2N2(size=3)
    population = method.start(vectors[None], score)
    pairs = set()
    for seed in range(40):
        draw = method.draw(population, [generator(seed)])
        pairs.add((int(draw.first), int(draw.second)))
        population = method.start(vectors[None], score)
    assert pairs == {(0, 1), (1, 0)}  # never itself, never a free place
    alone = method.start(vectors[None, :1], score)
    draw = method.draw(alone, [generator(0)])
    assert (int(draw.first), int(draw.second)) == (0, 0)  # nobody else solves anything
    method.step(alone, score, draw)
    assert alone.archive.isfinite().all()


def test_graded_scores_share_the_best_that_was_reached() -> None:
    population = Population.empty(torch.zeros(1, 2, 3), torch.rand(1, 2))
    for row in ([0.9, 0.1], [0.2, 0.6], [0.95, 0.0], [0.3, 0.7]):
        population.insert(torch.ones(1, 3), torch.tensor([row]))
    assert torch.equal(population.reached, torch.tensor([[0.95, 0.7]]))


def test_archives_keep_their_type_and_may_be_a_file(tmp_path) -> None:
    method, score = M2N2(size=3), plain(10, 30)
    parents = drawn(1, 2, 10).float()
    storage = torch.from_file(str(tmp_path / "archive"), shared=True, size=30).view(1, 3, 10)
    population, _ = method.evolve(parents, score, 5, [generator(1)], archive=storage)
    assert population.archive.data_ptr() == storage.data_ptr()
    fresh, _ = method.evolve(parents, score, 5, [generator(1)])
    assert torch.equal(fresh.archive, storage)
    assert fresh.archive.dtype == torch.float32
    half, _ = method.evolve(parents.bfloat16(), score, 5, [generator(1)])
    assert half.archive.dtype == torch.bfloat16


def test_networks_become_vectors_and_networks_again() -> None:
    nets = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)) for _ in range(3)]
    vectors = m2n2.flatten(nets)
    assert vectors.shape == (3, 4 * 5 + 5 + 4 * 5 + 5 * 3 + 3)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    empty = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    got = m2n2.correctness(empty, x, y)(vectors)
    assert torch.equal(m2n2.correctness(empty, x, y, chunk=2)(vectors), got)
    for net, vector, row in zip(nets, vectors, got, strict=True):
        assert torch.equal(row, net.eval()(x).argmax(-1) == y)
        empty.load_state_dict(m2n2.unflatten(vector, empty), strict=False)
        assert torch.equal(empty(x), net(x))
    population, history = M2N2(size=4).evolve(
        vectors[:2], m2n2.correctness(empty, x, y), 20, [generator(s) for s in range(3)]
    )
    assert population.archive.shape == (3, 4, vectors.shape[1])
    assert (history.best[:, -1] >= history.best[:, 0]).all()


# ---------------------------------------------------------------- bad input
def test_what_cannot_be_merged_is_refused() -> None:
    a, b = drawn(2, 6)
    for call, words in [
        (lambda: slerp(a, b[:5], 0.5), "one architecture"),
        (lambda: crossover(a, torch.zeros_like(b), 0.5, 2), "zero or not finite"),
        (lambda: crossover(a, b * math.nan, 0.5, 2), "zero or not finite"),
        (lambda: crossover(a, b, 1.5), "ratio"),
        (lambda: crossover(a, b, math.nan), "ratio"),
        (lambda: crossover(a, b, 0.5, 7), "from 0 to D = 6"),
        (lambda: crossover(a, b, 0.5, 2, "half"), "'segment'"),
        (lambda: fitness(torch.tensor([[0.5, 1.5]])), r"\[0, 1\]"),
        (lambda: fitness(torch.tensor([[0.5, -0.5]])), r"\[0, 1\]"),
        (lambda: fitness(torch.tensor([[0.5, math.nan]])), r"\[0, 1\]"),
        (lambda: fitness(table(2, 3), -1.0), "alpha"),
        (lambda: fitness(table(2, 3), 1.0, torch.ones(4)), "capacity"),
        (lambda: attraction(table(2, 3), 2), "first"),
        (lambda: update(drawn(2, 3), table(2, 4), drawn(4), table(4)), "do not fit"),
        (lambda: update(drawn(2, 3), table(2, 4), drawn(3), table(5)), "row"),
        (lambda: update(drawn(2, 3), table(2, 4), drawn(3), drawn(4) + 5), "row"),
        (lambda: M2N2(size=1), "size must lie"),
        (lambda: M2N2(alpha=-1.0), "alpha must lie"),
        (lambda: M2N2(angle="both"), "angle must be one of"),
        (lambda: m2n2.flatten([nn.Linear(3, 2), nn.Linear(2, 2)]), "'weight' is missing"),
        (lambda: m2n2.flatten([]), "models is empty"),
        (lambda: m2n2.unflatten(torch.zeros(7), nn.Linear(3, 2)), "the model 8"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parents": drawn(1, 2, 3, 4)}, "runs, parents, D"),
        ({"parents": [drawn(4), drawn(5)]}, "flatten"),
        ({"parents": torch.stack([drawn(10), torch.zeros(10, dtype=DOUBLE)])}, "zero or not"),
        ({"parents": drawn(2, 10) * math.inf}, "zero or not finite"),
        ({"score": lambda p: torch.ones(len(p), 4) * math.nan}, r"score: .*\[0, 1\]"),
        ({"score": lambda p: 2 * torch.ones(len(p), 4)}, r"score: .*\[0, 1\]"),
        ({"score": lambda p: torch.zeros(len(p), 4)}, "no parent"),
        ({"score": lambda p: torch.ones(4)}, "runs, examples"),
        ({"score": lambda p: torch.ones(len(p) + 1, 4)}, "score returned shape"),
        ({"evaluations": -1}, "evaluations"),
        ({"every": 0}, "every"),
        ({"generators": []}, "generators"),
        ({"archive": torch.full((1, 4, 9), 7.0)}, "storage"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(change, words) -> None:
    given = {"parents": drawn(2, 10), "score": plain(10, 30), "evaluations": 3}
    given |= {"generators": generator(0), "archive": torch.full((1, 4, 10), 7.0)} | change
    with pytest.raises(ValueError, match=words):
        M2N2(size=4).evolve(**given)
    assert (given["archive"] == 7).all()


def test_a_bad_draw_or_score_changes_nothing() -> None:
    method, score = M2N2(size=4), plain(10, 30)
    population = method.start(drawn(2, 2, 10), score)
    before = population.archive.clone(), population.scores.clone(), population.reached.clone()
    good = method.draw(population, [generator(0), generator(1)])
    bad = [
        good._replace(first=torch.tensor([0, 4])),
        good._replace(second=torch.tensor([0, -1])),
        good._replace(w=torch.tensor([0.5, 1.5])),
        good._replace(w=torch.tensor([0.5])),
        good._replace(split=torch.tensor([0, 11])),
        good._replace(noise=torch.zeros(2, 9)),
        good._replace(first=torch.tensor([3, 3])),  # places that hold no model
    ]
    for draw in bad:
        with pytest.raises(ValueError, match=r"draw|ratio|split|zero"):
            method.step(population, score, draw)
    for wrong in (lambda p: score(p).float() + 1, lambda p: score(p)[:, 1:]):
        with pytest.raises(ValueError, match="score"):
            method.step(population, wrong, good)
    now = population.archive, population.scores, population.reached
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert isinstance(good, Draw)
