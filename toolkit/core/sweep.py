"""The address of :func:`toolkit.core.runs.sweep.sweep` in programs written for earlier versions."""

from toolkit.core.runs.sweep import code_version, collect, grid, sweep

__all__ = ["code_version", "collect", "grid", "sweep"]
