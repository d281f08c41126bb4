"""Evaluation on dev after each epoch: figures and loss of the dual encoder, which select the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.pair_scorer import EncodedImages, PairScorer
from clipvisionalign.retrieval.metrics import RetrievalMetrics, metrics_of_ranks
from clipvisionalign.retrieval.ranks import WorkerShard, ranks_of_vectors
from clipvisionalign.training.cached_features import AnyFeatureCache, embed_cached
from clipvisionalign.training.caption_features import CaptionFeatureCache
from clipvisionalign.training.contrastive import DualEncoderLoss
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.gathered_batch import GatheredBatch
from clipvisionalign.training.halves import DevHalves, positives_of, split_halves
from clipvisionalign.training.sharding import full_tensor
from clipvisionalign.training.step import count_top1_correct


class DistributedAligner:
    """An aligner whose work is shared out over processes: each does its part, once, and all get everything.

    Images and captions that are encoded for pairs are encoded by every process for itself.

    Args:
        aligner: The same on all processes.
        distributed: The processes, which make the same calls in the same order.
        image_features: The image tower's of the images that it will be given, all of them and in order, where they are
            on disk.
    """

    def __init__(
        self, aligner: Aligner, distributed: Distributed, image_features: AnyFeatureCache | None = None
    ) -> None:
        self.aligner, self.distributed, self.image_features = aligner, distributed, image_features

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Encode images.

        Args:
            images: All images, the same on every process.

        Returns:
            Unit vectors (N, D) of all of them, on every process.
        """
        indices = range(len(images))[self.distributed.rank :: self.distributed.world_size]
        if self.image_features is None:
            return self._gather(lambda: self.aligner.encode_images([images[i] for i in indices]))
        return self._gather(partial(self._encode_cached_images, self.image_features, indices))

    @torch.no_grad()
    def _encode_cached_images(self, features: AnyFeatureCache, indices: range) -> Tensor:
        """The vectors (n, D) of images whose features are on disk."""
        self.aligner.eval()
        parts = [torch.empty(0, self.aligner.width)]
        for index in torch.tensor(list(indices), dtype=torch.long).split(256):
            cached = features(index, torch.zeros_like(index), self.aligner.device)
            parts.append(embed_cached(self.aligner, cached).vectors.cpu())
        return torch.cat(parts)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Encode captions.

        Args:
            captions: All captions, the same on every process.

        Returns:
            Unit vectors (M, D) of all of them, on every process.
        """
        return self.encode_tokens(self.aligner.text_tower.tokenize(self.local_items(captions)))

    def encode_tokens(self, local_tokens: list[list[int]]) -> Tensor:
        """Encode captions that are token lists already.

        Args:
            local_tokens: Those of this process's captions, which are `local_items` of all captions.

        Returns:
            Unit vectors (M, D) of all captions, on every process.
        """
        return self._gather(lambda: self.aligner.encode_tokens(local_tokens))

    def local_items(self, items: Sequence[Any]) -> list[Any]:
        """This process's part of a list.

        Args:
            items: The list, the same on every process.

        Returns:
            Every n-th item, from the process's rank on, where n processes share the work.
        """
        return list(items[self.distributed.rank :: self.distributed.world_size])

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> Tensor:
        """Score all pairs.

        Args:
            images: All images, the same on every process.
            captions: All captions, likewise.

        Returns:
            The scores (N, M), on every process.
        """
        indices = range(len(images))[self.distributed.rank :: self.distributed.world_size]
        nothing = torch.empty(0, len(captions))
        return self._gather(lambda: self.aligner.score([images[i] for i in indices], captions) if indices else nothing)

    def pair_scorer(self, images: Sequence[Any], captions: Sequence[str]) -> DistributedPairScorer:
        """What scores single pairs, dealt out over the processes.

        Args:
            images: All images, the same on every process.
            captions: All captions, likewise.

        Returns:
            The scorer; every process has to ask it for the same pairs.
        """
        return DistributedPairScorer(
            self.distributed.run_on_all(lambda: self.aligner.pair_scorer(images, captions)), self.distributed
        )

    @property
    def scores_all_pairs(self) -> bool:
        """Whether a whole gallery is scored pair by pair, without a dual encoder first."""
        return self.aligner.scores_all_pairs

    @property
    def worker_shard(self) -> WorkerShard:
        """This process's part of ranking a gallery."""
        distributed = self.distributed

        def all_reduce(counts: np.ndarray) -> np.ndarray:
            return distributed.all_reduce(torch.from_numpy(counts).to(distributed.device)).cpu().numpy()

        return WorkerShard(distributed.rank, distributed.world_size, all_reduce)

    def _gather(self, work: Callable[[], Tensor]) -> Tensor:
        return interleave_rows(self.distributed.run_and_gather(work))


