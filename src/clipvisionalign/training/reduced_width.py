"""The narrower common space that a run on a pretrained model asks for: found in the vectors of its training split."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.joined_captions import gallery_texts
from clipvisionalign.images import ImageError, ImageSource
from clipvisionalign.json_io import read_json
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.pretrained import check_width, find_pretrained, principal_directions, width_of
from clipvisionalign.progress import progress
from clipvisionalign.training.data import TrainingData

logger = logging.getLogger(__name__)

#: Training images, with their captions, in whose vectors the directions are looked for.
MAX_IMAGES = 4000

_BATCH = 64


@dataclass
class ReducedWidth:
    """How a run's common space was made narrower than its pretrained model's.

    Attributes:
        own: The model's width.
        width: The run's.
        explained: Share of the squared dot products of images and captions that is left, from 0 to 1.
        images: Number of training images in whose vectors that was measured.
        captions: Number of their captions.
    """

    own: int
    width: int
    explained: float
    images: int
    captions: int

    def to_dict(self) -> dict[str, Any]:
        """What weights.json of a run folder holds of it."""
        return asdict(self)


def recorded_width(run: Path) -> ReducedWidth | None:
    """How the common space of a run was made narrower.

    Args:
        run: A run folder.

    Returns:
        What its weights.json holds of it; None for a run whose model has its own width.
    """
    path = run / "weights.json"
    space = read_json(path).get("common_space", {}) if path.is_file() else {}
    return ReducedWidth(**space) if "own" in space else None


def check_space(config: AlignerConfig) -> None:
    """Check that a run does not ask for a wider common space than its pretrained model has, by the model's config.

    Of a model on the hub only small files are fetched.

    Args:
        config: of the model.

    Raises:
        ValueError: Its `width` is above the pretrained model's own, or the model is of another kind.
        WeightsNotFound: There is no such model here or on the hub.
        OSError: A download failed.
    """
    if config.pretrained and config.width is not None:
        folder, name, _ = find_pretrained(config.pretrained, weights=False)
        check_width(config.width, width_of(folder), name)


def find_directions(
    config: AlignerConfig, data: TrainingData, device: torch.device, show_progress: bool = True
) -> tuple[ReducedWidth | None, Tensor | None]:
    """The directions that a narrower common space keeps, see `principal_directions`.

    Args:
        config: of the model; its `width` counts where it is given and there is a pretrained model.
        data: whose training split is encoded, at most `MAX_IMAGES` images of it with their captions.
        device: where the model encodes.
        show_progress: whether encoding shows a live line.

    Returns:
        The record of the directions, and these (width, D); None twice where the model keeps its own width.

    Raises:
        DataError: No image of the training split can be read.
    """
    if not config.pretrained or config.width is None:
        return None, None
    # What scores pairs is built on top of the narrower space.
    plain = config if config.design == "sparse" else replace(config, design="self")
    aligner = Aligner(replace(plain, width=None)).to(device).eval()
    if config.width >= aligner.width:
        # Equal, or refused when the model is built.
        return None, None
    images, captions = _training_vectors(aligner, data, show_progress)
    directions, explained = principal_directions(images, captions, config.width)
    reduced = ReducedWidth(aligner.width, config.width, explained, len(images), len(captions))
    logger.info(
        f"common space of {reduced.width} of {reduced.own} dimensions: the principal components (about zero) of "
        f"{reduced.images:,} images and {reduced.captions:,} captions, which have {100 * explained:.2f}% of their "
        "squared dot products"
    )
    return reduced, directions


def _training_vectors(aligner: Aligner, data: TrainingData, show_progress: bool) -> tuple[Tensor, Tensor]:
    """Unit vectors of training images (N, D) and of their captions (M, D)."""
    count = min(MAX_IMAGES, len(data.train) if isinstance(data.train, CaptionedImages) else data.train.count)
    images: list[Tensor] = []
    captions: list[str] = []
    rows = iter(progress(_training_rows(data), "encoding images, for their directions", count, show_progress))
    while batch := list(islice(rows, _BATCH)):
        vectors, read = _encode_readable(aligner, [image for image, _ in batch])
        images.append(vectors)
        captions += [caption for row in read for caption in batch[row][1]]
    if not sum(map(len, images)):
        raise DataError(f"{data.source}: no training image can be read, in whose vectors directions could be found")
    aligner.show_progress = show_progress
    return torch.cat(images), aligner.encode_captions(captions)


def _training_rows(data: TrainingData) -> Iterator[tuple[ImageSource, list[str]]]:
    """Training images with their captions: some of a data set by a hash of their names, or the first of a stream."""
    if isinstance(data.train, CaptionedImages):
        few = data.train if len(data.train) <= MAX_IMAGES else data.train.first_by_hash(MAX_IMAGES)
        yield from ((row.image, _texts(row.captions, data)) for row in few.rows)
        return
    good = (sample for sample in data.train.samples() if not sample.error and sample.captions)
    yield from ((sample.image, _texts(sample.captions, data)) for sample in islice(good, MAX_IMAGES))


def _texts(captions: Sequence[str], data: TrainingData) -> list[str]:
    """What stands for an image's captions: these, or where captions are joined the texts of a gallery."""
    return list(gallery_texts(captions) if data.joined else captions)


def _encode_readable(aligner: Aligner, images: list[ImageSource]) -> tuple[Tensor, list[int]]:
    """Vectors (n, D) of the images that can be read, and which those are; training itself reports the others."""
    try:
        return aligner.encode_images(images), list(range(len(images)))
    except ImageError:
        vectors, read = [], []
        for row, image in enumerate(images):
            try:
                vectors.append(aligner.encode_images([image]))
                read.append(row)
            except ImageError:
                continue
        return torch.cat(vectors) if vectors else torch.empty(0, aligner.width), read
