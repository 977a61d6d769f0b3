"""A plugin of pytest: the kernels of chapters fork from one process that imported what all share.

Otherwise each would spend five seconds on the imports of its neighbours. A chapter keeps a process
of its own, and nothing of the toolkit is imported before it asks. Only on Linux: elsewhere
libraries do not survive a fork, and kernels are started as usual.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from multiprocessing import forkserver
from typing import Any

import pytest
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

LIBRARIES = ["ipykernel.kernelapp", "matplotlib_inline", "pandas", "seaborn", "torch._dynamo"]
INLINE = "module://matplotlib_inline.backend_inline"  # what a kernel sets before its first import
# a new interpreter's: this module is imported first where kernels fork from
PATHS = [path for path in sys.path if path]


def run(arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """Be a kernel, as ``python -m ipykernel_launcher`` in a new process."""
    import numpy as np
    import torch
    from ipykernel.kernelapp import launch_new_instance

    for own in (__name__, __package__):
        del sys.modules[own]
    gc.freeze()
    torch.default_generator.seed()  # of all forks it would be the same
    np.random.seed()
    os.setsid()
    os.chdir(cwd)
    # what it was forked from lives as long as its kernels: they end with who asked for them
    threading.Thread(
        target=_end_with, args=(multiprocessing.parent_process(),), daemon=True
    ).start()
    os.environ.clear()
    os.environ.update(env, JPY_PARENT_PID=str(os.getppid()))
    sys.path[:] = PATHS
    sys.argv = [find_spec("ipykernel_launcher").origin, *arguments]
    multiprocessing.current_process().daemon = False  # a chapter may start processes
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    launch_new_instance()


def _end_with(asking: Any) -> None:
    asking.join()
    os._exit(1)


class Process:
    """A forked process, with the methods of :class:`subprocess.Popen` that a provisioner uses."""

    stdin = stdout = stderr = None

    def __init__(self, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # matplotlib reads it when it is imported, which is before a kernel could set it
            patch.setenv("MPLBACKEND", INLINE)
            forkserver.ensure_running()
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=run, args=arguments, daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()


class Forked(LocalProvisioner):
    """Starts a kernel by a fork instead of a new interpreter."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.process = Process(arguments, kwargs["env"], str(kwargs.get("cwd") or os.getcwd()))
        self.pid = self.pgid = self.process.pid  # it leads a group of its own
        return self.connection_info


def pytest_configure(config: pytest.Config) -> None:
    """Kernels that this process starts are forked; those of its children are not."""
    if sys.platform != "linux":
        return
    multiprocessing.set_forkserver_preload([__name__, *LIBRARIES])
    KernelProvisionerFactory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:Forked", "")
    KernelProvisionerFactory.instance().default_provisioner_name = "forked"
