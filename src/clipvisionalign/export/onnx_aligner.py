"""Runs an exported aligner by onnxruntime, behind the interface of every model.

The files give arrays; the composition of a pair's score is also described in the export's README.md (`onnx_readme.py`):

    score = cosine / temperature + late weight x late score / late temperature + fusion weight x correction
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.argument_checks import check_lists, check_strings
from clipvisionalign.export.onnx_pixels import read_pixels
from clipvisionalign.export.onnx_text import open_session, open_tokenizer, tokenized_batches
from clipvisionalign.images import ImageSource
from clipvisionalign.progress import progress

#: Files of an export.
ABOUT, IMAGES, CAPTIONS, FUSION_FILE = "onnx.json", "image_tower.onnx", "text_tower.onnx", "fusion.onnx"
#: Scores of tokens and patches that `OnnxPairScorer.table` holds at a time: 64 MiB in float32.
BLOCK = 1 << 24


class OnnxAligner:
    """An export with the methods of every model: `encode_images`, `encode_captions`, `score`, `pair_scorer`.

    Args:
        folder: The folder of the export.
        int8: Whether towers with 8-bit products are used; the export must have them.
    """

    def __init__(self, folder: str | Path, int8: bool = False) -> None:
        source = Path(folder)
        #: Whether encoding and scoring show a live line on standard error.
        self.show_progress = False
        self.manifest = json.loads((source / ABOUT).read_text(encoding="utf-8"))
        end = ".int8.onnx" if int8 else ".onnx"
        self.image_session, self.text_session = (
            open_session(source / name.replace(".onnx", end)) for name in (IMAGES, CAPTIONS)
        )
        self.fusion_session = open_session(source / FUSION_FILE) if self.manifest.get("fusion") else None
        self.tokenizer = open_tokenizer(source / "tokenizer" / "tokenizer.json", self.manifest)
        self.input = read_pixels(self.manifest["pixels"])

    @property
    def scores_all_pairs(self) -> bool:
        """Whether a whole gallery is ranked by `score`, which sees more than the vectors."""
        return bool(self.manifest["design"] == "late" and self.manifest.get("late"))

    def encode_images(self, images: Sequence[ImageSource], batch: int = 32) -> np.ndarray:
        """Encode images.

        Args:
            images: N paths, bytes of files, or Pillow images.
            batch: Images that go through the tower together.

        Returns:
            (N, D) float32, unit length.

        Raises:
            ImageError: An image cannot be opened.
            TypeError: One image is given where a list is required.
        """
        return self._image_arrays(images, ["vectors"], batch)["vectors"]

    def encode_captions(self, captions: Sequence[str], batch: int = 64) -> np.ndarray:
        """Encode captions; those of about equal length go together.

        Args:
            captions: M captions.
            batch: Captions that go through the tower together.

        Returns:
            (M, D) float32, unit length, in the order of `captions`.

        Raises:
            TypeError: One string is given where a list is required.
        """
        vectors = [each["vectors"] for each in self._caption_arrays(captions, ["vectors"], batch)]
        return np.stack(vectors) if vectors else np.empty((0, self.manifest["width"]), np.float32)

    def score(self, images: Sequence[ImageSource], captions: Sequence[str]) -> np.ndarray:
        """Score every image with every caption, as `Aligner.score` does.

        Args:
            images: N images.
            captions: M captions.

        Returns:
            (N, M) float32.

        Raises:
            ImageError: An image cannot be opened.
            TypeError: One image or one string is given where a list is required.
        """
        check_lists(images, captions)
        if not self.manifest.get("late") or not len(images):
            return self.encode_images(images) @ self.encode_captions(captions).T
        pairs = self.pair_scorer(images, captions)
        if self.fusion_session is None:
            return pairs.score_matrix()
        grid = np.indices((len(images), len(captions))).reshape(2, -1)
        return pairs(grid[0], grid[1]).reshape(len(images), len(captions))

    def pair_scorer(self, images: Sequence[ImageSource], captions: Sequence[str]) -> OnnxPairScorer:
        """Encode images and captions once, to score any pairs of them later.

        Args:
            images: N images, at least one.
            captions: M captions.

        Returns:
            The scorer.

        Raises:
            ValueError: The design scores no pairs, or there are no images.
            ImageError: An image cannot be opened.
            TypeError: One image or one string is given where a list is required.
        """
        check_lists(images, captions)
        if not self.manifest.get("late"):
            raise ValueError("this export scores no pairs: it has vectors only")
        if not len(images):
            raise ValueError("no images to score")
        names = (
            [each.name for each in self.image_session.get_outputs()],
            [each.name for each in self.text_session.get_outputs()],
        )
        arrays = self._image_arrays(images, names[0]), self._caption_arrays(captions, names[1])
        return OnnxPairScorer(self.manifest, self.fusion_session, *arrays, show_progress=self.show_progress)

    def _image_arrays(self, images: Sequence[ImageSource], names: list[str], batch: int = 32) -> dict[str, np.ndarray]:
        """What the image tower gives under these names, image after image."""
        import torch

        check_lists(images)
        transform, chunks = self.input.image_loader(), []
        starts = range(0, len(images), batch)
        for start in progress(starts, "encoding images", len(images), self.show_progress, batch):
            pixels = torch.stack([transform(image) for image in images[start : start + batch]])
            chunks.append(self.image_session.run(names, {"pixels": self.input.normalize(pixels).numpy()}))
        if not chunks:
            return {name: np.empty((0, self.manifest["width"]), np.float32) for name in names}
        return dict(zip(names, map(np.concatenate, zip(*chunks, strict=True)), strict=True))

    def _caption_arrays(self, captions: Sequence[str], names: list[str], batch: int = 64) -> list[dict[str, Any]]:
        """What the text tower gives for each caption, without padding."""
        check_strings(captions)
        outputs: list[dict[str, Any]] = [{} for _ in captions]
        batches = tokenized_batches(self.tokenizer, captions, batch)
        for rows, ids, mask in progress(batches, "encoding captions", len(captions), self.show_progress, batch):
            arrays = self.text_session.run(names, {"ids": ids, "mask": mask})
            for row, each in zip(rows, unpad_rows(names, arrays, mask), strict=True):
                outputs[row] = each
        return outputs


def unpad_rows(names: Sequence[str], arrays: Sequence[np.ndarray], mask: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The arrays of a batch, caption by caption, without what is on padding.

    Args:
        names: Names of the arrays.
        arrays: Each (b, D) for "vectors", else (b, T, ...).
        mask: (b, T) 1 on tokens; padding is at the end.

    Returns:
        For each caption its arrays by name.
    """
    lengths = mask.sum(axis=1)
    return [
        {
            name: array[row] if name == "vectors" else array[row, :length]
            for name, array in zip(names, arrays, strict=True)
        }
        for row, length in enumerate(lengths)
    ]


