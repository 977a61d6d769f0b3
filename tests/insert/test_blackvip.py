"""BlackVIP: estimate and variance, both forms, the decoder, the box, whole steps, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit import BlackVIP
from toolkit.core.declare.catalogue import catalogue
from toolkit.core.seeds import generator
from toolkit.insert.blackvip import (
    SPSA,
    BadAnswer,
    BlackBox,
    BudgetSpent,
    CallFailed,
    Coordinator,
    Frame,
    gains,
    one_sided,
    relative_error,
    segmented_uniform,
    sphere,
    two_sided,
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed, "blackvip"))


# the estimate


def test_directions_are_segmented_uniform():
    delta = segmented_uniform(400, 50, generator(0, "delta"), torch.float64)
    size = delta.abs()
    assert 0.5 <= float(size.min()) < 0.51
    assert 0.99 < float(size.max()) <= 1.0
    assert abs(float(delta.mean())) < 0.02
    assert math.isclose(float(delta.square().mean()), 7 / 12, rel_tol=0.02)
    assert math.isclose(float(delta.pow(-2).mean()), 2.0, rel_tol=0.02)


def test_estimate_is_unbiased_with_the_stated_variance():
    g, draws = numbers(6), 20_000
    hessian = numbers(6, 6, seed=1)
    hessian = hessian + hessian.T
    delta = segmented_uniform(draws, 6, generator(1, "delta"), torch.float64)

    def loss(rows):
        return rows @ g + 0.5 * ((rows @ hessian) * rows).sum(1)

    slope = (loss(0.3 * delta) - loss(-0.3 * delta)) / 0.6
    # a quadratic has no bias of order c: exact along the direction
    torch.testing.assert_close(slope, delta @ g)
    each = slope[:, None] / delta
    wanted = 7 / 6 * (g.square().sum() - g.square())
    assert bool(((each.mean(0) - g).abs() < 4 * (wanted / draws).sqrt()).all())
    torch.testing.assert_close(each.var(0), wanted, rtol=0.06, atol=0)
    mean = two_sided(loss(0.3 * delta), loss(-0.3 * delta), delta, 0.3)
    torch.testing.assert_close(mean, each.mean(0))
    total = (each - g).square().sum(1).mean() / g.square().sum()
    assert math.isclose(float(total), relative_error(6, 1), rel_tol=0.03)


def test_one_number_is_exact_for_any_width():
    for c in (1e-3, 7.0):
        delta = segmented_uniform(3, 1, generator(2, "one"), torch.float64)
        g = two_sided(4 * c * delta[:, 0], -4 * c * delta[:, 0], delta, c)
        torch.testing.assert_close(g, torch.tensor([4.0], dtype=torch.float64))


def test_one_sided_is_that_of_bar():
    g, c = numbers(5), 1e-3
    u = sphere(20_000, 5, generator(3, "sphere"), torch.float64)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(20_000, dtype=torch.float64))
    found = one_sided(c * (u @ g), torch.zeros((), dtype=torch.float64), u, c)
    assert bool(((found - g).abs() < 0.08).all())
    one = one_sided(c * (u[:2] @ g), torch.zeros((), dtype=torch.float64), u[:2], c)
    torch.testing.assert_close(one, 5 / 2 * ((u[0] @ g) * u[0] + (u[1] @ g) * u[1]))


# the descent


def quadratic(rows):
    return ((rows - 1) * torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64) * (rows - 1)).sum(1)


def plain(phi, delta, a, o, alpha, c, gamma, beta):
    """The loop of the paper's code, one direction after the other."""
    m = None
    for i, directions in enumerate(delta, 1):
        ai, ci, found = a / (i + o) ** alpha, c / i**gamma, []
        for d in directions:
            up, down = quadratic((phi + ci * d)[None])[0], quadratic((phi - ci * d)[None])[0]
            found.append((up - down) / (2 * ci) / d)
        g = torch.stack(found).mean(0)
        m = g if m is None else beta * m + g
        phi = phi - ai * (g + beta * m)
    return phi


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_coded_form_is_a_plain_loop(beta):
    delta = torch.stack(
        [segmented_uniform(4, 3, generator(i, "d"), torch.float64) for i in range(7)]
    )
    options = {"a": 0.03, "o": 2.0, "alpha": 0.4, "c": 0.1, "gamma": 0.2, "beta": beta}
    this = SPSA(torch.zeros(3, dtype=torch.float64), directions=4, **options)
    for d in delta:
        this.step(quadratic, d)
    wanted = plain(torch.zeros(3, dtype=torch.float64), delta, **options)
    torch.testing.assert_close(this.phi, wanted, rtol=0, atol=1e-12)


