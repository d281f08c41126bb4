"""The folder that an export writes: whole or not there, and of one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clipvisionalign.export.folders import export_folder


def test_files_are_there_together_and_nothing_else(tmp_path):
    out = tmp_path / "above" / "out"
    with export_folder(out) as aside:
        (aside / "model").write_text("1")
        assert not out.exists()
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == {
        Path("above"), Path("above/out"), Path("above/out/model")
    }  # fmt: skip
    with pytest.raises(FileExistsError, match="not empty"), export_folder(out):
        pass


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), export_folder(tmp_path / "above" / "out") as aside:
        (aside / "model").write_text(str(1 / 0))
    assert not list(tmp_path.iterdir())


def other_export(out: Path) -> str:
    """What another process says that exports to `out`."""
    program = (
        "import sys; from clipvisionalign.export.folders import export_folder\n"
        f"with export_folder({str(out)!r}) as aside: (aside / 'model').write_text('second')"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr


def test_two_processes_do_not_export_to_one_folder(tmp_path):
    """The second is refused and disturbs nothing, while the first writes; and after that."""
    out = tmp_path / "out"
    with export_folder(out) as aside:
        (aside / "model").write_text("first")
        assert "Held" in other_export(out)
        (aside / "tokenizer").write_text("first")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"model": "first", "tokenizer": "first"}
    assert "FileExistsError" in other_export(out)
    assert list(tmp_path.iterdir()) == [out]
