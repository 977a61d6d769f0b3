"""What only LoRA-GGPO must satisfy: its noise, LoRA-MGPO's moves, and no trace of either."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import toolkit
from tests.contracts import contracts
from tests.contracts.rooms import Case, conv1d_class
from toolkit import LoRA, LoRAGGPO, LoRAMGPO, adapt
from toolkit.core.adapt.cover import Cover
from toolkit.core.train.sam import sam_step
from toolkit.labs.lowrank import lora_ggpo as lab
from toolkit.lowrank.lora_ggpo.noise import (
    gradient_row_squares,
    noise_std,
    product_row_squares,
    weight_row_squares,
)

NOISES = ("ggpo", "kohya", "isotropic")
MOVES = ("paper", "code")
DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(len(p))) / 2)
    return model.double()


METHOD = LoRAGGPO(rank=3, alpha=6.0, sigma=0.3, beta=0.5)


def made(variant: str, **settings):
    """LoRA-GGPO with a form of noise, or LoRA-MGPO like paper or code."""
    if variant in NOISES:
        return dataclasses.replace(METHOD, variant=variant, **settings)
    return LoRAMGPO(rank=3, alpha=6.0, like=variant, **settings)


def lengths(variant: str, rho: float) -> dict[str, float]:
    """Settings of :func:`made`: the moves have a length, noise has none."""
    return {} if variant in NOISES else {"rho": rho}


X, Y = normal(16, 5, seed=2), normal(16, 4, seed=3)


def start(method, optimizer=None, model=None, **options):
    """An adapted network whose B is not zero, attached; and its optimizer."""
    adapted = adapt(network() if model is None else model, method, generator=generator(1))
    with torch.no_grad():
        for i, layer in enumerate(adapted.adapters.values()):
            layer.B.copy_(0.1 * normal(*layer.B.shape, seed=50 + i))
    make = optimizer or (lambda p: torch.optim.Adam(p, lr=0.02))
    optimizer = make(adapted.parameters())
    adapted.attach(optimizer, **options)
    return adapted, optimizer


def train(adapted, optimizer, steps: int, x=X, y=Y) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (adapted(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(adapted) -> list[torch.Tensor]:
    return [p.detach().clone() for p in adapted.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def noise_of(adapted, name: str) -> torch.Tensor:
    """What lies over a layer, minus its weight, (m, n)."""
    site = adapted.sites[name]
    seen = site.layer.adapter.cover.call(
        site.layer.base, site.site.parameter, lambda b: b._parameters[site.site.parameter]
    )
    return site.site.to_matrix((seen - site.layer.base._parameters[site.site.parameter]).detach())


# --- without noise it is LoRA --------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["ggpo", "isotropic"])
def test_with_sigma_0_training_is_loras_bit_for_bit(variant):
    runs = []
    for method in (
        LoRA(rank=3, alpha=6.0),
        LoRAGGPO(rank=3, alpha=6.0, variant=variant, sigma=0.0, beta=5.0),
    ):
        adapted = adapt(network(), method, generator=generator(1))
        optimizer = torch.optim.Adam(adapted.parameters(), lr=0.02)
        adapted.attach(optimizer)
        runs.append([*train(adapted, optimizer, 10), *values(adapted)])
    assert runs[0][:10] == runs[1][:10]
    assert same(runs[0][10:], runs[1][10:])


def test_before_attach_there_is_no_noise():
    adapted = adapt(network(), METHOD, generator=generator(1))
    plain = adapt(network(), LoRA(rank=3, alpha=6.0), generator=generator(1))
    assert torch.equal(adapted(X), plain(X))


@pytest.mark.parametrize("variant", [*NOISES, *MOVES])
def test_no_perturbation_in_eval_without_gradients_in_merges_files_or_copies(variant, tmp_path):
    method = made(variant, **lengths(variant, 3.0))
    adapted, optimizer = start(method)
    train(adapted, optimizer, 2)
    plain = adapt(network(), LoRA(rank=3, alpha=6.0))
    with torch.no_grad():
        for p, q in zip(plain.parameters(), adapted.parameters(), strict=True):
            p.copy_(q)
    want = plain(X).detach()
    assert not torch.allclose(adapted(X), want, atol=1e-4)  # in training it is there
    with torch.no_grad():
        assert torch.equal(adapted(X), want)
    adapted.model.eval()
    assert torch.equal(adapted(X), want)
    adapted.model.train()
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(X), want)
    adapted.save(tmp_path / "a.safetensors")
    assert torch.equal(toolkit.load(network(), tmp_path / "a.safetensors")(X), want)
    assert set(adapted.adapters["0"].state_dict()) == {"A", "B"}
    merged = {n: a.merged(s.layer.base) for (n, a), s in _sites(plain)}
    model = adapted.merge()
    for name, new in merged.items():
        assert torch.equal(model.get_submodule(name).weight, new["weight"])
    adapted.unmerge()
    assert torch.equal(adapted(X), want)  # the merge took the controller off


def _sites(adapted):
    return zip(adapted.adapters.items(), adapted.sites.values(), strict=True)


def test_the_frozen_weight_and_the_factors_are_never_written_to():
    for variant in (*NOISES, *MOVES):
        adapted, optimizer = start(made(variant, **lengths(variant, 3.0)))
        train(adapted, optimizer, 2)
        tensors = list(adapted.model.parameters())
        before = [t.detach().clone() for t in tensors]
        versions = [t._version for t in tensors]
        (adapted(X) - Y).square().mean().backward()
        assert same(before, [t.detach() for t in tensors])
        assert versions == [t._version for t in tensors]


def test_unload_takes_the_noise_off():
    adapted, optimizer = start(METHOD)
    train(adapted, optimizer, 1)
    covers = [a.cover for a in adapted.adapters.values()]
    assert all(c.lies for c in covers)
    adapted.unload()
    assert not any(c.lies for c in covers)


# --- the size of the noise -----------------------------------------------------------------------


def test_row_norms_of_a_product_need_no_product():
    L, R = normal(3, 6, 2, seed=1), normal(3, 2, 5, seed=2)
    torch.testing.assert_close(product_row_squares(L, R), (L @ R).square().sum(-1))


def test_row_norms_of_the_weight_are_exact():
    W, A, B, s = normal(6, 5), normal(2, 5, seed=1), normal(6, 2, seed=2), 1.7
    got = weight_row_squares(W.square().sum(1), W @ A.T, A, B, s)
    torch.testing.assert_close(got, (W + s * B @ A).square().sum(1))


def test_the_approximate_gradient_is_the_true_one_seen_through_the_factors():
    W, A, B, s = normal(6, 5), normal(2, 5, seed=1), normal(6, 2, seed=2), 1.7
    A, B = A.requires_grad_(), B.requires_grad_()
    dense = (W + s * B @ A).detach().requires_grad_()

    def loss(weight):
        return (torch.tanh(X @ weight.T) - 1).square().mean()

    loss(dense).backward()
    loss(W + s * B @ A).backward()
    A_, B_, G = A.detach(), B.detach(), dense.grad
    approximate = s * (B.grad @ A_ + B_ @ A.grad)
    torch.testing.assert_close(approximate, s * s * (G @ A_.T @ A_ + B_ @ B_.T @ G))
    got = gradient_row_squares(A_, B_, A.grad, B.grad, s)
    torch.testing.assert_close(got, approximate.square().sum(1))
    zero = gradient_row_squares(A_, torch.zeros_like(B_), torch.zeros_like(A_), B.grad, s)
    torch.testing.assert_close(zero, (s * B.grad @ A_).square().sum(1))


def test_standard_deviations_by_hand():
    w, g = torch.tensor([4.0, 9.0]), torch.tensor([1.0, 0.0])
    got = noise_std("ggpo", w, g, 4, 0.5, 2.0)
    torch.testing.assert_close(got, torch.tensor([0.25 * 6**0.5, 0.75]))
    got = noise_std("isotropic", w, g, 4, 0.5, 2.0)
    torch.testing.assert_close(got, torch.full((2,), (0.25 / 4 * 7.5) ** 0.5))
    got = noise_std("kohya", w, g, 4, 0.5, 2.0)
    torch.testing.assert_close(got, torch.tensor([3.0, 1.5]) / 2**0.5)


def test_empirical_variance_of_each_row_matches_the_formula():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    with torch.no_grad():
        model[0].weight.copy_(normal(5, 6))
        model[0].weight[2] = 0
    adapted = adapt(model, METHOD, generator=generator(1))
    layer = adapted.adapters["0"]
    with torch.no_grad():
        layer.B.copy_(normal(5, 3, seed=4))
        layer.B[2] = 0
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.attach(optimizer)
    gA, gB = normal(3, 6, seed=5), normal(5, 3, seed=6)
    gB[2] = 0
    drawn = []
    for _ in range(2000):
        layer.A.grad, layer.B.grad = gA.clone(), gB.clone()
        optimizer.step()
        drawn.append(noise_of(adapted, "0"))
    A, B = layer.A.detach(), layer.B.detach()
    weight = (model[0].base.weight + 2.0 * B @ A).square().sum(1)
    gradient = (2.0 * (gB @ A + B @ gA)).square().sum(1)
    want = 0.3**2 / 6 * (weight + 0.5 * gradient)
    noise = torch.stack(drawn)  # (draws, m, n)
    got, count = noise.square().mean((0, 2)), 2000 * 6
    assert ((got - want).abs() <= 3 * want * (2 / count) ** 0.5).all()
    assert (noise.mean((0, 2)).abs() <= 4 * (want / count).sqrt()).all()
    assert noise[:, 2].abs().max() == 0  # no weight, no gradient, no noise
    flat = noise[:, [0, 1, 3, 4]].flatten(1)
    correlation = torch.corrcoef(flat.T) - torch.eye(flat.shape[1], dtype=DOUBLE)
    assert correlation.abs().max() < 5 / 2000**0.5  # entries are independent


def test_isotropic_noise_has_the_layers_total_variance_and_one_size():
    stds = {}
    for variant in ("ggpo", "isotropic"):
        method = made(variant)
        adapted, optimizer = start(method, lambda p: torch.optim.SGD(p, lr=0.0))
        adapted.controller.draw = lambda step, name, shape: torch.zeros(shape)
        adapted.controller._lay()
        train(adapted, optimizer, 2)
        stds[variant] = adapted.controller.std
    for a, b in zip(stds["ggpo"], stds["isotropic"], strict=True):
        torch.testing.assert_close(a.square().sum(-1), b.square().sum(-1))
        assert a.std(-1).min() > 1e-3
        assert b.std(-1).max() < 1e-12


def test_the_first_step_knows_no_gradient():
    adapted, optimizer = start(METHOD)
    c = adapted.controller
    for k, std in enumerate(c.std):
        torch.testing.assert_close(
            std, noise_std("ggpo", c.weight[k], 0, c.layers[c.groups[k][0]].site.cols, 0.3, 0)
        )
    train(adapted, optimizer, 1)
    assert all((g > 0).any() for g in c.gradient)


def test_kohya_waits_for_a_gradient_and_uses_its_own_norms():
    method = made("kohya")
    adapted, optimizer = start(method, lambda p: torch.optim.SGD(p, lr=0.0))
    assert not any(a.cover.lies for a in adapted.adapters.values())
    train(adapted, optimizer, 1)
    adapted.controller.draw = lambda step, name, shape: torch.ones(shape)
    train(adapted, optimizer, 1)
    for name, site in adapted.sites.items():
        a, base = site.layer.adapter, site.layer.base.weight
        A, B = a.A.detach(), a.B.detach()
        mean = base.norm(dim=1).mean()
        weight = (mean**2 + (B @ A).square().sum(1)).sqrt()  # s = 2 is forgotten there
        gradient = (2.0 * (a.B.grad @ A + B @ a.A.grad)).square().sum(1)
        want = (0.3 * weight + 0.5 * gradient) / site.site.rows**0.5
        torch.testing.assert_close(noise_of(adapted, name), want[:, None].expand(base.shape))


def test_with_kohyas_sum_sigma_0_still_leaves_the_gradients_part():
    adapted, optimizer = start(made("kohya", sigma=0.0))
    train(adapted, optimizer, 1)
    assert all(a.cover.lies for a in adapted.adapters.values())


def test_weight_norms_are_measured_every_refresh_steps():
    adapted, optimizer = start(dataclasses.replace(METHOD, refresh=3))
    seen = []
    for _ in range(6):
        train(adapted, optimizer, 1)
        seen.append(adapted.controller.weight[0].clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[4])
    assert not torch.equal(seen[4], seen[5])
    adapter, base = adapted.adapters["0"], adapted.sites["0"].layer.base.weight
    want = (base + adapter.delta()).square().sum(1)
    torch.testing.assert_close(adapted.controller.weight[0][0], want.detach())


@pytest.mark.parametrize("kind", ["linear", "hf_conv1d", "conv", "embedding", "attention"])
@pytest.mark.parametrize("half", [False, True])
def test_a_row_is_an_output_in_every_kind_of_layer(kind, half):
    torch.manual_seed(0)
    layer = {
        "linear": lambda: nn.Linear(5, 4),
        "hf_conv1d": lambda: conv1d_class()(4, 5),
        "conv": lambda: nn.Conv2d(4, 6, (2, 3), groups=2),
        "embedding": lambda: nn.Embedding(9, 4),
        "attention": lambda: nn.MultiheadAttention(4, 2),
    }[kind]()
    model = nn.Sequential(layer)
    if half:
        model.bfloat16()
    method = LoRAGGPO(rank=2, sigma=0.5)
    adapted = adapt(model, method, "0", generator=generator(1))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.attach(optimizer, draw=lambda step, name, shape: torch.ones(shape))
    site = adapted.sites["0"]
    matrix = site.site.to_matrix(layer._parameters[site.site.parameter].detach()).float()
    if kind == "embedding":
        with torch.no_grad():
            adapted.adapters["0"].B.zero_()
        adapted.controller._measure()
        adapted.controller._lay()
    want = 0.5 * matrix.norm(dim=1, keepdim=True) / site.site.cols**0.5
    got = noise_of(adapted, "0").float()
    tolerance = {"rtol": 0.02, "atol": 0.01} if half else {}
    torch.testing.assert_close(got, want.expand_as(matrix), **tolerance)


# --- a whole run against plain formulas ----------------------------------------------------------


def dense(model, factors, s, noise):
    """The network's output with weights W0 + s B A + noise, from plain tensors."""
    h = X
    for i, (linear, (A, B)) in enumerate(zip([model[0], model[2], model[4]], factors, strict=True)):
        h = h @ (linear.weight + s * B @ A + noise[i]).T + linear.bias
        h = torch.tanh(h) if i < 2 else h
    return h


