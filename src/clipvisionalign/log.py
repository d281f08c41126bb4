"""Log messages: which process shows them, and where.

Every module logs to `logging.getLogger(__name__)`, with INFO what a user may want to read, with WARNING what needs
attention. This module decides what becomes of that:

- Under a launcher only the main process shows messages.
- The command line shows them on standard error, unless `--quiet` is given.
- In a program that has configured `logging` they go to its handlers; in any other they are printed, as by `print`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

#: Takes one line.
Log = Callable[[str], None]

#: Name of the logger above those of all modules.
ROOT = "clipvisionalign"


def is_main_process() -> bool:
    """Whether this is the main process of those that a launcher started, or the only one."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


class RankFilter(logging.Filter):
    """Lets records of the main process pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is one of the main process.

        Args:
            record: A record.

        Returns:
            Whether it is.
        """
        return is_main_process()


class ConsoleHandler(logging.Handler):
    """Shows records as lines, by rich; or passes them to a function, see `log_to`.

    Attributes:
        listeners: functions that take the lines instead, the innermost last.
        is_command_line: whether this process is the command line, which shows records whatever else is configured.
        is_quiet: whether nothing is shown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Log] = []
        self.is_command_line = self.is_quiet = False
        self._rich_handler: logging.Handler | None = None
        self.addFilter(RankFilter())
        self.setFormatter(_LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, or pass it on.

        Args:
            record: A record.
        """
        if self.listeners:
            listener = self.listeners.pop()
            try:
                # What the listener logs itself goes to the one around it.
                listener(self.format(record))
            finally:
                self.listeners.append(listener)
        elif not self.is_quiet and (self.is_command_line or not logging.getLogger().handlers):
            self._show(record)

    def _show(self, record: logging.LogRecord) -> None:
        if self._rich_handler is None:
            self._rich_handler = _rich_handler(self)
        self._rich_handler.emit(record)


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return f"warning: {line}" if record.levelno >= logging.WARNING else line


def _rich_handler(handler: ConsoleHandler) -> logging.Handler:
    from rich.console import Console, ConsoleRenderable
    from rich.logging import RichHandler
    from rich.text import Text

    class LineHandler(RichHandler):
        """A line a record, and no columns: a command in it can be copied, however long it is."""

        def emit(self, record: logging.LogRecord) -> None:
            # Looked up each time: the streams of a process may be replaced.
            self.console.file = sys.stderr if handler.is_command_line else sys.stdout
            super().emit(record)

        def render_message(self, record: logging.LogRecord, message: str) -> ConsoleRenderable:
            return Text(message)

        def render(
            self, *, record: logging.LogRecord, traceback: Any, message_renderable: ConsoleRenderable
        ) -> ConsoleRenderable:
            return message_renderable

    lines = LineHandler(console=Console(soft_wrap=True))
    lines.setFormatter(handler.formatter)
    return lines


_handler = ConsoleHandler()
_logger = logging.getLogger(ROOT)
_logger.addHandler(_handler)
if _logger.level == logging.NOTSET:
    _logger.setLevel(logging.INFO)


def configure_command_line(is_quiet: bool = False, is_verbose: bool = False) -> None:
    """Show messages as the command line does: on standard error.

    Args:
        is_quiet: show none.
        is_verbose: also show those of other libraries, with time and logger.
    """
    _handler.is_command_line, _handler.is_quiet = True, is_quiet
    # A library that calls `logging.warning` gives the root logger a handler, which would show each message once more.
    _logger.propagate = False
    if is_verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")


@contextmanager
def restored_log() -> Iterator[None]:
    """Show messages after this as before it, whatever `configure_command_line` is told within.

    A program may call a command and continue.
    """
    before = _handler.is_command_line, _handler.is_quiet, _logger.propagate
    try:
        yield
    finally:
        _handler.is_command_line, _handler.is_quiet, _logger.propagate = before


@contextmanager
def log_to(listener: Log) -> Iterator[None]:
    """Pass messages of this package to a function, a line each, instead of showing them.

    Args:
        listener: takes a line. What it logs itself is shown, or passed to the function of a `log_to` around this one.

    Yields:
        Nothing.

    >>> lines = []
    >>> with log_to(lines.append):
    ...     logging.getLogger("clipvisionalign.training").warning("no room")
    >>> lines
    ['warning: no room']
    """
    with _locked():
        _handler.listeners.append(listener)
    try:
        yield
    finally:
        with _locked():
            _handler.listeners.remove(listener)


@contextmanager
def leave_out(is_left_out: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Neither show nor pass to a `log_to` the messages that a function selects; other handlers still receive them.

    Args:
        is_left_out: whether a record is left out.

    Yields:
        Nothing.

    >>> lines = []
    >>> with log_to(lines.append), leave_out(lambda record: record.name.endswith("training")):
    ...     logging.getLogger("clipvisionalign.training").info("epoch 1")
    ...     logging.getLogger("clipvisionalign.study").info("cell 1")
    >>> lines
    ['cell 1']
    """

    def passes(record: logging.LogRecord) -> bool:
        return not is_left_out(record)

    with _locked():
        _handler.addFilter(passes)
    try:
        yield
    finally:
        with _locked():
            _handler.removeFilter(passes)


@contextmanager
def _locked() -> Iterator[None]:
    """While no record is shown, or passed to a listener."""
    _handler.acquire()
    try:
        yield
    finally:
        _handler.release()


def deprecated_say(say: Log | None, stacklevel: int = 3) -> AbstractContextManager[None]:
    """The context of a function that still takes `say`, which prints a line; for one release.

    Args:
        say: what the caller gave; None for nothing.
        stacklevel: as `warnings.warn` takes it, so that the warning names the caller.

    Returns:
        A context in which `say` takes the lines that are logged.
    """
    if say is None:
        return nullcontext()
    message = "say is deprecated and will be removed in the next release: use logging, or clipvisionalign.log.log_to"
    warnings.warn(message, DeprecationWarning, stacklevel)
    return log_to(say)
