"""The command line: one file for each group of commands; output.py prints.

Heavy libraries load when a command needs them, so that `--help` answers at once.
"""

from clipvisionalign.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