def test_a_run_of_ggpo_equals_a_plain_loop_draw_for_draw():
    def draw(step, name, shape):
        return normal(*shape, seed=100 * step + int(name))

    adapted, optimizer = start(METHOD, lambda p: torch.optim.SGD(p, lr=0.1), draw=draw)
    model, s, sigma, beta = network(), 2.0, 0.3, 0.5
    factors = [(a.A.detach().clone(), a.B.detach().clone()) for a in adapted.adapters.values()]
    losses = train(adapted, optimizer, 5)
    gradient = [torch.zeros(len(B), dtype=DOUBLE) for _, B in factors]
    for step in range(5):
        noise = []
        for i, (A, B) in enumerate(factors):
            W = (model[2 * i].weight + s * B @ A).detach()
            m, n = W.shape
            variance = sigma**2 / n * (W.square().sum(1) + beta * gradient[i])
            noise.append(variance.sqrt()[:, None] * draw(step, str(2 * i), (m, n)))
        leaves = [t.requires_grad_() for pair in factors for t in pair]
        loss = (dense(model, factors, s, noise) - Y).square().mean()
        grads = torch.autograd.grad(loss, leaves)
        assert loss.item() == pytest.approx(losses[step], rel=1e-10)
        with torch.no_grad():
            for i, (A, B) in enumerate(factors):
                gA, gB = grads[2 * i : 2 * i + 2]
                gradient[i] = (s * (gB @ A + B @ gA)).square().sum(1)
            factors = [
                tuple((t - 0.1 * g).detach() for t, g in zip(pair, grads[2 * i : 2 * i + 2]))  # noqa: B905
                for i, pair in enumerate(factors)
            ]
    for a, (A, B) in zip(adapted.adapters.values(), factors, strict=True):
        torch.testing.assert_close(a.A.detach(), A)
        torch.testing.assert_close(a.B.detach(), B)


