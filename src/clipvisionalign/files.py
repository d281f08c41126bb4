"""Atomic writes of files and folders: written beside the target and renamed.

Whoever reads finds what was there before or what is there now, never half of it, at whatever moment a process is
killed or a disk is full. What a killed process leaves ends in `.part`; the next one that writes removes it.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

#: The ending of what is still being written.
PARTIAL_SUFFIX = ".part"
#: Seconds after which what no process of this machine writes to is nobody's.
ABANDONED_SECONDS = 3600.0


@contextmanager
def atomic_write(
    path: Path, sync: bool = True, unique_name: bool = False, in_own_folder: bool = False
) -> Iterator[Path]:
    """A path beside another where the body writes a file or makes a folder, which then takes the other's place.

    Where the body raises, nothing is left of it and `path` stays as it was.

    Args:
        path: What is written or replaced.
        sync: Whether the content is on the disk before the name is.
        unique_name: Whether the path beside it has a name that no other process writes to, for what several of them may
            write at once.
        in_own_folder: Whether it is in a folder of its own, for a writer that leaves files beside the one that it is
            asked for.

    Yields:
        The path to write to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "settings.yaml"
    ...     with atomic_write(path) as aside:
    ...         _ = aside.write_text("batch: 128", encoding="utf-8")
    ...     print(path.read_text(encoding="utf-8"), [file.name for file in Path(folder).iterdir()])
    batch: 128 ['settings.yaml']
    """
    partial = path.with_name(
        f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}" if unique_name else f"{path.name}{PARTIAL_SUFFIX}"
    )
    if partial.is_dir():
        remove(partial)
    aside = partial / path.name if in_own_folder else partial
    try:
        if in_own_folder:
            partial.mkdir()
        yield aside
        _set_usual_modes(aside)
        if sync:
            fsync_paths(*(sorted(aside.rglob("*")) if aside.is_dir() else []), aside)
        if aside.is_dir() and path.is_dir():
            # No folder takes the place of another one at once.
            shutil.rmtree(path)
        aside.replace(path)
    finally:
        remove(partial)


@contextmanager
def atomic_write_files(folder: Path) -> Iterator[Path]:
    """A folder beside another where the body writes files, each of which then takes the place of the one of its name.

    At every moment each is there whole, the former or the new one.

    Args:
        folder: Where the files go.

    Yields:
        The folder to write to.
    """
    partial = folder.with_name(f"{folder.name}{PARTIAL_SUFFIX}")
    remove(partial)
    try:
        yield partial
        if partial.is_dir():
            _set_usual_modes(partial)
            folder.mkdir(exist_ok=True)
            fsync_paths(*partial.iterdir())
            for file in sorted(partial.iterdir()):
                if file.is_dir() and (folder / file.name).is_dir():
                    # No folder takes the place of another one at once.
                    shutil.rmtree(folder / file.name)
                file.replace(folder / file.name)
    finally:
        remove(partial)


def _set_usual_modes(path: Path) -> None:
    """Let files be readable by whom a new file of this process is: safetensors writes for its owner alone."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    private = [each for each in files if each.is_file() and stat.S_IMODE(each.stat().st_mode) == 0o600]
    if not private:
        return
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / "new"
        new.touch()
        mode = stat.S_IMODE(new.stat().st_mode)
    for each in private:
        each.chmod(mode)


@contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Make the folders that a path is to be in.

    Where the body raises, those that were made are removed again, as far as they are empty, and so is `path` where that
    is an empty folder.

    Args:
        path: A file or folder.

    Yields:
        Nothing.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders up to the first that is not empty.

    Args:
        folders: Each of them in the next one; some may not be there.
    """
    for folder in folders:
        if folder.is_dir():
            if any(folder.iterdir()):
                return
            folder.rmdir()


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left of `atomic_write` with a name of their own (`unique_name`).

    It is of no process that runs here, and, since one may run elsewhere, was not written to for an hour.

    Args:
        folder: Where it is looked for.
    """
    for partial in folder.glob(f"*.*{PARTIAL_SUFFIX}"):
        pid = partial.name.removesuffix(PARTIAL_SUFFIX).rpartition(".")[2]
        inside = partial.rglob("*") if partial.is_dir() else []
        modified_times = [path.lstat().st_mtime for path in [partial, *inside] if path.exists()]
        if (
            pid.isdigit()
            and not _is_running(int(pid))
            and time.time() - max(modified_times, default=0) > ABANDONED_SECONDS
        ):
            remove(partial)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class Held(OSError):
    """Another process holds what this one asks for."""


@contextmanager
def run_lock(path: Path, doing: str, waits: bool = False) -> Iterator[None]:
    """A lock file that this process alone holds meanwhile, however it ends.

    On a disk without such locks none is held.

    Args:
        path: The lock file.
        doing: What the holder does, for the messages of others.
        waits: Whether to wait for another process that holds it.

    Yields:
        Nothing.

    Raises:
        Held: Another process holds it, and `waits` is false; nothing is changed.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        with path.open("a+") as file:
            try:
                # Not `flock`: a worker that is left would still hold it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    if waits:
                        time.sleep(0.2)
                        continue
                    message = f"{path.parent}: {_who_wrote(path)} {doing}; wait until it ends, or stop it"
                    raise Held(message) from None
            if not _is_at(file.fileno(), path):
                # Its holder removed it between the two calls: another one may be there by now.
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            try:
                yield
            finally:
                remove(path)
            return


def holder_of(path: Path) -> str:
    """Which other process holds a lock file.

    Not to be asked by the process that holds it, as it would hold it no more.

    Args:
        path: The lock file.

    Returns:
        What it does, and where; "" where none holds it.
    """
    if not path.is_file():
        return ""
    try:
        import fcntl

        with path.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _who_wrote(path) if error.errno in (errno.EACCES, errno.EAGAIN) else ""
    except ImportError:
        pass
    return ""


def _who_wrote(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has the name `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there.

    Args:
        path: What is removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder that the body fills; it is removed where the body raises.

    Args:
        folder: The folder, which is not there yet.

    Yields:
        Nothing.

    Raises:
        OSError: It cannot be made.
    """
    folder.mkdir()
    try:
        yield
    except BaseException:
        remove(folder)
        raise


def create_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """An array of NumPy in a new file that is mapped into memory, its room on the disk taken at once.

    While pages of a map are written, a full disk is a signal that ends the process; here it is an error.

    Args:
        path: The .npy file.
        dtype: Of the array.
        shape: Of the array, of one element at least.

    Returns:
        The array, to be written to.

    Raises:
        OSError: The disk has no room for it, or refuses to write.
    """
    import numpy as np

    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def fsync_paths(*paths: Path) -> None:
    """Write to the disk what was written to files, and the names in folders.

    Args:
        *paths: Files and folders.

    Raises:
        OSError: The disk refuses it.
    """
    for path in paths:
        # Windows flushes no file that is open for reading, and no folder.
        if os.name == "nt" and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def user_cache_folder() -> Path:
    """Where files are kept that can be recomputed: $CLIPVISIONALIGN_CACHE, or the user's cache folder.

    Returns:
        The folder, which need not exist.
    """
    configured = os.environ.get("CLIPVISIONALIGN_CACHE")
    return Path(configured) if configured else user_cache_path("clipvisionalign", appauthor=False)