def test_forms_are_one_iteration_where_the_step_is_constant():
    start, forms = numbers(3), {}
    for lookahead in (False, True):
        this = SPSA(start, a=0.02, alpha=0.0, c=0.1, beta=0.8, lookahead=lookahead)
        seen = []
        for i in range(9):
            seen.append(this.phi + (0.8 * this.m if lookahead else 0))
            this.step(quadratic, segmented_uniform(5, 3, generator(i, "form"), torch.float64))
        forms[lookahead] = torch.stack(seen)
    torch.testing.assert_close(forms[False], forms[True], rtol=0, atol=1e-12)
    # with a falling step they differ
    ends = []
    for lookahead in (False, True):
        this = SPSA(start, a=0.02, alpha=0.6, c=0.1, beta=0.8, lookahead=lookahead)
        for i in range(9):
            this.step(quadratic, segmented_uniform(5, 3, generator(i, "form"), torch.float64))
        ends.append(this.phi + (0.8 * this.m if lookahead else 0))
    assert float((ends[0] - ends[1]).abs().max()) > 1e-3


def test_no_momentum_is_spsa_in_both_forms():
    ends = []
    for lookahead in (False, True):
        this = SPSA(numbers(3), beta=0.0, lookahead=lookahead, generator=generator(5, "b"))
        for _ in range(5):
            this.step(quadratic)
        ends.append(this.phi)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-13)


def test_gains_of_the_schedule_and_given_ones():
    assert gains(1) == (0.01 / 2**0.4, 0.01)
    assert gains(8, a=1.0, o=0.0, alpha=1.0, c=4.0, gamma=1 / 3) == (0.125, pytest.approx(2.0))
    this = SPSA(numbers(3), generator=generator(0, "g"))
    assert this.step(quadratic, given=(0.5, 0.25))[2:] == (0.5, 0.25)
    assert this.step(quadratic)[2:] == gains(2)


# the decoder


def small(norm="batch", size=28, start=7, widths=(4,), features=10, channels=2, src_dim=98, **m):
    made = Coordinator(features, size, src_dim=src_dim, start=start, widths=widths,
                       channels=channels, norm=norm, generator=generator(0, "co"), **m)  # fmt: skip
    made = made.double()
    with torch.no_grad():
        for part in made.parameters():
            part.add_(0.3 * torch.randn(part.shape, generator=generator(1, "co"), dtype=part.dtype))
    return made


def test_counts_are_those_of_the_official_decoder():
    for length, count in ((784, 9136), (1568, 9920), (3136, 11488)):
        assert Coordinator(src_dim=length).count == count
    assert Frame().count == 69_840
    trigger = Coordinator(generator=generator(0, "t")).trigger
    assert trigger.shape == (1, 800)
    assert 0 <= float(trigger.detach().min()) < 0.01
    assert 0.09 < float(trigger.detach().max()) <= 0.1


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {}, {"size": 20, "start": 4, "widths": (4, 6), "src_dim": 32},
        {"size": 30, "start": 2, "widths": (8, 4, 2), "src_dim": 16},
    ],
    ids=["two stages", "three, cut", "four, cut"],
)  # fmt: skip
def test_rows_are_decoded_as_the_network_would(norm, train, shape):
    made, z = small(norm, **shape), numbers(5, 10)
    made.train()(numbers(6, 10, seed=2))
    made.train(train)
    rows = torch.stack([made.vector() + 0.1 * i for i in range(3)])
    found = made.prompts(rows, z)
    for row, prompts in zip(rows, found, strict=True):
        made.put(row)
        torch.testing.assert_close(prompts, made(z), rtol=0, atol=1e-10)
    assert found.shape == (3, 5, 2, made.size, made.size)