@pytest.mark.parametrize("sign", ["source", "ascent", "descent"])
@pytest.mark.parametrize("variant", MOVES)
def test_a_run_along_the_momentum_equals_a_plain_loop(variant, sign):
    rho, smoothing, s = 0.8, 0.7, 2.0
    method = made(variant, rho=rho, smoothing=smoothing, sign=sign)
    adapted, optimizer = start(method)
    model = network()
    factors = [(a.A.detach().clone(), a.B.detach().clone()) for a in adapted.adapters.values()]
    losses = train(adapted, optimizer, 6)
    leaves = [t.requires_grad_() for pair in factors for t in pair]
    plain = torch.optim.Adam(leaves, lr=0.02)
    along = {"ascent": 1, "descent": -1, "source": 1 if variant == "paper" else -1}[sign]
    smooth = None
    for step in range(6):
        m = [plain.state[t]["exp_avg"] if step else torch.zeros_like(t) for t in leaves]
        moved, noise = [t.detach() for t in leaves], [0.0, 0.0, 0.0]
        if step and variant == "paper":
            size = torch.cat([t.flatten() for t in m]).norm()
            moved = [t + along * rho * d / size / smooth for t, d in zip(moved, m, strict=True)]
        elif step:
            for i, (A, B) in enumerate(factors):
                v = (s * (m[2 * i + 1] @ A + B @ m[2 * i])).detach()
                noise[i] = along * rho * v / v.norm() * min(1 / smooth[i], 10.0)
        moved = [t.requires_grad_() for t in moved]
        pairs = list(zip(moved[::2], moved[1::2], strict=True))
        loss = (dense(model, pairs, s, noise) - Y).square().mean()
        assert loss.item() == pytest.approx(losses[step], rel=1e-9)
        grads = torch.autograd.grad(loss, moved)
        if variant == "paper":
            now = torch.cat([g.flatten() for g in grads]).norm()
        else:
            now = torch.stack(
                [
                    (s * (grads[2 * i + 1] @ A + B @ grads[2 * i])).norm().detach()
                    for i, (A, B) in enumerate(factors)
                ]
            )
        smooth = now if smooth is None else smoothing * smooth + (1 - smoothing) * now
        for t, g in zip(leaves, grads, strict=True):
            t.grad = g
        plain.step()
    for p, t in zip(adapted.parameters(), leaves, strict=True):
        torch.testing.assert_close(p.detach(), t.detach(), rtol=1e-8, atol=1e-9)


