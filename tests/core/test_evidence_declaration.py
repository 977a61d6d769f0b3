"""Whoever changes a claim after measuring is found, whatever he does to the results file."""

import json
import subprocess

import pytest

from tests.core.claims_toy import claim, conditions
from toolkit.core.evidence import committed, declare, first_declaration, register

LAB = "toolkit/labs/toy.py"
RESULTS = "book/results/toy.cpu.json"


class Project:
    """A small repository with a lab and its results."""

    def __init__(self, root):
        self.root = root
        self.git("init", "-q", "-b", "main")
        self.write(LAB, "claims")
        self.commit("Declare")

    def git(self, *arguments):
        setting = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(self.root), *setting, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def commit(self, words):
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", words)
        return self.git("rev-parse", "HEAD")

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def measure(self, *claims):
        """What a lab does at scale cpu: register, and write the results."""
        path = self.root / RESULTS
        stored = json.loads(path.read_text())["declaration"] if path.is_file() else None
        made = register(
            declare(claims),
            stored,
            first_declaration(self.root, "toy"),
            committed(self.root, LAB),
        )
        self.write(RESULTS, json.dumps({"schema": 2, "slug": "toy", "declaration": made}))
        return made


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def late(made):
    return {name: entry["late"] for name, entry in made["claims"].items()}


def test_an_honest_lab_is_on_time_and_keeps_its_first_commit(project):
    first = project.git("rev-parse", "HEAD")
    made = project.measure(claim())
    assert late(made) == {"rank": False}
    assert made["claims"]["rank"]["commit"] == made["commit"] == first
    project.commit("Measure")
    project.write("other.txt", "x")
    second = project.commit("Something else")
    again = project.measure(claim())
    assert late(again) == {"rank": False}
    assert again["claims"]["rank"]["commit"] == first
    assert again["commit"] == second
    assert again["dropped"] == []
    assert again["note"] == ""


CHEATS = {
    "a smaller margin": {"margin": 0.9},
    "other words": {"text": "Accuracy rises with the rank."},
    "another reason": {"reason": "it fits"},
    "a condition less": {"conditions": conditions("letters")},
    "other seeds": {"conditions": conditions("digits", n=21)},
    "another scale": {"scale": "bounded"},
    "the other direction": {"better": "less"},
    "another start": {"than": -0.5},
}


def test_a_claim_changed_after_measuring_is_late_and_stays_so(project):
    project.measure(claim())
    project.commit("Measure")
    honest = (project.root / RESULTS).read_text()
    for cheat, change in CHEATS.items():
        project.write(RESULTS, honest)
        assert late(project.measure(claim(**change))) == {"rank": True}, cheat
        assert late(project.measure(claim(**change))) == {"rank": True}, cheat
    project.commit("Change the claim")
    assert late(project.measure(claim(**change))) == {"rank": True}
    assert late(project.measure(claim())) == {"rank": True}  # what was late is not undone


def test_a_claim_added_after_measuring_is_late_and_a_dropped_one_is_named(project):
    project.measure(claim(), claim(id="second"))
    project.commit("Measure")
    made = project.measure(claim(), claim(id="third"))
    assert late(made) == {"rank": False, "third": True}
    assert made["dropped"] == ["second"]
    assert project.measure(claim(), claim(id="third"))["dropped"] == ["second"]


def test_changing_before_the_results_are_committed_is_found_in_the_file(project):
    project.measure(claim())
    for margin in (0.9, 0.9, 1.0):  # measuring again, or going back, does not undo it
        assert late(project.measure(claim(margin=margin))) == {"rank": True}


def test_deleting_the_results_and_measuring_again_does_not_help(project):
    project.measure(claim())
    project.commit("Measure")
    (project.root / RESULTS).unlink()
    assert late(project.measure(claim(margin=0.9))) == {"rank": True}
    (project.root / RESULTS).unlink()
    project.commit("Delete the results")
    assert late(project.measure(claim(margin=0.9))) == {"rank": True}
    project.commit("Measure again")
    assert late(project.measure(claim(margin=0.9))) == {"rank": True}


