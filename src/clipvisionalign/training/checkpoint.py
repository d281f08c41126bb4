"""Checkpoints: everything that a run requires to resume exactly.

- Written aside, flushed to the disk and renamed, so that a kill in the middle leaves the one before it whole.
- The last two are kept; one that does not read back is skipped for the one before it, with a word.
- Tensors, numbers and names only: read with `weights_only`, no pickle is run.
- Sharded weights are written by torch.distributed.checkpoint, each process its own shards, as safetensors; they load on
  any other number of processes, on one too.
"""

from __future__ import annotations

import logging
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.files import PARTIAL_SUFFIX, atomic_write, fsync_paths, remove
from clipvisionalign.log import Log, deprecated_say
from clipvisionalign.training.distributed import Distributed

logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoints"
KEEP_LAST = 2
#: In a sharded checkpoint: what is not sharded.
REST_FILE = "rest.pt"


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state of a run as one file, atomically; the last two checkpoints are kept.

    Args:
        run: The run folder.
        step: Number of steps so far.
        state: Tensors, numbers, texts, and lists and dictionaries of these.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written, such as on a full disk; nothing half written is left.
    """
    folder = run / CHECKPOINT_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    with atomic_write(path) as aside, _write_errors_as_oserror(path), aside.open("wb") as file:
        torch.save(state, file)
    _prune_checkpoints(folder)
    return path


def _prune_checkpoints(folder: Path) -> None:
    for old in list_checkpoints(folder.parent)[:-KEEP_LAST]:
        _discard_checkpoint(old)
    # And what a process left that was killed while it wrote or removed one.
    for leftover in [*folder.glob(f"step-*{PARTIAL_SUFFIX}"), *folder.glob("step-*.gone")]:
        remove(leftover)


def _discard_checkpoint(path: Path) -> None:
    """What is to be removed loses its name first: a folder that lacks a part is no checkpoint."""
    gone = path.with_name(f"{path.name}.gone")
    if gone.is_dir():
        shutil.rmtree(gone)
    path.replace(gone)


def _commit_folder(aside: Path, path: Path) -> None:
    """Give a checkpoint its name.

    A folder takes no other one's place at once: where its step has been written before, it first has a name that comes
    after, so that a kill at any moment leaves a whole one of the two with a name.
    """
    replacement = path.with_stem(f"{path.stem}-again")
    if replacement.exists():
        # Killed in the middle of this.
        if path.exists():
            _discard_checkpoint(path)
        replacement.replace(path)
    if path.exists():
        aside.replace(replacement)
        _discard_checkpoint(path)
        replacement.replace(path)
    else:
        aside.replace(path)


def save_sharded(
    run: Path, step: int, tensors: dict[str, Tensor], rest: dict[str, Any], distributed: Distributed
) -> Path:
    """Write tensors that are sharded over processes, each its own shards, and the rest; every process calls this.

    Args:
        run: The run folder.
        step: Number of steps so far.
        tensors: Tensors by name, sharded or whole.
        rest: What is not sharded.
        distributed: The processes.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: A process cannot write; raised on all, and nothing half written is left.
    """
    import torch.distributed.checkpoint as distributed_checkpoint
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    folder = run / CHECKPOINT_FOLDER
    path = folder / f"step-{step:09d}.shards"
    # Not `atomic_write`: many processes write to it, and each reports its own success.
    aside = path.with_name(f"{path.name}{PARTIAL_SUFFIX}")

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def end() -> None:
        files = {file.name: file.stat().st_size for file in aside.iterdir()}
        with _write_errors_as_oserror(path), (aside / REST_FILE).open("wb") as file:
            torch.save(rest | {"files": files}, file)
        fsync_paths(*aside.iterdir(), aside)
        _commit_folder(aside, path)
        _prune_checkpoints(folder)

    try:
        distributed.run_on_main(begin)
        with _ignore_warnings(), _rank_errors_as_oserror(path, "written"):
            writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
            distributed_checkpoint.save(tensors, storage_writer=writer)
        # Where a disk is not shared, or keeps what it is given back, only the process that wrote can report it.
        distributed.run_on_all(lambda: fsync_paths(*aside.iterdir()))
        distributed.run_on_main(end)
    except Exception:
        if distributed.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return path


def load_sharded(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors from a sharded checkpoint, whatever number of processes wrote it.

    Args:
        path: The folder of the checkpoint.
        tensors: Tensors by name, sharded or whole; they are changed themselves.

    Raises:
        OSError: It cannot be read.
    """
    import torch.distributed.checkpoint as distributed_checkpoint
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    with _ignore_warnings(), _rank_errors_as_oserror(path, "read"):
        distributed_checkpoint.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors of a sharded checkpoint.

    Args:
        path: The folder of the checkpoint.

    Returns:
        The names.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return set(HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)


@contextmanager
def _write_errors_as_oserror(path: Path) -> Iterator[None]:
    """torch's writer reports a full disk as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path}: could not be written: {str(error).splitlines()[0]}") from error


@contextmanager
def _rank_errors_as_oserror(path: Path, what: str) -> Iterator[None]:
    """The library raises on all processes an error of one, as an exception of its own that is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        message = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise OSError(f"{path}: could not be {what} by process {rank}: {message}") from None


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Without the library's word that a process alone is one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run.

    Args:
        run: The run folder.

    Returns:
        Files and folders, the newest last.
    """
    paths = [*(run / CHECKPOINT_FOLDER).glob("step-*.pt"), *(run / CHECKPOINT_FOLDER).glob("step-*.shards")]
    return sorted(paths, key=lambda path: (path.stem, path.suffix))


def load_last_checkpoint(run: Path, say: Log | None = None) -> dict[str, Any] | None:
    """The state of the newest checkpoint that reads back; others are skipped with a message.

    Args:
        run: The run folder.
        say: Deprecated: takes the lines that are logged otherwise.

    Returns:
        The state; of a sharded checkpoint all but its tensors, with its folder under "shards". None if there is none.
    """
    with deprecated_say(say):
        return _load_last_readable(run)


def _load_last_readable(run: Path) -> dict[str, Any] | None:
    for path in reversed(list_checkpoints(run)):
        try:
            if path.is_dir():
                rest = torch.load(path / REST_FILE, map_location="cpu", weights_only=True)
                for name, size in rest.pop("files", {}).items():
                    if (path / name).stat().st_size != size:
                        raise ValueError(f"{name} is not whole")
                return rest | {"shards": str(path)}
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            message = (str(error).splitlines() or [type(error).__name__])[0]
            logger.info(f"{path}: does not read back ({message[:80]}); taking the one before it")
    return None


def random_states() -> dict[str, Any]:
    """The states of the generators of PyTorch, NumPy and Python.

    Returns:
        States by library, and by the kind of the accelerator.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": list(map(_tuple_to_list, random.getstate())),
    }
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        states[accelerator.type] = _device_random_states(torch.get_device_module(accelerator))
    return states


def _device_random_states(device: Any) -> list[Tensor]:
    """Where the generators of an accelerator's devices stand; of one that has a single device (MPS) that one's."""
    return device.get_rng_state_all() if hasattr(device, "get_rng_state_all") else [device.get_rng_state()]


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the generators.

    Args:
        states: As `random_states` returned them.
    """
    torch.set_rng_state(states["torch"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type in states:
        device: Any = torch.get_device_module(accelerator)
        if hasattr(device, "set_rng_state_all"):
            device.set_rng_state_all(states[accelerator.type])
        else:
            device.set_rng_state(states[accelerator.type][0])


def _tuple_to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
