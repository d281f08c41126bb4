"""`PairScorer`: the scores of pairs of images and captions that were encoded and projected once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.fusion import Fusion
from clipvisionalign.models.late_interaction import LateInteraction, LateTokens, maxsim, maxsim_pairs
from clipvisionalign.progress import progress


class PairModel(nn.Module):
    """What `PairScorer` requires of the model that encoded its images and captions.

    Attributes:
        late: The late interaction; None where the design has none.
        fusion: The fusion on top of it; None where the design has none.
        show_progress: Whether scoring shows a live line on standard error.
    """

    late: LateInteraction | None
    fusion: Fusion | None
    show_progress: bool

    def scale(self) -> Tensor:
        """1 / temperature of the dual encoder's score.

        Returns:
            A scalar.
        """
        raise NotImplementedError


class EncodedImages(NamedTuple):
    """N images as pairs are scored with them.

    Attributes:
        vectors: (N, D) unit length.
        patches: (N, P, E) unit length.
        key_values: (N, L, P, 2 D) for a fusion; None without one.
    """

    vectors: Tensor
    patches: Tensor
    key_values: Tensor | None

    @classmethod
    def concat(cls, chunks: Sequence[EncodedImages]) -> EncodedImages:
        """Concatenate chunks of images.

        Args:
            chunks: The chunks, in their order.

        Returns:
            All of their images.

        Raises:
            ValueError: There are none.
        """
        if not chunks:
            raise ValueError("no images to score")
        key_values = [chunk.key_values for chunk in chunks if chunk.key_values is not None]
        vectors, patches = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("vectors", "patches"))
        return cls(vectors, patches, torch.cat(key_values) if key_values else None)


class EncodedCaption(NamedTuple):
    """A caption as pairs are scored with it; without padding.

    Attributes:
        vector: (D,) unit length.
        token_vectors: (T, E) unit length.
        token_weights: (T,) sum to 1.
        tokens: (T, W) for a fusion; None without one.
        positions: (T,) positions of the tokens in the caption, where some are left out (`keep_tokens`); else None.
    """

    vector: Tensor
    token_vectors: Tensor
    token_weights: Tensor
    tokens: Tensor | None
    positions: Tensor | None = None


class PairScorer:
    """Scores pairs of images and captions that were encoded once.

    A pair's score is cosine / temperature, plus weight x late score / its temperature, plus weight x the fusion's
    correction.

    Args:
        aligner: The model that encoded them; it has a late interaction.
        images: N images.
        captions: M captions.
        batch: Pairs that are scored together.
    """

    def __init__(
        self, aligner: PairModel, images: EncodedImages, captions: list[EncodedCaption], batch: int = 512
    ) -> None:
        assert aligner.late is not None
        self.aligner, self.late, self.fusion = aligner, aligner.late, aligner.fusion
        self.images, self.captions, self.batch = images, captions, batch
        self.image_vectors = images.vectors.cpu()
        width = images.vectors.shape[1]
        self.caption_vectors = torch.stack([c.vector for c in captions]).cpu() if captions else torch.empty(0, width)
        #: How often an image's patches went through the fusion's projections: once each, whatever is scored.
        self.projection_count = 0 if images.key_values is None else len(images.key_values)
        self.lengths = np.array([len(caption.token_vectors) for caption in captions])

    def component_weights(self) -> np.ndarray:
        """The weights of the three components of a score.

        Returns:
            (3,) float32: 1 for the dual encoder, the weight of the late interaction, and of the fusion, 0 without one.
        """
        fusion = 0.0 if self.fusion is None else self.fusion.weight.item()
        return np.array([1.0, self.late.weight.item(), fusion], dtype=np.float32)

    def __call__(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """Score pairs.

        Args:
            image_index: (Q,) positions among the encoded images.
            caption_index: (Q,) positions among the encoded captions.

        Returns:
            (Q,) float32.
        """
        return self.components(image_index, caption_index) @ self.component_weights()

    @torch.no_grad()
    def components(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """The components of the scores of pairs, before their weights.

        Args:
            image_index: (Q,) positions among the encoded images.
            caption_index: (Q,) positions among the encoded captions.

        Returns:
            (Q, 3) float32: cosine / temperature, late score / its temperature, correction of the fusion (0 without
            one).
        """
        scores = np.zeros((len(image_index), 3), dtype=np.float32)
        # Pairs of captions of one length stand together, so that little is padded.
        order = np.argsort(self.lengths[caption_index], kind="stable")
        with eval_mode(self.aligner):
            starts = range(0, len(order), self.batch)
            for start in progress(starts, "scoring pairs", len(order), self.aligner.show_progress, self.batch):
                pairs = order[start : start + self.batch]
                scores[pairs] = self.score_batch(image_index[pairs], caption_index[pairs]).float().cpu().numpy()
        return scores

    def score_batch(self, image_index: np.ndarray, caption_index: np.ndarray) -> Tensor:
        """`components` of as many pairs as are scored together, on the model's device, with gradients if enabled.

        Args:
            image_index: (Q,) positions among the encoded images.
            caption_index: (Q,) positions among the encoded captions.

        Returns:
            (Q, 3).
        """
        device = self.images.vectors.device
        images = torch.from_numpy(image_index).to(device)
        captions = [self.captions[caption] for caption in caption_index]
        vectors = torch.stack([caption.vector for caption in captions])
        dual = (self.images.vectors[images] * vectors).sum(-1) * self.aligner.scale()
        patches = self.images.patches[images]
        late = maxsim_pairs(patches, _pad_captions(captions)) * self.late.scale()
        if self.fusion is None:
            return torch.stack([dual, late, torch.zeros_like(dual)], dim=1)
        assert self.images.key_values is not None
        states = nn.utils.rnn.pad_sequence([c.tokens for c in captions if c.tokens is not None], batch_first=True)
        lengths = torch.tensor([len(c.tokens) for c in captions if c.tokens is not None], device=device)
        mask = torch.arange(states.shape[1], device=device) < lengths[:, None]
        correction = self.fusion(states, mask, self.images.key_values[images], self.late.matches(states, patches))
        return torch.stack([dual, late, correction.float()], dim=1)

    @torch.no_grad()
    def score_matrix(self) -> Tensor:
        """The scores of all pairs without a fusion, in blocks: memory beyond the result does not grow with it.

        Returns:
            (N, M) float32, on the CPU.

        Raises:
            ValueError: The model has a fusion, which scores the pairs that it is asked for.
        """
        if self.fusion is not None:
            raise ValueError("a fusion scores the pairs it is asked for, not a whole table")
        scores = (self.image_vectors @ self.caption_vectors.T) * self.aligner.scale().cpu()
        order = np.argsort(self.lengths, kind="stable")
        starts, show_progress = range(0, len(order), self.batch), self.aligner.show_progress
        for start in progress(starts, "scoring captions with all images", len(order), show_progress, self.batch):
            rows = order[start : start + self.batch]
            tokens = _pad_captions([self.captions[row] for row in rows])
            late = maxsim(self.images.patches, tokens) * self.late.scale() * self.late.weight
            scores[:, rows] += late.cpu()
        return scores


def _pad_captions(captions: Sequence[EncodedCaption]) -> LateTokens:
    vectors = nn.utils.rnn.pad_sequence([caption.token_vectors for caption in captions], batch_first=True)
    weights = nn.utils.rnn.pad_sequence([caption.token_weights for caption in captions], batch_first=True)
    lengths = torch.tensor([len(caption.token_vectors) for caption in captions], device=vectors.device)
    return LateTokens(vectors, weights, torch.arange(vectors.shape[1], device=vectors.device) < lengths[:, None])
