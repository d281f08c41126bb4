"""The folder that an export writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipvisionalign.files import atomic_write_files, folders_above, run_lock


def target_folder(out: str | Path) -> Path:
    """The folder that an export goes to.

    Args:
        out: The folder; it need not exist.

    Returns:
        Its absolute path.

    Raises:
        FileExistsError: It is a file, or a folder that is not empty.
    """
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out}: is there already and not empty; give another folder, or remove it first")
    return target


@contextmanager
def export_folder(out: str | Path) -> Iterator[Path]:
    """A folder for the files of an export, which replace `out` at the end of the block; after an error nothing is left.

    A context manager.

    Args:
        out: The folder that the export goes to.

    Yields:
        A temporary folder beside it.

    Raises:
        FileExistsError: `out` is not empty.
        Held: Another process exports to it.
    """
    target = target_folder(out)
    lock = target.with_name(f"{target.name}.lock")
    with folders_above(target), run_lock(lock, f"exports to {out}"):
        # Another process may have written it since.
        target_folder(out)
        with atomic_write_files(target) as aside:
            aside.mkdir()
            yield aside
