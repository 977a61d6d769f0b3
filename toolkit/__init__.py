"""Parameters in Motion: published ways to adapt, select, merge and control a network's parameters.

Names are resolved on first use (PEP 562), so ``import toolkit`` does no work. Core names are listed
in ``_EXPORTS``; every other public name is a method class, found in the source text of the module
that defines it, which is then the only method imported:

>>> from toolkit import adapt, catalogue, LoRA
>>> [entry.slug for entry in catalogue()][:1]
['lora']
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "adapt": "toolkit.core.adapt.put",
    "Adapted": "toolkit.core.adapt.model",
    "load": "toolkit.core.adapt.load",
    "save_peft": "toolkit.core.adapt.peft",
    "load_peft": "toolkit.core.adapt.from_peft",
    "catalogue": "toolkit.core.declare.catalogue",
}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    if name == "merge":  # the part's package, which can be called
        return importlib.import_module("toolkit.merge")
    if name in _EXPORTS:
        module = importlib.import_module(_EXPORTS[name])
        return getattr(module, name)
    from toolkit.core.declare.catalogue import find_class

    found = find_class(name)
    if found is None:
        raise AttributeError(
            f"module 'toolkit' has no attribute {name!r}; see `python -m toolkit list`"
        )
    return found


def __dir__() -> list[str]:
    from toolkit.core.declare.catalogue import catalogue

    return sorted([*_EXPORTS, "merge", *(entry.class_name for entry in catalogue())])
