"""A toy project for the engine's tests: a few toolkit modules and chapters of trivial cells."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from book.engine.__main__ import main
from book.engine.project import Chapter
from book.engine.source import Source, read

REPOSITORY = Path(__file__).resolve().parents[2]

TOOLKIT = {
    "toolkit/__init__.py": """
        __version__ = "9.8.7"
        _EXPORTS = {"adapt": "toolkit.core.adapted", "catalogue": "toolkit.core.declare.catalogue"}

        def __getattr__(name):
            import importlib
            if name in _EXPORTS:
                return getattr(importlib.import_module(_EXPORTS[name]), name)
            for part in ("alpha.one", "alpha.two"):
                module = importlib.import_module(f"toolkit.{part}")
                if hasattr(module, name):
                    return getattr(module, name)
            raise AttributeError(name)
        """,
    "toolkit/core/__init__.py": "",
    "toolkit/core/declare/__init__.py": "",
    "toolkit/core/adapted.py": "from toolkit.core.layers import WIDTH\ndef adapt(): return WIDTH\n",
    "toolkit/core/layers.py": "WIDTH = 3\n",
    "toolkit/core/show.py": "def later():\n    from toolkit.core.layers import WIDTH\n",
    "toolkit/core/declare/catalogue.py": """
        import types
        def catalogue():
            return [types.SimpleNamespace(slug="one", arxiv="2101.00001", code="them/one")]
        """,
    "toolkit/core/data.py": 'def hashes(names): return {n: "hash of " + n for n in names}\n',
    "toolkit/alpha/__init__.py": "",
    "toolkit/alpha/one.py": "class One:\n    value = 1\n",
    "toolkit/alpha/two.py": "from .one import One\nclass Two(One):\n    value = 2\n",
}
PYPROJECT = '[project]\nname = "toy"\n[project.urls]\nRepository = "https://github.com/us/toy"\n'
LAB_COMMAND = '''
    """``python -m toolkit lab SLUG ... --scale SCALE [--stale]``, as the real one."""
    import importlib, json, os, sys
    from pathlib import Path
    from toolkit.core.runs import results
    from toolkit.core.runs.code import Tracer, digest

    def reasons(slug):
        lab = importlib.import_module(f"toolkit.labs.alpha.{slug}")
        file = Path(os.environ["TOOLKIT_RESULTS"]) / f"{slug}.{scale}.json"
        old = json.loads(file.read_text()) if file.is_file() else {"experiments": {}}
        known = {
            (name, json.dumps(job["args"])): job
            for name, experiment in old["experiments"].items()
            for job in experiment["jobs"]
        }
        tracer, codes, experiments, reasons = Tracer(Path.cwd()), {}, {}, []
        for name, function, args in lab.jobs(scale):
            definitions = tracer.of_function(function)
            codes[digest(definitions)] = definitions
            job = known.get((name, json.dumps(args)))
            if job is None or job["code"] != digest(definitions):
                reasons.append(f"{name}: to measure")
                if not stale:
                    with open(Path.cwd() / f"{slug}.jobs", "a") as count:
                        count.write("x")
                    job = {"args": args, "record": function(**args), "error": None,
                           "code": digest(definitions)}
                    job["check"] = results.check(job)
            dotted = f"{function.__module__}.{function.__name__}"
            experiment = experiments.setdefault(name, {"functions": {"*": dotted}, "jobs": []})
            experiment["jobs"].append(job)
        if not stale:
            found = {"schema": 2, "slug": slug, "scale": scale, "codes": codes,
                     "experiments": experiments, "seeds": {n: [[0, 1]] for n in experiments}}
            file.write_text(results.text(found))
        return reasons

    options = sys.argv.index("--scale")
    slugs, scale, stale = sys.argv[2:options], sys.argv[options + 1], "--stale" in sys.argv
    if not stale:
        reasons(*slugs)
    else:
        told = {}
        for slug in slugs:
            try:
                told[slug] = reasons(slug)
            except Exception as error:
                told[slug] = f"{type(error).__name__}: {error}"
        print(json.dumps(told))
    '''
BED_COMMAND = '''
    """``python -m toolkit.labs.beds NAME --scale SCALE --seeds N --to DIR``, as the real one."""
    import importlib, sys
    from pathlib import Path
    from toolkit.core.runs import results
    from toolkit.core.runs.code import Tracer, digest
    from toolkit.core.runs.provenance import pins

    name, _, scale, _, seeds, _, folder = sys.argv[1:]
    adapt = importlib.import_module(f"toolkit.labs.beds.{name}").adapt
    definitions = Tracer(Path.cwd(), scale).of_function(adapt)
    jobs = []
    for seed in range(int(seeds)):
        job = {"args": {"seed": seed, "scale": scale}, "record": adapt(seed, scale), "error": None,
               "code": digest(definitions), "from": 0}
        jobs.append({**job, "check": results.check(job)})
    functions = {"*": f"toolkit.labs.beds.{name}.adapt"}
    results.write(Path(folder), {
        "schema": 2, "slug": f"beds/{name}", "scale": scale,
        "provenance": [{"commit": "c0ffee" * 6, "constraints": pins(Path.cwd())}],
        "codes": {digest(definitions): definitions},
        "experiments": {name: {"functions": functions, "jobs": jobs}},
        "tuning": {}, "seeds": {name: list(range(int(seeds)))},
    })
    '''
LAB = """
    from toolkit.alpha.one import One

    def slow(seed):
        return {"score": seed + One.value}

    def quick(seed):
        return {"score": seed * 2}

    def jobs(scale):
        count = {"ci": 2, "cpu": 3, "gpu": 4}[scale]
        for function in (slow, quick):
            for seed in range(count):
                yield function.__name__, function, {"seed": seed}

    def view(found):
        jobs = found["experiments"]["slow"]["jobs"]
        return "mean " + str(sum(job["record"]["score"] for job in jobs) / len(jobs))
    """
VIEW = (
    "import json, os\nfrom toolkit.labs.alpha.one import view",
    """
    assert os.environ.get("TOOLKIT_TELL") == "1"
    with open(os.environ["TOOLKIT_RESULTS"] + f"/one.{SCALE}.json") as file:
        found = json.load(file)
    print(view(found))
    """,
)
HEAD = """\
---
{front}
---

