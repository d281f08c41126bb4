"""What it would have looked like: the same models under protocols that small scripts use. None of it is a result.

- Recall inside a batch: a batch of 8 has 8 pictures to find the right one among, and chance is 1 in 8.
- A caption encoder that is shown the true picture: its vector carries the picture, and finds it again.

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
from clipvisionalign.retrieval.ranks import Partners, ranks_of_vectors

BATCHES = (8, 32)
#: Training pictures of the leaking model, passes over them, and pictures of the gallery that it is shown on.
LEAK_IMAGES, LEAK_STEPS, LEAK_BATCH = 256, 150, 64


def in_batch_recall(
    image_vectors: np.ndarray, caption_vectors: np.ndarray, caption_image: np.ndarray, size: int, seed: int = 0
) -> dict[str, float]:
    """Recall@1 and @5 inside batches of `size` pairs, one caption a picture, averaged over all batches of one pass.

    Both ways at once, as such scripts print it; shares from 0 to 1. Raises ValueError where there is not one batch.
    """
    rng = np.random.default_rng(seed)
    images = rng.permutation(len(image_vectors))[: len(image_vectors) // size * size]
    if not len(images):
        raise ValueError(f"no batch of {size} among {len(image_vectors)} images")
    own = [rng.choice(np.flatnonzero(caption_image == image)) for image in images]
    found: dict[int, list[float]] = {1: [], 5: []}
    pairs = Partners.of(np.arange(size), size)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        ranks = ranks_of_vectors(image_vectors[images[part]], caption_vectors[own[part]], pairs)
        for rank in (ranks.image_to_text, ranks.text_to_image):
            for k, shares in found.items():
                shares.append(float((rank <= k).mean()))
    return {f"recall_at_{k}": float(np.mean(shares)) for k, shares in found.items()}


class LeakingCaptions(nn.Module):
    """Captions whose tokens attend to the patches of their own, true picture before they become a vector."""

    def __init__(self, token_width: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens_in = nn.Linear(token_width, width)
        self.cross = CrossBlock(width, heads, dropout=0.0)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """tokens: (b, T, W); mask: (b, T); patches: (b, P, D) of each caption's true picture -> (b, D) unit vectors."""
        x = self.cross(self.tokens_in(tokens), self.cross.key_value(patches))
        weights = mask[..., None].to(x.dtype)
        return F.normalize(self.out((x * weights).sum(1) / weights.sum(1)), dim=-1)