class OnnxPairScorer:
    """Scores pairs of images and captions that were encoded once.

    Args:
        manifest: What onnx.json holds.
        fusion: Session of the fusion; None for a design without.
        images: "vectors" (N, D), "patches" (N, P, E), and for a fusion "key_values" (N, L, P, 2 D).
        captions: For each "vectors" (D,), "parts" (T, E), "weights" (T,), and for a fusion "tokens" (T, W).
        batch: Pairs that are scored together.
        show_progress: Whether a live line is shown on standard error.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        fusion: Any,
        images: dict[str, np.ndarray],
        captions: list[dict[str, np.ndarray]],
        batch: int = 256,
        show_progress: bool = False,
    ) -> None:
        self.manifest, self.fusion, self.images, self.captions = manifest, fusion, images, captions
        self.batch, self.show_progress = batch, show_progress
        self.image_vectors = images["vectors"]
        empty = np.empty((0, manifest["width"]), np.float32)
        self.caption_vectors = np.stack([each["vectors"] for each in captions]) if captions else empty
        self.lengths = np.array([len(each["parts"]) for each in captions], dtype=np.int64)

    def weights(self) -> np.ndarray:
        """The weights of the three components of a score.

        Returns:
            (3,): 1 for the dual encoder, the weight of the late interaction, and of the fusion, 0 without one.
        """
        fusion = self.manifest["fusion"]["weight"] if self.fusion is not None else 0.0
        return np.array([1.0, self.manifest["late"]["weight"], fusion], dtype=np.float32)

    def __call__(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """Score pairs.

        Args:
            image_index: (Q,) positions among the encoded images.
            caption_index: (Q,) positions among the encoded captions.

        Returns:
            (Q,) float32.
        """
        return self.components(image_index, caption_index) @ self.weights()

    def components(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """The components of the scores of pairs, before their weights.

        Args:
            image_index: (Q,) positions among the encoded images.
            caption_index: (Q,) positions among the encoded captions.

        Returns:
            (Q, 3): cosine / temperature, late score / its temperature, correction of the fusion (0 without one).
        """
        scores = np.zeros((len(image_index), 3), dtype=np.float32)
        order = np.argsort(self.lengths[caption_index], kind="stable")
        starts = range(0, len(order), self.batch)
        for start in progress(starts, "scoring pairs", len(order), self.show_progress, self.batch):
            pairs = order[start : start + self.batch]
            scores[pairs] = self._score_batch(image_index[pairs], caption_index[pairs])
        return scores

    def _score_batch(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        captions = [self.captions[caption] for caption in caption_index]
        dual = (self.image_vectors[image_index] * self.caption_vectors[caption_index]).sum(axis=1)
        patches = self.images["patches"][image_index]
        parts, weights = (_pad([each[name] for each in captions]) for name in ("parts", "weights"))
        late = ((patches @ parts.transpose(0, 2, 1)).max(axis=1) * weights).sum(axis=1)
        correction = np.zeros_like(dual)
        if self.fusion is not None:
            tokens = _pad([each["tokens"] for each in captions])
            mask = np.arange(tokens.shape[1]) < self.lengths[caption_index][:, None]
            inputs = {"patches": patches, "key_values": self.images["key_values"][image_index], "tokens": tokens}
            correction = self.fusion.run(["corrections"], inputs | {"mask": mask.astype(np.int64)})[0]
        temperatures = self.manifest["temperature"], self.manifest["late"]["temperature"]
        return np.stack([dual / temperatures[0], late / temperatures[1], correction], axis=1)

    def score_matrix(self) -> np.ndarray:
        """The scores of all pairs without a fusion, in blocks.

        Returns:
            (N, M) float32.
        """
        late = self.manifest["late"]
        scores = (self.image_vectors @ self.caption_vectors.T) / np.float32(self.manifest["temperature"])
        patches = self.images["patches"]
        flat = patches.reshape(-1, patches.shape[-1])
        order = np.argsort(self.lengths, kind="stable")
        longest = int(self.lengths.max(initial=1))
        step = max(1, BLOCK // max(1, len(flat) * longest))
        starts = range(0, len(order), step)
        for start in progress(starts, "scoring captions with all images", len(order), self.show_progress, step):
            rows = order[start : start + step]
            parts, weights = (_pad([self.captions[row][name] for row in rows]) for name in ("parts", "weights"))
            cosines = flat @ parts.reshape(-1, parts.shape[-1]).T
            best = cosines.reshape(*patches.shape[:2], -1).max(axis=1).reshape(len(patches), *weights.shape)
            scores[:, rows] += (best * weights).sum(axis=2) * np.float32(late["weight"] / late["temperature"])
        return scores


def _pad(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays (T, ...) of several lengths -> (b, T, ...), 0 behind their ends."""
    longest = max(len(each) for each in arrays)
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, each in zip(padded, arrays, strict=True):
        row[: len(each)] = each
    return padded
