"""Log messages: the first process shows them, on standard error for the command line; other programs get them by `logging`."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from clipvisionalign import log
from clipvisionalign.log import ConsoleHandler, deprecated_say, is_main_process, leave_out, log_to

logger = logging.getLogger("clipvisionalign.training.any")


@pytest.fixture
def handler(monkeypatch):
    """The handler of a process alone, whatever has been set in this one."""
    handler = ConsoleHandler()
    root = logging.getLogger("clipvisionalign")
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(root, "propagate", True)
    monkeypatch.setattr(log, "_handler", handler)
    return handler


def test_the_command_line_shows_a_message_as_one_line_on_standard_error(handler, capsys):
    handler.is_command_line = True
    long = "a command " * 40
    logger.info(f"{long}[bold]50 %[/bold]")
    logger.warning("no room")
    assert capsys.readouterr() == ("", f"{long}[bold]50 %[/bold]\nwarning: no room\n")


def test_quiet_shows_nothing(handler, capsys):
    handler.is_command_line = handler.is_quiet = True
    logger.warning("no room")
    assert capsys.readouterr() == ("", "")


def test_only_the_first_process_shows_messages(handler, capsys, monkeypatch):
    handler.is_command_line = True
    monkeypatch.setenv("RANK", "1")
    logger.info("from the second")
    assert not is_main_process()
    assert capsys.readouterr() == ("", "")


def test_a_program_that_has_configured_logging_gets_the_messages_instead(handler, capsys, caplog):
    logger.info("epoch 1")
    assert [(record.name, record.message) for record in caplog.records] == [(logger.name, "epoch 1")]
    assert capsys.readouterr() == ("", "")


def test_a_program_that_has_not_configured_logging_sees_them_printed():
    program = "import logging, clipvisionalign.log; logging.getLogger('clipvisionalign.training').info('epoch 1')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("epoch 1\n", "")


def test_the_command_line_shows_a_message_once_whatever_libraries_configure():
    program = (
        "import logging; from clipvisionalign.log import configure_command_line; configure_command_line(); "
        "logging.warning('a library'); logging.getLogger('clipvisionalign.training').info('epoch 1')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "WARNING:root:a library\nepoch 1\n")


def test_a_program_that_has_called_a_command_sees_messages_as_before():
    program = (
        "import logging; from clipvisionalign.cli import main; main(['check', 'nowhere', '--quiet']); "
        "logging.getLogger('clipvisionalign.training').info('epoch 1')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "epoch 1\n"


def test_a_function_takes_the_lines_and_may_log_itself(handler, capsys):
    handler.is_command_line = True
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        logger.info(f"cell 1: {line}")

    with log_to(listen):
        logger.info("epoch 1")
    logger.info("epoch 2")
    assert lines == ["epoch 1"]
    assert capsys.readouterr().err == "cell 1: epoch 1\nepoch 2\n"


def test_an_error_of_such_a_function_is_raised(handler):
    def fail(line: str) -> None:
        raise ValueError(line)

    with log_to(lambda line: None):
        with pytest.raises(ValueError, match="epoch 1"), log_to(fail):
            logger.info("epoch 1")
        logger.info("epoch 2")
    assert not handler.listeners


def test_messages_may_be_left_out_and_other_handlers_still_receive_them(handler, capsys, caplog):
    handler.is_command_line = True
    with leave_out(lambda record: record.getMessage().startswith("epoch")):
        logger.info("epoch 1")
        logger.info("cell 1")
    logger.info("epoch 2")
    assert capsys.readouterr().err == "cell 1\nepoch 2\n"
    assert [record.message for record in caplog.records] == ["epoch 1", "cell 1", "epoch 2"]


def test_say_works_for_one_release_and_warns_its_caller(handler):
    def train(say=None) -> None:
        with deprecated_say(say):
            logger.info("epoch 1")

    lines: list[str] = []
    with pytest.warns(DeprecationWarning, match="say is deprecated") as caught:
        train(lines.append)
    assert lines == ["epoch 1"]
    assert caught[0].filename == __file__
