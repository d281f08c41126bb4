"""The folder that an export writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipvisionalign.files import atomic_write_files, folders_above, run_lock


def target_folder(out: str | Path) -> Path:
    """Where an export goes. Raises FileExistsError where something is there."""
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out}: is there already and not empty; give another folder, or remove it first")
    return target


@contextmanager
def export_folder(out: str | Path) -> Iterator[Path]:
    """A folder where the body writes the files of an export, which then take their places in `out`.

    Args:
        out: where the export goes.

    Raises:
        FileExistsError: something is there.
        Held: another process exports to it.
    """
    target = target_folder(out)
    lock = target.with_name(f"{target.name}.lock")
    with folders_above(target), run_lock(lock, f"exports to {out}"):
        # Another process may have written it since.
        target_folder(out)
        with atomic_write_files(target) as aside:
            aside.mkdir()
            yield aside
