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
    "run folder that 'train' wrote, 'starter' for the starter model, or a pretrained dual encoder (CLIP, SigLIP, ...): "
    "its folder or hub name, such as openai/clip-vit-base-patch32"
)

#: Flags of every command.
QUIET, VERBOSE = "--quiet", "--verbose"
QUIET_HELP = "print the result and errors only: no notes, no progress"
VERBOSE_HELP = "print log messages, and with an error where in the code it was raised"


def add_offline_flag(parser: argparse.ArgumentParser) -> None:
    """Add --offline, for a command that may need a model's weights."""
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)


def command_parser(name: str, **options: Any) -> argparse.ArgumentParser:
    """A command's parser, with the flags that all commands share; options: those of `argparse.ArgumentParser`."""
    kind = argparse.RawDescriptionHelpFormatter
    # A shortened flag would pass by what looks for the whole word, such as --offline before anything is imported.
    parser = CommandParser(f"{PROGRAM} {name}", formatter_class=kind, allow_abbrev=False, **options)
    add_output_flags(parser)
    return parser


class CommandParser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, with the nearest flag or choice."""

    def error(self, message: str) -> NoReturn:
        """Print a usage error and exit with status 2."""
        exit_with_usage_error(self, message)


def add_output_flags(parser: Any) -> None:
    """Add the flags that set how much is printed, which every command has and `main` reads."""
    group = parser.add_argument_group("how much is printed")
    group.add_argument(QUIET, action="store_true", help=QUIET_HELP)
    group.add_argument(VERBOSE, action="store_true", help=VERBOSE_HELP)


def exit_with_usage_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Print a usage error with what the user may have meant, and where help is; exits with status 2."""
    suggestion = suggest(message, parser._option_string_actions)
    print(f"{parser.prog}: error: {message}{suggestion}", file=sys.stderr)
    print(f"see '{parser.prog} --help'", file=sys.stderr)
    sys.exit(2)


def suggest(message: str, flags: Iterable[str]) -> str:
    """The names nearest to the unknown ones of a usage error, or "".

    Args:
        message: as argparse or jsonargparse has it.
        flags: what the parser takes, such as "--count".

    >>> suggest("unrecognized arguments: --cuont 3", ["--count", "--minus"])
    "; did you mean '--count'?"
    >>> suggest("argument COMMAND: invalid choice: 'sarch' (choose from 'search', 'serve')", [])
    "; did you mean 'search'?"
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
    nearest = [each for word in words for each in difflib.get_close_matches(word, known, n=1, cutoff=0.6)]
    return f"; did you mean {' '.join(repr(each) for each in nearest)}?" if nearest else ""
