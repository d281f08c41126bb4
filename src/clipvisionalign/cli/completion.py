"""The command completion."""

from __future__ import annotations

import argparse

from clipvisionalign.cli.parser import PROGRAM, command_parser

SHELLS = ("bash", "zsh", "tcsh")


def completion_parser() -> argparse.ArgumentParser:
    """The parser of `completion`."""
    parser = command_parser(
        "completion",
        description="Print a script by which a shell completes commands, flags and choices.",
        epilog="examples:\n"
        f"  {PROGRAM} completion bash > ~/.local/share/bash-completion/completions/{PROGRAM}\n"
        f"  {PROGRAM} completion zsh > ~/.zfunc/_{PROGRAM}    # a folder of $fpath",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell to print a script for")
    return parser


def completion_script(shell: str, commands: dict[str, tuple[str, argparse.ArgumentParser]]) -> str:
    """The script of a shell.

    Args:
        shell: one of `SHELLS`.
        commands: by name, the help of each command and its parser.

    Returns:
        The text of the script.
    """
    import shtab

    parser = argparse.ArgumentParser(PROGRAM)
    subparsers = parser.add_subparsers()
    for name, (summary, own) in commands.items():
        command = subparsers.add_parser(name, help=summary, parents=[own], add_help=False, conflict_handler="resolve")
        command.prog = f"{PROGRAM} {name}"
    return str(shtab.complete(parser, shell))
