"""Old names of public functions, classes and modules, which work for one release with a DeprecationWarning.

`deprecated_names.json` holds, for each module of the release before, its public names and where each is now. An import
hook makes both kinds of old imports work: those of modules that are gone or renamed, and those of names that a module
that is still there has had. It also adds the old keyword arguments and attributes (`deprecated_members.py`). To end the
deprecation, delete both files, their tables, and the call in `__init__.py`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from clipvisionalign.deprecated_members import MemberTable, add_old_members


def install_deprecated_names(table: Mapping[str, Mapping[str, str]], members: Mapping[str, MemberTable]) -> None:
    """Make old imports, keyword arguments and attributes work, once in a process.

    Args:
        table: For each module of the release before its old names, each with the object that replaces it as
            "module:name".
        members: For each module its functions and classes with old parameters or attributes.
    """
    if not any(isinstance(finder, _DeprecatedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeprecatedFinder(table, members))


class _DeprecatedFinder(MetaPathFinder):
    """Finds the modules of the tables; what a module does not have is looked up among its old names."""

    def __init__(self, table: Mapping[str, Mapping[str, str]], members: Mapping[str, MemberTable]) -> None:
        self.table, self.members = table, members

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        names, members = self.table.get(fullname), self.members.get(fullname, {})
        if names is None and not members:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return ModuleSpec(fullname, _FormerModuleLoader(names or {}))
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _SourceLoader(spec.loader.name, spec.loader.path, names or {}, members)
        return spec


class _FormerModuleLoader(Loader):
    """Makes an empty module of a module that is gone, for its old names."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def exec_module(self, module: ModuleType) -> None:
        _add_old_names(module, self.names)


class _SourceLoader(SourceFileLoader):
    """Loads a module from its source and adds its old names, and those of its members."""

    def __init__(self, fullname: str, path: str, names: Mapping[str, str], members: MemberTable) -> None:
        super().__init__(fullname, path)
        self.names, self.members = names, members

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if self.names:
            _add_old_names(module, self.names)
        add_old_members(module, self.members)


def _add_old_names(module: ModuleType, names: Mapping[str, str]) -> None:
    """Give a module a `__getattr__` (PEP 562) for its old names. Raises AttributeError for names that it never had."""
    own = module.__dict__.get("__getattr__")

    def __getattr__(name: str) -> Any:
        if name not in names:
            if own is not None:
                return own(name)
            raise AttributeError(f"module '{module.__name__}' has no attribute '{name}'")
        home, _, new_name = names[name].partition(":")
        message = (
            f"{module.__name__}.{name} is deprecated and will be removed in the next release: use {home}.{new_name}"
        )
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(import_module(home), new_name)

    module.__dict__["__getattr__"] = __getattr__
