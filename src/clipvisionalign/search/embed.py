"""Encodes files into rows, decoded ahead of the image tower by threads or by a Ray cluster.

Both ways put the same files through the tower together, so that both give the same vectors.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipvisionalign.images import (
    CameraMetadata,
    ImageError,
    ImageTransform,
    camera_metadata,
    decode_image,
    open_header,
)
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.run_files import CONFIG_FILE, MODEL_FOLDERS, weights_file
from clipvisionalign.search.broken_files import classify_fault
from clipvisionalign.search.patch_vectors import packed_patches
from clipvisionalign.search.patches import PatchSettings
from clipvisionalign.search.ray_cluster import LOCAL_RAY, connected_to_ray
from clipvisionalign.search.storage import ImageFile, Storage, content_hash

#: Files that go through the tower at a time.
EMBED_BATCH_SIZE = 64
#: Pixels of a thumbnail's longer side.
THUMBNAIL_SIZE = 256

#: A file to look at, with the hash of its content where it is known already.
PendingFile = tuple[ImageFile, str]
#: A row of the table without its number, or one with the `reason` why there is none, what was at `fault`, and which
#: format's decoder is missing.
IndexRow = dict[str, Any]


def embed_files(
    aligner: Aligner, storage: Storage, pending: Sequence[PendingFile], patches: PatchSettings | None = None
) -> Iterator[list[IndexRow]]:
    """Encode files, in order; the files of the next two batches are decoded meanwhile.

    Args:
        aligner: The model.
        storage: The folder or URL of the images.
        pending: The files, each with the hash of its content, or "".
        patches: How the patches of the images are stored; None for none.

    Yields:
        Rows of `EMBED_BATCH_SIZE` files; one that cannot be decoded has no vector, but a reason and a fault. "patches"
        is in bytes, empty where there are none.
    """
    image_transform = aligner.image_tower.image_transform
    transform, size = image_transform.transform(), image_transform.decoded_size
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        futures: deque[Future[IndexRow]] = deque()
        submitted = 0
        for start in range(0, len(pending), EMBED_BATCH_SIZE):
            while submitted < min(len(pending), start + 3 * EMBED_BATCH_SIZE):
                futures.append(pool.submit(_decode, storage, transform, size, _pending_row(pending[submitted])))
                submitted += 1
            rows = [futures.popleft().result() for _ in pending[start : start + EMBED_BATCH_SIZE]]
            yield _embed(aligner, rows, patches)


def _pending_row(pending_file: PendingFile) -> IndexRow:
    file, content = pending_file
    return {"raw": file.raw, "size": file.size, "mtime_ns": file.mtime_ns, "hash": content}


def _decode(storage: Storage, transform: Callable[[Image.Image], Tensor], size: int, row: IndexRow) -> IndexRow:
    """The row with what is seen of its image, `pixels` in bytes; or with the reason why nothing is."""
    empty: IndexRow = {
        "width": 0, "height": 0, "thumbnail": b"", "pixels": b"", "reason": "", "fault": "", "missing_decoder": "",
        "camera_metadata": "",
    }  # fmt: skip
    try:
        source = storage.image_source(row["raw"])
        row["hash"] = row["hash"] or content_hash(source)
        # Before anything is loaded: some decoders take tags out with what they apply.
        with open_header(source) as header:
            camera = _pack_camera_metadata(camera_metadata(header))
        image, width, height = decode_image(source, size, THUMBNAIL_SIZE)
        pixels = transform(image).numpy().tobytes()
    except (ImageError, OSError) as error:
        return row | empty | {
            "reason": decode_error_message(error, storage, row["raw"]), "fault": classify_fault(error),
            "missing_decoder": error.missing_decoder if isinstance(error, ImageError) else "",
        }  # fmt: skip
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    out = BytesIO()
    image.save(out, "JPEG", quality=80)
    decoded = {"width": width, "height": height, "thumbnail": out.getvalue(), "pixels": pixels,
               "camera_metadata": camera}  # fmt: skip
    return row | empty | decoded


def _pack_camera_metadata(metadata: CameraMetadata) -> str:
    """As one text, which has the same type in all blocks of a cluster."""
    values = asdict(metadata)
    return json.dumps(values | {"taken": metadata.taken.isoformat() if metadata.taken else None})


def unpack_camera_metadata(text: str) -> CameraMetadata:
    """What the column "camera_metadata" of a decoded row holds.

    Args:
        text: The column; "" for an image that was not decoded.

    Returns:
        The metadata.
    """
    values = json.loads(text) if text else {}
    taken = values.get("taken")
    return CameraMetadata(**values | {"taken": datetime.fromisoformat(taken) if taken else None})


def decode_error_message(error: Exception, storage: Storage, raw: bytes) -> str:
    """Why a file was not decoded, with its path below the folder.

    Args:
        error: The error.
        storage: The folder or URL of the images.
        raw: Path of the file, in bytes.

    Returns:
        The message.
    """
    return str(error).replace(f"{storage.folder / os.fsdecode(raw)}", raw.decode("utf-8", "backslashreplace"))


def _embed(aligner: Aligner, rows: Sequence[IndexRow], settings: PatchSettings | None) -> list[IndexRow]:
    """Vectors and patches instead of pixels, for the rows that have any."""
    vectors: Iterator[np.ndarray] = iter(())
    packed: Iterator[bytes] = iter(())
    shape, decodable = aligner.image_tower.image_transform.input_shape, [row for row in rows if not row["reason"]]
    if decodable:
        pixels = np.stack([np.frombuffer(row["pixels"], dtype=np.uint8).reshape(shape) for row in decodable])
        with torch.no_grad(), eval_mode(aligner):
            features = aligner.image_tower(torch.from_numpy(pixels).to(aligner.device))
            embeddings = aligner.embed_image_features(features)
            vectors = iter(embeddings.vectors.float().cpu().numpy())
            packed = iter(packed_patches(aligner, embeddings, settings) if settings else [b""] * len(decodable))
    return [{name: value for name, value in row.items() if name != "pixels"}
            | {"vector": None if row["reason"] else next(vectors), "patches": b"" if row["reason"] else next(packed)}
            for row in rows]  # fmt: skip


def embed_files_with_ray(
    run: str | Path,
    image_transform: ImageTransform,
    storage: Storage,
    pending: Sequence[PendingFile],
    address: str = LOCAL_RAY,
    workers: int = 0,
    patches: PatchSettings | None = None,
) -> Iterator[list[IndexRow]]:
    """The rows of `embed_files`, from a Ray cluster.

    Tasks decode, actors encode, each on a GPU where the cluster has some.

    Args:
        run: The run folder, which is sent to the actors.
        image_transform: The transform of its image tower.
        storage: The folder or URL of the images, which the cluster's machines reach.
        pending: The files, each with the hash of its content, or "".
        address: "local" starts Ray on this machine; else the address of a cluster whose machines have this package.
        workers: Number of actors; 0 for one on each GPU, or on every second core.
        patches: How the patches of the images are stored; None for none.

    Yields:
        Rows as `embed_files` yields them.

    Raises:
        ConnectionError: No cluster answers.
        ValueError: `run` is no run folder.
    """
    import pyarrow as arrow
    import ray

    with connected_to_ray(address):
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        cluster_resources = ray.cluster_resources()
        gpus, cores = int(cluster_resources.get("GPU", 0)), cluster_resources.get("CPU", 1)
        workers = min(workers or gpus or max(1, int(cores // 2)), -(-len(pending) // EMBED_BATCH_SIZE))
        # One table is one block, and a block without a batch size stays whole: the tower sees the same batches.
        rows = [_pending_row(pending_file) for pending_file in pending]
        blocks = [
            arrow.Table.from_pylist(rows[start : start + EMBED_BATCH_SIZE])
            for start in range(0, len(rows), EMBED_BATCH_SIZE)
        ]
        actor_resources = {"num_gpus": 1} if gpus else {"num_cpus": cores / 2 / workers}
        embedded = (
            ray.data.from_arrow(blocks)
            .map_batches(
                _decode_block,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=0.5,
                fn_args=(storage.location, image_transform),
            )
            .map_batches(
                _EmbedActor,
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                fn_constructor_args=(ray.put(_read_run_files(Path(run))), patches),
                **actor_resources,
            )
        )
        for block in embedded.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield block.to_pylist()


def _decode_block(block: Any, location: str, image_transform: ImageTransform) -> Any:
    """A task of Ray: a block of files with their pixels."""
    import pyarrow as arrow

    storage, transform = Storage(location), image_transform.transform()
    return arrow.Table.from_pylist(
        [_decode(storage, transform, image_transform.decoded_size, row) for row in block.to_pylist()]
    )


class _EmbedActor:
    """An actor of Ray: an aligner of its own, written from what was sent."""

    def __init__(self, run: Any, patches: PatchSettings | None) -> None:
        import ray

        self.patches = patches

        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(run).items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.aligner = load_aligner(folder)

    def __call__(self, block: Any) -> Any:
        import pyarrow as arrow

        width = self.aligner.width
        rows = _embed(self.aligner, block.to_pylist(), self.patches)
        schema = block.schema.remove(block.schema.get_field_index("pixels"))
        for name, kind in (("vector", arrow.list_(arrow.float32(), width)), ("patches", arrow.binary())):
            schema = schema.append(arrow.field(name, kind))
        return arrow.Table.from_pylist(rows, schema=schema)


def _read_run_files(run: Path) -> dict[str, bytes]:
    """What an aligner is loaded from, by name. Raises ValueError for what is no run folder."""
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(
            f"{run}: a cluster takes a run folder: 'clipvisionalign train DATA --model.pretrained {run} --epochs 0' "
            "writes one of a pretrained model as it is"
        )
    paths = [
        run / CONFIG_FILE,
        *([file] if (file := weights_file(run)) else []),
        *(path for name in MODEL_FOLDERS for path in (run / name).rglob("*") if path.is_file()),
    ]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}
