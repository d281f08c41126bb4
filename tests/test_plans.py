"""A plan means what it says, or is refused before anything is written by a line that names key and place."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clipvisionalign.cli import main
from clipvisionalign.cli.train import train_parser
from clipvisionalign.study.config import DESIGNS, Plan, trials_of
from clipvisionalign.study.plan_file import plan_text, read_plan, ready_plans
from clipvisionalign.study.trial_checks import refuse_other_settings
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.run_folder import _write_settings

#: A refusal: file, line, key, what is wrong.
LINE = re.compile(r"(?P<file>.+?), line (?P<line>\d+): (?P<key>[^:]+(?:\[\d+\])?): (?P<told>.+)")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- plans as people write them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "message"),
    [
        ("title: x\nvariants: self", 2, "variants", "a list of names"),
        ("title: x\nvariants:", 2, "variants", "nothing stands there"),
        ("seeds: [1]\nsettings: null", 2, "settings", "nothing stands there"),
        ("measure: null", 1, "measure", "nothing stands there"),
        ("variants:\n- self\n- {late: {}}", 3, "variants[1]", "a list holds names alone"),
        ("variants: [self,\n  self]", 2, "variants[1]", "'self' stands there twice"),
        ("variants:\n  self: {}\n  self: {}", 3, "variants.self", "stands there twice"),
        ("settings:\n  batch: 4\n  model:\n    design: self", 4, "settings.model.design", "promises 'sparse'"),
        (
            "variants:\n  late: {settings: {model: {design: self}}}",
            2,
            "variants.late.settings.model.design",
            "promises",
        ),
        ("variants:\n  late-64:\n    settings: {model: {width: 64}}", 2, "variants.late-64", "no design is set"),
        (
            "variants:\n  sparse_8: {settings: {model: {design: late}}}",
            2,
            "variants.sparse_8.settings.model.design",
            "",
        ),
        ("settings:\n  epoch: 3", 2, "settings.epoch", "is it 'epochs'?"),
        ("epochs: 3", 1, "epochs", "is it 'settings.epochs'?"),
        ("variants:\n  late: {epochs: 3}", 2, "variants.late.epochs", "is it 'settings.epochs'?"),
        ("settings:\n  windows: 3", 2, "settings.windows", "is it 'model.text_tower.window'?"),
        ("sedes: [0]", 1, "sedes", "is it 'seeds'?"),
        ("settings:\n  epochs: true", 2, "settings.epochs", "a whole number, not true"),
        ("settings:\n  epochs:", 2, "settings.epochs", "nothing stands there"),
        ("settings: {model: self}", 1, "settings.model", "keys with values"),
        ("seeds: [0,\n 1.5]", 2, "seeds[1]", "a whole number"),
        ("seeds: [0, -1]", 1, "seeds[1]", "greater than or equal to 0"),
        ("seeds: []", 1, "seeds", "one at least"),
        ("settings: {}\nvariants:\n  cross:\n    settings: {freeze: all}", 4, "variants.cross.settings.freeze", "base"),
        ("variants: [late]\nsettings:\n  freeze: all", 3, "settings.freeze", "has one"),
        ("settings:\n  profile: 20", 2, "settings.profile", "leaves no run"),
        ("settings:\n  warmup: 2", 2, "settings.warmup", "should be from 0"),
        ("budget:\n  seconds: 600", 2, "budget.seconds", "same: seconds"),
        ("budget:\n  same: seconds\n  seconds: .nan", 3, "budget.seconds", ""),
        ("compare:\n  passes: any", 1, "compare", "names no variants"),
        ("compare:\n  a: self\n  b: lat", 3, "compare.b", "is it 'late'?"),
        ("variants:\n  self: {base: lat}\n  late: {}", 2, "variants.self.base", "is it 'late'?"),
        ("measure: {rounds: -1}", 1, "measure.rounds", "greater than or equal to 0"),
        ("drawing:\n  pixels: 4", 2, "drawing.pixels", "greater than or equal to 32"),
        ("variants: {dense: {}}", 1, "variants.dense", "unknown variant 'dense'"),
        ("variants:\n  self: {base: late}\n  late:\n    base: self", 4, "variants.late.base", "in a circle"),
        ("seeds: [1, 1]", 1, "seeds[1]", "1 stands there twice"),
        ("settings:\n  seed: 1", 2, "settings.seed", "the study's own"),
        ("budget: {same: luck}", 1, "budget.same", "'pictures' or 'seconds', not \"luck\""),
        ("split: train", 1, "split", "'dev' or 'test'"),
        ("scenes: 9\ndrawing:\n  splits: {train: 4, tests: 5}", 3, "drawing.splits.tests", "is it 'test'?"),
        ("scenes: 9\nsplit: test\ndrawing:\n  splits: {train: 4, dev: 5}", 4, "drawing.splits", "no scenes for test"),
        ("scenes: 9\ndrawing:\n  difficulty: {group: 3}", 3, "drawing.difficulty.group", "is it 'groups'?"),
        (
            "drawing:\n  difficulty:\n    captions: 2\n    relations: much",
            4,
            "drawing.difficulty.relations",
            "a number",
        ),
        ("drawing:\n  difficulty:\n    captions: 2\n    tokens: 64", 4, "drawing.difficulty.tokens", "from 128"),
        ("drawing: {difficulty: {negation: 0.5}}", 1, "drawing.difficulty.negation", "'captions' (1 to 5)"),
        ("measure:\n  minimal_pair_images: x", 2, "measure.minimal_pair_images", "minimal_pairs"),
        ("true: 3", 1, "true", "put it in quotes"),
        ("on: 3", 1, "on", "no such key"),
        ("settings: {batch: 1:30}", 1, "settings.batch", "a whole number"),
        ("title: 3", 1, "title", "a text, in quotes"),
        (
            "variants:\n  late2:\n    settings: {model: {design: self}}",
            3,
            "variants.late2.settings.model.design",
            "'late'",
        ),
        ("variants: [Cross]", 1, "variants.Cross", "promises 'cross'"),
        ("settings: {model: {design: self}}\nvariants: {small-late: {}}", 1, "settings.model.design", "'late'"),
        (
            "variants:\n  late:\n    base: self\n    settings:\n      model: {width: 64}\n  self: {}",
            5,
            "variants.late.settings.model.width",
            "that of 'self'",
        ),
        ("settings:\n  model:\n    late: {keep_tokens: -3}", 3, "settings.model.late.keep_tokens", "at least 0"),
        ("settings:\n  model:\n    width: 0", 3, "settings.model.width", "at least 1"),
        ("settings:\n  model.design: late", 2, "settings.model.design", "nested, model: {design: ...}"),
        ("settings:\n  model.late.width: 8", 2, "settings.model.late.width", "nested, model: {late: {width: ...}}"),
        ("settings: &b {epochs: 1}\nbase: *b", 2, "base", "no such key; there are title"),
        ("title: &a [*a]", 1, "title[0]", "holds itself"),
        ("variants:\n  self: {}\n  b: {settings: {model: {design: self}}}", 3, "variants.b", "same as 'self'"),
        # What has no effect makes no difference.
        (
            "variants:\n  self: {}\n  b: {settings: {negatives: 2, model: {design: self, fusion: {heads: 2}}}}",
            3,
            "variants.b",
            "same as 'self'",
        ),
        ("variants:\n  self: {}\n  late: {same_as: self}", 3, "variants.late.same_as", "has other settings"),
        ("variants:\n  self: {same_as: lat}\n  late: {}", 2, "variants.self.same_as", "is it 'late'?"),
        ("variants:\n  self: {same_as: self}", 2, "variants.self.same_as", "no other variant"),
        (
            "variants:\n  self: {settings: {patience: 1}}\n  late: {}\ncompare: {a: self, b: late, passes: equal}",
            4,
            "compare.passes",
            "patience 1 and 3",
        ),
    ],
)
def test_a_fault_is_told_with_its_line_and_its_key(tmp_path, capsys, text, line, key, message):
    path, out = tmp_path / "plan.yaml", tmp_path / "out"
    path.write_text(text)
    before = contents(tmp_path)
    assert main(["study", str(path), "--out", str(out)]) == 1
    match = LINE.fullmatch(capsys.readouterr().err.strip().removeprefix("clipvisionalign: error: "))
    assert match is not None
    assert (match["file"], int(match["line"]), match["key"]) == (str(path), line, key)
    assert message in match["told"]
    assert contents(tmp_path) == before


TINY = """data: {data}
seeds: [0]
settings:
  batch: 16
  augment: none
  model:
    image_tower: {{name: test_resnet, weights: random, size: 64}}
    text_tower: {{name: {text}}}
    width: 32
    fusion: {{layers: 1, heads: 2, width: 32}}
