"""Methods that make one model of several, or edit one by hand; ``toolkit.merge(...)`` merges."""

import sys
import types
from typing import Any


class _Merge(types.ModuleType):
    """The part's package, which can be called: its name is also that of what it does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :func:`toolkit.core.states.merging.merge`."""
        from toolkit.core.states.merging import merge

        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _Merge
