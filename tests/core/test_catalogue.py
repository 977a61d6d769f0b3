"""Discovery, hyperparameter declarations and their validation."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from typing import Annotated, ClassVar, Literal

import pytest

import toolkit
from toolkit import LoRA, catalogue
from toolkit.__main__ import main
from toolkit.core.declare import catalogue as module
from toolkit.core.declare.catalogue import entry
from toolkit.core.declare.fields import (
    Declared,
    Range,
    Smoothing,
    described,
    hyperparameters,
    read,
)
from toolkit.core.declare.info import PARTS, Info, home

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
class Toy(Declared):
    """A toy.

    Args:
        rank: rank of the toy,
            over two lines. Source: nowhere.
        rate: a share.
    """

    rank: Annotated[int, Range(1, 8)] = 4
    rate: Smoothing = 0.5
    mode: Literal["a", "b"] = "a"
    total: Annotated[int, Range(0)] | None = None
    flag: bool = False
    info: ClassVar[Info] = Info(slug="toy", part="lowrank", **COMMON)


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
        assert e.module == f"{home(e.part)}.{e.slug}"
        assert e.part in PARTS
        assert e.chapter == (None if e.part == "core" else f"notebooks/{e.part}/{e.slug}")
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
            if h.type is str and not h.choices:  # free text: the method itself must check it
                with pytest.raises(ValueError, match=h.name):
                    e.method(**{h.name: "no such thing"})
            else:
                assert h.choices or h.type is bool or h.low is not None
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


def test_what_is_read_is_what_the_classes_hold():
    for e in catalogue():
        assert e.info == e.method.info
        assert e.class_name == e.method.__name__
        assert e.hyperparameters == hyperparameters(e.method), e.slug


HEAD = """
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal
from toolkit.core.declare.fields import Range, Share
from toolkit.core.declare.info import Info
"""
METHOD = """
@dataclass(frozen=True)
class {name}{bases}:
    rank: Annotated[int, Range(low=1, high=8)] = 4
    info: ClassVar[Info] = Info(
        slug="{slug}", part="lowrank", title="Toy", arxiv="0000.00000", year=2020, equation="W",
        acts_on="nothing", count="0", inference="none", colour="#123456",
    )