variants:
  self: {{}}
"""


@pytest.mark.parametrize(
    ("variant", "key", "message"),
    [
        ("late: {settings: {device: warp9}}", "late.settings.device", "not to be had"),
        ("late: {settings: {loss: {name: sofmax}}}", "late.settings.loss.name", "neither softmax"),
        ("late: {settings: {loss: {name: 'os:getcwd'}}}", "late.settings.loss.name", "a first step fails"),
        ("late: {settings: {trackers: scroll}}", "late.settings.trackers", "there are tensorboard"),
        (
            "late: {settings: {model: {text_tower: {name: ./nowhere}}}}",
            "late.settings.model.text_tower.name",
            "no such",
        ),
        (
            "late: {settings: {model: {image_tower: {name: resnet5000}}}}",
            "late.settings.model.image_tower.name",
            "near",
        ),
        (
            "late: {settings: {model: {image_tower: {weights: w.pt}}}}",
            "late.settings.model.image_tower.weights",
            "w.pt",
        ),
        (
            "late: {settings: {model: {image_tower: {revision: a}}}}",
            "late.settings.model.image_tower.revision",
            "no rev",
        ),
        (
            "late: {settings: {model: {image_tower: {blocks: 2}}}}",
            "late.settings.model.image_tower.blocks",
            "no blocks",
        ),
        ("late: {settings: {model: {late: {temperature: 0}}}}", "late.settings.model.late.temperature", "above 0"),
        ("late: {settings: {model: {width: 36}}}", "late.settings.model.width", "multiple of 8"),
        ("late: {settings: {model: {text_tower: {max_tokens: 2}}}}", "late.settings.model.text_tower.max_tokens", "3"),
        ("cross: {settings: {model: {fusion: {heads: 3}}}}", "cross.settings.model.fusion.heads", "evenly"),
        (
            "sparse: {settings: {model: {text_tower: {window: 1}}}}",
            "sparse.settings.model.text_tower.window",
            "2 tokens",
        ),
        ("late: {settings: {freeze_layers: [none*]}}", "late.settings.freeze_layers", "no parameter"),
        ("late: {settings: {shard: true}}", "late.settings.shard", "several processes"),
        ("late: {settings: {chunk: 4, freeze: none}}", "late.settings.chunk", "batch norms"),
        ("late: {settings: {train_images: 1}}", "late.settings.train_images", "at least 2"),
        ("cross: {settings: {freeze: all}, base: self}", "cross.settings.freeze", "as drawn at random"),
        ("sparse: {base: self}", "sparse.base", "other towers"),
        ("late: {settings: {dev_data: elsewhere}}", "late.settings.dev_data", "the same for all variants"),
    ],
)
def test_what_train_would_refuse_of_one_variant_is_refused_before_another_is_trained(
    tmp_path, capsys, monkeypatch, scenes_folder, text_folder, variant, key, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipvisionalign.study.trial.train", None)
    text = TINY.format(data=scenes_folder, text=text_folder) + f"  {variant}\n"
    (tmp_path / "plan.yaml").write_text(text)
    before = contents(tmp_path)
    for more in ([], ["--dry-run"]):
        assert main(["study", "plan.yaml", "--out", "out", *more]) == 1
        match = LINE.fullmatch(
            capsys.readouterr().err.strip().splitlines()[-1].removeprefix("clipvisionalign: error: ")
        )
        assert match is not None
        location = (match["file"], int(match["line"]), match["key"])
        assert location == ("plan.yaml", len(text.splitlines()), f"variants.{key}")
        assert message in match["told"]
        assert contents(tmp_path) == before


@pytest.mark.parametrize(("split", "message"), [("dev", "give 'split: test'"), ("test", "elsewhere")])
def test_another_data_set_to_choose_by_is_there_and_is_not_the_one_that_is_measured(
    tmp_path, capsys, scenes_folder, text_folder, split, message
):
    path = tmp_path / "plan.yaml"
    text = TINY.format(data=scenes_folder, text=text_folder).replace("  batch: 16", "  dev_data: elsewhere")
    path.write_text(f"{text}split: {split}\n")
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{path}, line 4: settings.dev_data: " in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_reading_a_plan_lists_no_folder_not_even_the_current_one(tmp_path, monkeypatch):
    """Which may be a home folder: a plan's variants name no data set, and are compared without one."""
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text("data: x\nvariants: [self, late]\n")
    listed: list[Any] = []
    monkeypatch.setattr(os, "scandir", lambda folder=".": listed.append(folder) or [])
    assert list(read_plan("plan.yaml").variants) == ["self", "late"]
    assert listed == []


