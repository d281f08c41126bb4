"""The vectors of the training split by the model that a run starts from, computed once for a distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.batch import decode_pixels
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.files import fsync_paths, remove
from clipvisionalign.images import ImageSource
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.progress import progress
from clipvisionalign.training.cached_features import AnyFeatureCache, embed_cached
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.distillation import START_FILES, START_VECTORS
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.feature_cache import allocate_array
from clipvisionalign.training.forward import FeatureLookup
from clipvisionalign.training.init_run import load_init_weights
from clipvisionalign.training.validation import interleave_rows

#: Images, and captions, that a process encodes between two writes.
_BLOCK_SIZES = (64, 1000)


def build_start(config: RunConfig, device: torch.device, directions: Tensor | None = None) -> Aligner:
    """The model that a run starts from, where the run's own has been trained since, as in a later stage.

    Args:
        config: The settings of the run, whose `init` or `model.pretrained` it is.
        device: Where it encodes.
        directions: As of `Aligner`, of a pretrained model in a narrower common space.

    Returns:
        The model.
    """
    start = Aligner(config.model, load_weights=not config.init, directions=directions)
    if config.init:
        load_init_weights(start, config.init)
    return start.to(device).to(memory_format=torch.channels_last)


def write_start_vectors(
    run: Path, start: Aligner, data: CaptionedImages, processes: Distributed, cached: FeatureLookup | None = None
) -> None:
    """Encode the training split by the start, and write the vectors into the run's folder; every process calls this.

    Args:
        run: The run folder.
        start: The model that the run starts from.
        data: The training split.
        processes: They share the work.
        cached: What the frozen towers of `start` gave for the split, where that is on disk.

    Raises:
        OSError: The disk has no room for them.
    """
    folder, world_size = run / START_VECTORS, processes.world_size
    features = None if cached is None else cached.image_features
    pooled = None if cached is None or cached.caption_features is None else cached.caption_features.pooled
    tokens = start.text_tower.tokenize(data.captions) if pooled is None else []
    # Its own progress would be that of each block.
    shown, start.show_progress = start.show_progress, False

    def encode_captions(rows: list[int]) -> Tensor:
        return (
            start.encode_pooled(pooled[rows]) if pooled is not None else start.encode_tokens([tokens[r] for r in rows])
        )

    def encode_images(rows: list[int]) -> Tensor:
        if features is not None:
            return _embed_cached(start, features, rows)
        return _encode_images(start, [data.rows[row].image for row in rows])

    def make_folder() -> None:
        remove(folder)
        folder.mkdir()

    processes.run_on_main(make_folder)
    splits = (len(data), encode_images), (len(data.captions), encode_captions)
    for kind, block_size, (count, encode) in zip(START_FILES, _BLOCK_SIZES, splits, strict=True):
        size = block_size * world_size
        blocks = [range(first, min(first + size, count)) for first in range(0, count, size)]
        title = f"{kind} by the model that the run starts from"
        array = _open_array(folder / f"{kind}.npy", (count, start.width), processes)
        with eval_mode(start):
            for block in progress(blocks, title, count, processes.is_main, units_per_item=len):
                own = list(block[processes.rank :: world_size])
                parts = processes.run_and_gather(partial(_encode, encode, own, start.width))
                if array is not None:
                    array[block.start : block.stop] = interleave_rows(parts).numpy()
        if array is not None:
            array.flush()
    start.show_progress = shown
    processes.run_on_main(lambda: fsync_paths(*folder.iterdir(), folder))


def _open_array(path: Path, shape: tuple[int, int], processes: Distributed) -> np.memmap | None:
    """A file for vectors, its room taken, on the main process; None on the others. Raises OSError on all."""
    opened: list[np.memmap] = []
    processes.run_on_main(lambda: opened.append(allocate_array(path, np.float32, shape)))
    return opened[0] if opened else None


def _encode(encode: Callable[[list[int]], Tensor], rows: list[int], width: int) -> Tensor:
    """The vectors (n, D) of rows of the split; the last block may have none for a process."""
    return encode(rows).cpu() if rows else torch.empty(0, width)


@torch.no_grad()
def _encode_images(start: Aligner, images: Sequence[ImageSource]) -> Tensor:
    """Unit vectors (n, D) of images as they are; zeros for those that cannot be decoded, which no step has either."""
    load = start.image_tower.image_transform.image_loader()
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(lambda image: decode_pixels([image], load)[0], images))
    good = [row for row, pixels in enumerate(decoded) if len(pixels)]
    vectors = torch.zeros(len(images), start.width)
    if good:
        pixels = torch.cat([decoded[row] for row in good]).to(start.device)
        vectors[good] = start.embed_image_features(start.image_tower(pixels)).vectors.cpu()
    return vectors


@torch.no_grad()
def _embed_cached(start: Aligner, features: AnyFeatureCache, rows: list[int]) -> Tensor:
    """Unit vectors (n, D) of images whose features are on disk, in the view without augmentation."""
    index = torch.tensor(rows)
    return embed_cached(start, features(index, torch.zeros_like(index), start.device)).vectors.cpu()