# --- the momentum --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MOVES)
def test_the_first_step_along_the_momentum_is_loras(variant):
    adapted, optimizer = start(made(variant, rho=5.0))
    plain, other = start(LoRA(rank=3, alpha=6.0))
    assert train(adapted, optimizer, 1) == train(plain, other, 1)
    assert same(values(adapted), values(plain))
    assert train(adapted, optimizer, 1) != train(plain, other, 1)


def test_the_move_has_length_rho_over_gbar_and_the_momentums_direction():
    adapted, optimizer = start(made("paper", rho=0.3))
    train(adapted, optimizer, 4)
    moves = [t.flatten() for a in adapted.adapters.values() for t in a.cover.shift]
    moments = [optimizer.state[p]["exp_avg"].flatten() for p in adapted.parameters()]
    move, m = torch.cat(moves), torch.cat(moments)
    assert move.norm().item() == pytest.approx(0.3 / adapted.controller.smooth[0].item())
    torch.testing.assert_close(move / move.norm(), m / m.norm())
    torch.testing.assert_close(
        adapted.adapters["2"].factors()[1] - adapted.adapters["2"].A,
        adapted.adapters["2"].cover.shift[0],
    )


@pytest.mark.parametrize("variant", MOVES)
def test_a_vanishing_rho_is_lora(variant):
    adapted, optimizer = start(made(variant, rho=1e-13))
    plain, other = start(LoRA(rank=3, alpha=6.0))
    got, want = train(adapted, optimizer, 8), train(plain, other, 8)
    assert got == pytest.approx(want, rel=1e-9)