def test_all_faults_are_told_at_once(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("settings: {epochs: x}\nsedes: [1]\nmeasure: {round: 2}\n")
    with pytest.raises(ValueError, match="sedes") as refused:
        read_plan(path)
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize(
    "content", [b": :", b"[" * 5000, b"a: \xff\x00", b"", b"--- a\n--- b", b"3", b"a: !!set {b}"], ids=range(7)
)
def test_what_is_no_plan_is_refused_in_a_line(tmp_path, content):
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
        read_plan(path)
    assert len(str(refused.value).splitlines()) == 1


def test_what_yaml_allows_is_read(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "title: 2024-01-01\ndata: &d somewhere\nvariants:\n  self: &own {settings: {text_lr: 1e-4, compile: 'no'}}\n"
        "  late: {<<: *own, base: self}\n  sparse:\n  '1': {settings: {model: {design: cross}}}\nseeds: ['3']\n"
    )
    plan = read_plan(path)
    configs = {trial.variant: trial.config for trial in trials_of(plan, Path("study"))}
    assert plan.seeds == [3]
    assert (plan.title, configs["late"].text_lr, configs["late"].init) == ("2024-01-01", 1e-4, "study/cells/self-3")
    assert configs["1"].model.design == "cross"
    assert configs["sparse"].text_lr == RunConfig().text_lr


def test_a_control_is_a_variant_again_and_says_so(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("data: x\nvariants:\n  self: {}\n  again: {same_as: self, settings: {model: {design: self}}}\n")
    plan = read_plan(path)
    first, second = (cell.config for cell in trials_of(plan, Path("study"))[:2])
    assert first == replace(second, out=first.out)
    path.write_text(plan_text(plan))
    assert read_plan(path) == plan


WORDS = st.one_of(
    st.from_regex(r"[-+0-9.:eEo]{1,6}", fullmatch=True),
    st.sampled_from(
        [
            "yes",
            "No",
            "ON",
            "off",
            "y",
            "true",
            "False",
            "null",
            "~",
            "010",
            "1:30",
            "-1:30",
            "0o17",
            "1_000",
            "007",
            "1e1",
            "12e4567",
            "2024-01-01",
        ]
    ),
)


def means(word: str, kind: type) -> Any:
    """What a setting of a kind is by a word; None where the word is none of that kind."""
    if kind is bool:
        return {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}.get(word.lower())
    try:
        return kind(word)
    except ValueError:
        return None


def test_a_flag_is_no_time_of_day_and_a_folder_may_be(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for flag in ("--batch", "--model.width"):
        for value in ([flag, "1:30"], [f"{flag}=1:30"]):
            assert main(["train", "data", *value]) == 1
            assert f"{flag}: 1:30 is no number" in capsys.readouterr().err
    assert main(["train", "12:30", "--out", "12:31"]) == 1
    assert "is no number" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def run_settings() -> Any:
    """What `train` makes of a file of settings."""
    parser = train_parser()

    def read(path: Path) -> RunConfig:
        given = parser.parse_args(["--config", str(path)])
        return RunConfig(**{name: value for name, value in given.as_dict().items() if name in vars(RunConfig())})

    return read


@pytest.mark.parametrize("of", ["plan", "train"])
@given(word=WORDS)
@example(word="010")
@example(word="off")
@example(word="1:30")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_user_has_written_is_what_they_get_or_it_is_refused(tmp_path, capsys, run_settings, of, word):
    """As a text, as numbers, and as a boolean; in a plan and in a run's settings."""
    path = tmp_path / "settings.yaml"
    for key, kind in {"cache": str, "batch": int, "head_lr": float, "compile": bool}.items():
        path.write_text(f"variants: [self]\nsettings:\n  {key}: {word}\n" if of == "plan" else f"{key}: {word}\n")
        taken: RunConfig | None = None
        with suppress(ValueError, SystemExit):
            if of == "plan":
                taken = trials_of(replace(read_plan(path), data="x"), Path("study"))[0].config
            else:
                taken = run_settings(path)
        usual = {str: word == "off", int: word == "010", bool: word in ("off", "yes", "ON")}
        assert taken is not None or not usual.get(kind), (key, word)
        assert taken is None or getattr(taken, key) == means(word, kind), (key, word)


@pytest.mark.parametrize("name", list(ready_plans()))
def test_a_plan_in_a_studys_folder_is_the_plan(tmp_path, name):
    plan = replace(read_plan(name), data="data")
    (tmp_path / "plan.yaml").write_text(plan_text(plan))
    assert read_plan(tmp_path / "plan.yaml") == plan


# --- any plan ----------------------------------------------------------------------------------------------------------


def leaves(kind: type, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The settings of a dataclass, by their keys."""
    keys = []
    for each in fields(kind):
        value = getattr(kind(), each.name)
        key = (*prefix, each.name)
        keys += leaves(type(value), key) if is_dataclass(value) else [key]
    return keys


SETTINGS = leaves(RunConfig)
OWN = {
    "data", "out", "seed", "init", "layout", "group", "identity", "captions", "profile", "compile", "overwrite",
}  # fmt: skip
#: Values of settings, most of which fit some setting.
VALUES = st.one_of(
    st.integers(0, 4), st.sampled_from([0.5, 0.0, 1, 64, "none", "both", "all", "image", "rsum", "loss", "off", "lora"]),
    st.sampled_from([*DESIGNS, "1e-3", "7", "float32", True, False, None, [], ["x"], {}, -1, 2.5, "yes"]),
)  # fmt: skip


def fitting(key: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """Values that a setting takes: its default, and others."""
    usual: Any = RunConfig()
    for part in key:
        usual = getattr(usual, part)
    if isinstance(usual, bool):
        return st.booleans()
    if isinstance(usual, int):
        return st.integers(2, 9)
    if isinstance(usual, float):
        return st.sampled_from([0.5, 0.25, 0.125, "1e-3"])
    return st.just(usual)


#: Of settings whose kind does not tell what they take.
OTHER = {
    "freeze": "both", "peft": "lora", "augment": "none", "best_by": "loss", "precision": "float32", "identity": "none",
    "design": "late", "freeze_layers": ["image_tower.*"], "profile": 1, "warmup": 0.5, "ema": 0.5, "cache": "off",
    "device": "cpu", "layout": "folders", "trackers": "mlflow", "dev_data": "elsewhere", "init": "elsewhere",
}  # fmt: skip


@pytest.mark.parametrize("key", [key for key in SETTINGS if len(key) == 1 or "image_tower" in key], ids=".".join)
def test_a_setting_of_a_plan_finds_its_own_run_again_or_is_refused_before_it_is_trained(tmp_path, monkeypatch, key):
    """Whatever of it a run records: `overwrite` is recorded as false."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    usual: Any = RunConfig()
    for part in key:
        usual = getattr(usual, part)
    value = OTHER.get(key[-1], not usual if isinstance(usual, bool) else 2 if isinstance(usual, int) else
                      0.5 if isinstance(usual, float) else "elsewhere")  # fmt: skip
    given: Any = value
    for part in reversed(key):
        given = {part: given}
    plan_as_given = {"data": "x", "split": "test", "seeds": [0], "variants": {"late": {}}, "settings": given}
    Path("plan.yaml").write_text(yaml.safe_dump(plan_as_given))
    try:
        plan = read_plan("plan.yaml")
    except ValueError as error:
        message = str(error)
        assert f"settings.{'.'.join(key)}: " in message
        return
    (cell,) = trials_of(plan, Path("study"))
    cell.folder.mkdir(parents=True)
    _write_settings(cell.folder / "config.yaml", cell.config)
    refuse_other_settings(cell)


@st.composite
def some_settings(draw: Any, wrong: bool) -> dict[str, Any]:
    drawn_settings: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(SETTINGS), max_size=4, unique=True)):
        if (key[0] in OWN or key[-1] == "design") and not wrong:
            continue
        inside = drawn_settings
        for part in key[:-1]:
            inside = inside.setdefault(part, {})
        inside[key[-1]] = draw(VALUES if wrong else fitting(key))
    if wrong and draw(st.booleans()):
        drawn_settings.setdefault("model", {})["design"] = draw(st.sampled_from(DESIGNS))
    if wrong and draw(st.booleans()):
        drawn_settings[draw(st.sampled_from(["epoch", "mdel", "x"]))] = 1
    return drawn_settings


@st.composite
def plans(draw: Any) -> dict[str, Any]:
    """What a plan's YAML holds: half of them plans that can be carried out, half not quite."""
    wrong = draw(st.booleans())
    known = [*DESIGNS, "a", "late-64", "cross_b", *(["x y"] if wrong else [])]
    names = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    variants: Any = {}
    for name in names:
        own = {"settings": draw(some_settings(wrong))} if name not in DESIGNS or draw(st.booleans()) else {}
        if name not in DESIGNS and not wrong:
            promised = [design for design in DESIGNS if name.startswith(design)]
            own["settings"].setdefault("model", {})["design"] = draw(st.sampled_from(promised or DESIGNS))
        if draw(st.integers(0, 4)) == 0:
            own["base"] = draw(st.sampled_from([*names, "gone"] if wrong else ["", *variants]))
        variants[name] = own
    plan: dict[str, Any] = {"data": "somewhere", "variants": variants}
    if draw(st.booleans()):
        plan["settings"] = draw(some_settings(wrong))
    if draw(st.booleans()):
        seeds = st.integers(-1 if wrong else 0, 3)
        plan["seeds"] = draw(st.lists(seeds, min_size=0 if wrong else 1, max_size=3, unique=not wrong))
    if wrong and draw(st.booleans()):
        key = draw(st.sampled_from(["variants", "settings", "measure", "budget", "seeds", "sedes", "title", "compare"]))
        plan[key] = draw(st.one_of(VALUES, st.sampled_from([{"a": "self"}, {"same": "seconds"}, {"rounds": 1}])))
    return plan


def as_written(plan: dict[str, Any], name: str) -> dict[tuple[str, ...], Any]:
    """Every setting that the plan gives to a variant, by its key: its own before the plan's."""
    by_key: dict[tuple[str, ...], Any] = {}

    def add(values: Any, key: tuple[str, ...]) -> None:
        for part, value in values.items():
            if isinstance(value, dict):
                add(value, (*key, part))
            else:
                by_key[*key, part] = value

    variants = plan.get("variants", {})
    own = variants.get(name) if isinstance(variants, dict) else {}
    for values in (plan.get("settings", {}), (own or {}).get("settings", {})):
        add(values, ())
    return by_key


@given(plan=plans(), style=st.booleans())
@example(plan={"data": "x", "settings": {"model": {"design": "self"}}}, style=False)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_plan_is_trained_as_written_or_refused_with_key_and_place(tmp_path, capsys, plan, style):
    path, out = tmp_path / "plan.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(plan, sort_keys=False, default_flow_style=style))
    try:
        read = read_plan(path)
    except ValueError as error:
        message = str(error)
        refused(message, path, plan)
        capsys.readouterr()
        assert main(["study", str(path), "--out", str(out)]) == 1
        assert capsys.readouterr().err.strip() == f"clipvisionalign: error: {message}"
        assert [each.name for each in tmp_path.iterdir()] == ["plan.yaml"]
        return
    trials = trials_of(read, Path("study"))
    seeds = plan.get("seeds", Plan().seeds)
    names = list(plan.get("variants", Plan().variants))
    assert {(trial.variant, trial.seed) for trial in trials} == {(name, seed) for name in names for seed in seeds}
    for trial in trials:
        asked, usual = as_written(plan, trial.variant), asdict(RunConfig())
        name_parts = trial.variant.replace("_", "-").split("-")
        if trial.variant in DESIGNS:
            asked.setdefault(("model", "design"), trial.variant)
        for key in SETTINGS:
            value, default = asdict(trial.config), usual
            for part in key:
                value, default = value[part], default[part]
            if key in asked:
                given_as = asked[key]
                assert value == given_as or str(value) == str(given_as) or float(value) == float(given_as), key
            elif key[0] not in {"data", "out", "seed", "init", "cache", "trackers"}:
                assert value == default, key
        # A name promises its design.
        assert name_parts[0] not in DESIGNS or trial.config.model.design in name_parts
        assert trial.config.seed == trial.seed


def refused(message: str, path: Path, plan: dict[str, Any]) -> None:
    """Each line names the file, a line of it, and a key that stands there, or one that a missing one belongs under."""
    lines = path.read_text().splitlines()
    for each in message.splitlines():
        match = LINE.fullmatch(each)
        assert match is not None, each
        assert match["file"] == str(path)
        parts = re.findall(r"[^.\[\]]+", match["key"])
        there: Any = plan
        shown = None
        for part in parts:
            if isinstance(there, dict) and part in there:
                there, shown = there[part], part
            elif isinstance(there, list) and part.isdigit() and int(part) < len(there):
                there = there[int(part)]
                shown = (
                    yaml.safe_dump(there, default_flow_style=True).split("\n")[0]
                    if not isinstance(there, dict | list)
                    else None
                )
            else:
                break
        if shown is not None:
            assert shown.strip("'\"") in lines[int(match["line"]) - 1], each
