"""Settings from what YAML or JSON holds: the caller's own each time, though the same ones are parsed once."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

import pytest
import yaml

from clipvisionalign.plain_yaml import safe_load
from clipvisionalign.settings import config_from_dict


@dataclass
class Part:
    width: int = 3


@dataclass
class Settings:
    part: Part = field(default_factory=Part)
    names: list[str] = field(default_factory=list)
    share: float = 0.5


def test_settings_that_are_changed_change_no_others():
    values = {"part": {"width": 4}, "names": ["a"]}
    first, second = (config_from_dict(Settings, values) for _ in range(2))
    assert first == second == Settings(Part(4), ["a"])
    first.part.width = 9
    first.names.append("b")
    assert second == config_from_dict(Settings, values) == Settings(Part(4), ["a"])


def test_equal_values_of_other_kinds_are_told_apart():
    assert config_from_dict(Settings, {"share": 1.0}).share == 1.0
    for values in (
        {"part": {"width": True}},
        {"part": {"width": "x"}},
        {"names": 1},
        {"share": datetime.date(2024, 1, 1)},
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match="|".join(("width", "names", "share"))):
                config_from_dict(Settings, values)
    with pytest.raises(ValueError, match="widht"):
        config_from_dict(Settings, {"part": {"widht": 4}})


@pytest.mark.parametrize(
    "value", [{"a": [1, 0.1, 1e-7, None, True, "1e-4", "on", "1:30", "é\n"], "b": {"c": ""}}, [], "x", None]
)
def test_a_yaml_file_holds_what_pyyamls_own_loader_reads(value):
    for text in (yaml.safe_dump(value), yaml.safe_dump(value, allow_unicode=True, default_flow_style=True)):
        assert safe_load(text) == yaml.safe_load(text) == value
    with pytest.raises(yaml.YAMLError):
        safe_load("a: [1")
