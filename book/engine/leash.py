"""Run a command that ends when the engine is gone: ``python -P leash.py <engine's pid> <command>``.

Imports nothing of the engine, since it is started by its path.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import psutil


def main(parent: int, command: list[str]) -> int:
    """Returns the command's exit code, or 1 if the engine went first."""
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            if os.getppid() != parent:
                family = [*psutil.Process(child.pid).children(recursive=True), child]
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                return 1
            time.sleep(0.1)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
