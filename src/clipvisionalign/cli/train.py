"""The command train: settings from files and flags to a run folder."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from clipvisionalign.cli.output import print_metrics
from clipvisionalign.cli.parser import OFFLINE, OFFLINE_HELP, PROGRAM, add_output_flags, exit_with_usage_error
from clipvisionalign.counts import count_noun
from clipvisionalign.log import is_main_process, log_to

logger = logging.getLogger(__name__)

#: Flags of lists of names.
_LIST_FLAGS = ("--freeze_layers", "--freeze_layers+")


def train(arguments: list[str]) -> int:
    """Train a run, or resume one; prints the metrics, or with --profile where the time goes.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.recipes import recipe_file
    from clipvisionalign.training.train import resume
    from clipvisionalign.training.train import train as train_run

    parser = train_parser()
    hint = _ResumeHint()
    _refuse_clocks(arguments, _numbers(RunConfig()))
    arguments = _data_as_flag(arguments, parser._option_string_actions)
    arguments = _as_lists(_order_settings_arguments(arguments, recipe_file))
    args = parser.parse_args([*_inherited_settings(parser, arguments), *arguments])
    settings = parser.instantiate_classes(args).as_dict()
    if settings.pop("recipe") is not None:
        raise ValueError("a file of settings names no 'recipe': give --recipe on the command line")
    if settings.pop("offline") and OFFLINE not in arguments:
        raise ValueError(f"'offline' in a file of settings comes too late: give {OFFLINE}, or set HF_HUB_OFFLINE=1")
    for flag in ("config", "quiet", "verbose"):
        settings.pop(flag, None)
    resumed_run = settings.pop("resume")
    if resumed_run is not None and len([each for each in arguments if each != OFFLINE]) > 2:
        raise ValueError(f"--resume {resumed_run} resumes with the settings of that run; it takes no others")
    if resumed_run is None:
        _refuse_beside_stages(settings["stages"], arguments)
        _refuse_overridden(arguments, settings["model"])
        _refuse_absent(settings["data"])
    if settings["profile"]:
        with tempfile.TemporaryDirectory() as folder:
            settings |= {"out": str(Path(folder) / "profile"), "overwrite": False}
            profile = train_run(RunConfig(**settings))
        if is_main_process():
            print_profile(profile)
        return 0
    with hint.shown_for(settings["out"] if resumed_run is None else resumed_run):
        results = resume(resumed_run) if resumed_run is not None else train_run(RunConfig(**settings))
    if not is_main_process():
        return 0
    print_metrics(results)
    if "chosen" in results:
        print(f"{results['chosen']['figures']} (results.json, 'chosen')")
    print(f"the run is in {results['run']}; next: {PROGRAM} audit {results['run']}")
    return 0


def _data_as_flag(arguments: Sequence[str], actions: Mapping[str, Any]) -> list[str]:
    """`train DATA` is `train --data DATA`, wherever among the settings DATA stands."""
    if any(argument.partition("=")[0] == "--data" for argument in arguments):
        return list(arguments)
    follows_flag = False
    for number, argument in enumerate(arguments):
        flag, is_assigned, _ = argument.partition("=")
        if follows_flag and flag not in actions:
            follows_flag = False
        elif argument.startswith("-"):
            # Of a flag that there is not nobody knows whether a value follows.
            follows_flag = not is_assigned and (flag not in actions or actions[flag].nargs != 0)
        else:
            return ["--data", argument, *arguments[:number], *arguments[number + 1 :]]
    return list(arguments)


def _names(value: str) -> list[str]:
    """The names of a list, in brackets or without; one with a class of letters, such as layer.[01].*, is alone."""
    with suppress(ValueError):
        names = json.loads(value)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    inner = value.strip().removeprefix("[").removesuffix("]") if re.fullmatch(r"\[[^][]*\]", value.strip()) else value
    names = [inner] if "[" in inner else inner.split(",")
    return [name for each in names if (name := each.strip().strip("'\""))]


