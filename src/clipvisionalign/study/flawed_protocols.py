"""The same models under flawed protocols of small scripts; these figures are not results.

- Recall inside a batch: a batch of 8 has 8 images to find the right one among, and chance is 1 in 8.
- A caption encoder that is shown the true image: its vector carries the image, and finds it again.

What is measured here goes into a block of its own in report.json; `fence.py` keeps it out of the results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.fusion import CrossBlock
from clipvisionalign.retrieval.audit import audit
from clipvisionalign.retrieval.metrics import retrieval_metrics
from clipvisionalign.retrieval.ranks import Positives, ranks_of_vectors

IN_BATCH_SIZES = (8, 32)
#: Training images of the leaking model, passes over them, and images of the gallery that it is shown on.
LEAK_IMAGES, LEAK_STEPS, LEAK_BATCH = 256, 150, 64


def in_batch_recall(
    image_vectors: np.ndarray, caption_vectors: np.ndarray, caption_image: np.ndarray, size: int, seed: int = 0
) -> dict[str, float]:
    """Recall@1 and @5 inside batches, one caption an image, averaged over all batches of one pass.

    Both ways are averaged, as such scripts print it.

    Args:
        image_vectors: (N, D).
        caption_vectors: (M, D).
        caption_image: (M,) number of each caption's image.
        size: Pairs in a batch.
        seed: Seed of the order.

    Returns:
        Shares from 0 to 1, by name.

    Raises:
        ValueError: There is not one whole batch.
    """
    rng = np.random.default_rng(seed)
    images = rng.permutation(len(image_vectors))[: len(image_vectors) // size * size]
    if not len(images):
        raise ValueError(f"no batch of {size} among {len(image_vectors)} images")
    caption_index = [rng.choice(np.flatnonzero(caption_image == image)) for image in images]
    recalls: dict[int, list[float]] = {1: [], 5: []}
    pairs = Positives.of(np.arange(size), size)
    for start in range(0, len(images), size):
        batch = slice(start, start + size)
        ranks = ranks_of_vectors(image_vectors[images[batch]], caption_vectors[caption_index[batch]], pairs)
        for rank in (ranks.image_to_text, ranks.text_to_image):
            for k, values in recalls.items():
                values.append(float((rank <= k).mean()))
    return {f"recall_at_{k}": float(np.mean(values)) for k, values in recalls.items()}


class LeakingCaptions(nn.Module):
    """Captions whose tokens attend to the patches of their own, true image before they become a vector.

    Args:
        token_width: W, of the tokens.
        width: D, of patches and vectors.
        heads: Of the attention; they share out D.
    """

    def __init__(self, token_width: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens_in = nn.Linear(token_width, width)
        self.cross = CrossBlock(width, heads, dropout=0.0)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """Attend from tokens to patches.

        Args:
            tokens: (b, T, W).
            mask: (b, T), 0 on padding.
            patches: (b, P, D) of each caption's true image.

        Returns:
            (b, D) unit vectors.
        """
        x = self.cross(self.tokens_in(tokens), self.cross.key_value(patches))
        weights = mask[..., None].to(x.dtype)
        return F.normalize(self.out((x * weights).sum(1) / weights.sum(1)), dim=-1)


class LeakingModel:
    """The leaking encoder behind the contract of every model.

    It has `encode_images` and `encode_captions`, and remembers the images that it was shown last, as code does that
    hands both to one forward pass.

    Args:
        aligner: The towers.
        leak: The leaking encoder.
    """

    def __init__(self, aligner: Aligner, leak: LeakingCaptions) -> None:
        self.aligner, self.leak = aligner, leak
        self.patches: Tensor | None = None

    @torch.no_grad()
    def encode_images(self, images: Any) -> Tensor:
        """Encode images, whose patches stay for the captions.

        Args:
            images: (N,) images.

        Returns:
            (N, D).
        """
        vectors, self.patches = image_parts(self.aligner, images)
        return vectors

    @torch.no_grad()
    def encode_captions(self, captions: Any) -> Tensor:
        """Encode captions: caption i is shown image i of those before, or its share of them.

        Args:
            captions: (M,) captions.

        Returns:
            (M, D).
        """
        assert self.patches is not None, "the leaking model has seen no image yet"
        captions_per_image = max(1, len(captions) // len(self.patches))
        return self.with_true_images(
            captions, (np.arange(len(captions)) // captions_per_image).clip(max=len(self.patches) - 1)
        )

    @torch.no_grad()
    def with_true_images(self, captions: Any, caption_image: np.ndarray) -> Tensor:
        """Encode captions, each shown the image that it should find.

        Args:
            captions: (M,) captions.
            caption_image: (M,) number of each caption's image.

        Returns:
            (M, D).
        """
        assert self.patches is not None
        vectors = []
        for start in range(0, len(captions), LEAK_BATCH):
            tokens, mask = caption_parts(self.aligner, captions[start : start + LEAK_BATCH])
            patches = self.patches[torch.from_numpy(caption_image[start : start + LEAK_BATCH])]
            vectors.append(self.leak(tokens, mask, patches))
        return torch.cat(vectors)


def image_parts(aligner: Aligner, images: Any) -> tuple[Tensor, Tensor]:
    """Vectors and patches of images.

    Args:
        aligner: The towers.
        images: (N,) images.

    Returns:
        (N, D), and (N, P, D).
    """
    aligner.embed_patches()
    chunks = [(states.vectors.cpu(), states.patches.cpu()) for states in aligner.image_chunks(images, 64)
             if states.patches is not None]  # fmt: skip
    return torch.cat([vectors for vectors, _ in chunks]), torch.cat([patches for _, patches in chunks])


def caption_parts(aligner: Aligner, captions: Any) -> tuple[Tensor, Tensor]:
    """Tokens of captions.

    Args:
        aligner: The towers.
        captions: (b,) captions.

    Returns:
        Tokens (b, T, W), and mask (b, T).
    """
    tower = aligner.text_tower
    token_ids = [torch.tensor(row) for row in tower.tokenize(captions)]
    ids = nn.utils.rnn.pad_sequence(token_ids, batch_first=True, padding_value=tower.pad).to(aligner.device)
    lengths = torch.tensor([len(row) for row in token_ids], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    token_states = tower(ids, mask.long()).tokens
    assert token_states is not None
    return token_states.cpu(), mask.cpu()


def train_leaking(aligner: Aligner, train: CaptionedImages, seed: int = 0) -> LeakingModel:
    """Train the leaking encoder on a few hundred training images; the towers stay as they are.

    Args:
        aligner: The towers.
        train: The training split.
        seed: Of weights and order.

    Returns:
        The trained model.
    """
    subset = train.first_by_hash(LEAK_IMAGES)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        leak = LeakingCaptions(aligner.text_tower.width, aligner.width)
        vectors, patches = image_parts(aligner, subset.images)
        encoded_captions = [caption_parts(aligner, [row.captions[0]]) for row in subset.rows]
    optimizer = torch.optim.AdamW(leak.parameters(), lr=2e-3)
    batch = min(LEAK_BATCH, len(subset))
    for _ in range(LEAK_STEPS):
        batch_index = torch.randperm(len(subset), generator=generator)[:batch]
        tokens = nn.utils.rnn.pad_sequence([encoded_captions[i][0][0] for i in batch_index.tolist()], batch_first=True)
        lengths = torch.tensor([encoded_captions[i][0].shape[1] for i in batch_index.tolist()])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        scores = vectors[batch_index] @ leak(tokens, mask, patches[batch_index]).T / 0.05
        targets = torch.arange(batch)
        loss = (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return LeakingModel(aligner, leak.eval())


def measure_flawed_protocols(
    aligner: Aligner, train: CaptionedImages, eval_data: CaptionedImages, seed: int = 0
) -> dict[str, Any]:
    """The same trained model, measured honestly and as it should not be; shares from 0 to 1, mean of both ways.

    Args:
        aligner: The trained model.
        train: The training split.
        eval_data: The split that is measured.
        seed: Of everything drawn at random.

    Returns:
        Figures by protocol.
    """
    images = eval_data.images
    vectors, captions = aligner.encode_images(images).numpy(), aligner.encode_captions(eval_data.captions).numpy()
    caption_image = eval_data.caption_image
    bars = [
        {
            "protocol": "whole gallery",
            "honest": True,
            "of": len(images),
            **_recall_both_directions(vectors, captions, eval_data),
        }
    ]
    for size in IN_BATCH_SIZES[::-1]:
        if len(images) >= size:
            recall = in_batch_recall(vectors, captions, caption_image, size, seed)
            chance = {"chance": {f"recall_at_{k}": min(1.0, k / size) for k in (1, 5)}}
            bars.append({"protocol": f"inside batches of {size}", "honest": False, "of": size, **recall, **chance})
    leaking = train_leaking(aligner, train, seed)
    leaking_images = leaking.encode_images(images).numpy()
    leaking_captions = leaking.with_true_images(eval_data.captions, caption_image).numpy()
    header = {"protocol": "captions shown their true image", "honest": False, "of": len(images)}
    bars.append({**header, **_recall_both_directions(leaking_images, leaking_captions, eval_data)})
    checks = audit(
        leaking, images, eval_data.captions, caption_image, eval_data.image_identity, None, sample=min(24, len(images)),
        caption_group=eval_data.shared_text_ids,
    )  # fmt: skip
    return {"bars": bars, "audit_of_the_leak": checks.to_dict()}


def _recall_both_directions(vectors: np.ndarray, captions: np.ndarray, eval_data: CaptionedImages) -> dict[str, Any]:
    metrics = retrieval_metrics(
        vectors,
        captions,
        eval_data.caption_image,
        eval_data.image_identity,
        resamples=0,
        caption_group=eval_data.shared_text_ids,
    )
    names, chance = ("recall_at_1", "recall_at_5"), metrics.chance
    recalls = {name: (metrics.image_to_text[name].value + metrics.text_to_image[name].value) / 2 for name in names}
    by_chance = {name: (chance["image_to_text"][name] + chance["text_to_image"][name]) / 2 for name in names}
    return {**recalls, "chance": by_chance}
