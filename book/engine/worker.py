"""One chapter in a process of its own: papermill runs it, events go back through a pipe.

Started by :mod:`book.engine.watch` as ``python -P worker.py <job.json> <pipe>``, so it imports
nothing of the engine. The pipe
carries one JSON object a line: ``{"cell": k}`` when code cell k starts. What the run gave is
written to ``result.json`` in the chapter's scratch folder.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

RETRIES = 2  # a kernel that dies before its first cell lost a race for its sockets: try again


def main(job_file: str, pipe: str) -> None:
    """Run the job and write its result."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    threading.Thread(target=_end_with_parent, args=(job,), daemon=True).start()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    found = links(job)  # first, so that a broken catalogue costs no run
    with os.fdopen(int(pipe), "w", buffering=1, encoding="utf-8") as events:
        result = run(job, lambda event: events.write(json.dumps(event) + "\n"))
    result["links"] = found
    Path(job["scratch"], "result.json").write_text(json.dumps(result), encoding="utf-8")


def run(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Execute the prepared notebook of a job.

    Args:
        job: ``notebook`` (path), ``scratch``, ``cwd`` and ``sockets``
            (folders), ``scale``, ``seed``, ``cell_timeout`` (s).
        tell: called with ``{"cell": k}`` as code cell k starts.

    Returns:
        ``outputs`` (one list per code cell), or ``failed`` with message, cell and traceback; and
        ``seconds``, ``device_name`` and ``versions``.
    """
    started = time.monotonic()
    for attempt in range(RETRIES + 1):
        reached = {"cell": 0}
        try:
            outcome: dict[str, Any] = {"outputs": _execute(job, tell, reached)}
        except Exception as error:  # whatever ends a run is this chapter's failure
            if reached["cell"] == 0 and attempt < RETRIES:
                time.sleep(1 + attempt)
                continue
            outcome = {"failed": {**_explain(error, job), "cell": reached["cell"] or None}}
        break
    return {
        **outcome,
        "seconds": round(time.monotonic() - started, 1),
        "device_name": device_name(job["scale"]),
        "versions": versions(),
    }


def _execute(job: dict[str, Any], tell: Any, reached: dict[str, int]) -> list[list[dict]]:
    import papermill
    from traitlets.config import Config

    def cell_starts(cell: Any, cell_index: int) -> None:
        number = cell.metadata.get("number")  # absent from the cell papermill injects
        if number:
            reached["cell"] = number
            tell({"cell": number})

    config = Config()
    config.KernelManager.connection_file = f"{job['sockets']}/k.json"
    if os.name == "posix":
        config.KernelManager.transport = "ipc"  # no ports, so no races for them
    notebook = papermill.execute_notebook(
        job["notebook"],
        None,
        parameters={"SCALE": job["scale"], "SEED": job["seed"]},
        kernel_name="python3",
        progress_bar=False,
        request_save_on_cell_execute=False,
        start_timeout=120,
        execution_timeout=job["cell_timeout"],
        cwd=job["cwd"],
        config=config,
        on_cell_start=cell_starts,
        shutdown_kernel="immediate",
        store_widget_state=False,
    )
    return [
        [dict(output) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code" and "number" in cell.metadata
    ]


def _explain(error: Exception, job: dict[str, Any]) -> dict[str, str]:
    """A failure's message and traceback, without terminal colours."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError, strip_color

    if isinstance(error, PapermillExecutionError):
        text = strip_color("\n".join(error.traceback))
        return {"message": f"{error.ename}: {error.evalue}", "traceback": text}
    if isinstance(error, CellTimeoutError):
        return {"message": f"ended: it ran longer than the cell timeout of {job['cell_timeout']} s"}
    if isinstance(error, DeadKernelError):
        return {"message": f"the kernel died ({error}); was there enough memory?"}
    return {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def links(job: dict[str, Any]) -> dict[str, str]:
    """Paper and official code: from the catalogue for a method, else from the front matter."""
    found = {name: job[name] for name in ("paper", "code") if job.get(name)}
    try:
        from toolkit import catalogue
    except ImportError:  # a project without a catalogue
        return found
    for entry in catalogue():
        if entry.slug == job["slug"]:
            found = {"paper": entry.arxiv, "code": entry.code or "", **found}
    return {name: value for name, value in found.items() if value}


def device_name(scale: str) -> str:
    """The kind of device, never the name of the machine."""
    if scale == "gpu":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    return f"CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of Python and PyTorch; PyTorch's only where it is installed."""
    found = {"python": platform.python_version()}
    try:
        found["torch"] = metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        found["torch"] = ""
    return found


def _end_with_parent(job: dict[str, Any]) -> None:
    """End this process and its kernel when the engine is gone, however it went."""
    import psutil

    while os.getppid() == job["parent"]:
        time.sleep(0.5)
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    shutil.rmtree(job["sockets"], ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
