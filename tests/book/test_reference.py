"""The reference: every public module stands on one page, found in the folders at every build."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from motion_book.reference import exported, modules, outdated  # noqa: E402  (needs the path)

NAMED = re.compile(r"^\.\. module-reference:: (.+)$", re.MULTILINE)


def public(root: Path) -> list[str]:
    """The modules that users may import: the core and the parts, not the labs, no underscore."""
    found = []
    for file in sorted((root / "toolkit").glob("*/**/*.py")):
        names = file.relative_to(root).with_suffix("").parts
        names = names[:-1] if names[-1] == "__init__" else names
        if names[1] != "labs" and not any(name.startswith("_") for name in names):
            found.append(".".join(names))
    return [name for name in found if name != "toolkit.core"]


def told(root: Path) -> list[str]:
    """The modules that the pages of the reference tell, in the order of the pages' names."""
    pages = sorted((root / "book" / "reference").glob("*.md"))
    named = [n for p in pages for line in NAMED.findall(p.read_text("utf-8")) for n in line.split()]
    return [module for name in named for module in modules(root, name)]


def test_every_public_module_stands_on_one_page() -> None:
    assert sorted(told(ROOT)) == sorted(public(ROOT))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    texts = {
        "toolkit/__init__.py": "", "toolkit/core/__init__.py": "", "toolkit/core/io.py": "",
        "toolkit/core/nets/__init__.py": "from a.b import c, d as e\n__all__ = ['e', 'own']\n",
        "toolkit/core/nets/_hidden.py": "", "toolkit/labs/__init__.py": "",
        "toolkit/labs/lab.py": "",
        "book/reference/one.md": ".. module-reference:: toolkit.core.nets toolkit.core.io\n",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_new_module_is_found_and_a_new_room_is_missed(small: Path) -> None:
    assert sorted(told(small)) == sorted(public(small)) == ["toolkit.core.io", "toolkit.core.nets"]
    (small / "toolkit/core/nets/models.py").touch()
    assert "toolkit.core.nets.models" in told(small)
    assert sorted(told(small)) == sorted(public(small))
    (small / "toolkit/core/train").mkdir()
    (small / "toolkit/core/train/__init__.py").touch()
    assert sorted(told(small)) != sorted(public(small))


def test_pages_are_read_again_when_a_module_comes_or_goes(small: Path) -> None:
    facts = {"modules": {"toolkit.core.nets": ["toolkit.core.nets"]}}
    env = SimpleNamespace(metadata={"one": facts, "two": {}})
    assert outdated(SimpleNamespace(srcdir=small), env) == []
    (small / "toolkit/core/nets/models.py").touch()
    assert outdated(SimpleNamespace(srcdir=small), env) == ["one"]


def test_a_name_that_is_no_module_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match=r"no package or module toolkit\.core\.gone"):
        modules(small, "toolkit.core.gone")


def test_what_a_package_hands_on_is_named_with_its_home(small: Path) -> None:
    assert exported(small / "toolkit/core/nets/__init__.py") == {"e": "a.b.d"}
