"""Fetching files of one commit into the local cache, each verified."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipvisionalign.models.hub.cache import CARD, Choose, Snapshot, _remember_branch
from clipvisionalign.models.hub.errors import CorruptedDownload, DiskFull, HubUnreachable, _endpoint, _explained
from clipvisionalign.models.hub.licence import _licence, _licence_of_card
from clipvisionalign.models.hub.room import _MORE_ROOM, _free, _room, _size, _storage
from clipvisionalign.models.hub.verification import _drop, _expected_of_hub, _wrong
from clipvisionalign.progress import LongStep, long_step

#: How often a file is asked for whose download failed, beyond what huggingface_hub resumes by itself.
TRIES = 2

#: Bytes that are written together: what a cut connection loses at most.
CHUNK = 1 << 20

#: Longer descriptions are no description, and are not fetched.
_CARD_BYTES = 1_000_000

Say = Callable[[str], None]


def tell(line: str) -> None:
    """A line on standard error, for callers that have no place of their own for it."""
    print(line, file=sys.stderr, flush=True)


def _fetch(name: str, revision: str, info: Any, choose: Choose, say: Say) -> Snapshot:
    # What lies in sub-folders (onnx/, coreml/) is for other programs.
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or [] if "/" not in sibling.rfilename}
    files = choose(list(siblings))
    if CARD in siblings and (siblings[CARD].size or 0) < _CARD_BYTES and CARD not in files:
        files = [CARD, *files]
    folder = _storage(name) / "snapshots" / info.sha
    for file in files:
        expected = _expected_of_hub(siblings[file])
        if (folder / file).is_file() and (reason := _wrong(folder / file, expected)):
            say(f"{folder / file}: {reason}; it is fetched again")
            _drop(folder / file)
    missing = [file for file in files if not (folder / file).is_file()]
    licence = _licence(info) or _licence_of_card(folder / CARD)
    if missing:
        total = sum(siblings[file].size or 0 for file in missing)
        _check_room(name, total)
        files_of = f"{len(missing)} files, {_size(total)}" if len(missing) > 1 else f"{missing[0]}, {_size(total)}"
        told = f", licence {licence}" if licence else ""
        say(f"{name}: fetching {files_of}, from {_endpoint()} (commit {info.sha[:10]}{told})")
        with _quiet_hub(), long_step(f"fetching {name} (kB)", total // 1000) as step:
            bar = _Bar(step)
            for file in missing:
                _download(name, info.sha, file, siblings[file], bar, say)
    _remember_branch(name, revision or "main", info.sha)
    return Snapshot(name, info.id or name, info.sha, folder, tuple(files), licence)


def _download(name: str, commit: str, file: str, sibling: Any, bar: _Bar, say: Say) -> None:
    """One file into the cache, whole and verified. Raises what `snapshot` raises."""
    import inspect

    from huggingface_hub import constants, hf_hub_download

    options: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        options["tqdm_class"] = bar.counter
    for tries_left in reversed(range(TRIES)):
        done = bar.done
        try:
            path = hf_hub_download(
                name, file, revision=commit, etag_timeout=float(constants.HF_HUB_ETAG_TIMEOUT), **options
            )
            reason = _wrong(Path(path), _expected_of_hub(sibling))
            if not reason:
                return
            _drop(Path(path))
            problem: Exception = CorruptedDownload(
                f"{name}: {file} came with other content than the hub announces: {reason}; nothing of it is kept: try "
                "again, and if that does not help, a proxy or mirror on the way changes files"
            )
        except Exception as error:
            problem = _explained(error, name, commit, file)
        if not tries_left or not isinstance(problem, (HubUnreachable, CorruptedDownload)):
            raise problem from None
        bar.go_to(done)
        say(f"{name}: {file}: {problem}; once more")
        time.sleep(1)


def _check_room(name: str, total: int) -> None:
    """Raises DiskFull."""
    if _free(name) < total:
        raise DiskFull(f"{name}: needs {_size(total)}, but {_room(name)}. {_MORE_ROOM}")


class _Bar:
    """The bytes of all files of a repository, in kB, as a step that is told of."""

    def __init__(self, step: LongStep) -> None:
        self.step, self.done = step, 0

    def go_to(self, done: int) -> None:
        """So many bytes are there; fewer than before where a download is begun again."""
        self.done = done
        self.step.update(done // 1000)

    def counter(self, *_: Any, **__: Any) -> _Counter:
        """What huggingface_hub calls for each file, in tqdm's place."""
        return _Counter(self)


class _Counter:
    """As much of tqdm as huggingface_hub uses."""

    def __init__(self, bar: _Bar) -> None:
        self.bar = bar

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, count: float | None = 1) -> None:
        """So many bytes more, or fewer."""
        self.bar.go_to(self.bar.done + int(count or 0))

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """huggingface_hub over plain HTTP, in small pieces, and without lines of its own: what happens is told here."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    verbosity, xet = logging.get_verbosity(), getattr(constants, "HF_HUB_DISABLE_XET", False)
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    variable = os.environ.get("HF_HUB_DISABLE_XET")
    logging.set_verbosity(logging.CRITICAL)
    constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE = True, CHUNK
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE = xet, chunk
        if variable is None:
            del os.environ["HF_HUB_DISABLE_XET"]
        else:
            os.environ["HF_HUB_DISABLE_XET"] = variable
