"""What every adapting method must satisfy: plain functions of a case that raise AssertionError.

``CONTRACTS`` names them all. :func:`check` runs one and turns any other exception into an
AssertionError as well, so that a method that crashes breaks the contract it crashes in.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import toolkit
from tests.contracts import refusals, surroundings
from tests.contracts.rooms import Case
from toolkit.core.adapt import handles
from toolkit.core.adapt import load as loading
from toolkit.core.adapt.layer import AdaptedLayer
from toolkit.core.declare.catalogue import catalogue

DOUBLE = torch.float64


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    a, b = a.detach().double(), b.detach().double()
    gap, size = float((a - b).abs().max()), max(1.0, float(b.abs().max()))
    assert gap <= tolerance * size, f"{what}: differ by {gap:.3g} at size {size:.3g}"


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    assert a.keys() == b.keys(), f"{what}: names {sorted(a.keys() ^ b.keys())} differ"
    for key in a:
        assert torch.equal(a[key], b[key]), f"{what}: {key} changed"


def equals_base_at_init(case: Case) -> None:
    info = case.method.info
    base = case.base()
    with torch.no_grad():
        before = base(case.input())
        after = case.adapt(base).model(case.input())
    if not info.zero_init or info.init_tolerance:
        assert info.init_reason, "a method that changes the model at once must say why"
    if info.zero_init and info.init_tolerance == 0 and case.room == "attention":
        # read, not called: the same weight at another address, where products may round otherwise
        close(after, before, 1e-6, "output at the start")
    elif info.zero_init and info.init_tolerance == 0:
        assert torch.equal(after, before), "the adapted model differs from its base at the start"
    elif info.zero_init:
        close(after, before, info.init_tolerance, "output at the start")


def every_tensor_learns(case: Case) -> None:
    adapted = case.adapt()
    optimizer = case.optimizer(adapted)
    assert adapted.parameters(), "nothing trains"
    asleep = {name for name, _ in adapted.named_parameters()}
    for number in range(2):
        optimizer.zero_grad()
        case.loss(adapted.model, number).backward()
        asleep -= {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert not asleep, f"no gradient within two steps: {sorted(asleep)}"


def frozen_stays(case: Case) -> None:
    """Bit for bit, though the optimizer is given every tensor and decays weights."""
    adapted = case.adapt()
    ours = {id(p) for p in adapted.parameters()}
    frozen = {n: p for n, p in adapted.model.named_parameters() if id(p) not in ours}
    before = {n: p.detach().clone() for n, p in frozen.items()}
    # the bases' own: one of attention holds another adapted layer, whose adapter may have buffers
    buffers = {n: b.clone() for n, b in handles.buffers(adapted.model)}
    optimizer = torch.optim.AdamW(adapted.model.parameters(), lr=0.1, weight_decay=0.5)
    adapted.attach(optimizer, total_steps=20)
    for number in range(3):
        optimizer.zero_grad()
        case.loss(adapted.model, number).backward()
        optimizer.step()
    same_tensors({n: p.detach() for n, p in frozen.items()}, before, "frozen")
    same_tensors(dict(handles.buffers(adapted.model)), buffers, "frozen buffers")
    thawed = [n for n, p in frozen.items() if p.requires_grad or p.grad is not None]
    assert not thawed, f"frozen tensors were thawed: {thawed}"


def merged_equals_unmerged(case: Case) -> None:
    if not case.method.info.mergeable:
        return
    adapted = case.trained(dtype=DOUBLE)
    x, base = case.input(9, DOUBLE), case.base(DOUBLE)
    weights = {n: s.layer.base for n, s in adapted.sites.items()}
    old = {n: snapshot(layer) for n, layer in weights.items()}
    # a shift may give a layer the bias that it has a place for
    empty = {f"{n}.{k}" for n, m in weights.items() for k, p in m._parameters.items() if p is None}
    with torch.no_grad():
        before = adapted.model(x)
        assert not torch.equal(before, base(x)), "three steps of training changed no output"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # tied weights: tested in tests/core
            model = adapted.merge()
        close(model(x), before, 1e-12, "merged output")
        assert not any(isinstance(m, AdaptedLayer) for m in model.modules()), "an adapter stayed"
        after = [(n, p.shape, p.dtype) for n, p in model.state_dict().items()]
        assert [one for one in after if one[0] not in empty] == [
            (n, p.shape, p.dtype) for n, p in base.state_dict().items()
        ], "merging changed names, shapes or dtypes"
        assert all(p.is_contiguous() for p in model.parameters()), "merged weights are views"
        adapted.unmerge()
        close(adapted.model(x), before, 0.0, "output after unmerge")
    for name, layer in weights.items():
        same_tensors(snapshot(layer), old[name], f"unmerge of {name}")


def routes_agree(case: Case) -> None:
    """The factored and the materialised route: outputs, and gradients of every trained tensor."""
    if not case.method.info.mergeable:
        return
    with case.borrowed(DOUBLE) as adapted:
        calls: list[tuple[str, tuple, dict]] = []
        handles = [
            site.layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: calls.append((name, args, kwargs)),
                with_kwargs=True,
            )
            for name, site in adapted.sites.items()
        ]
        adapted.model(case.input(7, DOUBLE))
        for handle in handles:
            handle.remove()
        # the output projection of attention is read, not called
        called = {name for name, _, _ in calls}
        assert called or not adapted.sites, "no adapted layer was called"
        for name, args, kwargs in calls:
            layer = adapted.sites[name].layer
            parameters = list(layer.adapter.parameters())
            results = []
            for route in (layer, layer.materialised):
                y = route(*(a.detach() for a in args), **kwargs)
                y = y[0] if isinstance(y, tuple) else y
                weight = torch.cos(torch.arange(y.numel(), dtype=DOUBLE)).view(y.shape)
                results.append([y, *torch.autograd.grad((weight * y).sum(), parameters)])
            for one, other in zip(*results, strict=True):
                close(one, other, 1e-11, f"routes of {name}")


def unload_restores(case: Case) -> None:
    model = case.base()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    next(model.children()).eval()
    before = snapshot(model)
    facts = [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
    modules = [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False) if n]
    adapted = case.adapt(model)
    optimizer = case.optimizer(adapted)
    case.loss(model).backward()
    optimizer.step()
    assert adapted.unload() is model
    same_tensors(snapshot(model), before, "unload")
    now = [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
    assert now == facts, "unload changed a parameter's identity or its requires_grad flag"
    now = [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False) if n]
    assert now == modules, "unload left another module in place, or another training flag"
    optimizer.step()  # the method's hooks are gone: stale tensors step like any others


def save_load_round_trip(case: Case) -> None:
    x = case.input(8)
    with (
        case.borrowed() as adapted,
        tempfile.TemporaryDirectory() as folder,
        _known(case),
    ):
        path = Path(folder) / "adapter.safetensors"
        adapted.save(path)
        assert [p.name for p in Path(folder).iterdir()] == [path.name], "a stray file was left"
        loaded = toolkit.load(case.base(), path)
        assert loaded.method == case.method, "the hyperparameters changed on the way"
        same_tensors(
            dict(loaded.named_parameters()), dict(adapted.named_parameters()), "saved and loaded"
        )
        with torch.no_grad():
            close(loaded.model(x), adapted.model(x), 0.0, "output after loading")


def _known(case: Case):
    """Let ``toolkit.load`` find a method that is not in the catalogue."""
    if any(e.method is type(case.method) for e in catalogue()):
        return mock.patch.object(loading, "entry", loading.entry)
    found = mock.Mock(method=type(case.method))
    return mock.patch.object(loading, "entry", return_value=found)


def counted_as_formula(case: Case) -> None:
    adapted = case.adapt()
    for name, site in adapted.sites.items():
        counted = sum(p.numel() for p in site.layer.adapter.parameters())
        formula = case.method.count(site.site)
        assert counted == formula, f"{name}: trains {counted} numbers, the formula says {formula}"
    total = sum(case.method.count(site.site) for site in adapted.sites.values())
    assert adapted.costs()["trained"] == total
    assert adapted.report()["trained"].sum() == total
    assert list(adapted.report()["layer"]) == list(adapted.sites)


@contextlib.contextmanager
def _as_function(case: Case):
    """The borrowed model as a function of its trained tensors and, if it has numbers, its input."""
    with case.borrowed(DOUBLE) as adapted:
        ours = {id(p) for p in adapted.parameters()}
        named = {n: p for n, p in adapted.model.named_parameters() if id(p) in ours}
        x = case.input(6, DOUBLE)
        free = [p.detach().clone().requires_grad_() for p in named.values()]
        if x.is_floating_point():
            free.append(x.clone().requires_grad_())

        def function(*tensors: Tensor) -> Tensor:
            state = dict(zip(named, tensors[: len(named)], strict=True))
            return functional_call(
                adapted.model, state, (tensors[-1] if len(tensors) > len(named) else x,)
            )

        yield function, free


def gradients_are_right(case: Case) -> None:
    torch.default_generator.manual_seed(3)
    with _as_function(case) as (function, free):
        assert torch.autograd.gradcheck(function, free, fast_mode=True)


def second_gradients_are_right(case: Case) -> None:
    torch.default_generator.manual_seed(3)
    # torch's flash attention has no second derivative
    with _as_function(case) as (function, free), sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(function, free, fast_mode=True)


def deterministic_under_a_seed(case: Case) -> None:
    drawn = []
    for seed, world in ((5, 1), (5, 2), (6, 1)):
        torch.default_generator.manual_seed(world)
        state = torch.get_rng_state()
        adapted = case.adapt(seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "adapt drew from the global generator"
        drawn.append({n: p.detach().clone() for n, p in adapted.named_parameters()})
    same_tensors(drawn[0], drawn[1], "two models of one seed")
    source = torch.Generator().manual_seed(5)
    toolkit.adapt(case.base(), case.method, case.targets, generator=source)
    drew = not torch.equal(source.get_state(), torch.Generator().manual_seed(5).get_state())
    random = not drew or any(not torch.equal(drawn[0][n], drawn[2][n]) for n in drawn[0])
    constant = random or all((p == p.flatten()[0]).all() for p in drawn[0].values())
    assert random or constant, "the generator's seed has no effect on a random start"
    torch.default_generator.manual_seed(1)
    one = dict(case.trained().named_parameters())
    torch.default_generator.manual_seed(2)
    same_tensors(one, dict(case.trained().named_parameters()), "two runs of one seed")


def deepcopy_is_independent(case: Case) -> None:
    x = case.input(4)
    with case.borrowed() as adapted:
        for copied in (copy.deepcopy(adapted), copy.deepcopy(adapted.model)):
            model = getattr(copied, "model", copied)
            with torch.no_grad():
                close(model(x), adapted.model(x), 0.0, "output of the copy")
            ours = {id(p) for p in adapted.model.parameters()}
            assert ours.isdisjoint(map(id, model.parameters())), "the copy shares tensors"
        twin = copy.deepcopy(adapted)
        before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
        optimizer = case.optimizer(twin)
        case.loss(twin.model).backward()
        optimizer.step()
        same_tensors({n: p.detach() for n, p in adapted.named_parameters()}, before, "the original")
        now = {n: p.detach() for n, p in twin.named_parameters()}  # a copy goes on, and may grow
        moved = [n for n, p in now.items() if n not in before or not torch.equal(p, before[n])]
        assert moved, "training the copy moved nothing"
        twin.unload()
        assert not any(isinstance(m, AdaptedLayer) for m in twin.model.modules())
        assert all(isinstance(s.layer, AdaptedLayer) for s in adapted.sites.values())


CONTRACTS: dict[str, Callable[[Case], None]] = {
    function.__name__: function
    for function in (
        equals_base_at_init,
        every_tensor_learns,
        frozen_stays,
        merged_equals_unmerged,
        routes_agree,
        unload_restores,
        save_load_round_trip,
        counted_as_formula,
        gradients_are_right,
        second_gradients_are_right,
        deterministic_under_a_seed,
        deepcopy_is_independent,
        *surroundings.ALL,
        *refusals.ALL,
    )
}


def check(name: str, case: Case) -> None:
    """Run one contract; any failure is an AssertionError that names contract and case."""
    try:
        CONTRACTS[name](case)
    except Exception as error:
        where = f"{name} broken by {case.method!r} in room {case.room!r}, shape {case.shape}"
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