def test_vectors_are_in_pytorchs_order():
    made = small()
    wanted = nn.utils.parameters_to_vector(made.parameters())
    assert torch.equal(made.vector(), wanted.detach())
    made.put(torch.arange(made.count, dtype=torch.float64))
    assert made.trigger[0, 0] == 0
    assert torch.equal(made.vector(), torch.arange(made.count, dtype=torch.float64))


def test_statistics_follow_one_pass_or_as_the_code_every_pass():
    z = numbers(5, 10)
    for kind in ("own", "perturbed"):
        made, plain = small(statistics=kind).train(), small().train()
        rows = torch.stack([made.vector() + 0.1 * i for i in range(1, 4)])
        made.prompts(rows, z, own=made.vector())
        for row in [plain.vector()] if kind == "own" else rows:
            plain.put(row)
            plain(z)
        for one, two in zip(made.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
        before = [part.clone() for part in made.buffers()]
        made.eval().prompts(rows, z, own=made.vector())
        assert all(map(torch.equal, before, made.buffers()))


def test_frames_touch_the_border_alone():
    made = Frame(12, 2, 3)
    rows = torch.rand(2, made.count) + 1
    h = made.prompts(rows, torch.empty(4, 0))
    assert h.shape == (2, 1, 3, 12, 12)
    assert bool((h[..., 2:-2, 2:-2] == 0).all())
    assert int((h != 0).sum()) == 2 * made.count == 2 * 3 * (144 - 64)


# whole steps

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(2 * 28 * 28, 5)).double()
X, Y = numbers(6, 2, 28, 28, seed=7).mul(0.2).add(0.5).clamp(0, 1), torch.tensor([0, 1, 2, 3, 4, 0])
A = numbers(10, 2 * 28 * 28, seed=8) / 40


def encoder(x):
    return x.flatten(1) @ A.T


def begun(method=None, box=None, **more):
    made = small()
    this = (method or BlackVIP(directions=2)).start(
        made, encoder, generator=generator(9, "tuner"), **more
    )
    return this, box or BlackBox(lambda x: MODEL(x).softmax(1))


def test_a_step_is_spsa_of_the_prompted_loss():
    this, box = begun(BlackVIP(directions=3, c=0.1, a=0.05, beta=0.5))
    phi = this.optimiser.phi.clone()
    delta = segmented_uniform(3, len(phi), generator(1, "given"), torch.float64)
    net, found = small().train(), []
    for d in delta:
        sides = []
        for sign in (1, -1):
            net.put(phi + sign * 0.1 * d)
            x = (X + net(encoder(X))).clamp(0, 1)
            sides.append(F.cross_entropy(MODEL(x), Y).detach())
        found.append((sides[0] - sides[1]) / 0.2 / d)
    g = torch.stack(found).mean(0)
    done = this.step(box, X, Y, delta=delta)
    wanted = phi - 0.05 / 2**0.4 * 1.5 * g
    torch.testing.assert_close(this.optimiser.phi, wanted, rtol=0, atol=1e-10)
    assert (done.images, done.calls) == (36, 1)


