"""A toy project for the engine's tests: a few toolkit modules and chapters of trivial cells."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from book.engine.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]

TOOLKIT = {
    "toolkit/__init__.py": """
        __version__ = "9.8.7"
        _EXPORTS = {"adapt": "toolkit.core.adapted", "catalogue": "toolkit.core.catalogue"}

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
    "toolkit/core/adapted.py": "from toolkit.core.layers import WIDTH\ndef adapt(): return WIDTH\n",
    "toolkit/core/layers.py": "WIDTH = 3\n",
    "toolkit/core/show.py": "def later():\n    from toolkit.core.layers import WIDTH\n",
    "toolkit/core/catalogue.py": """
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
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for path, text in TOOLKIT.items():
            self.write(path, _dedent(text))
        self.write("constraints.txt", "torch==0\n")
        self.write("pyproject.toml", PYPROJECT)

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

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
