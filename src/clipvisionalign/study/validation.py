"""Values from YAML to a dataclass, by pydantic: each fault has its key, and the key's line in the file.

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
KeyPath = tuple[str | int, ...]
#: Up to so many valid names are all listed.
MAX_LISTED_NAMES = 16


@dataclass(frozen=True)
class NestedDataclass:
    """Marks, in annotations, a mapping that is a part of a dataclass's values.

    Attributes:
        kind: The dataclass.
    """

    kind: type


class PlanError(ValueError):
    """What is wrong in a plan.

    Args:
        *faults: Each the key of a value and what is wrong with it.
    """

    def __init__(self, *faults: tuple[KeyPath, str]) -> None:
        self.faults = faults
        super().__init__("\n".join(f"{format_key(key)}: {message}" for key, message in faults))


def format_key(key: KeyPath) -> str:
    """A key as the messages have it.

    Args:
        key: Names and positions from the top of the plan.

    Returns:
        The text.

    >>> format_key(("variants", "late", "settings", "epochs")), format_key(("seeds", 1))
    ('variants.late.settings.epochs', 'seeds[1]')
    """
    text = ""
    for key_part in key:
        text += f"[{key_part}]" if isinstance(key_part, int) else f".{key_part}"
    return text.removeprefix(".") or "the plan"


# --- from a file to values -------------------------------------------------------------------------------------------


class MarkedYaml:
    """A YAML file's values, and the line of each key.

    Args:
        name: The file's, for messages.
        content: Its bytes.

    Raises:
        ValueError: It is no YAML, a key stands twice or is no text, or a plan has no such kind of value; with file and
            line.
    """

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.lines: dict[KeyPath, int] = {}
        try:
            self._loader = _Loader(decode(content).text)
            self._flattened: set[int] = set()
            node = self._loader.get_single_node()
            if node is not None:
                self._record_lines(node, (), ())
            self.values: Any = None if node is None else self._loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            raise ValueError(f"{name}{line}: not YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
            raise ValueError(f"{name}: not YAML: {reason}") from None

    @classmethod
    def read(cls, path: Path) -> MarkedYaml:
        """Read a file.

        Args:
            path: The file.

        Returns:
            Its values with their lines.

        Raises:
            OSError: It cannot be read.
        """
        return cls(str(path), path.read_bytes())

    def _record_lines(self, node: yaml.Node, key: KeyPath, ancestors: tuple[yaml.Node, ...]) -> None:
        self.lines.setdefault(key, node.start_mark.line + 1)
        if node in ancestors:
            raise self._error(node, key, "holds itself")
        if node.tag not in _ALLOWED_TAGS:
            raise self._error(node, key, f"a value of the kind {node.tag.rpartition(':')[2]}: give a text, in quotes")
        if isinstance(node, yaml.SequenceNode):
            for index, each in enumerate(node.value):
                self._record_lines(each, (*key, index), (*ancestors, node))
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node, key)
            for name, value in node.value:
                self.lines[*key, name.value] = name.start_mark.line + 1
                self._record_lines(value, (*key, name.value), (*ancestors, node))

    def _check_keys(self, node: yaml.MappingNode, key: KeyPath) -> None:
        """And write out what is merged (`<<`), over which a mapping's own keys count."""
        seen_keys = set()
        # An anchor's mapping is come by more than once.
        for name, _ in node.value if id(node) not in self._flattened else []:
            if name.tag == _MERGE_TAG:
                continue
            if name.tag not in (_STR_TAG, _INT_TAG):
                key_text = name.value if isinstance(name, yaml.ScalarNode) else "what stands there"
                raise self._error(name, (*key, key_text), "YAML reads this key as no text: put it in quotes")
            if name.value in seen_keys:
                raise self._error(name, (*key, name.value), "stands there twice")
            seen_keys.add(name.value)
        if id(node) not in self._flattened:
            self._flattened.add(id(node))
            self._loader.flatten_mapping(node)

    def _error(self, node: yaml.Node, key: KeyPath, message: str) -> ValueError:
        return ValueError(f"{self.name}, line {node.start_mark.line + 1}: {format_key(key)}: {message}")

    def with_lines(self, error: PlanError) -> ValueError:
        """The same error with the file and the line of each fault, one a line.

        Args:
            error: The faults of a plan.

        Returns:
            The error to raise instead.
        """
        return ValueError("\n".join(f"{self.name}, line {self.line(key)}: {format_key(key)}: {message}"
                                    for key, message in error.faults))  # fmt: skip

    def line(self, key: KeyPath) -> int:
        """Where a key stands, or the nearest one above it.

        Args:
            key: The key.

        Returns:
            Number of the line, from 1.
        """
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


