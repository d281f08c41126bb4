"""`EncodingModel`: from images and captions to vectors and scores, with the towers that a subclass has.

- A caption's vector depends on that caption alone and an image's on that image alone; only a pair's score uses both.
- Encoding is in float32 whatever the training used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.argument_checks import check_lists, check_strings
from clipvisionalign.batch import TokenGroup, group_by_length
from clipvisionalign.images import ImageSource
from clipvisionalign.models.aligner_config import AlignerConfig
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.heads import CaptionEmbeddings, ImageEmbeddings
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower
from clipvisionalign.models.pair_scorer import EncodedCaption, EncodedImages, PairModel, PairScorer
from clipvisionalign.models.pretrained.parts import PretrainedImageTower, PretrainedTextTower
from clipvisionalign.models.text_tower import CaptionFeatures, TextTower
from clipvisionalign.models.tower_cache import TowerOutputCache
from clipvisionalign.progress import progress

#: Towers by name, or of a pretrained dual encoder.
AnyImageTower: TypeAlias = ImageTower | PretrainedImageTower
AnyTextTower: TypeAlias = TextTower | PretrainedTextTower


class EncodingModel(PairModel):
    """Encodes and scores images and captions; a subclass has the towers and heads, and embeds their outputs.

    Attributes:
        config: The settings of the model.
        image_tower: Pixels to pooled vector and patches.
        text_tower: Tokens to pooled vector and token vectors.
        text_head: Pooled vectors of captions to the common space.
        tower_cache: Outputs of frozen towers, reused where the same images and captions come again; None for none.
    """

    config: AlignerConfig
    image_tower: AnyImageTower
    text_tower: AnyTextTower
    text_head: nn.Module
    tower_cache: TowerOutputCache | None

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """D, width of the common space."""
        assert self.config.width is not None
        return self.config.width

    def embed_image_features(self, features: ImageFeatures) -> ImageEmbeddings:
        """Project the features of an image tower to the common space.

        Args:
            features: Pooled (B, C) and patches (B, P, C').

        Returns:
            Unit vectors (B, D), and patches (B, P, D) or None.
        """
        raise NotImplementedError

    def embed_caption_group(self, group: TokenGroup) -> CaptionEmbeddings:
        """Encode one group of captions.

        Args:
            group: Token ids and mask (b, T), on the model's device.

        Returns:
            Unit vectors (b, D), tokens (b, T, W) or None, and mask (b, T).
        """
        raise NotImplementedError

    def embed_caption_features(self, features: CaptionFeatures, group: TokenGroup) -> CaptionEmbeddings:
        """`embed_caption_group` with precomputed outputs of the text tower.

        Args:
            features: Outputs for a whole batch, pooled (M, W) and tokens (M, T, W) or None.
            group: One group of its captions, whose `rows` are positions among the M.

        Returns:
            As `embed_caption_group`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode_images(self, images: Sequence[ImageSource], batch: int = 64) -> Tensor:
        """Encode images.

        Args:
            images: N paths, bytes of files, or Pillow images.
            batch: Images that go through the tower together.

        Returns:
            (N, D) unit length, float32, on the CPU, in the order of `images`.

        Raises:
            ImageError: An image cannot be opened.
            TypeError: One image is given where a list is required.
        """
        chunks = [embeddings.vectors.cpu() for embeddings in self.image_chunks(images, batch)]
        return torch.cat(chunks) if chunks else torch.empty(0, self.width)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str], batch: int = 250) -> Tensor:
        """Encode captions; those of about equal length go together.

        Args:
            captions: M captions; what is longer than the text tower's `max_tokens` is cut.
            batch: Captions that go through the tower together.

        Returns:
            (M, D) unit length, float32, on the CPU, in the order of `captions`.

        Raises:
            TypeError: One string is given where a list is required.
        """
        check_strings(captions)
        return self.encode_tokens(self.text_tower.tokenize(captions), batch)

    @torch.no_grad()
    def encode_tokens(self, tokens: list[list[int]], batch: int = 250) -> Tensor:
        """Encode captions that are tokenised already.

        Args:
            tokens: M lists of token ids, as the text tower's `tokenize` returns them.
            batch: Captions that go through the tower together.

        Returns:
            (M, D) unit length, float32, on the CPU.
        """
        vectors = torch.empty(len(tokens), self.width)
        for rows, embeddings in self._caption_chunks(tokens, batch):
            vectors[rows] = embeddings.vectors.cpu()
        return vectors

    @torch.no_grad()
    def encode_pooled(self, pooled: Tensor) -> Tensor:
        """Project pooled vectors of the text tower to the common space.

        Args:
            pooled: (M, W).

        Returns:
            (M, D) unit length, float32, on the CPU.
        """
        return F.normalize(self.text_head(pooled.to(self.device)).float(), dim=-1).cpu()

    def score(self, images: Sequence[ImageSource], captions: Sequence[str]) -> Tensor:
        """Score every image with every caption.

        Args:
            images: N paths, bytes of files, or Pillow images.
            captions: M captions.

        Returns:
            (N, M), higher where image and caption fit: cosines, from -1 to 1, for the designs "self" and "sparse"; for
            "late" and "cross" scores of pairs, which have no bounds.

        Raises:
            ImageError: An image cannot be opened.
            TypeError: One image or one string is given where a list is required.
        """
        check_lists(images, captions)
        if self.late is None or not len(images):
            return self.encode_images(images) @ self.encode_captions(captions).T
        pairs = self.pair_scorer(images, captions)
        if self.fusion is None:
            return pairs.score_matrix()
        grid = np.indices((len(images), len(captions))).reshape(2, -1)
        return torch.from_numpy(pairs(grid[0], grid[1])).reshape(len(images), len(captions))

    def score_pairs(
        self, images: Sequence[ImageSource], captions: Sequence[str], image_index: np.ndarray, caption_index: np.ndarray
    ) -> np.ndarray:
        """Score some pairs only.

        Args:
            images: N paths, bytes of files, or Pillow images; each is encoded once.
            captions: M captions.
            image_index: (Q,) numbers of images.
            caption_index: (Q,) numbers of captions.

        Returns:
            (Q,) score of image `image_index[q]` with caption `caption_index[q]`, as in `score`.

        Raises:
            ImageError: An image cannot be opened.
            TypeError: One image or one string is given where a list is required.
        """
        check_lists(images, captions)
        if self.late is not None:
            return self.pair_scorer(images, captions)(image_index, caption_index)
        left, right = self.encode_images(images).numpy(), self.encode_captions(captions).numpy()
        return np.einsum("qd,qd->q", left[image_index], right[caption_index])

    @torch.no_grad()
    def pair_scorer(self, images: Sequence[ImageSource], captions: Sequence[str], batch: int = 512) -> PairScorer:
        """Encode images and captions once, to score any pairs of them later.

        Args:
            images: N paths, bytes of files, or Pillow images.
            captions: M captions.
            batch: Pairs that are scored together.

        Returns:
            The scorer, which keeps patches and tokens in memory.

        Raises:
            ValueError: The design scores no pairs, or there are no images.
            ImageError: An image cannot be opened.
            TypeError: One image or one string is given where a list is required.
        """
        if self.late is None:
            raise ValueError(f"the design '{self.config.design}' scores no pairs: it has vectors only")
        check_lists(images, captions)
        with eval_mode(self):
            return PairScorer(
                self,
                self.encode_images_for_pairs(self.image_chunks(images, 64)),
                self.encode_captions_for_pairs(captions),
                batch,
            )

    @torch.no_grad()
    def encode_images_for_pairs(self, chunks: Iterable[ImageEmbeddings]) -> EncodedImages:
        """Project images for pair scores, each once.

        Args:
            chunks: Images in the common space, as `image_chunks` yields them.

        Returns:
            All images of the chunks, on the model's device.

        Raises:
            ValueError: There are none.
        """
        return EncodedImages.concat([self.project_images_for_pairs(embeddings) for embeddings in chunks])

    def project_images_for_pairs(self, embeddings: ImageEmbeddings) -> EncodedImages:
        """Project some images for pair scores, with gradients if enabled; the design has to score pairs.

        Args:
            embeddings: Vectors (B, D) and patches (B, P, D).

        Returns:
            The B images.
        """
        assert self.late is not None
        assert embeddings.patches is not None
        key_values = None if self.fusion is None else self.fusion.project_patches(embeddings.patches)
        return EncodedImages(embeddings.vectors, self.late.project_patches(embeddings.patches), key_values)

    @torch.no_grad()
    def encode_captions_for_pairs(self, captions: Sequence[str]) -> list[EncodedCaption]:
        """Encode captions for pair scores, each once.

        Args:
            captions: M captions.

        Returns:
            The M captions in their order, on the model's device, without padding.

        Raises:
            TypeError: One string is given where a list is required.
        """
        check_strings(captions)
        with eval_mode(self):
            encoded: list[EncodedCaption | None] = [None] * len(captions)
            for rows, embeddings in self._caption_chunks(self.text_tower.tokenize(captions), 250):
                for row, caption in zip(rows.tolist(), self.project_captions_for_pairs(embeddings), strict=True):
                    encoded[row] = caption
        return [caption for caption in encoded if caption is not None]

    def project_captions_for_pairs(self, embeddings: CaptionEmbeddings) -> list[EncodedCaption]:
        """Project one group of captions for pair scores, with gradients if enabled; the design has to score pairs.

        Args:
            embeddings: Vectors (b, D), tokens (b, T, W) and mask (b, T).

        Returns:
            The b captions, without padding.
        """
        assert self.late is not None
        assert embeddings.tokens is not None
        late_tokens, encoded = self.late.project_tokens(embeddings.tokens, embeddings.mask), []
        for row in range(len(embeddings.vectors)):
            token_count, kept_count = int(embeddings.mask[row].sum()), int(late_tokens.mask[row].sum())
            encoded.append(
                EncodedCaption(
                    embeddings.vectors[row],
                    late_tokens.vectors[row, :kept_count],
                    late_tokens.weights[row, :kept_count],
                    embeddings.tokens[row, :token_count] if self.fusion is not None else None,
                    None if late_tokens.positions is None else late_tokens.positions[row, :kept_count],
                )
            )
        return encoded

    @torch.no_grad()
    def image_chunks(self, images: Sequence[ImageSource], batch: int = 64) -> Iterator[ImageEmbeddings]:
        """Encode images chunk by chunk, in evaluation mode.

        Args:
            images: N paths, bytes of files, or Pillow images; with `tower_cache` the outputs for images are kept.
            batch: Images in a chunk.

        Yields:
            Vectors (batch, D), and patches (batch, P, D) where the design uses them, on the model's device.

        Raises:
            ImageError: An image cannot be opened.
            TypeError: One image is given where a list is required.
        """
        check_lists(images)
        starts = range(0, len(images), batch)
        with eval_mode(self), ThreadPoolExecutor() as pool:
            for start in progress(starts, "encoding images", len(images), self.show_progress, batch):
                yield self.embed_image_features(self._image_features(images[start : start + batch], pool))

    def _image_features(self, images: Sequence[ImageSource], pool: ThreadPoolExecutor) -> ImageFeatures:
        """What the image tower gives for some images: looked at now, or remembered."""
        cache = None if self.tower_cache is None else self.tower_cache.images
        missing = [image for image in images if cache is None or image not in cache]
        if missing:
            pixels = torch.stack(list(pool.map(self.image_tower.image_transform.image_loader(), missing)))
            features = self.image_tower(pixels.to(self.device))
            if cache is None:
                return features
            for position, image in enumerate(missing):
                cache[image] = ImageFeatures(*(part[position].clone() for part in features))
        assert cache is not None
        pooled, patches = zip(*(cache[image] for image in images), strict=True)
        return ImageFeatures(torch.stack(pooled), torch.stack(patches))

    def _caption_chunks(self, tokens: list[list[int]], batch: int) -> Iterator[tuple[Tensor, CaptionEmbeddings]]:
        groups = group_by_length(tokens, self.text_tower.pad, batch)
        with eval_mode(self):
            show_progress = self.show_progress
            for group in progress(
                groups, "encoding captions", len(tokens), show_progress, lambda group: len(group.rows)
            ):
                moved = TokenGroup(group.ids.to(self.device), group.mask.to(self.device), group.rows)
                if self.tower_cache is None:
                    yield group.rows, self.embed_caption_group(moved)
                else:
                    features = self._cached_caption_features(moved, [tuple(tokens[row]) for row in group.rows.tolist()])
                    yield (
                        group.rows,
                        self.embed_caption_features(features, replace(moved, rows=torch.arange(len(moved.rows)))),
                    )

    def _cached_caption_features(self, group: TokenGroup, keys: list[tuple[int, ...]]) -> CaptionFeatures:
        """What the text tower gives for a group: read now, or remembered."""
        assert self.tower_cache is not None
        cache = self.tower_cache.captions
        missing = [position for position, key in enumerate(keys) if key not in cache]
        if missing:
            features = self.text_tower(group.ids[missing], group.mask[missing])
            for row, position in enumerate(missing):
                token_features = features.tokens[row, : len(keys[position])].clone()
                cache[keys[position]] = features.pooled[row].clone(), token_features
        pooled = torch.stack([cache[key][0] for key in keys])
        if self.late is None:
            return CaptionFeatures(pooled, None, group.mask)
        tokens = nn.utils.rnn.pad_sequence([cache[key][1] for key in keys], batch_first=True)
        return CaptionFeatures(pooled, tokens, group.mask)
