"""Files into rows: decoded ahead of the picture tower, by the threads of this machine or by a Ray cluster.

Both ways put the same files through the tower together, so that both give the same vectors.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipvisionalign.images import PictureError, PictureInput, open_header, open_picture
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.eval_mode import evaluating
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.run_files import CONFIG_FILE, IMAGE_FOLDER, TEXT_FOLDER, WEIGHTS_FILE
from clipvisionalign.search.broken import fault_of
from clipvisionalign.search.files import PictureFile, Place, content_hash

#: Files that go through the tower at a time.
BATCH = 64
#: Pixels of a thumbnail's longer side.
THUMBNAIL = 256

#: A file to look at, with the hash of its content where it is known already.
Todo = tuple[PictureFile, str]
#: A row of the table without its number, or one with the `reason` why there is none, and what was at `fault`.
Row = dict[str, Any]
#: Ray's name for a cluster that is started on this machine.
LOCAL = "local"


def encoded(aligner: Aligner, place: Place, todo: Sequence[Todo]) -> Iterator[list[Row]]:
    """Rows of `BATCH` files at a time, in order; the files of the next two batches are decoded meanwhile."""
    look, size = aligner.image_tower.input.transform(), aligner.image_tower.input.size
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        waiting: deque[Future[Row]] = deque()
        started = 0
        for start in range(0, len(todo), BATCH):
            while started < min(len(todo), start + 3 * BATCH):
                waiting.append(pool.submit(_decode, place, look, size, _row(todo[started])))
                started += 1
            yield _look(aligner, [waiting.popleft().result() for _ in todo[start : start + BATCH]])


def _row(one: Todo) -> Row:
    file, content = one
    return {"raw": file.raw, "size": file.size, "mtime_ns": file.mtime_ns, "hash": content}


def _decode(place: Place, look: Callable[[Image.Image], Tensor], size: int, row: Row) -> Row:
    """The row with what is seen of its picture, `pixels` in bytes; or with the reason why nothing is."""
    nothing: Row = {"width": 0, "height": 0, "thumbnail": b"", "pixels": b"", "reason": "", "fault": ""}
    try:
        content = place.picture(row["raw"])
        row["hash"] = row["hash"] or content_hash(content)
        with open_header(content) as opened:
            width, height = opened.size
        picture = open_picture(content, max(size, THUMBNAIL))
        pixels = look(picture).numpy().tobytes()
    except (PictureError, OSError) as error:
        return row | nothing | {"reason": why_not(error, place, row["raw"]), "fault": fault_of(error)}
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out = BytesIO()
    picture.save(out, "JPEG", quality=80)
    seen = {"width": width, "height": height, "thumbnail": out.getvalue(), "pixels": pixels}
    return row | nothing | seen


def why_not(error: Exception, place: Place, raw: bytes) -> str:
    """Why a file was not decoded; with its own path, as it is listed, not with where that lies."""
    return str(error).replace(f"{place.folder / os.fsdecode(raw)}", raw.decode("utf-8", "backslashreplace"))


def _look(aligner: Aligner, rows: Sequence[Row]) -> list[Row]:
    """Vectors instead of pixels, for the rows that have any."""
    size, seen = aligner.image_tower.input.size, [row for row in rows if not row["reason"]]
    if seen:
        pixels = np.stack([np.frombuffer(row["pixels"], dtype=np.uint8).reshape(3, size, size) for row in seen])
        with torch.no_grad(), evaluating(aligner):
            features = aligner.image_tower(torch.from_numpy(pixels).to(aligner.device))
            vectors = iter(aligner.image_states(features).vectors.float().cpu().numpy())
    return [{name: value for name, value in row.items() if name != "pixels"}
            | {"vector": None if row["reason"] else next(vectors)} for row in rows]  # fmt: skip


def encoded_by_ray(
    run: str | Path, wanted: PictureInput, place: Place, todo: Sequence[Todo], address: str = LOCAL, workers: int = 0
) -> Iterator[list[Row]]:
    """What `encoded` gives, from a Ray cluster: tasks decode, actors look, each on a GPU where the cluster has some.

    address: "local" starts Ray on this machine; else that of a cluster, whose machines have this package and reach
    `place`; the run is sent to them. workers: actors; 0 for one on each GPU, or on every second core.
    Raises ConnectionError where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import pyarrow as arrow
    import ray

    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        there = ray.cluster_resources()
        gpus, cores = int(there.get("GPU", 0)), there.get("CPU", 1)
        workers = min(workers or gpus or max(1, int(cores // 2)), -(-len(todo) // BATCH))
        # One table is one block, and a block without a batch size stays whole: the tower sees the same batches.
        rows = [_row(one) for one in todo]
        blocks = [arrow.Table.from_pylist(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
        share = {"num_gpus": 1} if gpus else {"num_cpus": cores / 2 / workers}
        looked = (
            ray.data.from_arrow(blocks)
            .map_batches(
                _decode_block, batch_size=None, batch_format="pyarrow", num_cpus=0.5, fn_args=(place.location, wanted)
            )
            .map_batches(
                _Looker, batch_size=None, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=workers),
                fn_constructor_args=(ray.put(_files_of_run(Path(run))),), **share,
            )
        )  # fmt: skip
        for block in looked.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield block.to_pylist()
    finally:
        ray.shutdown()


def _decode_block(block: Any, location: str, wanted: PictureInput) -> Any:
    """A task of Ray: a block of files with their pixels."""
    import pyarrow as arrow

    place, look = Place(location), wanted.transform()
    return arrow.Table.from_pylist([_decode(place, look, wanted.size, row) for row in block.to_pylist()])


class _Looker:
    """An actor of Ray: an aligner of its own, written anew from what was sent."""

    def __init__(self, run: Any) -> None:
        import ray

        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(run).items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.aligner = load_aligner(folder)

    def __call__(self, block: Any) -> Any:
        import pyarrow as arrow

        width = self.aligner.config.width
        rows = _look(self.aligner, block.to_pylist())
        schema = block.schema.remove(block.schema.get_field_index("pixels"))
        return arrow.Table.from_pylist(
            rows, schema=schema.append(arrow.field("vector", arrow.list_(arrow.float32(), width)))
        )


def _files_of_run(run: Path) -> dict[str, bytes]:
    """What an aligner is loaded from, by name."""
    paths = [
        run / CONFIG_FILE,
        run / WEIGHTS_FILE,
        *(path for name in (TEXT_FOLDER, IMAGE_FOLDER) for path in (run / name).rglob("*") if path.is_file()),
    ]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}