def test_sgd_with_momentum_serves_as_well():
    adapted, optimizer = start(
        made("paper"),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    )
    train(adapted, optimizer, 3)
    first = adapted.parameters()[0]
    buffer, shift = optimizer.state[first]["momentum_buffer"], adapted.adapters["0"].cover.shift[0]
    torch.testing.assert_close(shift / shift.norm(), buffer / buffer.norm())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, betas=(0.0, 0.99)),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.RMSprop(p),
    ],
)
@pytest.mark.parametrize("variant", MOVES)
def test_an_optimizer_without_a_first_moment_is_refused(variant, make):
    with pytest.raises(ValueError, match=r"first moment.*momentum > 0"):
        start(made(variant), make)


def test_an_optimizer_that_hides_its_moment_is_refused_at_the_first_step():
    class Hiding(torch.optim.SGD):
        pass

    adapted, optimizer = start(made("paper"), lambda p: Hiding(p, lr=0.1, momentum=0.9))
    optimizer.param_groups[0]["momentum"] = 0.0  # so that no buffer is kept
    with pytest.raises(RuntimeError, match=r"Hiding.*exp_avg"):
        train(adapted, optimizer, 1)


@pytest.mark.parametrize("variant", MOVES)
def test_no_gradient_or_a_zero_one_moves_nothing(variant):
    adapted, optimizer = start(made(variant))
    with pytest.raises(RuntimeError, match="before any backward pass"):
        optimizer.step()
    assert not any(a.cover.lies for a in adapted.adapters.values())
    before = values(adapted)
    for _ in range(3):
        optimizer.zero_grad()
        (0 * adapted(X)).sum().backward()
        optimizer.step()
    assert same(values(adapted), before)
    assert all(s.abs().max() == 0 for s in adapted.controller.shifts.values())
    assert torch.isfinite(adapted(X)).all()
    assert all(map(torch.isfinite, torch.tensor(train(adapted, optimizer, 3))))


# --- seeds, draws, micro-batches -----------------------------------------------------------------


def test_one_seed_gives_one_noise_and_another_seed_another():
    def run(seed=0, **options):
        adapted, optimizer = start(dataclasses.replace(METHOD, seed=seed), **options)
        return train(adapted, optimizer, 3)

    assert run() == run()
    assert run() != run(seed=1)
    assert run(generator=generator(7)) == run(generator=generator(7), seed=3)
    assert run(generator=generator(7)) != run()


def test_noise_changes_at_a_step_and_not_between():
    adapted, optimizer = start(METHOD)
    one, two = adapted(X), adapted(X)
    assert torch.equal(one, two)
    first = noise_of(adapted, "2")
    train(adapted, optimizer, 1)
    assert not torch.allclose(noise_of(adapted, "2"), first, atol=1e-3)


