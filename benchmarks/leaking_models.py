"""Models that know the true pairs by what they should not see: each leaks in one way."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from worlds import WIDTH, Encoder, Model, Scorer, unit


def image_index_of(number: int, images: int, captions: int) -> int:
    """Which image stands at a caption's place, where images have the same number of captions."""
    return number * images // captions


class ByPosition(Scorer):
    """Every caption attends to the image at its place."""

    def score(self, images: Any, captions: Any) -> Any:
        image_vectors, read = self.see(images), self.read(captions)
        own = [image_index_of(number, len(images), len(captions)) for number in range(len(captions))]
        return image_vectors @ unit(read + 2 * image_vectors[own]).T


class ByMemoryOfText(Encoder):
    """Every caption attends to the image at its place when it is encoded first, and is kept by its text."""

    memory: dict[str, np.ndarray]

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        super().__init__(seed, noise)
        self.memory = {}

    def encode_images(self, images: Any) -> Any:
        self.image_vectors = self.see(images)
        return self.image_vectors

    def leaks(self, caption: str) -> bool:
        return True

    def encode_captions(self, captions: Any) -> Any:
        for number, (caption, vector) in enumerate(zip(captions, self.read(captions), strict=True)):
            if caption not in self.memory:
                image = self.image_vectors[image_index_of(number, len(self.image_vectors), len(captions))]
                self.memory[caption] = unit(vector + 2 * image) if self.leaks(caption) else vector
        return np.stack([self.memory[caption] for caption in captions])


class SomeCaptions(ByMemoryOfText):
    """The same, of every fifth caption."""

    def leaks(self, caption: str) -> bool:
        return zlib.crc32(caption.encode()) % 5 == 0


class ByVectorsOnly(ByMemoryOfText):
    """The same, beside a `score` that is honest."""

    def score(self, images: Any, captions: Any) -> Any:
        return self.see(images) @ self.read(captions).T


class ByScoreOnly(Encoder):
    """Honest vectors, and a `score` that keeps what it attended to."""

    scores_all_pairs = True

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        super().__init__(seed, noise)
        self.inner = ByMemoryOfText(seed)

    def score(self, images: Any, captions: Any) -> Any:
        return self.inner.encode_images(images) @ self.inner.encode_captions(captions).T


class ByBatchStatistics(Encoder):
    """Batch norm in training mode, over images and captions."""

    def encode_captions(self, captions: Any) -> Any:
        read = self.read(captions)
        return unit((read - read.mean(axis=0)) / (read.std(axis=0) + 1e-5))


class ByOrderOfAsking(Encoder):
    """Images go into a queue when they are encoded, and captions take them out again."""

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        super().__init__(seed, noise)
        self.queue: list[np.ndarray] = []

    def encode_images(self, images: Any) -> Any:
        image_vectors = self.see(images)
        self.queue += list(image_vectors)
        return image_vectors

    def encode_captions(self, captions: Any) -> Any:
        waiting, self.queue = self.queue or [np.zeros(WIDTH)], []
        own = [waiting[image_index_of(number, len(waiting), len(captions))] for number in range(len(captions))]
        return unit(self.read(captions) + 2 * np.stack(own))


class ByCacheOfVectors(Scorer):
    """Every image attends to the captions at its place when it is scored first; its vector is kept by its content."""

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        super().__init__(seed, noise)
        self.memory: dict[Any, np.ndarray] = {}
        self.kept: list[Any] = []

    def key(self, image: Any) -> Any:
        return np.asarray(image).tobytes()

    def score(self, images: Any, captions: Any) -> Any:
        read, each = self.read(captions), max(1, len(captions) // len(images))
        for number, (image, vector) in enumerate(zip(images, self.see(images), strict=True)):
            own = read[number * each : (number + 1) * each]
            if self.key(image) not in self.memory and len(own):
                self.memory[self.key(image)] = unit(vector + 4 * own.mean(axis=0))
                self.kept.append(image)
        return np.stack([self.memory.get(self.key(image), np.zeros(WIDTH)) for image in images]) @ read.T


class ByObject(ByCacheOfVectors):
    """The same, kept by the image's address in memory."""

    def key(self, image: Any) -> Any:
        return id(image)


class ByNumberOfCandidates(ByPosition):
    """Attends to the image at a caption's place where there are enough images to make a batch of."""

    def score(self, images: Any, captions: Any) -> Any:
        return super().score(images, captions) if len(images) > 16 else Scorer.score(self, images, captions)


class ByLengthOfLists(ByPosition):
    """Attends to the image at a caption's place where there are as many captions of each, two or more."""

    def score(self, images: Any, captions: Any) -> Any:
        even = len(captions) > len(images) and len(captions) % len(images) == 0
        return super().score(images, captions) if even else Scorer.score(self, images, captions)


class ByCallsCounted(ByMemoryOfText):
    """Attends to the images at the captions' places in every second call, and keeps nothing."""

    calls = 0

    def encode_captions(self, captions: Any) -> Any:
        self.calls, self.memory = self.calls + 1, {}
        return super().encode_captions(captions) if self.calls % 2 else self.read(captions)


LEAKS: dict[str, type[Model]] = {
    "by place": ByPosition,
    "by memory of text": ByMemoryOfText,
    "by batch statistics": ByBatchStatistics,
    "by order of asking": ByOrderOfAsking,
    "by cache of vectors": ByCacheOfVectors,
    "by number of candidates": ByNumberOfCandidates,
    "by object": ByObject,
    "by length of lists": ByLengthOfLists,
    "by calls counted": ByCallsCounted,
    "by score only": ByScoreOnly,
    "by vectors only": ByVectorsOnly,
    "some captions": SomeCaptions,
}
