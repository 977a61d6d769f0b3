"""Discovery, hyperparameter declarations and their validation."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import types
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import pytest

import toolkit
from toolkit import LoRA, catalogue
from toolkit.core import catalogue as module
from toolkit.core.catalogue import PARTS, Info, entry, hyper, hyperparameters, validate

COMMON = {
    "title": "Toy",
    "arxiv": "0000.00000",
    "year": 2020,
    "equation": "W",
    "acts_on": "nothing",
    "count": "0",
    "inference": "none",
    "colour": "#123456",
}


@dataclass(frozen=True)
class Toy:
    rank: int = hyper(4, low=1, high=8, help="rank")
    rate: float = hyper(0.5, low=0.0, high=1.0, open_low=True, open_high=True)
    mode: str = hyper("a", choices=("a", "b"))
    total: int | None = hyper(None, type=int, low=0)
    flag: bool = hyper(False)
    info: ClassVar[Info] = Info(slug="toy", part="lowrank", **COMMON)

    def __post_init__(self) -> None:
        validate(self)


def test_methods_of_every_module_are_found_once():
    import toolkit.lowrank as part

    modules = [m.name for m in pkgutil.iter_modules(part.__path__) if not m.name.startswith("_")]
    found = [e.module.rpartition(".")[2] for e in catalogue() if e.part == "lowrank"]
    assert sorted(found) == sorted(modules)
    slugs = [e.slug for e in catalogue()]
    assert {"lora", "adalora"} <= set(slugs)
    assert len(set(slugs)) == len(slugs)


def test_module_part_and_slug_agree():
    for e in catalogue():
        assert e.module == f"toolkit.{e.part}.{e.slug}"
        assert e.part in PARTS
        assert e.chapter == f"notebooks/{e.part}/{e.slug}"
        assert getattr(toolkit, e.method.__name__) is e.method
        assert e.method.__name__ in dir(toolkit)


def test_order_is_by_part_then_year_and_the_list_is_the_callers_own():
    keys = [(PARTS.index(e.part), e.year, e.slug) for e in catalogue()]
    assert keys == sorted(keys)
    catalogue().clear()
    assert catalogue()


def test_entries_declare_what_the_book_prints():
    for e in catalogue():
        assert e.title
        assert e.equation
        assert e.count
        assert e.colour.startswith("#")
        assert len(e.colour) == 7
        for h in e.hyperparameters:
            assert h.help, (e.slug, h.name)
            assert h.source, (e.slug, h.name)
            assert h.choices or h.type is bool or (h.low is not None and h.high is not None)
    colours = [e.colour for e in catalogue()]
    assert len(set(colours)) == len(colours)


def test_defaults_are_valid_and_methods_are_frozen():
    for e in catalogue():
        method = e.method()
        assert [getattr(method, h.name) for h in e.hyperparameters] == [
            h.default for h in e.hyperparameters
        ]
        with pytest.raises(FrozenInstanceError):
            method.anything = 1


@pytest.fixture
def extra_module(monkeypatch):
    """Adds a module to the lowrank part for one test."""

    def add(name: str, *methods: type, imported: tuple[type, ...] = ()) -> None:
        made = types.ModuleType(f"toolkit.lowrank.{name}")
        for method in methods:
            monkeypatch.setattr(method, "__module__", made.__name__)
            setattr(made, method.__name__, method)
        for method in imported:
            setattr(made, method.__name__, method)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        real = module._modules()
        monkeypatch.setattr(module, "_modules", lambda: [*real, made.__name__])
        module._entries.cache_clear()

    yield add
    module._entries.cache_clear()


def test_a_new_module_is_picked_up(extra_module):
    extra_module("toy", Toy)
    assert entry("toy").method is Toy
    assert "toy" in [e.slug for e in catalogue()]
    assert importlib.import_module("toolkit").Toy is Toy


def test_imported_methods_are_not_listed_again(extra_module):
    extra_module("toy", Toy, imported=(LoRA,))
    assert [e.slug for e in catalogue()].count("lora") == 1


def test_two_methods_of_one_slug_are_refused(extra_module):
    twin = type("Twin", (), {"info": Info(slug="lora", part="lowrank", **COMMON)})
    extra_module("twin", twin)
    with pytest.raises(RuntimeError, match="lora"):
        catalogue()


@pytest.mark.parametrize(("wrong", "near"), [("adalor", "adalora"), ("lroa", "lora")])
def test_an_unknown_slug_suggests_the_nearest(wrong, near):
    with pytest.raises(KeyError, match=f"did you mean '{near}'"):
        entry(wrong)
    with pytest.raises(KeyError, match="known"):
        entry("zzzzzzzzz")


def test_an_unknown_name_of_the_package_points_to_the_list():
    with pytest.raises(AttributeError, match="python -m toolkit list"):
        _ = toolkit.NoSuchMethod
    with pytest.raises(AttributeError):
        _ = entry("lora").no_such_fact


def test_hyperparameters_keep_their_declaration():
    named = {h.name: h for h in hyperparameters(Toy)}
    assert list(named) == ["rank", "rate", "mode", "total", "flag"]
    assert (named["rank"].low, named["rank"].high, named["rank"].type) == (1, 8, int)
    assert named["total"].optional
    assert named["mode"].choices == ("a", "b")
    assert hyperparameters(Toy()) == hyperparameters(Toy)


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"rank": 0}, ValueError, r"Toy\(rank=0\).*\[1, 8\]"),
        ({"rank": 9}, ValueError, r"\[1, 8\]"),
        ({"rank": 2.0}, TypeError, "rank must be int"),
        ({"rank": True}, TypeError, "rank must be int"),
        ({"rank": None}, TypeError, "rank must be int"),
        ({"rate": 0.0}, ValueError, r"\(0.0, 1.0\)"),
        ({"rate": 1.0}, ValueError, r"\(0.0, 1.0\)"),
        ({"rate": float("nan")}, ValueError, "rate"),
        ({"rate": "0.5"}, TypeError, "rate must be float"),
        ({"mode": "c"}, ValueError, r"one of \['a', 'b'\]"),
        ({"total": -1}, ValueError, r"\[0, inf\]"),
        ({"flag": 1}, TypeError, "flag must be bool"),
    ],
)
def test_bad_values_are_refused_by_name(values, kind, words):
    with pytest.raises(kind, match=words):
        Toy(**values)


def test_good_values_pass():
    toy = Toy(rank=8, rate=1 / 3, mode="b", total=None, flag=True)
    assert (toy.rank, toy.mode) == (8, "b")
    with pytest.raises(TypeError, match="rnk"):
        Toy(rnk=3)