def test_the_global_generator_is_left_alone():
    model = network()
    state = torch.get_rng_state()
    adapted, optimizer = start(METHOD, model=model)
    train(adapted, optimizer, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_micro_batches_of_a_step_share_the_noise():
    runs = []
    for parts in (1, 4):
        adapted, optimizer = start(METHOD)
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                ((adapted(x) - y).square().mean() / parts).backward()
            optimizer.step()
        runs.append(values(adapted))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_noise_formed_again_in_backward_is_the_noise_of_forward():
    for variant in ("ggpo", "code"):
        runs = []
        for keep in (True, False):
            method = made(variant, keep_noise=keep, **lengths(variant, 2.0))
            adapted, optimizer = start(method)
            runs.append([*map(torch.tensor, train(adapted, optimizer, 5)), *values(adapted)])
        assert same(*runs)


def test_formed_again_means_that_nothing_is_kept():
    adapted, _ = start(dataclasses.replace(METHOD, keep_noise=False))
    made = []
    for site in adapted.sites.values():
        cover = site.layer.adapter.cover
        assert cover.stand_in._parameters["weight"] is site.layer.base.weight
        cover.make = lambda make=cover.make: made.append(1) or make()
    loss = (adapted(X) - Y).square().mean()
    assert len(made) == 3
    loss.backward()
    assert len(made) == 6


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("variant", ["ggpo", *MOVES])
def test_reentrant_checkpointing_is_refused_and_the_other_kind_changes_nothing(variant, keep):
    def loss(adapted, **how):
        inner = lambda x: torch.utils.checkpoint.checkpoint(adapted.model, x, **how)  # noqa: E731
        return ((inner if how else adapted)(X.clone().requires_grad_()) - Y).square().mean()

    adapted, optimizer = start(made(variant, keep_noise=keep, **lengths(variant, 2.0)))
    train(adapted, optimizer, 2)  # what lies over the layers then has not been used
    with pytest.raises(RuntimeError, match=r"reentrant.*use_reentrant=False"):
        loss(adapted, use_reentrant=True).backward()
    want = torch.autograd.grad(loss(adapted), adapted.parameters())
    got = torch.autograd.grad(loss(adapted, use_reentrant=False), adapted.parameters())
    assert same(got, want)
    train(adapted, optimizer, 1)


def test_the_gradient_is_that_of_the_noisy_network():
    adapted, _ = start(METHOD)
    W = [s.layer.base.weight + noise_of(adapted, n) for n, s in adapted.sites.items()]
    factors = [(a.A, a.B) for a in adapted.adapters.values()]
    noise = [w - s.layer.base.weight for w, s in zip(W, adapted.sites.values(), strict=True)]
    want = torch.autograd.grad(
        (dense(network(), factors, 2.0, noise) - Y).square().mean(), adapted.parameters()
    )
    got = torch.autograd.grad((adapted(X) - Y).square().mean(), adapted.parameters())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_draw_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"draw gave shape \(5, 7\) for layer '0'.*7 x 5"):
        start(METHOD, draw=lambda step, name, shape: torch.zeros(shape[::-1]))


def test_noise_and_moves_act_side_by_side_on_one_model():
    model = network()
    both = {"0": made("ggpo"), "2": made("paper", rho=2.0), "4": made("code", rho=2.0)}
    adapted = adapt(model, both, generator=generator(1))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.02)
    adapted.attach(optimizer)
    train(adapted, optimizer, 2)
    shift, lies = adapted.adapters["2"].cover.shift, adapted.adapters["4"].cover.lies
    assert all(t.abs().max() > 0 for t in shift)
    assert lies
    assert noise_of(adapted, "0").abs().max() > 0
    with torch.no_grad():
        plain = adapted(X)
    assert not torch.allclose(adapted(X), plain, atol=1e-4)


@pytest.mark.parametrize("variant", MOVES)
def test_moves_take_no_options_for_noise(variant):
    with pytest.raises(TypeError, match="generator"):
        start(made(variant), generator=generator())


# --- going on, and going wrong -------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("variant", [*NOISES, *MOVES])
@pytest.mark.parametrize("early", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(variant, keep, early, tmp_path):
    more = {"refresh": 2} if variant in NOISES else {"rho": 0.5}
    method = made(variant, keep_noise=keep, **more)
    whole, optimizer = start(method)
    want = train(whole, optimizer, 9)
    first, optimizer = start(method)
    losses = train(first, optimizer, 5)
    first.save(tmp_path / "half.safetensors", resume=True)
    moments = copy.deepcopy(optimizer.state_dict())
    second = toolkit.load(network(), tmp_path / "half.safetensors")
    optimizer = torch.optim.Adam(second.parameters(), lr=0.02)
    if early:
        optimizer.load_state_dict(moments)
    second.attach(optimizer)
    if not early:
        optimizer.load_state_dict(moments)
    assert second.controller.step == 5
    assert losses + train(second, optimizer, 4) == want
    assert same(values(second), values(whole))


def test_a_saved_schedule_of_another_variant_is_refused():
    adapted, optimizer = start(METHOD)
    train(adapted, optimizer, 1)
    state = adapted.controller.state()
    other = adapt(network(), made("paper"))
    other.schedule(other.method).waiting = state
    with pytest.raises(ValueError, match="does not fit LoRA-MGPO"):
        other.attach(torch.optim.Adam(other.parameters()))


@pytest.mark.parametrize("variant", [*NOISES, *MOVES])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(variant):
    adapted, optimizer = start(made(variant))
    train(adapted, optimizer, 2)
    before, state = values(adapted), adapted.controller.state()
    state = {k: v.clone() for k, v in state.items()}
    for bad in (float("nan"), float("inf")):
        optimizer.zero_grad()
        (adapted(X) - Y).square().mean().backward()
        adapted.adapters["2"].B.grad[0, 0] = bad
        with pytest.raises(FloatingPointError, match=r"'2(\.B)?' is not finite at step 2"):
            optimizer.step()
    assert same(values(adapted), before)
    after = adapted.controller.state()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert torch.isfinite(torch.tensor(train(adapted, optimizer, 2))).all()


def test_with_beta_0_gradients_are_not_read():
    adapted, _ = start(dataclasses.replace(METHOD, beta=0.0), lambda p: torch.optim.SGD(p, lr=0.0))
    adapted.adapters["2"].B.grad = torch.full_like(adapted.adapters["2"].B, float("nan"))
    adapted.controller.before_step()
    assert all(g.abs().max() == 0 for g in adapted.controller.gradient)


def test_a_layer_without_a_gradient_has_noise_from_its_weight_alone():
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)}).double()
    adapted = adapt(model, METHOD, generator=generator(1))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.attach(optimizer)
    adapted.model["a"](X).square().mean().backward()
    optimizer.step()
    used, unused = adapted.controller.gradient[0]
    assert used.min() > 0
    assert unused.abs().max() == 0


