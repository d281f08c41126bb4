"""Old keyword arguments, attributes and methods work for one release, and warn."""

from __future__ import annotations

import inspect
import json
import logging
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clipvisionalign.deprecated_members import add_old_members

#: The parameters and public attributes of version 0.1's functions and classes, by "module:name".
MEMBERS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "v0.1" / "public_members.json").read_text()
)
#: Parameters that have no successor, with the reason.
GONE: dict[str, tuple[set[str], str]] = {
    "clipvisionalign.study.cells:asked_of": ({"cell", "part", "split", "pairs", "overlap", "audit_images"}, "a context"),
    "clipvisionalign.study.cells:kept_figures": (
        {"cell", "part", "split", "pairs", "overlap", "audit_images"}, "inputs, in place of what they are made from"
    ),
    "clipvisionalign.study.cells:measure_cell": ({"part", "split", "pairs", "overlap", "audit_images"}, "a context"),
    "clipvisionalign.study.costs:Cost": ({"name"}, "follows from its path"),
    "clipvisionalign.study.report:commands": ({"plan"}, "the folder holds the plan"),
}  # fmt: skip


def accepted_parameters(function: Any) -> set[str]:
    """What a function takes by keyword, by old names too, if the new ones are there."""
    parameters = inspect.signature(function).parameters
    old = getattr(function.__init__ if isinstance(function, type) else function, "old_parameters", {})
    if isinstance(function, type) and issubclass(function, tuple):
        old = getattr(function.__new__, "old_parameters", {})
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return set(inspect.signature(function).parameters) | set(old) | {"any"}
    return set(parameters) | {name for name, new in old.items() if not isinstance(new, str) or new in parameters}


def instance_attributes(cls: type) -> set[str]:
    """Names that a class, or its annotations, or a method's assignment to `self`, gives its objects."""
    names: set[str] = set()
    for each in cls.__mro__:
        if each.__module__.startswith("clipvisionalign"):
            names |= set(vars(each)) | set(vars(each).get("__annotations__", {}))
            for method in vars(each).values():
                code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
                names |= set(code.co_names) if code else set()
    return names


@pytest.mark.parametrize("name", MEMBERS)
def test_every_parameter_and_attribute_of_version_0_1_is_accepted(name):
    module, _, old_name = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        thing = getattr(import_module(module), old_name)
    gone = GONE.get(name, (set(), ""))[0]
    accepted = accepted_parameters(thing)
    assert "any" in accepted or not set(MEMBERS[name].get("parameters", ())) - accepted - gone
    for attribute, parameters in MEMBERS[name].get("members", {}).items():
        static = inspect.getattr_static(thing, attribute, None)
        new = getattr(static, "new", attribute) if type(static).__name__ == "_OldAttribute" else attribute
        assert new in instance_attributes(thing), attribute
        method = inspect.getattr_static(thing, new, None)
        if parameters and (callable(method) or isinstance(method, (classmethod, staticmethod))):
            method = getattr(method, "__func__", method)
            assert not set(parameters) - accepted_parameters(method), attribute


def test_no_exception_is_left_of_a_parameter_that_works():
    for name, (gone, _) in GONE.items():
        module, _, old_name = name.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            thing = getattr(import_module(module), old_name)
        assert gone <= set(MEMBERS[name]["parameters"])
        assert not gone & accepted_parameters(thing)


def test_an_old_keyword_gives_what_the_new_one_gives_and_warns_at_its_line():
    import numpy as np

    from clipvisionalign.batch import are_positives

    ids = np.arange(4)
    expected = are_positives(ids, ids, caption_text_id=np.zeros(4, dtype=np.int64), identity_texts=None)
    with pytest.warns(DeprecationWarning, match=r"are_positives\(true_texts=...\).*use identity_texts=") as caught:
        old = are_positives(ids, ids, caption_text_id=np.zeros(4, dtype=np.int64), true_texts=None)  # type: ignore
    assert np.array_equal(old, expected)
    assert [each.filename for each in caught] == [__file__]
    with pytest.raises(TypeError, match="got 'identity_texts' twice: as true_texts, its old name"):
        are_positives(ids, ids, identity_texts=None, true_texts=None)  # type: ignore


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    """A module with old names of every kind."""
    module = ModuleType("module_with_old_names")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(
        "from dataclasses import dataclass\n"
        "from typing import NamedTuple\n"
        "@dataclass(frozen=True)\n"
        "class Frozen:\n"
        "    new: int = 0\n"
        "    def double(self, times=2): return self.new * times\n"
        "    @classmethod\n"
        "    def of(cls, new): return cls(new)\n"
        "    @staticmethod\n"
        "    def add(new): return new + 1\n"
        "class Pair(NamedTuple):\n"
        "    new: int\n"
        "class Open:\n"
        "    def __init__(self, new): self.new = new\n",
        vars(module),
    )
    renamed = {"parameters": {"old": "new"}, "attributes": {"old": "new"}}
    add_old_members(module, {
        "Frozen": {**renamed, "attributes": {"old": "new", "twice": "double"}}, "Pair": renamed, "Open": renamed,
        "Frozen.double": {"parameters": {"count": "times"}}, "Frozen.of": {"parameters": {"old": "new"}},
        "Frozen.add": {"parameters": {"old": "new"}},
    })  # fmt: skip
    return module


def test_old_names_of_every_kind_of_class_and_method_work(module, recwarn):
    assert [getattr(module, name)(old=3).old for name in ("Frozen", "Pair", "Open")] == [3, 3, 3]
    assert module.Frozen(3).twice(count=3) == 9
    assert module.Frozen.of(old=3) == module.Frozen(3)
    assert module.Frozen.add(old=3) == 4
    changed = module.Open(1)
    changed.old = 2
    assert changed.new == 2
    assert [(each.category, each.filename) for each in recwarn] == [(DeprecationWarning, __file__)] * 11


def test_new_names_do_not_warn(module, recwarn):
    assert [getattr(module, name)(new=3).new for name in ("Frozen", "Pair", "Open")] == [3, 3, 3]
    assert module.Frozen(3).double(times=3) == 9
    assert not recwarn


def test_say_that_is_gone_takes_the_lines_by_keyword_and_by_its_place():
    module = ModuleType("module")

    def work(out: str, *, more: str = "") -> str:
        logging.getLogger("clipvisionalign.study").info(f"{out}{more}")
        return out

    module.work = work  # type: ignore[attr-defined]
    add_old_members(module, {"work": {"parameters": {"say": 1}}})
    for arguments, keywords in ((("a",), {"more": "b"}), (("a",), {}), ((), {"out": "a"})):
        lines: list[str] = []
        with pytest.warns(DeprecationWarning, match="say is deprecated") as caught:
            assert module.work(*arguments, say=lines.append, **keywords) == "a"
        assert lines == [f"a{keywords.get('more', '')}"]
        assert [each.filename for each in caught] == [__file__]
    lines = []
    with pytest.warns(DeprecationWarning, match="say is deprecated"):
        module.work("a", lines.append, "b")
    assert lines == ["ab"]