def _as_lists(arguments: Sequence[str]) -> list[str]:
    """Names of a flag that takes a list, one or with commas between them, as the list that the parser reads: in YAML a
    name that begins with * is an alias."""
    listed = list(arguments)
    for number, argument in enumerate(arguments):
        flag, is_assigned, value = argument.partition("=")
        if flag not in _LIST_FLAGS or (not is_assigned and number + 1 == len(arguments)):
            continue
        value = value if is_assigned else arguments[number + 1]
        if value.startswith("--"):
            continue
        text = json.dumps(_names(value))
        if is_assigned:
            listed[number] = f"{flag}={text}"
        else:
            listed[number + 1] = text
    return listed


def print_profile(results: dict[str, Any]) -> None:
    """Print the milliseconds of a step's parts and their shares.

    Args:
        results: As `train --profile` returns them.
    """
    from rich.console import Console
    from rich.table import Table

    steps, images, seconds = results["steps"], results["images"], results["profile"]
    total = sum(seconds.values())
    title = f"{count_noun(steps, 'step')}, {count_noun(images, 'image')}, {images / total:.1f} images a second"
    table = Table(title=title, title_justify="left")
    for column in ("where the time goes", "ms a step", "share"):
        table.add_column(column, justify="left" if column.startswith("where") else "right")
    for kind, elapsed in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{1000 * elapsed / steps:.1f}", f"{100 * elapsed / total:.1f} %")
    Console().print(table)
    if results["loading"]:
        loading_text = ", ".join(
            f"{kind} {1000 * elapsed / steps:.1f} ms" for kind, elapsed in results["loading"].items()
        )
        print(f"in the loader, beside it where there are workers: {loading_text} a step")
    print(f"before the first step: tokenise {results['tokenise']:.2f} s, once")


def train_parser() -> Any:
    """What reads the settings of a run: from files (--config) and flags."""
    import yaml
    from jsonargparse import ArgumentParser, set_loader

    from clipvisionalign.training.config import SECTIONS, RunConfig
    from clipvisionalign.training.recipes import recipes

    known = "; ".join(f"{name}: {words}" for name, words in recipes().items())
    numbers = _numbers(RunConfig())
    for name, section in SECTIONS.items():
        numbers += _numbers(section(), f"{name}.")
    set_loader("plain_yaml", partial(_load_settings, numbers=numbers), (yaml.YAMLError,))

    class TrainParser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            words = message.removeprefix("unrecognized arguments: ")
            if words != message and not words.startswith("-"):
                message += "; one data set is given, before or among the settings"
            exit_with_usage_error(self, message)

    parser = TrainParser(
        parser_mode="plain_yaml",
        prog=f"{PROGRAM} train",
        usage=f"{PROGRAM} train DATA --out RUN [settings]\n       {PROGRAM} train DATA --recipe NAME [settings]\n"
        f"       {PROGRAM} train --resume RUN",
        description="Train an aligner and leave a complete run folder. Settings come from a recipe (--recipe), from a "
        "YAML file (--config) and from flags, the latter of these counting more; the run folder's own config.yaml "
        "repeats a run. A run that was stopped, by Ctrl-C, a kill or a full disk, resumes with --resume and ends as "
        "if nothing had been. --model.pretrained NAME starts from a pretrained dual encoder, such as "
        "openai/clip-vit-base-patch32, in the place of two towers.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help=f"settings by name. {known}")
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)
    for section in SECTIONS.values():
        parser.add_class_arguments(section)
    parser.add_class_arguments(RunConfig, skip={each.name for kind in SECTIONS.values() for each in fields(kind)})
    parser.add_argument("--resume", help="a run that was stopped: resumes from its last checkpoint, with its settings")
    add_output_flags(parser)
    return parser


def _load_settings(text: str, numbers: list[str]) -> Any:
    """What a file of settings holds, without its sections.

    numbers: the settings that are numbers, with and without their section. Raises ValueError for what would be misread,
    or is misplaced.
    """
    from clipvisionalign.models.aligner_config import read_recorded_settings
    from clipvisionalign.plain_yaml import load_settings
    from clipvisionalign.training.config import flatten_sections

    settings = load_settings(text, numbers)
    if not isinstance(settings, dict):
        return settings
    flat = flatten_sections(settings)
    return flat | {"model": read_recorded_settings(flat["model"])} if "model" in flat else flat


