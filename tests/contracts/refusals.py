"""Contracts about bad input: a specific error, and a model that is as it was."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import toolkit
from tests.contracts.rooms import Case
from toolkit import adapt
from toolkit.core.adapt.sites import describe
from toolkit.core.declare.fields import hyperparameters


def _state(model: nn.Module) -> list:
    tensors = [
        (n, id(p), p.requires_grad, p.detach().clone())
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    modules = [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [tensors, modules, hooks]


@contextlib.contextmanager
def refused(kind: type | tuple[type, ...], *words: str, model: nn.Module | None = None):
    """The block must raise ``kind`` with all ``words`` in its message, and not touch the model."""
    before = _state(model) if model is not None else None
    try:
        yield
    except kind as error:
        message = str(error)
        missing = [w for w in words if w not in message]
        assert not missing, f"the message does not say {missing}: {message}"
    else:
        raise AssertionError(f"accepted in silence; expected an error that says {words}")
    if model is None:
        return
    after = _state(model)
    assert before[1:] == after[1:], "the refusal left another structure behind"
    for old, new in zip(before[0], after[0], strict=True):
        assert old[:3] == new[:3], f"the refusal changed {old[0]}'s identity or flag"
        assert torch.equal(old[3], new[3]), f"the refusal changed {old[0]}"


def refuses_bad_hyperparameters(case: Case) -> None:
    """Rank 0 and every other value below or above its range, of a wrong type, not a number."""
    cls = type(case.method)
    for h in hyperparameters(cls):
        # ValueError or TypeError, by a message that names the hyperparameter
        bad: list = [object()]
        if h.choices is not None or h.type is str:
            bad += ["no such choice"]
        elif h.type is not bool:
            bad += ["4", float("nan")]
            if h.low is not None:
                bad.append(h.type(h.low) if h.open_low else h.type(h.low - 1))
            if h.high is not None:
                bad.append(h.type(h.high) if h.open_high else h.type(h.high + 1))
            if h.type is int:
                bad += [1.5, True]
        for value in bad:
            with refused((ValueError, TypeError), h.name, cls.__name__):
                cls(**{h.name: value})


def warns_of_a_rank_above_the_layer(case: Case) -> None:
    """It is taken as given: published adapters have such ranks, and files must be readable."""
    names = {h.name for h in hyperparameters(case.method)} & {"rank", "init_rank"}
    if not names:
        return
    (start,) = names
    layers = adapt(case.base(), case.method, case.targets).sites.values()
    most = min(min(s.site.rows, s.site.cols) for s in layers)
    above = most + 1
    above += -above % getattr(case.method, "pieces", 1)  # a rank may have to be a multiple
    ranks = _ranks_off(case) | {start: above}
    if start == "init_rank":  # where ranks only grow, the target is not below the start
        ranks["target_rank"] = max(ranks["target_rank"], above)
    method = type(case.method)(**ranks)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = adapt(case.base(), method, case.targets)
    words = f"rank {above} "
    assert any(words in str(w.message) and f"at most {most}" in str(w.message) for w in told)
    assert sum(p.numel() for p in adapted.parameters()) == sum(
        method.count(s.site) for s in adapted.sites.values()
    )


def _ranks_off(case: Case) -> dict[str, int]:
    names = {h.name for h in hyperparameters(case.method)}
    return {n: getattr(case.method, n) for n in names if n.endswith("_rank")}


def refuses_a_target_that_matches_nothing(case: Case) -> None:
    model = case.base()
    name = next(iter(case.adapt(case.base()).sites))
    # a name one slip away from a real one is shown as near miss
    with refused(ValueError, "targets", name.rsplit(".", 1)[-1], model=model):
        adapt(model, case.method, name + "x")
    with refused(ValueError, "targets", "empty", model=model):
        adapt(model, case.method, [])
    with refused(TypeError, "targets", model=model):
        adapt(model, case.method, 3.5)
    with refused((TypeError, ValueError), "targets", model=model):
        adapt(model, case.method, nn.Tanh)
    with refused(ValueError, "train", "headd", model=model):
        adapt(model, case.method, case.targets, train="headd.*")


def refuses_a_second_method(case: Case) -> None:
    adapted = case.adapt()
    with refused(RuntimeError, "merge()", "unload()", model=adapted.model):
        case.adapt(adapted.model)


def refuses_to_merge_twice(case: Case) -> None:
    adapted = case.trained()
    if case.method.info.mergeable and case.room != "tied":
        adapted.merge()
        with refused(RuntimeError, "merge", "unmerge()", model=adapted.model):
            adapted.merge()
        with refused(RuntimeError, "unload", "unmerge()", model=adapted.model):
            adapted.unload()
        with refused(RuntimeError, "save", "unmerge()"):
            adapted.save("never-written.safetensors")
        assert not Path("never-written.safetensors").exists()
        adapted.unmerge()
    adapted.unload()
    with refused(RuntimeError, "merge", "adapt", model=adapted.model):
        adapted.merge()


@contextlib.contextmanager
def _saved(case: Case) -> Iterator[Path]:
    from tests.contracts.contracts import _known

    with tempfile.TemporaryDirectory() as folder, _known(case):
        path = Path(folder) / "adapter.safetensors"
        with case.borrowed() as adapted:
            adapted.save(path)
        yield path


def refuses_another_architecture(case: Case) -> None:
    with _saved(case) as path:
        other = nn.Sequential(nn.Linear(3, 3))
        with refused(ValueError, str(path), "architecture", model=other):
            toolkit.load(other, path)
        model = case.base()
        name, site = list(case.adapt(case.base()).sites.items())[-1]
        parent, _, leaf = name.rpartition(".")
        wider = nn.Linear(site.site.cols + 1, site.site.rows + 1)
        setattr(model.get_submodule(parent), leaf, wider)
        with refused(ValueError, str(path), name, "shape", model=model):
            toolkit.load(model, path)


def refuses_a_tampered_file(case: Case) -> None:
    """Tensors of a wrong shape, missing, or of a layer that is not there."""
    with _saved(case) as path:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        key = next(k for k in tensors if k.startswith("adapter."))
        wrong = tensors | {key: torch.zeros(*tensors[key].shape, 2)}
        missing = {k: v for k, v in tensors.items() if k != key}
        unknown = tensors | {"adapter.no.such.layer.A": torch.zeros(2)}
        name = key.removeprefix("adapter.").rpartition(".")[0]
        for change, word in ((wrong, name), (missing, name), (unknown, "no.such.layer")):
            save_file(change, path, metadata=metadata)
            model = case.base()
            with refused(ValueError, str(path), word, model=model):
                toolkit.load(model, path)
        save_file(tensors, path, metadata=metadata)
        toolkit.load(case.base(), path)


def refuses_a_damaged_file(case: Case) -> None:
    with _saved(case) as path:
        whole = path.read_bytes()
        model = case.base()
        for part in (whole[: len(whole) // 2], whole[:4], b"", b"\x80\x04pickle" * 9):
            path.write_bytes(part)
            with refused(ValueError, str(path), "safetensors", model=model):
                toolkit.load(model, path)
        save_file({"weight": torch.zeros(2)}, path)
        with refused(ValueError, str(path), "format", model=model):
            toolkit.load(model, path)
        path.unlink()
        with refused(FileNotFoundError, str(path), model=model):
            toolkit.load(model, path)


def refuses_an_optimizer_without_its_tensors(case: Case) -> None:
    adapted = case.adapt()
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with refused(ValueError, "optimizer", "adapted.parameters()", model=adapted.model):
        adapted.attach(stranger, total_steps=20)
    with refused(TypeError, "optimizer", model=adapted.model):
        adapted.attach("adam", total_steps=20)
    case.optimizer(adapted)
    if adapted.controller is not None:
        with refused(RuntimeError, "attach", model=adapted.model):
            case.optimizer(adapted)
    with refused((TypeError, RuntimeError), model=adapted.model):
        case.optimizer(adapted := case.adapt())
        adapted.attach(torch.optim.SGD(adapted.parameters()), total_steps=20, no_such_option=1)


def refuses_to_allocate_without_gradients(case: Case) -> None:
    """For methods with an allocation: none before a backward pass, none on NaN gradients."""
    adapted = case.adapt()
    optimizer = case.optimizer(adapted)
    if not hasattr(adapted.controller, "allocating"):
        return
    with refused(RuntimeError, "backward", model=adapted.model):
        optimizer.step()
    for number in range(10):
        optimizer.zero_grad()
        case.loss(adapted.model, number).backward()
        if adapted.controller.allocating:
            break
        optimizer.step()
    assert adapted.controller.allocating, "no allocation within ten steps"
    name, broken = list(adapted.named_parameters())[-1]
    broken.grad.view(-1)[0] = float("nan")
    moments = {k: v.clone() for k, v in optimizer.state[broken].items()}
    with refused(FloatingPointError, name.rpartition(".")[0], "gradient", model=adapted.model):
        optimizer.step()
    for key, value in moments.items():
        assert torch.equal(optimizer.state[broken][key], value), f"the optimizer's {key} changed"
    optimizer.zero_grad()
    case.loss(adapted.model).backward()
    optimizer.step()  # and training goes on


def refuses_layers_it_cannot_adapt(case: Case) -> None:
    """Kinds it does not list, and layers whose settings adapting cannot honour."""
    model = nn.Sequential(nn.LayerNorm(4), nn.Embedding(5, 4, max_norm=1.0))
    if "norm" not in case.method.info.kinds and "module" not in case.method.info.kinds:
        with refused(TypeError, "0", "LayerNorm", model=model):
            adapt(model, case.method, "0")
    if "embedding" in case.method.info.kinds:
        with refused(ValueError, "max_norm", model=model):
            adapt(model, case.method, nn.Embedding)
    if "attention" in case.method.info.kinds:
        model = nn.Sequential(nn.MultiheadAttention(4, 1, kdim=6))
        with refused(ValueError, "kdim", model=model):
            adapt(model, case.method, nn.MultiheadAttention)
    lone = nn.Linear(4, 4)
    with refused(TypeError, "Sequential", model=lone):
        adapt(lone, case.method)
    with refused(TypeError, "LayerNorm"):
        describe(nn.LayerNorm(3))


ALL = (
    refuses_bad_hyperparameters,
    warns_of_a_rank_above_the_layer,
    refuses_a_target_that_matches_nothing,
    refuses_a_second_method,
    refuses_to_merge_twice,
    refuses_another_architecture,
    refuses_a_tampered_file,
    refuses_a_damaged_file,
    refuses_an_optimizer_without_its_tensors,
    refuses_to_allocate_without_gradients,
    refuses_layers_it_cannot_adapt,
)