class _Loader(plain_yaml.Loader):
    """A key that is a number becomes a text, as it stands there."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        return {name.value: self.construct_object(value, deep=True) for name, value in node.value}


_STR_TAG, _INT_TAG, _MERGE_TAG = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "merge"))
_ALLOWED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


# --- from values to a dataclass --------------------------------------------------------------------------------------


def validate_as(kind: type, values: Any, key: KeyPath = ()) -> Any:
    """A dataclass from what YAML or JSON holds; nothing is taken for what it is not, and no key is left over.

    A text that is a number, such as YAML's 1e-4, is one.

    Args:
        kind: The dataclass.
        values: What the file holds.
        key: Where the values stand in the plan.

    Returns:
        An object of that kind.

    Raises:
        PlanError: All that is wrong.
    """
    values = copy.deepcopy(values)
    faults = []
    for _ in range(2):
        try:
            return _model_of(kind).model_validate_json(json.dumps({"it": values})).it  # type: ignore[attr-defined]
        except ValidationError as error:
            faults = error.errors()
        if not _parse_texts(values, faults):
            break
    raise PlanError(*(((*key, *each["loc"][1:]), _error_message(kind, each, key)) for each in faults))


@lru_cache
def _model_of(kind: type) -> type[BaseModel]:
    # The settings of a model hold for the dataclasses in it as well.
    strict = ConfigDict(extra="forbid", strict=True)
    return create_model(kind.__name__, __config__=strict, it=(kind, ...))


#: What is read from a text, by the fault of one that stands where it belongs.
_PARSERS: dict[str, Callable[[str], Any]] = {
    "int_type": int, "float_type": float, "bool_type": plain_yaml.boolean,
}  # fmt: skip


def _parse_texts(values: Any, faults: list[Any]) -> bool:
    """Put numbers where texts of them stand; whether there were any."""
    changed = False
    for each in faults:
        if isinstance(each["input"], str) and each["type"] in _PARSERS and len(each["loc"]) > 1:
            *parents, last = each["loc"][1:]
            container = values
            for key_part in parents:
                container = container[key_part]
            try:
                container[last] = _PARSERS[each["type"]](each["input"])
                changed = True
            except (ValueError, KeyError):
                continue
    return changed


def _error_message(kind: type, fault: Any, key: KeyPath) -> str:
    """A fault in plain words."""
    loc, value = fault["loc"][1:], fault["input"]
    if fault["type"] == "unexpected_keyword_argument":
        name, known = str(loc[-1]), _keys_at(kind, loc[:-1])
        if "." in name and name in known:
            *above, last = name.split(".")
            nested = f"{': {'.join(above)}: {{{last}: ...{'}' * len(above)}"
            return f"a key with dots is not looked into: write it nested, {nested}"
        return f"no such key{suggest_name(name, known)}"
    if value is None:
        return "nothing stands there: give a value, or leave the line out"
    expected = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
              "string_type": "a text", "list_type": "a list", "dict_type": "keys with values",
              "dataclass_type": "keys with values"}.get(fault["type"])  # fmt: skip
    message = f"should be {expected}" if expected else fault["msg"].replace("Input should", "should")
    way = ", in quotes" if fault["type"] == "string_type" and isinstance(value, bool | int | float) else ""
    return f"{message}{way}, not {format_json(value)}"


def format_json(value: Any) -> str:
    """A value as JSON, cut where it is long.

    Args:
        value: The value.

    Returns:
        The text.
    """
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def suggest_name(name: str, names: list[str]) -> str:
    """The hint after an unknown name: the nearest of those that there are, by their last part; or all of a few.

    Args:
        name: The unknown name.
        names: Those that there are.

    Returns:
        The end of a message; "" for no hint.

    >>> suggest_name("epoch", ["epochs", "batch"]), suggest_name("x", ["epochs", "batch"])
    ("; is it 'epochs'?", '; there are epochs, batch')
    """
    # One of somewhere else has to be more than a little alike.
    for candidates, least in (([each for each in names if "." not in each], 0.6), (names, 0.8)):
        ends: dict[str, str] = {}
        for each in candidates:
            ends.setdefault(each.rpartition(".")[2], each)
        if matches := difflib.get_close_matches(name, ends, 1, least):
            return f"; is it '{ends[matches[0]]}'?"
    top_level = [each for each in names if "." not in each]
    return f"; there are {', '.join(top_level)}" if len(top_level) <= MAX_LISTED_NAMES else ""


def _keys_at(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    """The keys that there are at a place of a dataclass, and, with dots, those further below."""
    for key_part in loc:
        kind = get_type_hints(kind)[key_part] if is_dataclass(kind) else get_args(kind)[-1]
    return list(_keys_below(kind))


def _keys_below(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, below in get_type_hints(kind, include_extras=True).items() if is_dataclass(kind) else ():
        yield f"{prefix}{name}"
        marks: list[Any] = [each.kind for each in get_args(below) if isinstance(each, NestedDataclass)]
        yield from _keys_below((marks or [below])[0], f"{prefix}{name}.")
