"""A folder as a commit of a hub repository: only where it is asked for by name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipvisionalign.models.hub.download import plain_http
from clipvisionalign.models.hub.errors import WeightsNotFound, hub_endpoint, translate_error
from clipvisionalign.models.hub.offline import is_offline
from clipvisionalign.progress import progress_step

#: What the hub itself puts into a new repository.
_NEW_FILES = {".gitattributes"}


def check_upload(name: str, overwrite: bool = False) -> set[str]:
    """Everything about an upload that can be known before there is something to upload.

    Args:
        name: The repository, `OWNER/NAME`.
        overwrite: Whether a repository that has files may get a further commit.

    Returns:
        The files that the repository has; none where it is not there.

    Raises:
        ValueError: The name is not of that form, or no request may be made.
        PermissionError: No account is logged in.
        FileExistsError: The repository has files, and `overwrite` is false.
        WeightsNotFound: The hub refuses the account, or does not answer.
    """
    from huggingface_hub import HfApi, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise ValueError(f"--push {name}: no repository's name: {str(error).splitlines()[0]}") from None
    if "/" not in name:
        raise ValueError(f"--push {name}: a repository is named OWNER/NAME, with your account or organisation in front")
    if is_offline():
        raise ValueError(f"--push {name}: needs the hub, and no request may be made (--offline, HF_HUB_OFFLINE)")
    if get_token() is None:
        raise PermissionError(f"--push {name}: no account: 'hf auth login', or HF_TOKEN with a token that may write")
    try:
        with plain_http():
            existing = _files_of(HfApi(), name)
    except errors.RepositoryNotFoundError:
        # Private ones of others look the same; the hub refuses to create those.
        return set()
    except Exception as error:
        raise _translate(error, name) from error
    if existing and not overwrite:
        raise FileExistsError(
            f"{hub_endpoint()}/{name}: is there already, with {len(existing)} files; --overwrite adds a commit to it, "
            "in which they are replaced and its history is kept"
        )
    return existing


def upload_folder(folder: str | Path, name: str, private: bool = False, overwrite: bool = False) -> str:
    """Upload the files of a folder as one commit; create the repository if it is not there.

    Args:
        folder: What to upload, with its sub-folders.
        name: The repository, `OWNER/NAME`, on the hub of `HF_ENDPOINT`.
        private: Whether a repository that is created can be seen by its owner alone.
        overwrite: Whether a repository that has files may get a further commit, which replaces all of them.

    Returns:
        The address of the repository.

    Raises:
        ValueError, PermissionError, FileExistsError: See `check_upload`.
        WeightsNotFound: The hub refuses the account, or does not answer; there is no commit then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    old = check_upload(name, overwrite)
    api, files = HfApi(), sorted(path for path in Path(folder).rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    try:
        # Each file is read twice: for its checksum, and to be sent.
        with plain_http(), progress_step(f"uploading to {name} (kB)", 2 * total // 1000) as step:
            api.create_repo(name, private=private, exist_ok=True)
            done = 0

            def count(size: int) -> None:
                nonlocal done
                done += size
                step.update(min(done, 2 * total) // 1000)

            names = [path.relative_to(folder).as_posix() for path in files]
            operations: list[Any] = [
                CommitOperationAdd(file, _CountedFile(path, count)) for file, path in zip(names, files, strict=True)
            ]
            operations += [CommitOperationDelete(file) for file in sorted(old - set(names))]
            api.create_commit(name, operations, commit_message="Upload by clipvisionalign", num_threads=1)
    except Exception as error:
        raise _translate(error, name) from error
    return f"{hub_endpoint()}/{name}"


def _files_of(api: Any, name: str) -> set[str]:
    """The files of a repository's main branch but for what the hub itself puts there."""
    return {each.rfilename for each in api.model_info(name).siblings or []} - _NEW_FILES


class _CountedFile(io.BufferedReader):
    """A file that counts what is read of it."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path))
        self._count = count

    def read(self, size: int | None = -1, /) -> bytes:
        """As many bytes as are asked for, or left."""
        data = super().read(size)
        self._count(len(data))
        return data


def _translate(error: Exception, name: str) -> Exception:
    """One error for what the hub answered to an upload."""
    cause: BaseException = error
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
        return WeightsNotFound(
            f"{name}: {hub_endpoint()} does not let this account write there: a token that may write ('hf auth login', "
            "HF_TOKEN), and an owner that you are or belong to"
        )
    return translate_error(cause, name, "") if isinstance(cause, Exception) else error
