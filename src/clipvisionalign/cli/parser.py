"""What all parsers share: the program's name, the layout of help, common flags, and usage errors that name the nearest
flag or choice."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

PROGRAM = "clipvisionalign"

#: Takes towers' weights from the cache alone; set before anything is imported that might ask the hub.
OFFLINE = "--offline"
OFFLINE_HELP = "never ask the hub for weights: what is not on this machine is an error (as HF_HUB_OFFLINE=1)"

#: What stands for a model.
MODEL_HELP = (
    "run folder that 'train' wrote, or the hub name of one that 'export --huggingface' wrote; 'starter' for the "
    "starter model; or a pretrained dual encoder (CLIP, SigLIP, ...): its folder or hub name, such as "
    "openai/clip-vit-base-patch32"
)

#: Flags of every command.
QUIET, VERBOSE = "--quiet", "--verbose"
QUIET_HELP = "print the result and errors only: no notes, no progress"
VERBOSE_HELP = "print log messages, and with an error where in the code it was raised"


def add_offline_flag(parser: argparse.ArgumentParser) -> None:
    """Add --offline, for a command that may need a model's weights.

    Args:
        parser: Of the command.
    """
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)


def command_parser(name: str, **options: Any) -> argparse.ArgumentParser:
    """A command's parser, with the flags that all commands share.

    Args:
        name: The command.
        **options: Those of `argparse.ArgumentParser`.

    Returns:
        The parser.
    """
    kind = argparse.RawDescriptionHelpFormatter
    # A shortened flag would pass by what looks for the whole word, such as --offline before anything is imported.
    parser = CommandParser(f"{PROGRAM} {name}", formatter_class=kind, allow_abbrev=False, **options)
    add_output_flags(parser)
    return parser


class CommandParser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, with the nearest flag or choice."""

    def error(self, message: str) -> NoReturn:
        """Print a usage error and exit with status 2.

        Args:
            message: As argparse has it.
        """
        exit_with_usage_error(self, message)


def add_output_flags(parser: Any) -> None:
    """Add the flags that set how much is printed, which every command has and `main` reads.

    Args:
        parser: Of a command.
    """
    group = parser.add_argument_group("how much is printed")
    group.add_argument(QUIET, action="store_true", help=QUIET_HELP)
    group.add_argument(VERBOSE, action="store_true", help=VERBOSE_HELP)


#: Flags of other programs, and the last words of ours that mean it.
_OTHER_NAMES = {
    "learning_rate": "lr", "wd": "weight_decay", "num_epochs": "epochs", "num_train_epochs": "epochs",
    "max_steps": "steps", "num_workers": "workers", "early_stopping": "patience", "output": "out", "output_dir": "out",
    "dtype": "precision", "pretrained_model": "pretrained", "model_name_or_path": "pretrained",
}  # fmt: skip

#: How the types of settings are called.
_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}


def exit_with_usage_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Print a usage error with what the user may have meant, and where help is; exits with status 2.

    Args:
        parser: What failed to parse.
        message: As argparse or jsonargparse has it.
    """
    suggestion = suggest(message, parser._option_string_actions)
    print(f"{parser.prog}: error: {_describe_bad_value(message, parser)}{suggestion}", file=sys.stderr)
    print(f"see '{parser.prog} --help'", file=sys.stderr)
    sys.exit(2)


def suggest(message: str, flags: Iterable[str]) -> str:
    """The names nearest to the unknown ones of a usage error.

    Args:
        message: as argparse or jsonargparse has it.
        flags: what the parser takes, such as "--count".

    Returns:
        The end of a message; "" for no name.

    >>> suggest("unrecognized arguments: --cuont 3", ["--count", "--minus"])
    "; did you mean '--count'?"
    >>> suggest("argument COMMAND: invalid choice: 'sarch' (choose from 'search', 'serve')", [])
    "; did you mean 'search'?"
    >>> suggest("unrecognized arguments: --lr 1e-4", ["--lora", "--text_lr", "--image_lr", "--head_lr"])
    "; did you mean '--text_lr', '--image_lr' or '--head_lr'?"
    >>> suggest("unrecognized arguments: -dog", ["--count", "--minus"])
    '; words to avoid stand behind --minus, words that begin with a dash behind --'
    """
    known = list(flags)
    if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        words, known = [match[1]], re.findall(r"[^\s,']+", match[2])
    elif match := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE | re.DOTALL):
        words = [word.partition("=")[0] for word in match[1].split() if word.startswith("-")]
    elif match := re.search(r"Literal\[(.*?)\]. Got value: (.*)", message):
        words, known = [match[2]], re.findall(r"'([^']*)'", match[1])
    elif match := re.search(r"(?:Group '([^']+)' does not accept option|Key) '([^']+)'", message):
        prefix = f"--{match[1]}." if match[1] else "--"
        words, known = [match[2]], [flag.removeprefix(prefix) for flag in known if flag.startswith(prefix)]
    else:
        return ""
    nearest = [_alternatives(each) for word in words if (each := _nearest(word, known))]
    if not nearest and "--minus" in known and any(re.match(r"-[^\W\d]", word) for word in words):
        return "; words to avoid stand behind --minus, words that begin with a dash behind --"
    return f"; did you mean {' '.join(nearest)}?" if nearest else ""


def _alternatives(names: list[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)


def _nearest(word: str, known: list[str]) -> list[str]:
    """The names of which an unknown one is the last word, as --lr of --text_lr; else the one spelt most alike."""
    plain = word.lstrip("-").replace("-", "_").lower()
    plain = _OTHER_NAMES.get(plain, plain)
    same = [each for each in known if each.lstrip("-") == plain]
    ending = [each for each in known if each.endswith((f"_{plain}", f".{plain}"))]
    return same or ending[:4] or difflib.get_close_matches(word, known, n=1, cutoff=0.6)


def _describe_bad_value(message: str, parser: argparse.ArgumentParser) -> str:
    """jsonargparse's error about a value of another type, in one line with what the setting is; others as they are."""
    key = re.search(r'Parser key "([^"]+)":', message)
    value = re.search(r"(?:Got value|Given value): (.*)", message, re.DOTALL)
    union = re.search(r"Subtypes: \[(.*)\]", message)
    choices = re.search(r"Literal\[(.*?)\]", message)
    types = re.findall(r"<class '(\w+)'>", union[1] if union else message)
    kinds = [_KINDS[each] for each in types if each in _KINDS]
    if key is None or value is None or not (kinds or choices):
        return message
    action = parser._option_string_actions.get(f"--{key[1]}")
    meaning = re.sub(r"\s*\(type: .*", "", str(action.help or ""), flags=re.DOTALL) if action else ""
    meaning = " ".join(meaning.split()).partition(". ")[0].rstrip(".")
    expected = f"one of {choices[1]}" if choices else " or ".join(dict.fromkeys(kinds))
    return f"--{key[1]}: should be {expected}, not '{value[1].strip()}'{f': {meaning}' if meaning else ''}"