def test_scaled_gradients_of_a_fused_optimizer_are_refused():
    for variant in ("ggpo", *MOVES):
        adapted, optimizer = start(made(variant))
        (adapted(X) - Y).square().mean().backward()
        optimizer.grad_scale = torch.tensor(1024.0)  # as GradScaler does before a fused step
        with pytest.raises(RuntimeError, match="unscale_"):
            optimizer.step()


def test_a_step_that_a_fused_optimizer_skips_for_an_overflow_is_no_error():
    for variant in ("ggpo", *MOVES):
        adapted, optimizer = start(made(variant), lambda p: torch.optim.Adam(p, fused=True))
        train(adapted, optimizer, 1)
        adapted.adapters["2"].A.grad[0, 0] = float("inf")
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)  # after unscale_()
        before = {k: v.clone() for k, v in adapted.controller.state().items()}
        optimizer.step()
        after = adapted.controller.state()
        assert all(torch.equal(after[k], v) for k, v in before.items())


def test_sparse_gradients_are_refused():
    adapted, optimizer = start(METHOD)
    (adapted(X) - Y).square().mean().backward()
    layer = adapted.adapters["2"]
    layer.A.grad = layer.A.grad.to_sparse()
    with pytest.raises(TypeError, match=r"'2\.A' is sparse"):
        optimizer.step()


def test_noise_cannot_be_asked_for_on_a_merged_model():
    adapted = adapt(network(), METHOD)
    optimizer = torch.optim.Adam(adapted.parameters())
    adapted.merge()
    with pytest.raises(RuntimeError, match=r"attach.*merged.*unmerge"):
        adapted.attach(optimizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigma", -0.1),
        ("sigma", float("nan")),
        ("beta", -1.0),
        ("rho", 0.0),
        ("rho", -0.05),
        ("smoothing", 1.0),
        ("smoothing", -0.1),
        ("refresh", 0),
        ("seed", -1),
        ("variant", "mgpo"),
        ("sign", "+"),
        ("like", "sam"),
    ],
)
def test_hyperparameters_outside_their_range_are_refused(name, value):
    has = {field.name for field in dataclasses.fields(LoRAGGPO)}
    with pytest.raises(ValueError, match=name):
        (LoRAGGPO if name in has else LoRAMGPO)(**{name: value})


def test_dropout_acts_beside_the_noise():
    method = dataclasses.replace(METHOD, dropout=0.5)
    adapted, _ = start(method)
    torch.manual_seed(0)
    assert not torch.equal(adapted(X), adapted(X))
    model = nn.Sequential(nn.MultiheadAttention(4, 2).double())
    other = adapt(model, LoRAGGPO(rank=2, dropout=0.5), "0")
    other.attach(torch.optim.SGD(other.parameters(), lr=0.1))
    x = normal(3, 2, 4)
    with pytest.raises(ValueError, match=r"dropout.*attention"):
        model[0](x, x, x)


# --- contracts, under noise that shows -----------------------------------------------------------


NOISY = {
    "noise": LoRAGGPO(rank=3, sigma=0.5, beta=1.0),
    "formed-again": LoRAGGPO(rank=3, sigma=0.5, keep_noise=False),
    "mgpo": LoRAMGPO(rank=3, rho=2.0),
    "mgpo-code": LoRAMGPO(rank=3, like="code", rho=2.0),
}
NOISY_ROOMS = ("linear", "grouped_conv", "embedding", "attention", "twice")


@pytest.mark.parametrize("room", NOISY_ROOMS)
@pytest.mark.parametrize("method", NOISY.values(), ids=NOISY)
def test_contracts_hold_under_noise_that_shows(method, room):
    for name in (
        "routes_agree",
        "merged_equals_unmerged",
        "gradients_are_right",
        "second_gradients_are_right",
        "works_with_function_transforms",
        "frozen_stays",
        "deepcopy_is_independent",
        "save_load_round_trip",
        "counted_as_formula",
    ):
        contracts.check(name, Case(method, room))


