"""The dev gallery during and after training: what the checkpoint and the weights of a pair's parts are chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import Aligner, EncodedImages, PairScorer
from clipvisionalign.retrieval.metrics import RetrievalMetrics, metrics_of_ranks, retrieval_metrics
from clipvisionalign.retrieval.ranks import Partners, Share, ranks_of_scores
from clipvisionalign.retrieval.rerank import reranked
from clipvisionalign.training.feature_cache import FeatureCache
from clipvisionalign.training.processes import Processes


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
            return self._all(self.aligner.encode_images([images[i] for i in mine]))
        self.aligner.eval()
        parts = [torch.empty(0, self.aligner.config.width)]
        with torch.no_grad():
            for index in torch.tensor(list(mine), dtype=torch.long).split(256):
                known = self.features(index, torch.zeros_like(index), self.aligner.device)
                parts.append(self.aligner.image_states(known).vectors.cpu())
        return self._all(torch.cat(parts))

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> unit vectors (M, D) on every process."""
        mine = range(len(captions))[self.processes.number :: self.processes.count]
        return self._all(self.aligner.encode_captions([captions[i] for i in mine]))

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> Tensor:
        """The scores of all pairs (N, M) on every process."""
        mine = range(len(images))[self.processes.number :: self.processes.count]
        own = self.aligner.score([images[i] for i in mine], captions) if mine else torch.empty(0, len(captions))
        return self._all(own)

    def pair_scorer(self, images: Sequence[Any], captions: Sequence[str]) -> SharedPairs:
        """What scores single pairs, dealt out over the processes."""
        return SharedPairs(self.aligner.pair_scorer(images, captions), self.processes)

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

    def _all(self, mine: Tensor) -> Tensor:
        return dealt_back(self.processes.objects(mine))


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
        own = self.scorer.parts(image_index[mine], caption_index[mine])
        return dealt_back(self.processes.objects(torch.from_numpy(own))).numpy()

    def table(self) -> Tensor:
        """The scores of all pairs (N, M) without a fusion, on every process."""
        mine = slice(self.processes.number, None, self.processes.count)
        images = EncodedImages(*(None if part is None else part[mine] for part in self.scorer.images))  # type: ignore[arg-type]
        own = PairScorer(self.scorer.aligner, images, self.scorer.captions)
        return dealt_back(self.processes.objects(own.table()))


def dealt_back(parts: Sequence[Tensor]) -> Tensor:
    """Rows that were dealt out one by one, back in their order."""
    found = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for number, part in enumerate(parts):
        found[number :: len(parts)] = part
    return found


def dev_metrics(
    aligner: Aligner, data: CaptionedImages, features: FeatureCache | None, processes: Processes
) -> tuple[RetrievalMetrics, np.ndarray, np.ndarray]:
    """The dual encoder on the whole dev gallery, without intervals; and its vectors (N, D) and (M, D)."""
    shared = Shared(aligner, processes, features)
    images, captions = shared.encode_images(data.images).numpy(), shared.encode_captions(data.captions).numpy()
    metrics = retrieval_metrics(
        images,
        captions,
        data.caption_image,
        data.image_identity,
        resamples=0,
        share=shared.share,
        caption_group=data.caption_group,
    )
    return metrics, images, captions


#: What the late score and the fusion's correction may count beside the dual encoder's score; 0 leaves them out.
PAIR_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)


def choose_pair_weights(
    aligner: Aligner, data: CaptionedImages, candidates: int, shared: Shared | None = None
) -> tuple[float, float]:
    """Set what the late score and the fusion's correction count to what gives the best rsum; returns both.

    shared: the same aligner, where several processes score the pairs together.

    The towers have seen the training captions many times and are surer there than on new pictures, so that the weights
    cannot be learned with them. Like the best epoch they are chosen on dev: what they are worth shows outside of dev.
    """
    assert aligner.late is not None
    score = (shared or aligner).pair_scorer(data.images, data.captions)
    partners = Partners.of(data.caption_image, len(data), data.image_identity, data.caption_group)
    if aligner.fusion is None:
        aligner.late.weight.fill_(0.0)
        dual = score.table().numpy()
        aligner.late.weight.fill_(1.0)
        late = score.table().numpy() - dual

        def rsum(weights: tuple[float, float]) -> float:
            ranks = ranks_of_scores(dual + weights[0] * late, partners)
            return metrics_of_ranks(ranks, partners.caption_image, resamples=0).rsum.value

        grid = [(weight, 0.0) for weight in PAIR_WEIGHTS]
    else:
        parts: list[np.ndarray] = []

        def rsum(weights: tuple[float, float]) -> float:
            def weighted(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
                # The candidates are the same for every weight: scored once.
                if not parts:
                    parts.append(score.parts(images, captions))
                return parts[0] @ np.array([1.0, *weights], dtype=np.float32)

            vectors = score.image_vectors.numpy(), score.caption_vectors.numpy()
            _, after = reranked(*vectors, partners, weighted, candidates)
            return metrics_of_ranks(after, partners.caption_image, resamples=0).rsum.value

        grid = [(late, fusion) for late in PAIR_WEIGHTS for fusion in PAIR_WEIGHTS]
    # On a tie the smaller weights: what shows no gain is not trusted.
    best = max(grid, key=lambda weights: (rsum(weights), -sum(weights)))
    aligner.late.weight.fill_(best[0])
    if aligner.fusion is not None:
        aligner.fusion.weight.fill_(best[1])
    return best
