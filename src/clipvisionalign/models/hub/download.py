"""Downloads files of one commit into the local cache, each verified."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipvisionalign.models.hub.cache import MODEL_CARD, CheckConfig, ChooseFiles, Snapshot, record_branch
from clipvisionalign.models.hub.errors import CorruptedDownload, DiskFull, HubUnreachable, hub_endpoint, translate_error
from clipvisionalign.models.hub.licence import licence_of, licence_of_card
from clipvisionalign.models.hub.room import (
    FREE_SPACE_HINT,
    format_bytes,
    free_bytes,
    free_space,
    repository_folder,
)
from clipvisionalign.models.hub.verification import expected_of_hub, find_mismatch, remove_cached
from clipvisionalign.progress import ProgressStep, progress_step

logger = logging.getLogger(__name__)

#: How often a file is asked for whose download failed, beyond what huggingface_hub resumes by itself.
TRIES = 2

#: Bytes that are written together: what a cut connection loses at most.
CHUNK = 1 << 20

#: Longer descriptions are no description, and are not fetched.
_MAX_CARD_BYTES = 1_000_000


def print_to_stderr(line: str) -> None:
    """Print a line to standard error; for programs that still import `tell` of version 0.1.

    Args:
        line: The line.
    """
    print(line, file=sys.stderr, flush=True)


def fetch_file(
    name: str, revision: str, info: Any, choose: ChooseFiles, *, check: CheckConfig | None = None, nested: bool = False
) -> Snapshot:
    """Download the files of a commit into the local cache, each verified by size and hash.

    Files of the cache whose content differs are fetched again. JSON files come first; README.md is fetched too, for the
    licence.

    Args:
        name: Repository OWNER/NAME.
        revision: The branch, tag or commit that was asked for, which is recorded; "" for main.
        info: The answer of the hub: commit, files, sizes, hashes (huggingface_hub's ModelInfo).
        choose: Selects the required files by the names of the repository's.
        check: Called with the commit's folder after the JSON files; raises for a model of another kind. None for no
            check.
        nested: Whether `choose` is also given the files below folders.

    Returns:
        The files.

    Raises:
        DiskFull: There is no room; nothing is fetched.
        HubUnreachable: The connection failed, `TRIES` times.
        CorruptedDownload: A file came with other content, `TRIES` times.
        WeightsNotFound: `choose` misses files, or the hub refuses one.
    """
    # What lies in sub-folders (onnx/, coreml/) is for other programs.
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or [] if nested or "/" not in sibling.rfilename}
    files = choose(list(siblings))
    if MODEL_CARD in siblings and (siblings[MODEL_CARD].size or 0) < _MAX_CARD_BYTES and MODEL_CARD not in files:
        files = [MODEL_CARD, *files]
    folder = repository_folder(name) / "snapshots" / info.sha
    for file in files:
        expected = expected_of_hub(siblings[file])
        if (folder / file).is_file() and (reason := find_mismatch(folder / file, expected)):
            logger.info(f"{folder / file}: {reason}; it is fetched again")
            remove_cached(folder / file)
    missing = [file for file in files if not (folder / file).is_file()]
    licence = licence_of(info) or licence_of_card(folder / MODEL_CARD)
    if missing:
        total = sum(siblings[file].size or 0 for file in missing)
        _check_room(name, total)
        files_of = (
            f"{len(missing)} files, {format_bytes(total)}"
            if len(missing) > 1
            else f"{missing[0]}, {format_bytes(total)}"
        )
        licence_note = f", licence {licence}" if licence else ""
        logger.info(f"{name}: fetching {files_of}, from {hub_endpoint()} (commit {info.sha[:10]}{licence_note})")
        with plain_http(), progress_step(f"fetching {name} (kB)", total // 1000) as step:
            bar = _DownloadProgress(step)
            # What a config.json rules out is found before the weights, which are large, are fetched.
            config_files = [file for file in missing if file.endswith(".json")]
            for file in config_files:
                _download(name, info.sha, file, siblings[file], bar)
            if check is not None:
                check(folder)
            for file in missing:
                if file not in config_files:
                    _download(name, info.sha, file, siblings[file], bar)
    record_branch(name, revision or "main", info.sha)
    return Snapshot(name, info.id or name, info.sha, folder, tuple(files), licence)


def _download(name: str, commit: str, file: str, sibling: Any, bar: _DownloadProgress) -> None:
    """One file into the cache, whole and verified. Raises what `snapshot` raises."""
    import inspect

    from huggingface_hub import constants, hf_hub_download

    options: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        options["tqdm_class"] = bar.tqdm_class
    for tries_left in reversed(range(TRIES)):
        done = bar.done
        try:
            path = hf_hub_download(
                name, file, revision=commit, etag_timeout=float(constants.HF_HUB_ETAG_TIMEOUT), **options
            )
            reason = find_mismatch(Path(path), expected_of_hub(sibling))
            if not reason:
                return
            remove_cached(Path(path))
            problem: Exception = CorruptedDownload(
                f"{name}: {file} came with other content than the hub announces: {reason}; nothing of it is kept: try "
                "again, and if that does not help, a proxy or mirror on the way changes files"
            )
        except Exception as error:
            problem = translate_error(error, name, commit, file)
        if not tries_left or not isinstance(problem, (HubUnreachable, CorruptedDownload)):
            raise problem from None
        bar.set_done(done)
        logger.info(f"{name}: {file}: {problem}; once more")
        time.sleep(1)


def _check_room(name: str, total: int) -> None:
    """Raises DiskFull."""
    if free_bytes(name) < total:
        raise DiskFull(f"{name}: needs {format_bytes(total)}, but {free_space(name)}. {FREE_SPACE_HINT}")


class _DownloadProgress:
    """The bytes of all files of a repository, in kB, as a progress step."""

    def __init__(self, step: ProgressStep) -> None:
        self.step, self.done = step, 0

    def set_done(self, done: int) -> None:
        """So many bytes are there; fewer than before where a download restarts."""
        self.done = done
        self.step.update(done // 1000)

    def tqdm_class(self, *_: Any, **__: Any) -> _TqdmAdapter:
        """What huggingface_hub calls for each file, in tqdm's place."""
        return _TqdmAdapter(self)


class _TqdmAdapter:
    """As much of tqdm as huggingface_hub uses."""

    def __init__(self, bar: _DownloadProgress) -> None:
        self.bar = bar

    def __enter__(self) -> _TqdmAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, count: float | None = 1) -> None:
        """So many bytes more, or fewer."""
        self.bar.set_done(self.bar.done + int(count or 0))

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def plain_http() -> Iterator[None]:
    """huggingface_hub over plain HTTP, in small pieces, and without lines of its own: progress is shown here."""
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
