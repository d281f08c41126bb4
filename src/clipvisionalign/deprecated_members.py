"""Old keyword arguments and attributes, which work for one release with a DeprecationWarning.

`deprecated_members.json` holds, for each module, its functions, methods and classes whose parameters or attributes had
other names in the release before. Parameters of a class are those of its constructor:

    "clipvisionalign.batch": {"TokenizedCaptions": {"parameters": {"lost": "num_truncated"}}}

A parameter `say` that is gone, which took lines, has its position in place of a new name, or null if it is accepted by
keyword alone; what followed it is keyword-only now.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from types import ModuleType
from typing import Any

#: By a function or class, by "parameters" or "attributes": for each old name the new one.
MemberTable = Mapping[str, Mapping[str, Mapping[str, Any]]]

SAY = "say"


def add_old_members(module: ModuleType, table: MemberTable) -> None:
    """Make the old parameters and attributes of a module's functions and classes work.

    Args:
        module: A module that has been loaded.
        table: Its part of `deprecated_members.json`.
    """
    for name, old_names in table.items():
        class_name, _, method = name.rpartition(".")
        owner: Any = getattr(module, class_name) if class_name else module
        if parameters := old_names.get("parameters"):
            # As it is written there, or in a class that it is of.
            thing = inspect.getattr_static(owner, method)
            if isinstance(thing, type):
                constructor = "__new__" if issubclass(thing, tuple) else "__init__"
                wrapper = _with_old_parameters(getattr(thing, constructor), name, parameters)
                setattr(thing, constructor, staticmethod(wrapper) if constructor == "__new__" else wrapper)
            elif isinstance(thing, (classmethod, staticmethod)):
                setattr(owner, method, type(thing)(_with_old_parameters(thing.__func__, name, parameters)))
            else:
                setattr(owner, method, _with_old_parameters(thing, name, parameters))
        for old, new in old_names.get("attributes", {}).items():
            setattr(vars(owner)[method], old, _OldAttribute(f"{name}.{old}", new))


def _with_old_parameters(
    function: Callable[..., Any], name: str, parameters: Mapping[str, str | int | None]
) -> Callable[..., Any]:
    """A function that also takes its old keyword arguments, and `say`."""
    takes_say = SAY in parameters and not isinstance(parameters[SAY], str)
    new_names = {old: new for old, new in parameters.items() if isinstance(new, str)}

    @wraps(function)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        for old in new_names.keys() & keywords.keys():
            new = new_names[old]
            if new in keywords:
                raise TypeError(f"{name}() got '{new}' twice: as {old}, its old name, and as {new}")
            _warn(f"{name}({old}=...)", f"{new}=")
            keywords[new] = keywords.pop(old)
        if not takes_say:
            return function(*args, **keywords)
        from clipvisionalign.log import deprecated_say

        say, position = keywords.pop(SAY, None), parameters[SAY]
        if isinstance(position, int) and len(args) > position:
            import inspect

            followers = list(inspect.signature(function).parameters)[position:]
            say, keywords = args[position], keywords | dict(zip(followers, args[position + 1 :], strict=False))
            args = args[:position]
        with deprecated_say(say):
            return function(*args, **keywords)

    vars(wrapper)["old_parameters"] = parameters
    return wrapper


class _OldAttribute:
    """An attribute that is another one's old name."""

    def __init__(self, name: str, new: str) -> None:
        self.name, self.new = name, new

    def __get__(self, instance: Any, owner: type) -> Any:
        _warn(self.name, self.new)
        return getattr(owner if instance is None else instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        _warn(self.name, self.new)
        setattr(instance, self.new, value)


def _warn(old: str, new: str) -> None:
    message = f"{old} is deprecated and will be removed in the next release: use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
