"""Old names of public objects, which keep working for one release with a DeprecationWarning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def deprecated_names(module: str, present: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` (PEP 562) that forwards old names to the objects that replace them.

    Args:
        module: The name of the module that had the old names.
        present: For each old name the object that replaces it, as "module:name".

    Returns:
        A function from an old name to the object. It raises AttributeError for any other name.
    """

    def __getattr__(name: str) -> Any:
        if name not in present:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        home, _, new_name = present[name].partition(":")
        message = f"{module}.{name} is deprecated and will be removed in the next release: use {home}.{new_name}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(import_module(home), new_name)

    return __getattr__
