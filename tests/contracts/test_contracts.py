"""Every contract, over every adapting method of the catalogue, in every room it accepts."""

from __future__ import annotations

import shutil

import pytest

from tests.contracts.contracts import CONTRACTS, check
from tests.contracts.rooms import ROOMS, Case, cases
from tests.contracts.surroundings import works_compiled

# What depends on shapes runs on three of each room, the rest on one.
THREE_SHAPES = {
    "equals_base_at_init",
    "every_tensor_learns",
    "frozen_stays",
    "merged_equals_unmerged",
    "routes_agree",
    "save_load_round_trip",
    "counted_as_formula",
}
# Costly contracts run in the rooms whose code paths differ.
SOME_ROOMS = {
    "second_gradients_are_right": {"linear", "hf_conv1d", "conv1d", "embedding", "attention"},
    "works_compiled": {"linear", "hf_conv1d", "grouped_conv", "embedding", "attention"},
}
# Of the costliest, one room runs every time and the others once a week.
EVERY_TIME = {"works_compiled": {"linear"}}
ALL = cases()
# case by case, so that the contracts of one share its trained model
RUNS = [
    (name, case)
    for case in ALL
    for name in CONTRACTS
    if (not case.shape or name in THREE_SHAPES) and case.room in SOME_ROOMS.get(name, ROOMS)
]


def _name(case: Case) -> str:
    return f"{case.method.info.slug}-{case.room}-{case.shape}"


def _run(name: str, case: Case):
    """One test. tests/budgets.py reads the method from its name: its contracts share a process."""
    every_time = case.room in EVERY_TIME.get(name, ROOMS)
    marks = () if every_time else pytest.mark.weekly
    return pytest.param(name, case, id=f"{name}-{_name(case)}", marks=marks)


@pytest.mark.parametrize(("contract", "case"), [_run(*run) for run in RUNS])
def test_contract(contract, case):
    check(contract, case)


def test_every_method_meets_every_kind_it_declares():
    kinds = {}
    for case in ALL:
        kinds.setdefault(case.method.info, set()).add(ROOMS[case.room].kind)
    assert kinds
    for info, met in kinds.items():
        # norms and whole modules are no layers of one matrix: tests/core/test_kinds.py
        assert met == set(info.kinds) - {"norm", "module"}, info.slug


@pytest.mark.weekly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
@pytest.mark.parametrize("case", cases(shapes=1, rooms=("linear",))[:1], ids=_name)
def test_compiled_by_inductor(case):
    works_compiled(case, backend="inductor")
