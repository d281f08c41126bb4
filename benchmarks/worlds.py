"""Images and captions of a few words each, and the common parts of models that know the words."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

WIDTH, WORDS = 32, 120


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


@lru_cache(maxsize=100_000)
def word_vector(word: str, seed: int) -> np.ndarray:
    """A vector of its own for every word, whatever the word."""
    return np.random.default_rng((seed, zlib.crc32(word.encode()))).standard_normal(WIDTH)


@dataclass
class World:
    """Images (N vectors), captions (M), each caption's image (M,), and what `audit` takes of images that are one."""

    images: list[np.ndarray]
    captions: list[str]
    owners: np.ndarray
    identity: np.ndarray | None = None
    caption_group: np.ndarray | None = None

    def ask(self, check: Callable[..., Any], model: Any, **options: Any) -> Any:
        """`audit` or `evaluate` of a model on this world."""
        return check(
            model, self.images, self.captions, self.owners, self.identity, caption_group=self.caption_group, **options
        )


def world(seed: int, images: int = 60, captions: Any = 5) -> World:
    """captions: of each image, one number or a number an image."""
    rng = np.random.default_rng(seed)
    vocabulary = [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(WORDS)]
    shown, written = [], []
    counts = np.broadcast_to(captions, images)
    for count in counts:
        about = rng.choice(vocabulary, 6, replace=False)
        shown.append(sum(word_vector(word, seed) for word in about))
        written += [" ".join(rng.permutation(about)[:4]) for _ in range(count)]
    return World(shown, written, np.repeat(np.arange(images), counts))


class Model:
    """The common part of all models here: images as they are, captions by their words. An honest model, good if `seed`
    is that of its world, else one of random vectors."""

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        self.seed, self.noise = seed, noise

    def see(self, images: Any) -> np.ndarray:
        return unit(np.stack([np.asarray(image, dtype=np.float64) for image in images]))

    def read(self, captions: Any) -> np.ndarray:
        vectors = []
        for caption in captions:
            vector = sum((word_vector(word, self.seed) for word in caption.split()), np.zeros(WIDTH))
            vectors.append(vector + self.noise * word_vector(caption, self.seed + 1))
        return unit(np.stack(vectors))


class Encoder(Model):
    """Answers `encode_images` and `encode_captions`."""

    def encode_images(self, images: Any) -> Any:
        return self.see(images)

    def encode_captions(self, captions: Any) -> Any:
        return self.read(captions)


class Scorer(Model):
    """Answers `score`."""

    def score(self, images: Any, captions: Any) -> Any:
        return self.see(images) @ self.read(captions).T
