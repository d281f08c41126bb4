"""The dev gallery after each epoch: figures and loss of the dual encoder, by which the checkpoint is chosen."""

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
from clipvisionalign.retrieval.ranks import Share, ranks_of_vectors
from clipvisionalign.training.feature_cache import CaptionCache, FeatureCache
from clipvisionalign.training.halves import Halves, halves_of, partners_of
from clipvisionalign.training.losses import Gallery, PairLoss
from clipvisionalign.training.processes import Processes, whole
from clipvisionalign.training.step import first_is_partner


class Shared:
    """An aligner whose work is shared out over processes: each encodes and scores its part, once, and all get
    everything. Images and captions that are encoded for pairs are encoded by every process for itself.

    features: the picture tower's of the images that it will be given, all of them and in order, where they are on disk.
    """

    def __init__(self, aligner: Aligner, processes: Processes, features: FeatureCache | None = None) -> None:
        self.aligner, self.processes, self.features = aligner, processes, features

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Images -> unit vectors (N, D) on every process."""
        mine = range(len(images))[self.processes.number :: self.processes.count]
        if self.features is None:
            return self._all(lambda: self.aligner.encode_images([images[i] for i in mine]))
        return self._all(partial(self._of_features, self.features, mine))

    @torch.no_grad()
    def _of_features(self, features: FeatureCache, mine: range) -> Tensor:
        """The vectors (n, D) of images whose features are on disk."""
        self.aligner.eval()
        parts = [torch.empty(0, self.aligner.config.width)]
        for index in torch.tensor(list(mine), dtype=torch.long).split(256):
            known = features(index, torch.zeros_like(index), self.aligner.device)
            parts.append(self.aligner.image_states(known).vectors.cpu())
        return torch.cat(parts)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> unit vectors (M, D) on every process."""
        return self.encode_tokens(self.aligner.text_tower.tokenize(self.mine(captions)))

    def encode_tokens(self, mine: list[list[int]]) -> Tensor:
        """Token lists of this process's captions -> unit vectors (M, D) of all captions, on every process."""
        return self._all(lambda: self.aligner.encode_tokens(mine))

    def mine(self, all_of_them: Sequence[Any]) -> list[Any]:
        """This process's part of a list."""
        return list(all_of_them[self.processes.number :: self.processes.count])

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> Tensor:
        """The scores of all pairs (N, M) on every process."""
        mine = range(len(images))[self.processes.number :: self.processes.count]
        nothing = torch.empty(0, len(captions))
        return self._all(lambda: self.aligner.score([images[i] for i in mine], captions) if mine else nothing)

    def pair_scorer(self, images: Sequence[Any], captions: Sequence[str]) -> SharedPairs:
        """What scores single pairs, dealt out over the processes."""
        return SharedPairs(self.processes.each(lambda: self.aligner.pair_scorer(images, captions)), self.processes)

    @property
    def scores_all_pairs(self) -> bool:
        """Whether a whole gallery is scored pair by pair, without a dual encoder first."""
        return self.aligner.scores_all_pairs

    @property
    def share(self) -> Share:
        """This process's part of ranking a gallery."""
        processes = self.processes

        def total(counts: np.ndarray) -> np.ndarray:
            return processes.total(torch.from_numpy(counts).to(processes.device)).cpu().numpy()

        return Share(processes.number, processes.count, total)

    def _all(self, mine: Callable[[], Tensor]) -> Tensor:
        return dealt_back(self.processes.everyone(mine))


