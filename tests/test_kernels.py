"""A forked kernel is what a new one is, but for the imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel
from jupyter_client.provisioning import KernelProvisionerFactory

from tests import kernels

ROOT = Path(__file__).resolve().parents[1]
FACTS = """
import json, multiprocessing, os, signal, sys, threading
before = [m for m in sys.modules if m.partition(".")[0] in ("toolkit", "book", "tests")]
from matplotlib import pyplot
import numpy as np, random, torch
print(json.dumps({
    "ours": before, "path": sys.path, "argv": sys.argv[0], "folder": os.getcwd(),
    "env": {k: v for k, v in os.environ.items() if k != "JPY_PARENT_PID"},
    "parent": os.environ["JPY_PARENT_PID"] == str(os.getppid()),
    "backend": pyplot.get_backend(), "daemon": multiprocessing.current_process().daemon,
    "session": os.getsid(0) == os.getpid(), "interrupt": repr(signal.getsignal(signal.SIGINT)),
    "drawn": [torch.initial_seed(), float(np.random.rand()), random.random()],
    "threads": torch.get_num_threads(), "main": sorted(vars(sys.modules["__main__"])),
}))
"""

ASKING = """
import time
from tests import kernels
kernels.LIBRARIES = []
kernels.pytest_configure(None)
from jupyter_client.manager import start_new_kernel
manager, _ = start_new_kernel()
print(manager.provisioner.process.pid, flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels fork on Linux only")


def told(client, code: str) -> str:
    """What a kernel prints."""
    words = []
    client.execute_interactive(
        code, timeout=60, output_hook=lambda m: words.append(m["content"].get("text", ""))
    )
    return "".join(words)


@pytest.fixture
def forking(monkeypatch):
    """Kernels of this test are forked, as those of chapters."""
    factory = KernelProvisionerFactory.instance()
    before = dict(factory.provisioners), factory.default_provisioner_name
    kernels.pytest_configure(None)
    yield factory
    factory.provisioners.clear()
    factory.provisioners.update(before[0])
    factory.default_provisioner_name = before[1]


def facts(folder: Path) -> dict:
    manager, client = start_new_kernel(cwd=str(folder))
    try:
        return json.loads(told(client, FACTS))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_forked_kernel_is_like_a_new_one(forking, tmp_path):
    forked, again = facts(tmp_path), facts(tmp_path)
    drawn = [forked.pop("drawn"), again.pop("drawn")]
    assert all(one != other for one, other in zip(*drawn, strict=True))
    assert forked == again
    forking.default_provisioner_name = "local-provisioner"
    new = facts(tmp_path)
    del new["drawn"]
    assert new["ours"] == []
    assert new["folder"] == str(tmp_path)
    assert forked == new


def test_a_forked_kernel_that_dies_is_seen(forking, tmp_path):
    manager: KernelManager
    manager, client = start_new_kernel(cwd=str(tmp_path))
    try:
        assert manager.is_alive()
        assert told(client, "print(1)") == "1\n"
        client.execute("import os; os._exit(3)")
        manager.provisioner.process.wait()
        assert not manager.is_alive()
        assert manager.provisioner.process.poll() == 3
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_forked_kernel_ends_with_the_process_that_asked_for_it():
    asking = subprocess.Popen([sys.executable, "-c", ASKING], cwd=ROOT, stdout=subprocess.PIPE)
    kernel = psutil.Process(int(asking.stdout.readline()))
    below = kernel.parent()
    assert below.pid != asking.pid
    assert below.is_running()
    asking.kill()
    asking.wait()
    asking.stdout.close()
    left = psutil.wait_procs([kernel, below], timeout=20)[1]
    for process in left:
        process.kill()
    assert left == []


def test_a_forked_kernel_can_be_interrupted_and_start_processes(forking, tmp_path):
    manager, client = start_new_kernel(cwd=str(tmp_path))
    try:
        request = client.execute("import time; print(0); time.sleep(60)")
        while client.get_iopub_msg(timeout=20)["msg_type"] != "stream":
            pass
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=20)
        while reply["parent_header"].get("msg_id") != request:
            reply = client.get_shell_msg(timeout=20)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        code = "import multiprocessing as m; p = m.get_context('fork').Process(target=int)"
        assert told(client, f"{code}; p.start(); p.join(); print(p.exitcode)").split() == ["0"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
