"""What takes long says so: a line a minute in a log, one live line for each step on a terminal, one mechanism for all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import clipvisionalign
from clipvisionalign import cli
from clipvisionalign.progress import INTERVAL_VARIABLE, log_interval_seconds, progress, progress_step

SOURCE = Path(clipvisionalign.__file__).parent


def run(program: str, every: float, **more) -> tuple[list[str], float]:
    """The lines that a program leaves in a log, and how long it took."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent), INTERVAL_VARIABLE: str(every)}, **more,
    )  # fmt: skip
    return done.stderr.splitlines(), time.monotonic() - start


def test_a_log_gets_lines_with_count_rate_and_time_left():
    lines, _ = run(
        """
        import time
        from clipvisionalign.progress import progress
        batches = [range(start, start + 20) for start in range(0, 600, 20)]
        for batch in progress(batches, "encoding images", 600, units_per_item=len):
            time.sleep(0.1)
        """,
        every=0.5,
    )
    form = r"encoding images (\d+) of 600, [\d.]+ a second, about \d+ s left"
    done = [int(re.fullmatch(form, line).group(1)) for line in lines]
    # Three seconds of work: the first line comes soon, since the step will outlast half a second; then one every 0.5 s.
    assert 4 <= len(lines) <= 8
    assert done == sorted(done)
    assert done[0] < 100
    assert all(count % 20 == 0 for count in done)


def test_a_short_step_says_nothing():
    lines, _ = run(
        """
        from clipvisionalign.progress import progress
        assert list(progress(range(5), "counting", 5)) == [0, 1, 2, 3, 4]
        """,
        every=60,
    )
    assert lines == []


def test_an_item_that_takes_long_is_told_of_too_and_steps_within_steps_share_a_line():
    lines, _ = run(
        """
        import time
        from clipvisionalign.progress import progress_step, progress
        with progress_step("study", in_terminal=False):
            time.sleep(0.7)
            for run in progress(range(2), "measuring runs", 2):
                with progress_step("examples"):
                    time.sleep(1.0)
        """,
        every=0.3,
    )
    assert lines[0].startswith("study, ")
    inner = [line for line in lines if "examples" in line]
    assert len(inner) >= 4
    assert all(re.match(r"measuring runs [01] of 2.* > examples, \d+ s so far$", line) for line in inner)


def test_what_was_done_before_counts_as_done_and_not_in_the_rate():
    with progress_step("training, step", 100, visible=False) as step:
        step.set_initial(90)
        step.start -= 10.0
        step.update(95, "loss 1.5")
        assert step.message() == "training, step 95 of 100, 2 s each, loss 1.5, about 10 s left"


def test_once_all_is_done_what_follows_is_not_in_the_rate_and_no_end_is_promised():
    with progress_step("training, step", 4, visible=False) as step:
        step.start -= 8.0
        step.update(4, "loss 1.5")
        step.start, step.updated = step.start - 60.0, step.updated - 60.0
        assert step.message() == "training, step 4 of 4, 2 s each, loss 1.5"


def test_a_step_that_is_not_shown_says_nothing():
    lines, _ = run(
        """
        import time
        from clipvisionalign.progress import progress
        for _ in progress(range(10), "counting", 10, visible=False):
            time.sleep(0.05)
        """,
        every=0.1,
    )
    assert lines == []


def test_a_forked_process_tells_of_its_own_steps_only():
    lines, _ = run(
        """
        import os, sys, time
        from clipvisionalign.progress import progress_step, progress
        with progress_step("parent"):
            if child := os.fork():
                os.waitpid(child, 0)
            else:
                for _ in progress(range(10), "child", 10):
                    time.sleep(0.1)
                sys.stderr.flush()
                os._exit(0)
        """,
        every=0.3,
    )
    assert any(line.startswith("parent") for line in lines)
    assert any(line.startswith("child") for line in lines)
    assert not any("parent" in line and "child" in line for line in lines)


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals")
def test_a_terminal_gets_live_lines_and_none_for_a_log():
    import pty

    parent, child = pty.openpty()
    program = """
        import time
        from clipvisionalign.progress import progress
        for _ in progress(range(2), "measuring runs", 2):
            for _ in progress(range(5), "encoding images", 5):
                time.sleep(0.1)
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE.parent),
        INTERVAL_VARIABLE: "0.1",
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=child, env=environment)
    os.close(child)
    shown = b""
    try:
        while piece := os.read(parent, 4096):
            shown += piece
    except OSError:
        pass  # Linux ends a pseudo-terminal so
    os.close(parent)
    assert process.wait() == 0
    assert b"measuring runs" in shown
    assert b"encoding images" in shown
    assert b"a second" not in shown


def test_an_interval_that_is_no_time_is_refused(monkeypatch):
    for interval in ("soon", "0", "-3", "nan"):
        monkeypatch.setenv(INTERVAL_VARIABLE, interval)
        with pytest.raises(ValueError, match=INTERVAL_VARIABLE):
            log_interval_seconds()


def test_every_command_tells_of_itself(monkeypatch, capsys):
    def slow(arguments: list[str]) -> int:
        time.sleep(0.5)
        return 0

    monkeypatch.setenv(INTERVAL_VARIABLE, "0.1")
    monkeypatch.setitem(cli.COMMANDS, "scenes", ("", slow))
    assert cli.main(["scenes"]) == 0
    assert "slow, 0 s so far" in capsys.readouterr().err


def test_the_commands_steps_are_counted(monkeypatch, capsys, scenes_folder):
    monkeypatch.setenv(INTERVAL_VARIABLE, "0.02")
    assert cli.main(["check", str(scenes_folder)]) == 0
    stderr = capsys.readouterr().err
    assert re.search(r"checking images \d+ of \d+", stderr)


def test_nothing_else_draws_lines_of_progress():
    others = [path for path in SOURCE.rglob("*.py") if path.name != "progress.py"]
    for path in others:
        text = path.read_text()
        assert "rich.progress" not in text, path
        assert "isatty" not in text, path


def test_a_loop_that_is_left_early_ends_its_step(monkeypatch, capsys):
    monkeypatch.setenv(INTERVAL_VARIABLE, "0.05")
    for item in progress(range(100), "counting", 100):
        if item == 3:
            break
    time.sleep(0.3)
    assert capsys.readouterr().err == ""
