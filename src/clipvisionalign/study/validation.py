"""Values from YAML to a dataclass, by pydantic: each fault is told with its key, and the key's line in the file.

YAML is read more strictly than PyYAML does it: a key that stands twice is a fault, as one of them would be lost, and
what is no plain number is the text that stands there (`plain_yaml.py`).
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from clipvisionalign import plain_yaml
from clipvisionalign.data.text_files import decode

#: Where a value stands: keys, and places in lists.
Key = tuple[str | int, ...]
#: Names up to so many are all told, where one of them is asked for.
FEW = 16


@dataclass(frozen=True)
class Below:
    """Of a mapping that is a part of a dataclass's values, in annotations: which dataclass."""

    kind: type


class PlanError(ValueError):
    """What is wrong in a plan. faults: each the key of a value and what is wrong with it."""

    def __init__(self, *faults: tuple[Key, str]) -> None:
        self.faults = faults
        super().__init__("\n".join(f"{dotted(key)}: {message}" for key, message in faults))


def dotted(key: Key) -> str:
    """A key as the messages have it.

    >>> dotted(("variants", "late", "settings", "epochs")), dotted(("seeds", 1))
    ('variants.late.settings.epochs', 'seeds[1]')
    """
    found = ""
    for part in key:
        found += f"[{part}]" if isinstance(part, int) else f".{part}"
    return found.removeprefix(".") or "the plan"


# --- from a file to values -------------------------------------------------------------------------------------------


class MarkedYaml:
    """A YAML file's values, and the line of each key. Raises ValueError with file and line for what is no YAML, for a
    key that stands twice or is no text, and for a kind of value that a plan has none of."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.lines: dict[Key, int] = {}
        try:
            self._loader = _Loader(decode(content).text)
            self._merged: set[int] = set()
            node = self._loader.get_single_node()
            if node is not None:
                self._mark(node, (), ())
            self.values: Any = None if node is None else self._loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            raise ValueError(f"{name}{line}: not YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, RecursionError) as error:
            told = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
            raise ValueError(f"{name}: not YAML: {told}") from None

    @classmethod
    def read(cls, path: Path) -> MarkedYaml:
        """Raises OSError where the file cannot be read."""
        return cls(str(path), path.read_bytes())

    def _mark(self, node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> None:
        self.lines.setdefault(key, node.start_mark.line + 1)
        if node in above:
            raise self._fault(node, key, "holds itself")
        if node.tag not in _TAGS:
            raise self._fault(node, key, f"a value of the kind {node.tag.rpartition(':')[2]}: give a text, in quotes")
        if isinstance(node, yaml.SequenceNode):
            for place, each in enumerate(node.value):
                self._mark(each, (*key, place), (*above, node))
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node, key)
            for name, value in node.value:
                self.lines[*key, name.value] = name.start_mark.line + 1
                self._mark(value, (*key, name.value), (*above, node))

    def _check_keys(self, node: yaml.MappingNode, key: Key) -> None:
        """And write out what is merged (`<<`), over which a mapping's own keys count."""
        own = set()
        # An anchor's mapping is come by more than once.
        for name, _ in node.value if id(node) not in self._merged else []:
            if name.tag == _MERGE:
                continue
            if name.tag not in (_TEXT, _WHOLE):
                told = name.value if isinstance(name, yaml.ScalarNode) else "what stands there"
                raise self._fault(name, (*key, told), "YAML reads this key as no text: put it in quotes")
            if name.value in own:
                raise self._fault(name, (*key, name.value), "stands there twice")
            own.add(name.value)
        if id(node) not in self._merged:
            self._merged.add(id(node))
            self._loader.flatten_mapping(node)

    def _fault(self, node: yaml.Node, key: Key, message: str) -> ValueError:
        return ValueError(f"{self.name}, line {node.start_mark.line + 1}: {dotted(key)}: {message}")

    def placed(self, error: PlanError) -> ValueError:
        """The same error with the file and the line of each fault, one a line."""
        return ValueError("\n".join(f"{self.name}, line {self.line(key)}: {dotted(key)}: {message}"
                                    for key, message in error.faults))  # fmt: skip

    def line(self, key: Key) -> int:
        """Where a key stands, or the nearest one above it."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


class _Loader(plain_yaml.Loader):
    """A key that is a number becomes a text, as it stands there."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        return {name.value: self.construct_object(value, deep=True) for name, value in node.value}


