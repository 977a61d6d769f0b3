"""What is shipped: dependencies that cannot drift, one address, and a wheel that stands alone."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lines(name: str) -> list[str]:
    """The requirements in a file, without comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in found if line]


def normal(words: Iterable[str]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Requirements in a form that can be compared: name, versions, marker, extras."""
    return sorted(
        (canonicalize_name(r.name), str(r.specifier), str(r.marker or ""), tuple(sorted(r.extras)))
        for r in map(Requirement, words)
    )


@cache
def tracked() -> tuple[str, ...]:
    """Files that git tracks or would take, as paths from the root; all files outside a checkout."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        names = set(filter(None, done.stdout.split("\0")))
    else:
        paths = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
        away = ("_build", "__pycache__", "dist", "build")
        names = {
            p.as_posix()
            for p in paths
            if not any(part in away or part.startswith(".venv") for part in p.parts)
        }
    return tuple(sorted(n for n in names if (ROOT / n).is_file()))


@cache
def text(name: str) -> str:
    return (ROOT / name).read_bytes().decode("utf-8", errors="replace")


def test_requirements_are_the_core_and_the_book_extra() -> None:
    extras = project()["optional-dependencies"]
    assert normal(lines("requirements.txt")) == normal(
        [*project()["dependencies"], *extras["book"]]
    )


def test_the_package_sets_lower_bounds_only() -> None:
    for word in project()["dependencies"]:
        found = Requirement(word)
        operators = [s.operator for s in found.specifier]
        assert operators == [">="], f"{word}: the core takes one lower bound and nothing else"
    capped = []
    for words in project()["optional-dependencies"].values():
        for word in words:
            operators = sorted(s.operator for s in Requirement(word).specifier)
            if operators != [">="]:
                capped.append((canonicalize_name(Requirement(word).name), operators))
    assert capped == [("jupyter-book", ["<", ">="])]


def test_constraints_pin_every_requirement_to_a_version_that_satisfies_it() -> None:
    pins = {}
    for line in lines("constraints.txt"):
        pin = Requirement(line)
        marks = list(pin.specifier)
        assert [m.operator for m in marks] == ["=="], f"constraints.txt: {line!r} is no exact pin"
        assert not marks[0].version.endswith("*"), f"constraints.txt: {line!r} is no exact pin"
        assert canonicalize_name(pin.name) not in pins, f"constraints.txt pins {pin.name} twice"
        pins[canonicalize_name(pin.name)] = marks[0].version
    wanted = [*project()["dependencies"]]
    for words in project()["optional-dependencies"].values():
        wanted += words
    for word in wanted:
        need = Requirement(word)
        version = pins.get(canonicalize_name(need.name))
        assert version is not None, f"constraints.txt does not pin {need.name}"
        assert need.specifier.contains(version, prereleases=True), f"{need} excludes {version}"


def test_what_runs_before_a_commit_is_what_the_makefile_runs() -> None:
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    (ruff,) = [r["rev"] for r in hooks if r["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}" in lines("constraints.txt")


def test_the_address_is_written_by_hand_in_one_file_only() -> None:
    address = project()["urls"]["Repository"]
    home = address.removeprefix("https://github.com/").strip("/")
    assert home.count("/") == 1, f"Repository must be a GitHub address, not {address}"
    recorded = [n for n in tracked() if n.startswith(("book/notebooks/", "book/practice/"))]
    by_hand = [n for n in tracked() if n not in recorded and home.lower() in text(n).lower()]
    assert by_hand == ["pyproject.toml"]
    links = re.compile(
        r"(?:git\+)?https://(?:github\.com|colab\.research\.google\.com/github)/(\S+)"
    )
    owner = home.split("/")[0]
    for name in recorded:  # written there by the engine, so they can only be out of date
        for link in links.findall(text(name)):
            if link.startswith(f"{owner}/"):
                assert link.startswith(home), f"{name} holds another address: {link}"


# Put together from pieces, so that this file does not find itself.
MACHINE = re.compile(
    r"(?<![\w.:~<\]/-])/" + r"(?:root|work|tmp|mnt|var/folders|home|Users)/[\w.-]",
)
HOSTS = re.compile(
    "|".join([r"pypi\." + r"org", "pythonhosted" + r"\.org", "npmjs" + r"\.(?:org|com)"])
    + "|(?:extra-)?index"
    + r"-url[ =]+https?://(?!download\.pytorch\.org)",
)


def test_no_file_names_a_machine_or_a_package_host() -> None:
    assert MACHINE.search("see " + "/" + "root/x")
    assert MACHINE.search("'/" + "home/ann/y'")
    assert not MACHINE.search("https://host.org/" + "work/x")
    assert HOSTS.search("https://pypi" + ".org/simple")
    for name in tracked():
        if name == "tests/book/test_sources.py":  # holds examples that its own search must find
            continue
        for pattern in (MACHINE, HOSTS):
            found = pattern.search(text(name))
            assert found is None, f"{name} holds {found[0]!r}"


def test_licences_and_citation_agree_with_the_package() -> None:
    import toolkit

    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    assert project()["license"] == "Apache-2.0"
    docs = text("LICENSE-docs")
    assert "https://creativecommons.org/licenses/by/4.0/" in docs
    sections = re.findall(r"^Section (\d) -- ", docs, re.MULTILINE)
    assert sections == list("12345678"), "LICENSE-docs must hold the whole licence"
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["license"] == "Apache-2.0"
    assert citation["version"] == toolkit.__version__
    assert [a["name"] for a in citation["authors"]] == [a["name"] for a in project()["authors"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_toolkit_and_its_manifest_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        facts = archive.read(metadata).decode()
        manifest = archive.read("toolkit/core/data/manifest.toml")
    shipped = sorted(n for n in names if ".dist-info/" not in n)
    sources = [n for n in tracked() if n.startswith("toolkit/")]
    kept = [n for n in tracked() if n.startswith("data/bases/")]
    assert any(n.endswith(".safetensors") for n in kept)
    assert "toolkit/py.typed" in shipped, "type checkers would not see the annotations"
    bases = [n.replace("data/bases", "toolkit/labs/beds/bases") for n in kept]
    assert shipped == sorted([*sources, "toolkit/core/data/manifest.toml", *bases])
    assert manifest == (ROOT / "data" / "manifest.toml").read_bytes()
    needs = re.findall(r"^Requires-Dist: (.+)$", facts, re.MULTILINE)
    assert normal(n for n in needs if "extra ==" not in n) == normal(project()["dependencies"])
    assert any(n.endswith("/licenses/LICENSE") for n in names)
