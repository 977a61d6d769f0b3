"""The runtime that draws the explorers' charts: Vega, Vega-Lite and Vega-Embed as one script."""

from __future__ import annotations

import contextlib
from typing import Any


def runtime() -> str:
    """Return the script that the installed ``vl_convert`` bundles.

    To bundle it takes seconds of every process and gives the same for one version, so it is kept
    beside the data sets, see :func:`toolkit.core.data.directory`.

    Raises:
        ImportError: ``vl_convert`` is not installed.
    """
    import vl_convert

    from toolkit.core.data import directory
    from toolkit.core.io import write_text

    maker: Any = vl_convert  # its stubs know no version, and ask for an argument that it has not
    file = directory() / "runtime" / f"vl-convert-{maker.__version__}.js"
    if file.is_file():
        return file.read_text("utf-8")
    script: str = maker.javascript_bundle()
    with contextlib.suppress(OSError):  # where nothing can be kept, each process bundles its own
        write_text(file, script)
    return script