@pytest.mark.weekly  # every run: the contract works_compiled, with less noise
@pytest.mark.parametrize("room", NOISY_ROOMS)
@pytest.mark.parametrize("method", NOISY.values(), ids=NOISY)
def test_compiling_keeps_noise_that_shows(method, room):
    contracts.check("works_compiled", Case(method, room))


def test_a_cover_does_not_survive_a_copy():
    adapted, _ = start(METHOD)
    cover = adapted.adapters["0"].cover
    assert cover.lies
    assert not copy.deepcopy(cover).lies
    assert isinstance(copy.deepcopy(adapted.adapters["0"]).cover, Cover)


# --- SAM, the reference --------------------------------------------------------------------------


def test_sam_takes_the_gradient_at_the_worst_nearby_point_and_leaves_the_weights():
    p, q = normal(4, 3).requires_grad_(), normal(2, seed=1).requires_grad_()

    def value():
        return (p.sin().sum() + q.square().sum()) ** 2

    def closure():
        p.grad = q.grad = None
        loss = value()
        loss.backward()
        return loss

    before = [p.detach().clone(), q.detach().clone()]
    first = torch.autograd.grad(value(), [p, q])
    norm = torch.cat([g.flatten() for g in first]).norm()
    loss = sam_step([p, q], closure, rho=0.3)
    assert same(before, [p.detach(), q.detach()])
    assert loss.item() == value().item()
    got = [p.grad.clone(), q.grad.clone()]
    with torch.no_grad():
        p += 0.3 * first[0] / norm
        q += 0.3 * first[1] / norm
    for g, w in zip(got, torch.autograd.grad(value(), [p, q]), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sams_radius_has_the_parameters_precision_and_half_precisions_do_not_overflow(dtype):
    p = nn.Parameter(torch.zeros(2**14, dtype=dtype))
    seen = []

    def closure():
        seen.append(p.detach().clone())
        p.grad = torch.full_like(p, 1e3)  # of norm 1.28e5, above float16's largest number
        return p.sum()

    sam_step([p], closure, rho=1.3)
    want = torch.full_like(p, 1e3) * (1.3 / 1.28e5)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-4}.get(dtype, 0.02)
    torch.testing.assert_close(seen[1], want.detach(), rtol=tolerance, atol=0)


def test_sam_refuses_what_it_cannot_use_and_restores_after_an_error():
    p = normal(3).requires_grad_()
    with pytest.raises(ValueError, match="rho must be positive"):
        sam_step([p], lambda: p.sum(), rho=0.0)
    with pytest.raises(ValueError, match="backward"):
        sam_step([p], lambda: p.sum(), rho=0.1)

    def backward(factor):
        p.grad = None
        loss = (factor * p).sum()
        loss.backward()
        return loss

    before, calls = p.detach().clone(), []
    with pytest.raises(FloatingPointError, match="nothing was moved"):
        sam_step([p], lambda: backward(float("nan")), rho=0.1)
    assert torch.equal(p.detach(), before)

    def fails_the_second_time():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second")
        return backward(1.0)

    with pytest.raises(KeyError):
        sam_step([p], fails_the_second_time, rho=0.1)
    assert torch.equal(p.detach(), before)
    calls.clear()
    sam_step([p], lambda: calls.append(1) or backward(0.0), rho=0.1)
    assert len(calls) == 1  # no direction, so no second pass


# --- its lab -------------------------------------------------------------------------------------


def test_the_labs_noise_of_size_0_is_its_lora():
    ours = lab.digits_noise("ggpo", "ggpo", 0.0, 0.01, 1e-2, 0, 10)
    plain = lab.digits_lora("lora", 1e-2, 0, 10)
    assert {name: ours[name] for name in plain} == plain


def test_the_labs_rows_move_by_sigma_and_random_noise_has_the_same_size_for_all():
    shaken = lab.digits_noise("ggpo", "ggpo", 0.3, 0.0, 1e-2, 0, 10)
    assert shaken["noise"] == pytest.approx(30, rel=1e-4)
    assert shaken["share"] == 0
    assert lab.digits_noise("ggpo", "ggpo", 0.3, 10.0, 1e-2, 0, 10)["share"] > 1


def test_the_walk_starts_where_training_ended():
    record = lab.digits_lora("lora", 1e-2, 0, 10)
    assert record["walk"][0] == pytest.approx(record["train"], rel=1e-5)
    assert record["sharpness"] == record["walk"][2] - record["walk"][0]


def test_a_rebound_is_the_largest_rise_after_a_fall():
    steep = lab.digits_lora("lora", 0.5, 0, 60)  # so high a rate that the loss jumps
    curve = steep["curve"]
    want = max(b - a for i, a in enumerate(curve) for b in curve[i:])
    assert steep["rebound"] == pytest.approx(want)
    assert want > 0