def _inherited_settings(parser: Any, arguments: list[str]) -> list[str]:
    """The model of the run of --init as a first file of settings, so that it need not be given again.

    All that is given counts more. Beside another pretrained model that is given, nothing is taken.
    """
    if not any(argument.partition("=")[0] in ("--init", "--config") for argument in arguments):
        return []
    import json

    from clipvisionalign.training.init_run import model_settings_of

    given = parser.parse_args(arguments, defaults=False)
    model = model_settings_of(given.init) if given.get("init") and not given.get("model.pretrained") else {}
    if not model:
        return []
    logger.info(f"--init {given.init}: the settings of its model are taken where none are given")
    return ["--config", json.dumps({"model": model})]


def _refuse_beside_stages(stages: str, arguments: list[str]) -> None:
    """Raises ValueError for flags beside --stages that each stage has of its own, their defaults too."""
    flags = [
        flag for flag in ("--epochs", "--freeze", "--steps") if flag in {each.partition("=")[0] for each in arguments}
    ]
    if stages and flags:
        raise ValueError(f"--stages {stages} gives each stage its own {', '.join(flags)}: leave out one or the other")


def _refuse_overridden(arguments: list[str], model: Any) -> None:
    """Raises ValueError for a flag of a setting that a pretrained model has its own of, be it given its default."""
    from clipvisionalign.models.aligner_config import counts_beside_pretrained
    from clipvisionalign.training.config_checks import overridden_message

    for argument in arguments if model.pretrained else ():
        setting = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--model.") and not counts_beside_pretrained(setting.removeprefix("model.")):
            raise ValueError(overridden_message(setting))


def _refuse_absent(data: str) -> None:
    """Raises DataError where there is no such data set, which is found out before anything about the run folder."""
    from clipvisionalign.data.formats import detect_layout

    if data and not Path(data).exists():
        detect_layout(data)


class _ResumeHint:
    """Prints how a run is resumed where it is interrupted and training itself has not printed it, as in the last
    measurement."""

    def __init__(self) -> None:
        self.is_shown = False

    def _listen(self, line: str) -> None:
        self.is_shown = self.is_shown or "train --resume" in line
        logger.info(line)

    @contextmanager
    def shown_for(self, run: str) -> Iterator[None]:
        """Print the hint for a KeyboardInterrupt of what is done within, which is raised again."""
        try:
            with log_to(self._listen):
                yield
        except KeyboardInterrupt:
            is_begun = any((Path(run) / name).exists() for name in ("config.yaml", "stages"))
            unfinished = is_begun and not (Path(run) / "results.json").is_file()
            if unfinished and not self.is_shown and is_main_process():
                logger.info(f"{run}: interrupted; resume it with: {PROGRAM} train --resume {run}")
            raise


def _numbers(settings: Any, prefix: str = "") -> list[str]:
    """The settings that are numbers, by their names with dots."""
    names = [f"{prefix}{each.name}" for each in fields(settings) if each.type in ("int | None", "float | None")]
    for name, value in vars(settings).items():
        if is_dataclass(value):
            names += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            names.append(f"{prefix}{name}")
    return names


def _refuse_clocks(arguments: list[str], numbers: list[str]) -> None:
    """Raises ValueError for flags such as --batch 1:30, which jsonargparse would read as YAML 1.1 does: as 90."""
    from clipvisionalign.plain_yaml import is_clock

    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        if flag.removeprefix("--") in numbers and is_clock(value):
            raise ValueError(f"{flag}: {value} is no number")


def _order_settings_arguments(arguments: list[str], recipe_file: Callable[[str], Path]) -> list[str]:
    """A recipe as the first file of settings, then the files given, then the flags: what stands later counts more."""
    recipes: list[str] = []
    files: list[str] = []
    flags: list[str] = []
    remaining = list(arguments)
    while remaining:
        flag, equals, value = remaining.pop(0).partition("=")
        if flag not in ("--recipe", "--config"):
            flags.append(f"{flag}{equals}{value}")
            continue
        if not equals:
            if not remaining:
                raise ValueError(f"{flag}: {'the name of a recipe' if flag == '--recipe' else 'a file'} should follow")
            value = remaining.pop(0)
        (recipes if flag == "--recipe" else files).append(value)
    recipe_files = [str(recipe_file(name)) for name in recipes]
    return [argument for path in [*recipe_files, *files] for argument in ("--config", path)] + flags