class DistributedPairScorer:
    """A `PairScorer` whose pairs are dealt out over processes, which all ask for the same ones.

    Args:
        scorer: It, of the same images and captions on all processes.
        distributed: The processes.
    """

    def __init__(self, scorer: PairScorer, distributed: Distributed) -> None:
        self.scorer, self.distributed = scorer, distributed
        self.image_vectors, self.caption_vectors = scorer.image_vectors, scorer.caption_vectors

    def __call__(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """Score pairs.

        Args:
            image_index: (Q,) positions among the encoded images.
            caption_index: (Q,) positions among the encoded captions.

        Returns:
            (Q,) float32, on every process.
        """
        return self.components(image_index, caption_index) @ self.scorer.component_weights()

    def components(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """The components of the scores of pairs, before their weights.

        Args:
            image_index: (Q,) positions among the encoded images.
            caption_index: (Q,) positions among the encoded captions.

        Returns:
            (Q, 3) float32, as of `PairScorer.components`, on every process.
        """
        rows = slice(self.distributed.rank, None, self.distributed.world_size)
        gathered = self.distributed.run_and_gather(
            lambda: torch.from_numpy(self.scorer.components(image_index[rows], caption_index[rows]))
        )
        return interleave_rows(gathered).numpy()

    def score_matrix(self) -> Tensor:
        """The scores of all pairs without a fusion.

        Returns:
            (N, M), on every process.
        """
        rows = slice(self.distributed.rank, None, self.distributed.world_size)
        images = EncodedImages(*(None if part is None else part[rows] for part in self.scorer.images))  # type: ignore[arg-type]
        local_scorer = PairScorer(self.scorer.aligner, images, self.scorer.captions)
        return interleave_rows(self.distributed.run_and_gather(local_scorer.score_matrix))


def interleave_rows(parts: Sequence[Tensor]) -> Tensor:
    """Put rows that were dealt out one by one back in their order.

    Args:
        parts: The rows of each process, in the order of their ranks; at least one part.

    Returns:
        All rows, in the order in which they were dealt.
    """
    result = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        result[rank :: len(parts)] = part
    return result


@dataclass(frozen=True)
class DevMetrics:
    """Metrics, loss and vectors of the dual encoder on dev, after an epoch.

    Attributes:
        metrics: Retrieval metrics over the whole gallery, without intervals.
        loss: The training's loss of the dual encoder, in batches of the training's size.
        accuracy: Share of captions whose image is first in its batch.
        half_rsum: The recall sum in each half's own gallery; empty where dev cannot be halved.
        half_loss: The loss of each half, likewise.
        image_vectors: (N, D).
        caption_vectors: (M, D).
    """

    metrics: RetrievalMetrics
    loss: float
    accuracy: float
    half_rsum: list[float]
    half_loss: list[float]
    image_vectors: np.ndarray
    caption_vectors: np.ndarray

    def scores(self, best_by: str) -> list[float]:
        """What the epoch is chosen by: more is better.

        Args:
            best_by: "loss" for the loss, else the recall sum.

        Returns:
            That of all of dev, then of each half.
        """
        if best_by == "loss":
            return [-loss for loss in (self.loss, *self.half_loss)]
        return [self.metrics.rsum.value, *self.half_rsum]

    def to_dict(self) -> dict[str, Any]:
        """What a line of metrics.jsonl holds of it.

        Returns:
            Values that JSON can hold.
        """
        halves = {"rsum": self.half_rsum, "loss": [finite_or_none(loss) for loss in self.half_loss]}
        return {
            "dev_loss": finite_or_none(self.loss),
            "dev_accuracy": self.accuracy,
            "dev": self.metrics.to_dict(),
            "dev_halves": halves if self.half_rsum else None,
        }


def finite_or_none(value: float) -> float | None:
    """A number as JSON can hold it.

    Args:
        value: Any number.

    Returns:
        It, or None for NaN and infinity.
    """
    return value if np.isfinite(value) else None


class DevGallery:
    """Measures the dual encoder on dev, after every epoch alike; the captions are tokenised once.

    The loss is of the averaged weights in float32 and without dropout or varied images, over batches that are dealt by
    a fixed seed: the same in every epoch, run and number of processes. The last batch is filled up with the first
    images; a dev split smaller than a batch is one batch, and has a lower loss for that.

    Args:
        data: The dev split.
        image_features: The image tower's of its images, where they are on disk.
        loss_fn: The training's own loss, with what it has learned itself.
        batch_size: Images of a batch of the training, of all processes together.
        distributed: The processes that share the work.
        caption_features: What the text tower gives for its captions, where that is on disk.
    """

    def __init__(
        self,
        data: CaptionedImages,
        image_features: AnyFeatureCache | None,
        loss_fn: DualEncoderLoss,
        batch_size: int,
        distributed: Distributed,
        caption_features: CaptionFeatureCache | None = None,
    ) -> None:
        self.data, self.image_features, self.caption_features, self.distributed = (
            data,
            image_features,
            caption_features,
            distributed,
        )
        self.loss_fn, self.batch_size = loss_fn, batch_size
        self.positives = positives_of(data)
        self.tokens: list[list[int]] | None = None

    @cached_property
    def halves(self) -> DevHalves | None:
        """The halves that choose for each other, None where there are none."""
        return split_halves(self.data)

    def measure(self, aligner: Aligner) -> DevMetrics:
        """Encode the gallery and measure it; every process calls this.

        Args:
            aligner: The model, with the averaged weights where there are any.

        Returns:
            The same on every process.
        """
        shared = DistributedAligner(aligner, self.distributed, self.image_features)
        images, captions = shared.encode_images(self.data.images), self._captions(shared)
        owners, shard = self.positives.caption_image, shared.worker_shard
        ranks = ranks_of_vectors(images.numpy(), captions.numpy(), self.positives, shard)
        metrics = metrics_of_ranks(ranks, owners, resamples=0)
        half_rsum, halves = [], self.halves.parts if self.halves else ()
        for part in halves:
            ranks = ranks_of_vectors(
                images.numpy()[part.images], captions.numpy()[part.captions], part.positives, shard
            )
            half_rsum.append(metrics_of_ranks(ranks, part.positives.caption_image, resamples=0).rsum.value)
        # What it is chosen by has to be the same on every process, to the last bit.
        bias = self.loss_fn.bias_of(aligner.logit_bias)
        bias = torch.zeros(()) if bias is None else full_tensor(bias).detach().cpu()
        parts = [np.arange(len(self.data)), *(part.images for part in halves)]
        scale = aligner.scale().detach().cpu()
        batch_losses = self.distributed.run_on_main(
            lambda: [self._loss(images, captions, scale, bias, p) for p in parts]
        )
        (loss, accuracy), half_loss = batch_losses[0], [each for each, _ in batch_losses[1:]]
        return DevMetrics(metrics, loss, accuracy, half_rsum, half_loss, images.numpy(), captions.numpy())

    def _captions(self, shared: DistributedAligner) -> Tensor:
        """The captions' vectors (M, D); of a frozen text tower, whose outputs are on disk, the head's work alone."""
        if self.caption_features is not None:
            return shared.aligner.encode_pooled(self.caption_features.pooled)
        if self.tokens is None:
            self.tokens = shared.aligner.text_tower.tokenize(shared.local_items(self.data.captions))
        return shared.encode_tokens(self.tokens)

    @torch.no_grad()
    def _loss(
        self, images: Tensor, captions: Tensor, scale: Tensor, bias: Tensor, chosen: np.ndarray
    ) -> tuple[float, float]:
        """Mean loss and accuracy over the batches of some images with all of their captions."""
        owners = self.positives.caption_image
        group = np.arange(len(images)) if self.positives.identity is None else self.positives.identity
        text = self.positives.caption_group
        true = None if text is None else torch.from_numpy(np.unique(np.stack([group[owners], text], axis=1), axis=0))
        by_image = np.split(np.argsort(owners, kind="stable"), np.bincount(owners, minlength=len(images)).cumsum()[:-1])
        losses, correct, count = [], 0.0, 0
        for indices in fixed_batches(chosen, self.batch_size):
            columns = np.concatenate([by_image[index] for index in indices])
            identities = torch.from_numpy(group[indices]), torch.from_numpy(group[owners[columns]])
            texts = None if text is None else torch.from_numpy(text[columns])
            batch_true_texts = None if true is None else true[torch.isin(true[:, 0], identities[0])]
            gallery = GatheredBatch(
                images[indices], captions[columns], *identities, caption_text=texts, true_texts=batch_true_texts
            )
            losses.append(sum(piece.item() for piece in self.loss_fn.chunks(gallery, scale, bias)))
            correct, count = correct + count_top1_correct(gallery).item(), count + len(columns)
        return float(np.mean(losses)), correct / max(count, 1)


def fixed_batches(images: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """Deal batches of one size by a fixed seed.

    Args:
        images: (n,) numbers of images; at least one.
        size: Images of a batch; at most n are taken.
        seed: Another one deals them in another order.

    Returns:
        (batches, size) of the numbers; the last batch is filled up from the first.
    """
    order = images[np.random.default_rng(seed).permutation(len(images))]
    size = min(size, len(order))
    batch_count = -(-len(order) // size)
    return np.resize(order, (batch_count, size))