def test_rewriting_the_stored_hash_does_not_help(project):
    project.measure(claim())
    project.commit("Measure")
    path = project.root / RESULTS
    record = json.loads(path.read_text())
    fresh = declare([claim(margin=0.9)])
    record["declaration"]["claims"]["rank"] = {
        "hash": fresh.claims["rank"],
        "commit": record["declaration"]["commit"],
        "late": False,
    }
    path.write_text(json.dumps(record))
    assert late(project.measure(claim(margin=0.9))) == {"rank": True}
    project.commit("Pretend")
    assert late(project.measure(claim(margin=0.9))) == {"rank": True}


def test_unmarking_a_late_claim_does_not_help(project):
    project.measure(claim())
    project.commit("Measure")
    project.measure(claim(), claim(id="second"))
    project.commit("Add a claim")
    path = project.root / RESULTS
    path.write_text(path.read_text().replace('"late": true', '"late": false'))
    assert late(project.measure(claim(), claim(id="second")))["second"]


@pytest.mark.parametrize("declared", [{}, {"declaration": {"hash": "", "claims": {}}}])
def test_measuring_before_declaring_anything_makes_all_claims_late(project, declared):
    project.write(RESULTS, json.dumps({"schema": 2, "slug": "toy", **declared}))
    project.commit("Measure first")
    (project.root / RESULTS).unlink()
    assert late(project.measure(claim())) == {"rank": True}


def test_results_of_the_first_edition_declare_nothing(project):
    project.write(RESULTS, json.dumps({"schema": 1, "slug": "toy", "claims": []}))
    project.commit("First edition")
    assert first_declaration(project.root, "toy").claims is None
    (project.root / RESULTS).unlink()
    assert late(project.measure(claim())) == {"rank": False}


def test_an_edited_declaring_file_is_declared_but_not_committed(project):
    project.write(LAB, "claims, edited")
    made = project.measure(claim())
    assert made["claims"]["rank"] == {
        "hash": declare([claim()]).claims["rank"],
        "commit": "",
        "late": False,
    }
    project.commit("Commit both at once")
    assert project.measure(claim())["claims"]["rank"]["commit"] == ""  # it was not, then
    project.write("new.py", "untracked")
    assert committed(project.root, "new.py") == ""
    assert committed(project.root, LAB) == project.git("rev-parse", "HEAD")


def test_without_git_the_file_itself_counts_and_that_is_said(tmp_path):
    first = first_declaration(tmp_path, "toy")
    assert first.claims is None
    assert "no git history" in first.note
    assert committed(tmp_path, LAB) == ""
    made = register(declare([claim()]), None, first)
    assert "no git history" in made["note"]
    assert late(register(declare([claim(margin=2.0)]), made, first)) == {"rank": True}


def test_a_git_that_is_not_installed_is_like_none(project, monkeypatch):
    project.measure(claim())
    project.commit("Measure")
    monkeypatch.setenv("PATH", "")
    assert "no git history" in first_declaration(project.root, "toy").note


def test_a_shallow_clone_says_that_it_sees_only_part(project, tmp_path_factory):
    project.measure(claim())
    project.commit("Measure")
    path = project.root / RESULTS
    path.unlink()
    project.commit("Delete")
    clone = tmp_path_factory.mktemp("shallow") / "clone"
    project.git("clone", "-q", "--depth", "1", f"file://{project.root}", str(clone))
    first = first_declaration(clone, "toy")
    assert first.claims is None
    assert "only part of the history" in first.note


def test_a_damaged_declaration_is_refused():
    for stored in ({}, {"claims": {"rank": {"hash": "x"}}}, {"claims": ["rank"]}):
        with pytest.raises(ValueError, match="damaged"):
            register(declare([claim()]), stored)


def test_hashes_cover_everything_and_do_not_depend_on_order():
    whole = declare([claim(), claim(id="b")])
    assert whole.claims["rank"] == declare([claim()]).claims["rank"]
    assert whole.hash == declare([claim(id="b"), claim()]).hash
    assert len({declare([claim(**change)]).hash for change in CHEATS.values()}) == len(CHEATS)