_TEXT, _WHOLE, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "merge"))
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


# --- from values to a dataclass --------------------------------------------------------------------------------------


def validated(kind: type, values: Any, key: Key = ()) -> Any:
    """A dataclass from what YAML or JSON holds; nothing is taken for what it is not, and no key is left over. A text
    that is a number, such as YAML's 1e-4, is one.

    key: where the values stand in the plan. Raises PlanError with all that is wrong.
    """
    values = copy.deepcopy(values)
    faults = []
    for _ in range(2):
        try:
            return _model_of(kind).model_validate_json(json.dumps({"it": values})).it  # type: ignore[attr-defined]
        except ValidationError as error:
            faults = error.errors()
        if not _texts_into_numbers(values, faults):
            break
    raise PlanError(*(((*key, *each["loc"][1:]), _told(kind, each, key)) for each in faults))


@lru_cache
def _model_of(kind: type) -> type[BaseModel]:
    # The settings of a model hold for the dataclasses in it as well.
    strict = ConfigDict(extra="forbid", strict=True)
    return create_model(kind.__name__, __config__=strict, it=(kind, ...))


#: What is read from a text, by the fault of one that stands where it belongs.
_READ: dict[str, Callable[[str], Any]] = {
    "int_type": int, "float_type": float, "bool_type": plain_yaml.boolean,
}  # fmt: skip


def _texts_into_numbers(values: Any, faults: list[Any]) -> bool:
    """Put numbers where texts of them stand; whether there were any."""
    done = False
    for each in faults:
        if isinstance(each["input"], str) and each["type"] in _READ and len(each["loc"]) > 1:
            *above, last = each["loc"][1:]
            inside = values
            for part in above:
                inside = inside[part]
            try:
                inside[last] = _READ[each["type"]](each["input"])
                done = True
            except (ValueError, KeyError):
                continue
    return done


def _told(kind: type, fault: Any, key: Key) -> str:
    """A fault in plain words."""
    loc, given = fault["loc"][1:], fault["input"]
    if fault["type"] == "unexpected_keyword_argument":
        name, known = str(loc[-1]), _names_at(kind, loc[:-1])
        if "." in name and name in known:
            *above, last = name.split(".")
            nested = f"{': {'.join(above)}: {{{last}: ...{'}' * len(above)}"
            return f"a key with dots is not looked into: write it nested, {nested}"
        return f"no such key{nearest(name, known)}"
    if given is None:
        return "nothing stands there: give a value, or leave the line out"
    wanted = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
              "string_type": "a text", "list_type": "a list", "dict_type": "keys with values",
              "dataclass_type": "keys with values"}.get(fault["type"])  # fmt: skip
    told = f"should be {wanted}" if wanted else fault["msg"].replace("Input should", "should")
    way = ", in quotes" if fault["type"] == "string_type" and isinstance(given, bool | int | float) else ""
    return f"{told}{way}, not {shown(given)}"


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: str, known: list[str]) -> str:
    """What to say after an unknown name: the nearest of those that there are, by their last part; or all of a few.

    >>> nearest("epoch", ["epochs", "batch"]), nearest("x", ["epochs", "batch"])
    ("; is it 'epochs'?", '; there are epochs, batch')
    """
    # One of somewhere else has to be more than a little alike.
    for some, least in (([each for each in known if "." not in each], 0.6), (known, 0.8)):
        ends: dict[str, str] = {}
        for each in some:
            ends.setdefault(each.rpartition(".")[2], each)
        if alike := difflib.get_close_matches(name, ends, 1, least):
            return f"; is it '{ends[alike[0]]}'?"
    own = [each for each in known if "." not in each]
    return f"; there are {', '.join(own)}" if len(own) <= FEW else ""


def _names_at(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    """The keys that there are at a place of a dataclass, and, with dots, those further below."""
    for part in loc:
        kind = get_type_hints(kind)[part] if is_dataclass(kind) else get_args(kind)[-1]
    return list(_names_below(kind))


def _names_below(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, below in get_type_hints(kind, include_extras=True).items() if is_dataclass(kind) else ():
        yield f"{prefix}{name}"
        marks: list[Any] = [each.kind for each in get_args(below) if isinstance(each, Below)]
        yield from _names_below((marks or [below])[0], f"{prefix}{name}.")