class SharedPairs:
    """A `PairScorer` whose pairs are dealt out over processes, which all ask for the same ones."""

    def __init__(self, scorer: PairScorer, processes: Processes) -> None:
        self.scorer, self.processes = scorer, processes
        self.image_vectors, self.caption_vectors = scorer.image_vectors, scorer.caption_vectors

    def __call__(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        return self.parts(image_index, caption_index) @ self.scorer.weights()

    def parts(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """The parts of the pairs' scores (Q, 3), on every process."""
        mine = slice(self.processes.number, None, self.processes.count)
        found = self.processes.everyone(
            lambda: torch.from_numpy(self.scorer.parts(image_index[mine], caption_index[mine]))
        )
        return dealt_back(found).numpy()

    def table(self) -> Tensor:
        """The scores of all pairs (N, M) without a fusion, on every process."""
        mine = slice(self.processes.number, None, self.processes.count)
        images = EncodedImages(*(None if part is None else part[mine] for part in self.scorer.images))  # type: ignore[arg-type]
        own = PairScorer(self.scorer.aligner, images, self.scorer.captions)
        return dealt_back(self.processes.everyone(own.table))


def dealt_back(parts: Sequence[Tensor]) -> Tensor:
    """Rows that were dealt out one by one, back in their order."""
    found = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for number, part in enumerate(parts):
        found[number :: len(parts)] = part
    return found


@dataclass(frozen=True)
class DevFigures:
    """What the dual encoder showed on dev after an epoch.

    metrics: over the whole gallery, without intervals. loss, accuracy: the training's own, in its batches. half_rsum,
    half_loss: of each half's own gallery, empty where dev cannot be halved. image_vectors: (N, D); caption_vectors:
    (M, D).
    """

    metrics: RetrievalMetrics
    loss: float
    accuracy: float
    half_rsum: list[float]
    half_loss: list[float]
    image_vectors: np.ndarray
    caption_vectors: np.ndarray

    def scores(self, best_by: str) -> list[float]:
        """What the epoch is chosen by, more is better: of all of dev, then of each half."""
        if best_by == "loss":
            return [-loss for loss in (self.loss, *self.half_loss)]
        return [self.metrics.rsum.value, *self.half_rsum]

    def to_dict(self) -> dict[str, Any]:
        """What a line of metrics.jsonl holds of it."""
        halves = {"rsum": self.half_rsum, "loss": [finite(loss) for loss in self.half_loss]}
        return {
            "dev_loss": finite(self.loss),
            "dev_accuracy": self.accuracy,
            "dev": self.metrics.to_dict(),
            "dev_halves": halves if self.half_rsum else None,
        }


def finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if np.isfinite(value) else None


class DevGallery:
    """Measures the dual encoder on dev, after every epoch alike; the captions are tokenised once.

    The loss is the training's own (`loss_of`, with what it has learned itself), of the averaged weights in float32 and
    without dropout or varied images, over batches of the training's size (`batch`, all processes' images together) that
    are dealt by a fixed seed: the same in every epoch, run and number of processes. The last batch is filled up with
    the first images; a dev split smaller than a batch is one batch, and has a lower loss for that.
    """

    def __init__(
        self, data: CaptionedImages, features: FeatureCache | None, loss_of: PairLoss, batch: int,
        processes: Processes, read: CaptionCache | None = None,
    ) -> None:  # fmt: skip
        self.data, self.features, self.read, self.processes = data, features, read, processes
        self.loss_of, self.batch = loss_of, batch
        self.partners = partners_of(data)
        self.tokens: list[list[int]] | None = None

    @cached_property
    def halves(self) -> Halves | None:
        """The halves that choose for each other, None where there are none."""
        return halves_of(self.data)

    def measure(self, aligner: Aligner) -> DevFigures:
        """Encode the gallery and measure it; every process calls this, and gets the same."""
        shared = Shared(aligner, self.processes, self.features)
        images, captions = shared.encode_images(self.data.images), self._captions(shared)
        owners, share = self.partners.caption_image, shared.share
        ranks = ranks_of_vectors(images.numpy(), captions.numpy(), self.partners, share)
        metrics = metrics_of_ranks(ranks, owners, resamples=0)
        half_rsum, halves = [], self.halves.parts if self.halves else ()
        for part in halves:
            ranks = ranks_of_vectors(images.numpy()[part.images], captions.numpy()[part.captions], part.partners, share)
            half_rsum.append(metrics_of_ranks(ranks, part.partners.caption_image, resamples=0).rsum.value)
        # What it is chosen by has to be the same on every process, to the last bit.
        bias = whole(self.loss_of.bias).detach().cpu() if hasattr(self.loss_of, "bias") else torch.zeros(())
        parts = [np.arange(len(self.data)), *(part.images for part in halves)]
        scale = aligner.scale().detach().cpu()
        found = self.processes.first_does(lambda: [self._loss(images, captions, scale, bias, p) for p in parts])
        (loss, accuracy), half_loss = found[0], [each for each, _ in found[1:]]
        return DevFigures(metrics, loss, accuracy, half_rsum, half_loss, images.numpy(), captions.numpy())

    def _captions(self, shared: Shared) -> Tensor:
        """The captions' vectors (M, D); of a frozen text tower, whose outputs are on disk, the head's work alone."""
        if self.read is not None:
            return shared.aligner.encode_pooled(self.read.pooled)
        if self.tokens is None:
            self.tokens = shared.aligner.text_tower.tokenize(shared.mine(self.data.captions))
        return shared.encode_tokens(self.tokens)

    @torch.no_grad()
    def _loss(
        self, images: Tensor, captions: Tensor, scale: Tensor, bias: Tensor, chosen: np.ndarray
    ) -> tuple[float, float]:
        """Mean loss and accuracy over the batches of some images with all of their captions."""
        owners = self.partners.caption_image
        group = np.arange(len(images)) if self.partners.identity is None else self.partners.identity
        text = self.partners.caption_group
        true = None if text is None else torch.from_numpy(np.unique(np.stack([group[owners], text], axis=1), axis=0))
        by_image = np.split(np.argsort(owners, kind="stable"), np.bincount(owners, minlength=len(images)).cumsum()[:-1])
        losses, right, count = [], 0.0, 0
        for places in dealt_alike(chosen, self.batch):
            columns = np.concatenate([by_image[place] for place in places])
            identities = torch.from_numpy(group[places]), torch.from_numpy(group[owners[columns]])
            texts = None if text is None else torch.from_numpy(text[columns])
            own = None if true is None else true[torch.isin(true[:, 0], identities[0])]
            gallery = Gallery(images[places], captions[columns], *identities, caption_text=texts, true_texts=own)
            losses.append(sum(piece.item() for piece in self.loss_of.pieces(gallery, scale, bias)))
            right, count = right + first_is_partner(gallery).item(), count + len(columns)
        return float(np.mean(losses)), right / max(count, 1)


def dealt_alike(images: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """Batches of one size (batches, size), dealt by a fixed seed; the last one is filled up from the first."""
    order = images[np.random.default_rng(seed).permutation(len(images))]
    size = min(size, len(order))
    number = -(-len(order) // size)
    return np.resize(order, (number, size))
