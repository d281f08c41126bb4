"""What is written aside is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from clipvisionalign.files import PARTIAL_SUFFIX, atomic_write

SOURCE = Path(__file__).parent.parent / "src" / "clipvisionalign"


def write_folder(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (folder / name).write_text(text, encoding="utf-8")


def content(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path.parent)): file.read_text(encoding="utf-8") for file in files}


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "in folder"])
def test_the_old_stays_until_the_new_is_whole(tmp_path, kind, sync, own):
    path = tmp_path / "kept"
    how = {"sync": sync, "unique_name": own, "in_own_folder": kind == "in folder"}

    def write(text: str, fails: bool = False) -> None:
        with atomic_write(path, **how) as aside:
            write_folder(aside, text) if kind == "folder" else aside.write_text(text, encoding="utf-8")
            if kind == "in folder":
                # What some writers leave beside the file that they are asked for.
                aside.with_name("beside").write_text("", encoding="utf-8")
            if fails:
                raise OSError("no room")

    for text, before in (("old", None), ("new", "old")):
        with pytest.raises(OSError, match="no room"):
            write(text, fails=True)
        assert path.exists() == (before is not None)
        assert set(content(path).values()) == ({before} if before else set())
        write(text)
        assert set(content(path).values()) == {text}
        assert [each.name for each in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_leaves_the_old_and_the_next_one_tidies_up(tmp_path, kind):
    path = tmp_path / "kept"

    def write(text: str, killed: bool = False) -> None:
        with atomic_write(path) as aside:
            write_folder(aside, text) if kind == "folder" else aside.write_text(text, encoding="utf-8")
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)

    write("old")
    process = os.fork()
    if not process:
        write("half", killed=True)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert set(content(path).values()) == {"old"}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["kept", f"kept{PARTIAL_SUFFIX}"]
    write("new")
    assert set(content(path).values()) == {"new"}
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]


def test_nothing_else_renames_what_it_wrote():
    """Sharded checkpoints alone do it on their own: many processes write them together."""
    by_hand = re.compile(r"\.part[\"']|os\.replace|NamedTemporaryFile|\b(aside|part)\.(replace|rename)\(")
    offending = {path.name for path in SOURCE.rglob("*.py") if by_hand.search(path.read_text(encoding="utf-8"))}
    assert offending == {"files.py", "checkpoint.py"}