def test_queries_are_counted_and_the_base_stays():
    before = [p.detach().clone() for p in MODEL.parameters()]
    graphs = []

    def watching(x):
        graphs.append(x.requires_grad or torch.is_grad_enabled())
        return MODEL(x).softmax(1)

    this, box = begun(box=BlackBox(watching, batch=6))
    for _ in range(3):
        this.step(box, X, Y)
    assert box.images == this.images == 2 * 2 * 6 * 3
    assert box.calls == this.calls == 2 * 2 * 3
    assert graphs == [False] * 12
    assert all(map(torch.equal, before, MODEL.parameters()))
    assert not this.optimiser.phi.requires_grad
    assert this.prompted(X).grad_fn is None


def test_pieces_of_a_step_give_the_whole():
    ends = []
    for at_once in (None, 6, 13):
        this, box = begun(at_once=at_once)
        for _ in range(2):
            this.step(box, X, Y)
        ends.append(this.state_dict())
    for other in ends[1:]:
        for name in ends[0].keys() - {"calls"}:
            torch.testing.assert_close(ends[0][name], other[name], rtol=0, atol=1e-10)


def test_no_strength_or_a_zeroed_last_layer_is_the_bare_model():
    this, box = begun(BlackVIP(eps=0.0))
    assert torch.equal(this.prompted(X), X)
    assert torch.equal(this.predict(box, X), box(X))
    made = small()
    with torch.no_grad():
        made.body[-1].weight.zero_()
    assert torch.equal(BlackVIP().start(made, encoder).prompted(X), X)


def test_images_are_cut_to_the_valid_range_of_each_channel():
    this, _ = begun(BlackVIP(eps=50.0), mean=(0.5, 0.3), std=(0.2, 0.4))
    x = this.prompted((X - 0.4) / 0.3)
    for channel, (mu, sigma) in enumerate(((0.5, 0.2), (0.3, 0.4))):
        low, high = (0 - mu) / sigma, (1 - mu) / sigma
        assert math.isclose(float(x[:, channel].min()), low, rel_tol=1e-6)
        assert math.isclose(float(x[:, channel].max()), high, rel_tol=1e-6)


def test_resumed_runs_go_on_as_if_nothing_had_happened():
    this, box = begun()
    for _ in range(2):
        this.step(box, X, Y)
    kept = {k: v.clone() for k, v in this.state_dict().items()}
    this.step(box, X, Y)
    other, again = begun()
    other.load_state_dict(kept)
    again.load_state_dict({"images": 48, "calls": 2})
    other.step(again, X, Y)
    for name, value in this.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert again.images == box.images == 72


def test_it_learns_with_a_frame_and_with_the_one_sided_estimate():
    for method in (
        BlackVIP(a=20.0, c=0.05, directions=8, beta=0.5),
        BlackVIP(a=20.0, c=0.05, directions=8, beta=0.0, estimator="one-sided"),
    ):
        this = method.start(Frame(28, 6, 2), generator=generator(0, "frame"))
        box, losses = BlackBox(MODEL, returns="logits"), []
        for _ in range(60):
            losses.append(this.step(box, X.float().double(), Y).loss)
        assert losses[-1] < losses[0] - 0.1


def test_a_loss_of_ones_own():
    this, box = begun()
    other, _ = begun()
    this.step(box, X, Y)
    other.step(box, X, Y, loss=F.nll_loss)
    torch.testing.assert_close(this.optimiser.phi, other.optimiser.phi)


# the box


def test_the_budget_is_kept_exactly_and_refused_before_the_call():
    this, box = begun(box=BlackBox(lambda x: MODEL(x).softmax(1), budget=50))
    this.step(box, X, Y)
    this.step(box, X, Y)
    assert (box.images, box.left) == (48, 2)
    kept = this.state_dict()
    with pytest.raises(BudgetSpent, match="24 images are asked for and 2 of 50 are left"):
        this.step(box, X, Y)
    assert box.images == 48
    assert all(torch.equal(v, this.state_dict()[k]) for k, v in kept.items())
    box.budget = 72
    this.step(box, X, Y)
    assert box.left == 0