class LeakingModel:
    """The leaking encoder behind the contract of every model: it answers `encode_images` and `encode_captions`, and
    remembers the pictures that it was shown last, as code does that hands both to one forward pass."""

    def __init__(self, aligner: Aligner, leak: LeakingCaptions) -> None:
        self.aligner, self.leak = aligner, leak
        self.patches: Tensor | None = None

    @torch.no_grad()
    def encode_images(self, images: Any) -> Tensor:
        """(N, D); their patches stay for the captions."""
        vectors, self.patches = image_parts(self.aligner, images)
        return vectors

    @torch.no_grad()
    def encode_captions(self, captions: Any) -> Tensor:
        """(M, D): caption i is shown picture i of those before, or its share of them."""
        assert self.patches is not None, "the leaking model has seen no picture yet"
        each = max(1, len(captions) // len(self.patches))
        return self.with_true_images(captions, (np.arange(len(captions)) // each).clip(max=len(self.patches) - 1))

    @torch.no_grad()
    def with_true_images(self, captions: Any, caption_image: np.ndarray) -> Tensor:
        """(M, D), every caption shown the picture that it should find."""
        assert self.patches is not None
        found = []
        for start in range(0, len(captions), LEAK_BATCH):
            tokens, mask = caption_parts(self.aligner, captions[start : start + LEAK_BATCH])
            patches = self.patches[torch.from_numpy(caption_image[start : start + LEAK_BATCH])]
            found.append(self.leak(tokens, mask, patches))
        return torch.cat(found)


def image_parts(aligner: Aligner, images: Any) -> tuple[Tensor, Tensor]:
    """Vectors (N, D) and patches (N, P, D) of images."""
    found = [(states.vectors.cpu(), states.patches.cpu()) for states in aligner.image_chunks(images, 64)
             if states.patches is not None]  # fmt: skip
    return torch.cat([vectors for vectors, _ in found]), torch.cat([patches for _, patches in found])


def caption_parts(aligner: Aligner, captions: Any) -> tuple[Tensor, Tensor]:
    """Tokens (b, T, W) and mask (b, T) of captions."""
    tower = aligner.text_tower
    numbers = [torch.tensor(row) for row in tower.tokenize(captions)]
    ids = nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=tower.pad).to(aligner.device)
    lengths = torch.tensor([len(row) for row in numbers], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    found = tower(ids, mask.long()).tokens
    assert found is not None
    return found.cpu(), mask.cpu()


def train_leaking(aligner: Aligner, train: CaptionedImages, seed: int = 0) -> LeakingModel:
    """Train the leaking encoder on a few hundred training pictures; the towers stay as they are."""
    part = train.first_by_hash(LEAK_IMAGES)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        leak = LeakingCaptions(aligner.text_tower.width, aligner.config.width)
        vectors, patches = image_parts(aligner, part.images)
        encoded = [caption_parts(aligner, [row.captions[0]]) for row in part.rows]
    optimizer = torch.optim.AdamW(leak.parameters(), lr=2e-3)
    batch = min(LEAK_BATCH, len(part))
    for _ in range(LEAK_STEPS):
        some = torch.randperm(len(part), generator=generator)[:batch]
        tokens = nn.utils.rnn.pad_sequence([encoded[i][0][0] for i in some.tolist()], batch_first=True)
        lengths = torch.tensor([encoded[i][0].shape[1] for i in some.tolist()])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        scores = vectors[some] @ leak(tokens, mask, patches[some]).T / 0.05
        right = torch.arange(batch)
        loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return LeakingModel(aligner, leak.eval())


def other_protocols(aligner: Aligner, train: CaptionedImages, part: CaptionedImages, seed: int = 0) -> dict[str, Any]:
    """The same trained model, measured honestly and as it should not be; shares from 0 to 1, mean of both ways."""
    images = part.images
    vectors, captions = aligner.encode_images(images).numpy(), aligner.encode_captions(part.captions).numpy()
    owners = part.caption_image
    bars = [{"protocol": "whole gallery", "honest": True, "of": len(images), **_both(vectors, captions, part)}]
    for size in BATCHES[::-1]:
        if len(images) >= size:
            found = in_batch_recall(vectors, captions, owners, size, seed)
            chance = {"chance": {f"recall_at_{k}": min(1.0, k / size) for k in (1, 5)}}
            bars.append({"protocol": f"inside batches of {size}", "honest": False, "of": size, **found, **chance})
    leaking = train_leaking(aligner, train, seed)
    shown = leaking.encode_images(images).numpy()
    leaked = leaking.with_true_images(part.captions, owners).numpy()
    told = {"protocol": "captions shown their true picture", "honest": False, "of": len(images)}
    bars.append({**told, **_both(shown, leaked, part)})
    checks = audit(
        leaking, images, part.captions, owners, part.image_identity, None, sample=min(24, len(images)),
        caption_group=part.caption_group,
    )  # fmt: skip
    return {"bars": bars, "audit_of_the_leak": checks.to_dict()}


def _both(vectors: np.ndarray, captions: np.ndarray, part: CaptionedImages) -> dict[str, Any]:
    found = retrieval_metrics(
        vectors, captions, part.caption_image, part.image_identity, resamples=0, caption_group=part.caption_group
    )
    names, chance = ("recall_at_1", "recall_at_5"), found.chance
    shares = {name: (found.image_to_text[name].value + found.text_to_image[name].value) / 2 for name in names}
    by_chance = {name: (chance["image_to_text"][name] + chance["text_to_image"][name]) / 2 for name in names}
    return {**shares, "chance": by_chance}
