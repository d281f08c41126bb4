"""The sections of a run's settings: each setting is in one, files may have them, and nothing recorded changes by them."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path

import pytest
import yaml

from clipvisionalign.cli import main
from clipvisionalign.cli.train import _data_as_flag, train_parser
from clipvisionalign.models.aligner_config import DEFAULT_WIDTH
from clipvisionalign.models.text_families import DEFAULT_MAX_TOKENS
from clipvisionalign.study.config import Plan, Variant, trials_of
from clipvisionalign.study.trial_checks import settings_hash
from clipvisionalign.training.config import SECTIONS, RunConfig, flatten_sections
from clipvisionalign.training.run_folder import _write_settings

#: Settings other than the defaults, as flags name them.
GIVEN = {
    "data": "captions", "augment": "crop", "epochs": 3, "batch": 16, "text_lr": 0.5, "ema": 0.5, "negatives": 2,
    "freeze": "both", "lora": {"rank": 2}, "out": "mine", "init": "before", "seed": 7, "device": "cpu",
    "model": {"design": "late"}, "loss": {"name": "sigmoid"},
}  # fmt: skip


def in_sections(settings: dict) -> dict:
    """The same settings, each in its section."""
    nested: dict = {}
    for name, value in settings.items():
        section = next((key for key, kind in SECTIONS.items() if name in {each.name for each in fields(kind)}), None)
        (nested if section is None else nested.setdefault(section, {}))[name] = value
    return nested


def read(path: Path) -> RunConfig:
    """The settings that `train --config` takes from a file."""
    parser = train_parser()
    given = parser.instantiate_classes(parser.parse_args(["--config", str(path)])).as_dict()
    return RunConfig(**{each.name: given[each.name] for each in fields(RunConfig)})


def test_each_setting_is_in_one_section_and_has_one_value():
    names = [each.name for kind in SECTIONS.values() for each in fields(kind)]
    assert sorted([*names, "model", "loss"]) == sorted(each.name for each in fields(RunConfig))
    assert len(set(names)) == len(names)
    config = RunConfig(epochs=3)
    for section, kind in SECTIONS.items():
        part = getattr(config, section)
        assert isinstance(part, kind)
        for each in fields(kind):
            setattr(part, each.name, value := object())
            assert getattr(config, each.name) is value


def test_the_data_set_stands_anywhere_among_the_settings():
    parser = train_parser()
    actions = parser._option_string_actions
    settings = [
        ["--quiet"],
        ["--seed", "-1"],
        ["--epochs", "3"],
        ["--text_lr=1e-4"],
        ["--config", "captions"],
        ["--offline"],
    ]
    for position in range(len(settings) + 1):
        arguments = [*chain(*settings[:position], ["captions"], *settings[position:])]
        assert _data_as_flag(arguments, actions) == ["--data", "captions", *chain(*settings)]
    for arguments in (
        ["--resume", "captions"], ["--epochs", "3"], [], ["--unknown", "captions"],
        # A word too many is an error, and no other data set.
        ["--data", "captions", "--epochs", "3", "4"], ["--data=captions", "--out", "run", "others"],
    ):  # fmt: skip
        assert _data_as_flag(arguments, actions) == arguments


def test_a_second_data_set_is_refused(capsys):
    for arguments in (["captions", "others", "--epochs", "3"], ["--data", "captions", "--epochs", "3", "others"]):
        with pytest.raises(SystemExit):
            main(["train", *arguments])
        assert "unrecognized arguments: others; one data set is given" in capsys.readouterr().err


def test_a_file_has_its_settings_in_sections_or_not(tmp_path):
    flat, nested, mixed = (tmp_path / f"{name}.yaml" for name in ("flat", "nested", "mixed"))
    sections = in_sections(GIVEN)
    assert set(sections) == {*SECTIONS, "model", "loss"}
    flat.write_text(yaml.safe_dump(GIVEN))
    nested.write_text(yaml.safe_dump(sections))
    mixed.write_text(yaml.safe_dump({**sections.pop("schedule"), **sections}))
    assert read(flat) == read(nested) == read(mixed) != RunConfig()
    # What a run records repeats it, and is read by versions without sections.
    config = read(nested)
    _write_settings(tmp_path / "config.yaml", config)
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    # A width and a limit of tokens that were not given are recorded as what they are.
    config = replace(config, model=config.model.resolved())
    assert recorded == asdict(config)
    assert not set(SECTIONS) & set(recorded)
    assert read(tmp_path / "config.yaml") == config
    assert flatten_sections(sections | in_sections(recorded)) == recorded


def test_the_file_in_the_documentation_is_read(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (tmp_path / "run.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    config = read(tmp_path / "run.yaml")
    assert (config.dataset.augment, config.schedule.batch, config.text_lr) == ("crop", 64, 5e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule: {text_lr: 0.1}", r"schedule\.text_lr: no such setting; 'schedule' has epochs, steps, "),
        ("epochs: 3\nschedule: {epochs: 4}", r"schedule\.epochs: is there twice"),
        ("schedule: 3", "schedule: should be settings with their values, not 3"),
        ("schedule: {epochs: 1:30}", r"schedule\.epochs: 1:30 is no number"),
        ("schedule: {epochs: }", r"schedule\.epochs: nothing stands there"),
    ],
)
def test_a_setting_that_is_misplaced_in_a_file_is_refused_by_its_key(tmp_path, text, message):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "settings.yaml")


def test_hashes_of_settings_are_those_that_studies_have_recorded(tmp_path, monkeypatch):
    """As budget.json of a study from before there were sections has them."""
    monkeypatch.chdir(tmp_path)
    settings = {"text_lr": 3e-4, "lora": {"rank": 2}, "model": {"late": {"width": 8}}}
    variants = {"self": Variant(), "late": Variant(settings=settings)}
    plan = Plan(scenes=40, seeds=[0], variants=variants, settings={"epochs": 2, "freeze": "both"})
    alone, late = trials_of(plan, Path("study"))
    assert settings_hash(alone) == "b990d08e271f2eaf76205985cf2c603a"
    assert settings_hash(late) == "95aa5e83d956a1fb440712480b091b31"
    for each in fields(RunConfig):
        if each.name not in ("seed", "out", "init", "steps", "epochs", "data", "cache", "dev_data", "model"):
            assert settings_hash(replace(late, config=replace(late.config, **{each.name: "?"}))) != settings_hash(late)

    def of_pretrained(**model) -> str:
        own = {"design": "self", "pretrained": "openai/clip-vit-base-patch32", **model}
        plan = Plan(scenes=40, seeds=[0], variants={"clip": Variant(settings={"model": own})})
        return settings_hash(trials_of(plan, Path("study"))[0])

    # From when a width and a limit of tokens stood beside every pretrained model.
    recorded = {
        "8a8201122e5983f2a0a49588d0f677ae": of_pretrained(),
        "f380b9f2f8303cf8fde07e280b9d93b5": of_pretrained(design="sparse", positions="stretched"),
        "0e9b11a49773a5937e543e45bcde6c9f": of_pretrained(text_tower={"max_tokens": 64}),
    }
    assert list(recorded) == list(recorded.values())
    given = [of_pretrained(width=width) for width in (128, DEFAULT_WIDTH)]
    given += [of_pretrained(text_tower={"max_tokens": limit}) for limit in (32, DEFAULT_MAX_TOKENS)]
    given += [of_pretrained(width=DEFAULT_WIDTH, text_tower={"max_tokens": DEFAULT_MAX_TOKENS})]
    assert len({*given, *recorded}) == len(given) + len(recorded)


def test_all_settings_of_python_make_a_file_of_settings(tmp_path, capsys):
    """Also those that are None: a program writes its settings as they are."""
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(asdict(RunConfig(data=str(tmp_path / "nothing"), out=str(tmp_path / "run")))))
    assert main(["train", "--config", str(file)]) == 1
    assert "no such file or folder" in capsys.readouterr().err