# {title}

In one breath.

```{{code-cell}} python
:tags: [parameters]
SCALE = "ci"  # ci, cpu or gpu
SEED = 0
```
"""


class Toy:
    """A project in a temporary folder, driven through the engine's command line.

    Args:
        root: an empty folder.
        like: a project to start from, so that what many tests need is recorded once.
    """

    def __init__(self, root: Path, like: Toy | None = None) -> None:
        self.root = root
        if like is not None:
            shutil.copytree(like.root, root)
            return
        for path, text in TOOLKIT.items():
            self.write(path, _dedent(text))
        self.write("constraints.txt", "torch==0\n")
        self.write("pyproject.toml", PYPROJECT)

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace words of a file that are there."""
        text = (self.root / path).read_text(encoding="utf-8")
        assert old in text
        self.write(path, text.replace(old, new))

    def lab(self, text: str = LAB) -> None:
        """Give chapter ``one`` a lab, and the toolkit the command that runs it."""
        self.write("toolkit/labs/__init__.py", "")
        self.write("toolkit/labs/alpha/__init__.py", "")
        self.write("toolkit/labs/alpha/one.py", _dedent(text))
        self.write("toolkit/__main__.py", _dedent(LAB_COMMAND))
        self._core()
        self.chapter("one", *VIEW)

    def bed(self, name: str, text: str) -> None:
        """Give the project a test bed, and the results of two runs at ``cpu``."""
        self.write("toolkit/labs/__init__.py", "")
        self.write("toolkit/labs/beds/__init__.py", "")
        self.write("toolkit/labs/beds/__main__.py", _dedent(BED_COMMAND))
        self.write(f"toolkit/labs/beds/{name}.py", _dedent(text))
        self._core()
        words = ["-m", "toolkit.labs.beds", name]
        words += ["--scale", "cpu", "--seeds", "2", "--to", "book/results"]
        home = {**os.environ, "PYTHONPATH": str(self.root)}
        subprocess.run([sys.executable, *words], cwd=self.root, env=home, check=True)

    def _core(self) -> None:
        """The toolkit's own files that follow code and keep results."""
        parts = ("code", "code_index", "code_names", "code_tree", "results", "jobs", "provenance")
        for name in ("io.py", *(f"runs/{part}.py" for part in parts)):
            text = (REPOSITORY / "toolkit/core" / name).read_text(encoding="utf-8")
            self.write(f"toolkit/core/{name}", text)
        self.write("toolkit/core/runs/__init__.py", "")

    def jobs(self, slug: str = "one") -> int:
        """How many jobs the lab has run in this project's folder."""
        file = self.root / f"{slug}.jobs"
        return len(file.read_text()) if file.is_file() else 0

    def commit(self) -> str:
        """Commit all of it; returns the commit."""

        def git(*words: str) -> str:
            command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
            done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        if not (self.root / ".git").is_dir():
            git("init", "-q")
            self.write(".gitignore", "_build/\n*.count\n*.jobs\n__pycache__/\n")
        git("add", "-A")
        git("commit", "-q", "--allow-empty", "-m", "a state")
        return git("rev-parse", "HEAD")

    def chapter(
        self,
        slug: str,
        *cells: str,
        part: str = "alpha",
        front: str = "chapter: {}",
        tail: str = "",
    ) -> Path:
        """Write a chapter with these code cells after its parameters cell."""
        text = HEAD.format(front=front, title=slug.title())
        for cell in cells:
            text += f"\n```{{code-cell}} python\n{_dedent(cell).strip()}\n```\n"
        return self.write(f"book/chapters/{part}/{slug}.md", text + tail)

    def engine(self, *words: str, code: int = 0) -> str:
        """Run a command of the engine in this process; its words, after checking its exit code."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                result = main([words[0], "--root", str(self.root), *words[1:]])
            except SystemExit as end:  # argparse's way to refuse
                result = end.code
        assert result == code, said.getvalue()
        return said.getvalue()

    def start(self, *words: str, stderr: int = subprocess.STDOUT) -> subprocess.Popen:
        """Start the engine in a process of its own and return at once."""
        command = ["-m", "book.engine", words[0], "--root", str(self.root), *words[1:]]
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=REPOSITORY,
        )

    def page(self, slug: str, part: str = "alpha") -> dict:
        path = self.root / "book" / "notebooks" / part / f"{slug}.ipynb"
        return json.loads(path.read_text(encoding="utf-8"))

    def text(self, slug: str, part: str = "alpha") -> bytes:
        return (self.root / "book" / "notebooks" / part / f"{slug}.ipynb").read_bytes()

    def printed(self, slug: str) -> str:
        """All the page's text output."""
        outputs = [o for c in self.page(slug)["cells"] for o in c.get("outputs", [])]
        return "".join("".join(o.get("text", [])) for o in outputs)

    def runs(self, slug: str) -> int:
        """How often a chapter that calls ``COUNT`` has run."""
        file = self.root / f"{slug}.count"
        return len(file.read_text()) if file.is_file() else 0

    def count(self, slug: str) -> str:
        """Code that leaves a mark each time it runs."""
        return f"with open({str(self.root / slug)!r} + '.count', 'a') as f: f.write('x')"

    def processes(self) -> list[psutil.Process]:
        """Every process on the machine that works for this project: workers and kernels."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.root) in process.environ().get("TOOLKIT_RESULTS", ""):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def leftovers(self) -> list[Path]:
        return [*self.root.glob("book/**/.*"), *self.root.glob("_build/engine/*/*/*.json")]


@functools.cache
def read_once(chapter: Chapter) -> Source:
    """A chapter of the book, for tests that change nothing of it: reading takes 50 ms each time."""
    return read(chapter)


def until(condition: Callable[[], object], seconds: float = 40) -> None:
    """Wait for a condition, and fail if it never comes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def kill9(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def _dedent(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")