def failing(times, error=OSError):
    """A service that fails so many times, then answers."""
    left = [times]

    def call(x):
        if left[0]:
            left[0] -= 1
            raise error("line lost")
        return MODEL(x).softmax(1)

    return call


def test_a_failure_loses_nothing_and_the_same_step_can_be_taken():
    good, fine = begun()
    good.step(fine, X, Y)
    this, box = begun(box=BlackBox(failing(1)))
    with pytest.raises(CallFailed, match=r"OSError \(line lost\)") as raised:
        this.step(box, X, Y)
    assert isinstance(raised.value.__cause__, OSError)
    assert (box.images, this.optimiser.taken) == (24, 0)
    this.step(box, X, Y)
    assert torch.equal(this.optimiser.phi, good.optimiser.phi)
    assert box.images == this.images == 48


def test_a_failure_half_way_gives_statistics_and_generator_back():
    good, fine = begun(at_once=6)
    good.step(fine, X, Y)
    answered = [0]

    def second(x):
        answered[0] += 1
        if answered[0] == 3:
            raise OSError("line lost")
        return MODEL(x).softmax(1)

    this, box = begun(BlackVIP(directions=2, like="code"), BlackBox(second), at_once=6)
    before = {k: v.clone() for k, v in this.state_dict().items()}
    with pytest.raises(CallFailed):
        this.step(box, X, Y)
    changed = {k for k, v in this.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"images", "calls"}
    this.step(box, X, Y)
    assert torch.equal(this.optimiser.phi, good.optimiser.phi)


def test_tenacity_decides_what_is_tried_again():
    tenacity = pytest.importorskip("tenacity")

    def policy():
        return tenacity.Retrying(stop=tenacity.stop_after_attempt(3), reraise=True)

    box = BlackBox(failing(2), retry=policy())
    assert box(X).shape == (6, 5)
    assert (box.images, box.calls) == (18, 3)
    with pytest.raises(CallFailed, match="OSError"):
        BlackBox(failing(3), retry=policy())(X)
    box = BlackBox(failing(3), budget=12, retry=policy())
    with pytest.raises(BudgetSpent):  # not tried again for ever, and not one image too many
        box(X)
    assert box.images == 12
    with pytest.raises(TypeError, match="not the decorator"):
        BlackBox(failing(0), retry=tenacity.retry(stop=tenacity.stop_after_attempt(3)))(X)


def test_any_callable_may_be_the_policy():
    for policy in (lambda call: call(), lambda call, images: call(images)):
        assert BlackBox(lambda x: MODEL(x).softmax(1), retry=policy)(X).shape == (6, 5)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: torch.full((len(x), 5), 0.3), 'say returns="logits"'),
        (lambda x: torch.tensor([[1.5, -0.5]] * len(x)), "no probabilities"),
        (lambda x: torch.full((len(x), 5), math.nan), "not finite"),
        (lambda x: torch.full((len(x) - 1, 5), 0.2), r"shape \(5, 5\), wanted \(6, classes\)"),
        (lambda x: torch.full((len(x),), 1.0), "shape"),
        (lambda x: torch.ones(len(x), 5, dtype=torch.int64), "floating point"),
        (lambda x: None, "NoneType is no table"),
        (lambda x: {"logits": 1}, "dict is no table"),
    ],
)
def test_answers_that_are_none_are_named(answer, words):
    this, box = begun(box=BlackBox(answer))
    kept = this.state_dict()
    with pytest.raises(BadAnswer, match=words):
        box(X)
    with pytest.raises(BadAnswer):
        this.step(box, X, Y)
    kept |= {k: v for k, v in this.state_dict().items() if k in ("images", "calls")}
    assert all(torch.equal(v, this.state_dict()[k]) for k, v in kept.items())