"""


def method_text(name: str, slug: str, bases: str = "") -> str:
    return METHOD.format(name=name, slug=slug, bases=bases)


@pytest.fixture
def extra_module(monkeypatch, tmp_path):
    """Adds the source file of a module to the lowrank part for one test."""
    import toolkit.lowrank as part

    monkeypatch.setattr(part, "__path__", part.__path__)
    part.__path__.append(str(tmp_path))
    made = []

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        importlib.invalidate_caches()
        made.append(name)
        module.forget()

    yield add
    part.__path__.remove(str(tmp_path))
    for name in made:
        sys.modules.pop(f"toolkit.lowrank.{name}", None)
        vars(part).pop(name, None)
    module.forget()


def test_a_new_module_is_picked_up_and_imported_on_demand(extra_module):
    extra_module("toy", method_text("NewToy", "toy"))
    assert "toy" in [e.slug for e in catalogue()]
    assert entry("toy").hyperparameters[0].high == 8
    assert "NewToy" in dir(toolkit)
    assert "toolkit.lowrank.toy" not in sys.modules
    assert importlib.import_module("toolkit").NewToy is entry("toy").method
    assert "toolkit.lowrank.toy" in sys.modules


def test_constants_bases_and_arithmetic_are_read_from_source(extra_module):
    extra_module(
        "toy",
        "from toolkit.core.adapt.sites import KINDS as EVERY\n"
        "from toolkit.lowrank.lora import LoRA\n"
        "WAYS = Literal['a', 'b']\n"
        "@dataclass(frozen=True)\n"
        "class Base(LoRA):\n"
        "    '''A base.\n\n    Args:\n        rank: of the base.\n    '''\n"
        "    rank: Annotated[int, Range(1, 2**4 - 1)] = 2\n"
        "    mode: WAYS = 'a'\n"
        + method_text("NewToy", "toy", "(Base)").replace("    rank: Ann", "    alpha: Ann")
        + "    share: Share | None = None\n",
    )
    read = entry("toy")
    assert "toolkit.lowrank.toy" not in sys.modules
    assert [h.name for h in read.hyperparameters] == [
        *("rank", "alpha", "dropout", "rank_stabilised", "mode", "share")
    ]
    assert read.hyperparameters == hyperparameters(read.method)
    assert read.hyperparameters[0].high == 15
    assert read.hyperparameters[0].help == "of the base"
    assert read.hyperparameters[4].choices == ("a", "b")
    extra_module("kinds", method_text("Kinds", "kinds").replace("arxiv", "kinds=EVERY, arxiv"))
    assert "toolkit.lowrank.kinds" in module.broken()  # EVERY is imported in another module only


@pytest.mark.parametrize(
    "text",
    [
        method_text("NewToy", "toy").replace("low=1", "low=max(0, 1)"),
        method_text("NewToy", "toy").replace("= 4", "= max(4, 2)"),
        "facts = dict(low=1)\n" + method_text("NewToy", "toy").replace("low=1", "**facts"),
        "def make(**facts):\n    return Info(**facts)\n"
        + method_text("NewToy", "toy").replace("= Info(", "= make("),
        "import toolkit.core.adapt.sites as layers\n"
        + method_text("NewToy", "toy").replace("arxiv", "kinds=layers.KINDS, arxiv"),
    ],
    ids=["call", "default", "unpacked", "maker", "attribute"],
)
def test_what_is_no_literal_is_imported_from_that_module_alone(extra_module, text):
    extra_module("toy", text)
    extra_module("other", method_text("Other", "other"))
    assert entry("toy").hyperparameters == hyperparameters(entry("toy").method)
    assert "toolkit.lowrank.toy" in sys.modules
    assert "toolkit.lowrank.other" not in sys.modules


def test_imported_methods_and_variants_are_not_listed_again(extra_module):
    extra_module(
        "toy",
        "from toolkit.lowrank.lora import LoRA\n"
        + method_text("NewToy", "toy")
        + "class Variant(NewToy):\n    pass\n",
    )
    assert [e.slug for e in catalogue()].count("lora") == 1
    assert [e.slug for e in catalogue()].count("toy") == 1
    with pytest.raises(AttributeError, match="python -m toolkit list"):
        _ = toolkit.Variant


def test_two_methods_of_one_slug_are_refused(extra_module):
    extra_module("twin", method_text("Twin", "lora"))
    with pytest.raises(RuntimeError, match="lora"):
        catalogue()


def test_a_further_method_of_a_package_is_found_by_name_and_not_listed():
    found = toolkit.LoRAMGPO
    assert found.__module__ == "toolkit.lowrank.lora_ggpo.mgpo"
    assert found.info.slug == "lora_ggpo"
    assert "LoRAMGPO" not in [e.class_name for e in catalogue()]
    with pytest.raises(AttributeError):  # a class that declares nothing is no method
        _ = toolkit.NoiseController


DAMAGED = {
    "syntax": ("class Damaged(:\n", SyntaxError),
    "import": ("import no_such_package\n" + method_text("Damaged", "damaged"), ImportError),
    "attribute": ("import math\nmath.nothing\n" + method_text("Damaged", "damaged"), ImportError),
    "own": ("raise OSError('own')\n" + method_text("Damaged", "damaged"), OSError),
    "declared": (method_text("Damaged", "damaged").replace("low=1", "low=nothing()"), NameError),
    "field": (method_text("Damaged", "damaged").replace("low=1", "least=1"), TypeError),
    "info": (method_text("Damaged", "damaged").replace("arxiv", "arxif"), TypeError),
}


@pytest.mark.parametrize(("text", "kind"), DAMAGED.values(), ids=DAMAGED)
def test_a_broken_module_breaks_no_other_and_tells_its_own_error(extra_module, text, kind):
    extra_module("damaged", text)
    assert toolkit.LoRA is entry("lora").method is LoRA
    assert len([e for e in catalogue() if e.slug != "damaged"]) >= 8
    assert load_class("LoRAGGPO") is entry("lora_ggpo").method
    with pytest.raises(kind) as caught:
        load_class("Damaged")
    assert "python -m toolkit list" not in str(caught.value)


def load_class(name: str) -> type:
    """What ``from toolkit import name`` gives."""
    space: dict = {}
    exec(f"from toolkit import {name}", space)
    return space[name]


@pytest.mark.parametrize("case", ["syntax", "declared", "field", "info"])
def test_the_list_names_what_it_cannot_read(extra_module, capsys, case):
    text, kind = DAMAGED[case]
    extra_module("damaged", text)
    assert list(module.broken()) == ["toolkit.lowrank.damaged"]
    assert main(["list"]) == 1
    shown = capsys.readouterr()
    assert f"toolkit.lowrank.damaged cannot be read: {kind.__name__}" in shown.err
    assert "\nadalora " in shown.out
    assert main(["show", "damaged"]) == 2
    assert "toolkit.lowrank.damaged cannot be read" in capsys.readouterr().err
    assert main(["show", "lora"]) == 0


def in_a_new_process(program: str) -> list:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_listing_and_showing_import_no_method_and_no_torch():
    assert (
        in_a_new_process(
            "import json, sys\n"
            "from toolkit.__main__ import main\n"
            "main(['list'])\n"
            "main(['show', 'adalora'])\n"
            f"parts = {[p for p in PARTS if p != 'core'] + ['core.baselines']}\n"
            "heavy = [m for m in sys.modules if m in ('torch', 'numpy', 'pandas')\n"
            "         or m.startswith(tuple(f'toolkit.{part}.' for part in parts))]\n"
            "print(json.dumps(heavy))"
        )
        == []
    )


def test_a_method_is_imported_without_the_others():
    loaded = in_a_new_process(
        "import json, sys\n"
        "from toolkit import LoRA\n"
        "assert LoRA.__module__ == 'toolkit.lowrank.lora'\n"
        f"parts = {[p for p in PARTS if p != 'core'] + ['core.baselines']}\n"
        "print(json.dumps([m for m in sys.modules\n"
        "    if m.startswith(tuple(f'toolkit.{part}.' for part in parts))]))"
    )
    assert loaded == ["toolkit.lowrank.lora"]


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
    assert (named["rank"].help, named["rank"].source) == (
        "rank of the toy, over two lines",
        "nowhere",
    )
    assert (named["rate"].help, named["flag"].help) == ("a share", "")
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


@pytest.mark.parametrize("hint", [list, int | str, int | str | None, Annotated[bytes, Range()]])
def test_an_annotation_of_another_form_is_refused(hint):
    with pytest.raises(TypeError, match="rank"):
        read("rank", hint, None, {})


def test_meanings_end_where_the_next_heading_begins():
    text = """One line.

    Args:
        rank: of it: the
            size. Source: card.
        rate: speed.

    Raises:
        ValueError: never.
    """
    assert described(text) == {"rank": ("of it: the size", "card"), "rate": ("speed", "")}
    assert described(None) == {}
