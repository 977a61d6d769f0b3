"""Each contract fails where it should: on a method, or a floor, broken in just that respect."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest

from tests.contracts import refusals, rooms
from tests.contracts.broken_methods import BROKEN
from tests.contracts.contracts import CONTRACTS, check
from tests.contracts.rooms import Case
from toolkit.core.adapt import facts
from toolkit.core.adapt import load as loading
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.steps import hooks as schedule
from toolkit.lowrank.adalora import AdaLoRA
from toolkit.lowrank.lora import LoRA

SOUND = {"refuses_to_allocate_without_gradients": AdaLoRA(rank=3, target_rank=2)}
APART = "works_on_two_processes"  # its broken method is in test_two_processes.py


def _silent(module, name):
    """Let a function of the floor swallow its errors."""
    original = getattr(module, name)

    def swallow(*args, **kwargs):
        with contextlib.suppress(ValueError, TypeError, RuntimeError):
            return original(*args, **kwargs)

    return mock.patch.object(module, name, swallow)


# Contracts that the floor keeps for every method: contract -> a floor broken in that respect.
BROKEN_FLOOR = {
    "refuses_a_target_that_matches_nothing": lambda: _silent(refusals, "adapt"),
    "refuses_layers_it_cannot_adapt": lambda: _silent(refusals, "adapt"),
    "refuses_a_second_method": lambda: _silent(rooms, "adapt"),
    "refuses_to_merge_twice": lambda: mock.patch.object(Adapted, "_need", return_value=None),
    "refuses_another_architecture": lambda: mock.patch.object(
        loading, "_check_fits", return_value=None
    ),
    "refuses_a_damaged_file": lambda: mock.patch.object(facts, "SafetensorError", KeyError),
    "refuses_an_optimizer_without_its_tensors": lambda: mock.patch.object(
        schedule, "check_holds", return_value=None
    ),
}
PAIRS = [(name, broken) for name, many in BROKEN.items() if name != APART for broken in many]


def test_every_contract_has_a_defect_that_breaks_it():
    assert set(CONTRACTS) == (set(BROKEN) | set(BROKEN_FLOOR)) - {APART}


@pytest.mark.parametrize(
    ("contract", "broken"), PAIRS, ids=[f"{n}-{type(m).__name__}" for n, m in PAIRS]
)
def test_broken_method_breaks_its_contract(contract, broken):
    check(contract, Case(SOUND.get(contract, LoRA(rank=3)), "linear"))
    with pytest.raises(AssertionError, match=contract):
        check(contract, Case(broken, "linear"))


@pytest.mark.parametrize("contract", BROKEN_FLOOR)
def test_broken_floor_breaks_its_contract(contract):
    case = Case(LoRA(rank=3), "linear")
    check(contract, case)
    with BROKEN_FLOOR[contract](), pytest.raises(AssertionError, match=contract):
        check(contract, case)


CHANGES = {
    "value": lambda adapted: next(iter(adapted.parameters())).data.add_(1),
    "flag": lambda adapted: next(iter(adapted.parameters())).requires_grad_(False),
    "mode": lambda adapted: adapted.model.eval(),
    "state": lambda adapted: adapted.merge(),
    "hook": lambda adapted: adapted.model.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_borrowed_model_that_was_changed_is_not_lent_again(change):
    case = Case(LoRA(rank=3), "linear", 1)
    with case.borrowed() as first:
        case.loss(first.model).backward()
    with case.borrowed() as again:
        assert again is first
        assert all(p.grad is None for p in again.model.parameters())
        change(again)
    with case.borrowed() as fresh:
        assert fresh is not first