def test_answers_of_other_kinds_are_read():
    logits = MODEL(X).detach()
    wanted = logits.log_softmax(1)
    torch.testing.assert_close(BlackBox(lambda x: logits, returns="logits")(X), wanted)
    for made in (logits.softmax(1).numpy(), logits.softmax(1).tolist(), logits.softmax(1).half()):
        found = BlackBox(lambda x, made=made: made)(X)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-2)
    certain = torch.eye(5)[Y]
    assert bool(BlackBox(lambda x: certain)(X).isfinite().all())


def test_class_counts_that_differ_are_named():
    sizes = iter((5, 4))
    box = BlackBox(lambda x: torch.full((len(x), n := next(sizes)), 1 / n))
    box(X)
    with pytest.raises(BadAnswer, match="4 classes, before there were 5"):
        box(X)
    this, box = begun()
    with pytest.raises(ValueError, match="labels 0 to 7, the box knows 5 classes"):
        this.step(box, X, Y + torch.tensor([0, 0, 0, 0, 3, 0]))


# refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"src_dim": 100}, "src_dim: 100 numbers do not fill maps of 7 x 7"),
        ({"features": 98}, "no room for the trigger"),
        ({"widths": (3,)}, "widths: .* a multiple of the 2"),
        ({"size": 57}, "2 stages reach 28 of 57 pixels; give 3 widths"),
        ({"norm": "layer"}, "norm"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"c": 0.0}, "c must"), ({"a": 0.0}, "a must"), ({"beta": 1.0}, "beta"),
     ({"eps": -1.0}, "eps"), ({"directions": 0}, "directions"),
     ({"estimator": "gauss"}, "estimator")],
)  # fmt: skip
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        BlackVIP(**options)


def test_arguments_that_do_not_fit_are_refused_before_the_box_is_asked():
    def asked(x):
        raise AssertionError("the box was asked")

    this, box = begun(box=BlackBox(asked))
    wrong = numbers(2, len(this.optimiser.phi))
    wrong[0, 3] = 0
    for given, words in (
        ({"x": X[:, :1]}, r"x: images \(N, 2, 28, 28\)"),
        ({"y": Y[:5]}, "one whole label for each of 6"),
        ({"delta": numbers(2, 3)}, "delta"),
        ({"delta": wrong}, "holds a 0"),
        ({"given": (0.1, 0.0)}, "width c must be above 0"),
        ({"z": numbers(6, 4)}, r"wanted \(N, 10\)"),
    ):
        with pytest.raises(ValueError, match=words):
            this.step(box, **({"x": X, "y": Y} | given))
    assert box.calls == 0
    with pytest.raises(ValueError, match="steps count from 1"):
        gains(0)
    with pytest.raises(ValueError, match="c: must be above 0"):
        gains(1, c=0.0)
    with pytest.raises(ValueError, match="encoder"):
        BlackVIP().start(small())
    with pytest.raises(ValueError, match="mean: 1 or 2 numbers"):
        BlackVIP().start(small(), encoder, mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="delta: give directions, or a generator"):
        BlackVIP().start(small(), encoder).step(box, X, Y)
    with pytest.raises(ValueError, match="of another prompter"):
        this.load_state_dict({"phi": this.optimiser.phi})
    with pytest.raises(ValueError, match="phi: "):
        small().put(torch.zeros(3))
    with pytest.raises(ValueError, match="width"):
        Frame(28, 15)
    for options in ({"budget": -1}, {"batch": 0}, {"returns": "scores"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            BlackBox(asked, **options)


def test_a_loss_that_is_not_finite_changes_nothing():
    this, box = begun()
    kept = this.state_dict()
    with pytest.raises(FloatingPointError, match="smaller a or c"):
        this.step(box, X, Y, loss=lambda p, y: p.sum() * math.inf)
    assert torch.equal(this.optimiser.phi, kept["phi"])
    assert torch.equal(this.state_dict()["generator"], kept["generator"])


def test_it_is_in_the_catalogue():
    assert {e.slug: e.part for e in catalogue()}["blackvip"] == "insert"
