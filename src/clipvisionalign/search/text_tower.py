"""The text tower that lies beside an index as ONNX, by which words are searched for without PyTorch.

`index` writes it (`write`), once for each aligner: it is kept in the user's cache by the aligner's fingerprint, and
indexes on the same disk hold second names of those files. `search` and `serve` open it (`open`).
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign import __version__
from clipvisionalign.export.onnx_text import TEXT_FORMAT, TEXT_GRAPH, TEXT_MANIFEST, TEXT_TOKENIZER
from clipvisionalign.files import atomic_write, user_cache_folder
from clipvisionalign.progress import progress_step
from clipvisionalign.search.storage import Storage

if TYPE_CHECKING:
    from clipvisionalign.export.onnx_text import OnnxTextTower
    from clipvisionalign.models.aligner import Aligner

logger = logging.getLogger(__name__)

#: Below an index, and below the user's cache folder.
INDEX_FOLDER, CACHED_TOWERS = "text", "text_towers"
#: Bytes of the text towers that the cache keeps: those that were used last, the last one whatever its size.
MAX_CACHED_BYTES = 1_000_000_000
#: How what a text tower lacks is installed.
INSTALL_HINT = 'pip install "clipvisionalign[search]"'


@dataclass
class TextTowerReport:
    """What became of the text tower beside an index.

    Attributes:
        state: "unchanged", "written", "cached" (taken from the user's cache), or "none".
        bytes: Of its files.
        seconds: That it took.
        reason: Why there is none; "" where there is one.
    """

    state: str = "none"
    bytes: int = 0
    seconds: float = 0.0
    reason: str = ""


def read_text_manifest(index: Storage, fingerprint: str) -> dict[str, Any] | None:
    """What is known of the text tower beside an index.

    Args:
        index: The storage of the index.
        fingerprint: Of the index's aligner.

    Returns:
        The content of its text.json; None where there is no text tower of that aligner that this version reads.
    """
    try:
        manifest = json.loads(index.read(f"{INDEX_FOLDER}/{TEXT_MANIFEST}") or "null")
    except ValueError:
        return None
    if not isinstance(manifest, dict):
        return None
    fits = manifest.get("format") == TEXT_FORMAT and manifest.get("aligner") == fingerprint
    return manifest if fits and not manifest.get("reason") else None


def open_text_tower(index: Storage, fingerprint: str) -> OnnxTextTower | None:
    """Open the text tower beside an index; behind a URL it is fetched into the user's cache once.

    Args:
        index: The storage of the index.
        fingerprint: Of the index's aligner.

    Returns:
        The text tower; None where there is none that can be used here, after a line with the reason.
    """
    manifest = read_text_manifest(index, fingerprint)
    if manifest is None:
        return None
    from clipvisionalign.export.onnx_text import OnnxTextTower

    try:
        if index.is_local:
            return OnnxTextTower(index.folder / INDEX_FOLDER)
        return OnnxTextTower(_fetch(index, fingerprint))
    except ModuleNotFoundError as error:
        logger.info(f"note: words are encoded by PyTorch, which takes longer to load: no {error.name}; {INSTALL_HINT}")
    except Exception as error:
        # onnxruntime has errors of its own kinds, such as for a file that was cut.
        reason = str(error).partition("\n")[0]
        logger.info(f"note: words are encoded by PyTorch: {index}/{INDEX_FOLDER} cannot be used: {reason}")
    return None


def _fetch(index: Storage, fingerprint: str) -> Path:
    """The cached folder of a remote index's text tower."""
    folder = user_cache_folder() / CACHED_TOWERS / fingerprint
    if not _is_complete(folder, fingerprint, "late" in (read_text_manifest(index, fingerprint) or {})):
        with progress_step("fetching the text tower"):
            _write_cached(folder, lambda aside: _fetch_files(index, aside))
    (folder / TEXT_MANIFEST).touch()
    return folder


def _fetch_files(index: Storage, target: Path) -> None:
    for name in (TEXT_GRAPH, TEXT_TOKENIZER, TEXT_MANIFEST):
        index.get_file(f"{INDEX_FOLDER}/{name}", target / name)


def keep_text_tower(
    run: str | Path, index: Storage, fingerprint: str, aligner: Aligner, *, quiet: bool = False
) -> TextTowerReport:
    """Write the text tower of an index's aligner beside it, where it is not there yet; a failure is only reported.

    Args:
        run: The run folder, or a pretrained dual encoder.
        index: The storage of the index.
        fingerprint: Of the aligner.
        aligner: The aligner as it encodes; it is loaded once more to be exported.
        quiet: Whether nothing is logged, as of the shards of an index that has logged it itself.

    Returns:
        What was done.
    """
    text = index.read(f"{INDEX_FOLDER}/{TEXT_MANIFEST}")
    try:
        kept = json.loads(text or "null") or {}
    except ValueError:
        kept = {}
    has_tokens = aligner.late_scales is not None
    if kept.get("aligner") == fingerprint and kept.get("format") == TEXT_FORMAT:
        # One of before gives vectors alone.
        if not kept.get("reason") and ("late" in kept or not has_tokens):
            return TextTowerReport("unchanged", int(kept.get("bytes", 0)))
        if kept.get("reason") and kept.get("version") == __version__:
            return TextTowerReport(reason=str(kept["reason"]))
    start = time.perf_counter()
    folder, state = user_cache_folder() / CACHED_TOWERS / fingerprint, "cached"
    try:
        if not _is_complete(folder, fingerprint, has_tokens):
            state = "written"
            with progress_step("exporting the text tower"):
                _write_cached(folder, lambda aside: _export(run, fingerprint, aside, aligner))
        (folder / TEXT_MANIFEST).touch()
        for name in (TEXT_GRAPH, TEXT_TOKENIZER):
            index.put_file(f"{INDEX_FOLDER}/{name}", folder / name)
        manifest_text = (folder / TEXT_MANIFEST).read_text(encoding="utf-8")
        index.write(f"{INDEX_FOLDER}/{TEXT_MANIFEST}", manifest_text)
    except ModuleNotFoundError as error:
        return _without(f"no {error.name}; {INSTALL_HINT}, then index again", quiet)
    except Exception as error:
        logger.debug("the text tower is not exported", exc_info=True)
        reason = str(error).partition("\n")[0] or type(error).__name__
        if not isinstance(error, OSError):
            # So that this version does not try again at every update.
            content = {"format": TEXT_FORMAT, "aligner": fingerprint, "version": __version__, "reason": reason}
            with suppress(OSError):
                index.write(f"{INDEX_FOLDER}/{TEXT_MANIFEST}", json.dumps(content, indent=2) + "\n")
        return _without(reason, quiet)
    report = TextTowerReport(state, json.loads(manifest_text)["bytes"], round(time.perf_counter() - start, 2))
    if not quiet:
        _log_written(report, index)
    return report


def _log_written(report: TextTowerReport, index: Storage) -> None:
    how = "written" if report.state == "written" else "taken from the cache"
    logger.info(
        f"text tower: {report.bytes / 1e6:,.1f} MB {how} in {report.seconds:.1f} s ({index}/{INDEX_FOLDER}): searches "
        "by words need no PyTorch"
    )


def _without(reason: str, quiet: bool) -> TextTowerReport:
    if not quiet:
        logger.info(f"note: no text tower beside the index, searches load PyTorch: {reason}")
    return TextTowerReport(reason=reason)


def _export(run: str | Path, fingerprint: str, folder: Path, aligner: Aligner) -> None:
    # Before they are missed in the middle of an export.
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    from clipvisionalign.export.text_tower import check_text_export, write_text_tower
    from clipvisionalign.models.io import load_aligner

    check_text_export(aligner, run)
    # Packed weights cannot be exported.
    write_text_tower(load_aligner(run, "cpu", packed=False), fingerprint, folder)


def _is_complete(folder: Path, fingerprint: str, has_tokens: bool) -> bool:
    try:
        manifest = json.loads((folder / TEXT_MANIFEST).read_text(encoding="utf-8"))
        written = sum((folder / name).stat().st_size for name in (TEXT_GRAPH, TEXT_TOKENIZER))
        return bool(
            manifest["format"] == TEXT_FORMAT and manifest["aligner"] == fingerprint and manifest["bytes"] == written
            and ("late" in manifest or not has_tokens)
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _write_cached(folder: Path, write: Callable[[Path], None]) -> None:
    """Let a function write a folder of the cache, whole or not at all; those that were used longest ago are removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder, sync=False, unique_name=True) as aside:
        aside.mkdir()
        write(aside)
    manifests = sorted(folder.parent.glob(f"*/{TEXT_MANIFEST}"), key=_last_use, reverse=True)
    total = 0
    for position, manifest in enumerate(manifests):
        with suppress(OSError):  # Another process may remove it.
            total += sum(path.stat().st_size for path in manifest.parent.iterdir())
        if position and total > MAX_CACHED_BYTES:
            shutil.rmtree(manifest.parent, ignore_errors=True)
