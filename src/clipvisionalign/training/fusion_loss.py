"""The loss of pair scores: late interaction over all pairs, fusion over hard negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.heads import CaptionEmbeddings, ImageEmbeddings
from clipvisionalign.models.late_interaction import maxsim
from clipvisionalign.training.contrastive import contrastive_loss, sample_hard_negatives


def pair_loss(
    aligner: Aligner, images: ImageEmbeddings, captions: list[CaptionEmbeddings], positives: Tensor, negatives: int
) -> Tensor:
    """The loss of what scores pairs: the late interaction's over all pairs, and the fusion's where there is one.

    positives: (B, M), columns in the order of `captions`.
    """
    assert aligner.late is not None
    assert images.patches is not None
    patches = aligner.late.project_patches(images.patches)
    tokens = [aligner.late.project_tokens(*tokens_of_rows(group)) for group in captions]
    late = aligner.late.scale() * torch.cat([maxsim(patches, group_tokens) for group_tokens in tokens], dim=1)
    loss = contrastive_loss(late, positives)
    if aligner.fusion is None:
        return loss
    logits = dual_logits(aligner, images, captions) + late.detach()
    return loss + fusion_loss(aligner, images, patches, captions, logits, positives, negatives)


@torch.no_grad()
def dual_logits(aligner: Aligner, images: ImageEmbeddings, captions: list[CaptionEmbeddings]) -> Tensor:
    """The dual encoder's score of every pair over its temperature (B, M), without gradients."""
    return aligner.scale() * images.vectors @ torch.cat([group.vectors for group in captions]).T


def tokens_of_rows(group: CaptionEmbeddings) -> tuple[Tensor, Tensor]:
    """Token states (M, T, W) and mask (M, T) of a group of captions."""
    assert group.tokens is not None
    return group.tokens, group.mask


def fusion_loss(
    aligner: Aligner,
    images: ImageEmbeddings,
    patches: Tensor,
    captions: list[CaptionEmbeddings],
    logits: Tensor,
    positives: Tensor,
    count: int,
) -> Tensor:
    """Each true pair against `count` hard negatives, both ways.

    One caption of each image is drawn. It is scored with its image and with hard negative images; its image is scored
    with it and with hard negative captions. logits, positives: (B, M), columns in the order of `captions`; logits are
    the scores without the fusion, the dual encoder's and the late interaction's.

    The fused score is that plus a correction, and the negatives were drawn by its probability. A softmax over drawn
    candidates has to take the log of that probability off each score (Bengio and Senecal, IEEE Transactions on Neural
    Networks 19 (2008), 713), which leaves the correction alone: it learns what the rest lacks, instead of learning to
    take back what the drawing has made common.
    """
    assert aligner.fusion is not None
    assert aligner.late is not None
    assert images.patches is not None
    count = min(count, int((~positives).sum(dim=1).min()), int((~positives).sum(dim=0).min()))
    rows = torch.arange(len(positives), device=logits.device)
    sampled_captions = torch.multinomial(positives.float(), 1).squeeze(1)
    wrong_images = sample_hard_negatives(logits.T[sampled_captions], positives.T[sampled_captions], count)
    wrong_captions = sample_hard_negatives(logits, positives, count)
    image_index = torch.cat([rows, wrong_images.flatten(), rows.repeat_interleave(count)])
    caption_index = torch.cat([sampled_captions, sampled_captions.repeat_interleave(count), wrong_captions.flatten()])

    lengths = torch.cat([group.mask.sum(dim=1) for group in captions])
    longest = int(lengths.max())
    tokens = torch.cat(
        [
            nn.functional.pad(group_tokens, (0, 0, 0, longest - group_tokens.shape[1]))
            for group_tokens, _ in map(tokens_of_rows, captions)
        ]
    )
    key_values = aligner.fusion.project_patches(images.patches)
    corrections = torch.zeros(len(image_index), device=logits.device)
    # Pairs of like caption length go together, so that little is padded.
    order = lengths[caption_index].argsort(stable=True)
    for pairs in order.split(512):
        chosen = caption_index[pairs]
        width = int(lengths[chosen].max())
        mask = torch.arange(width, device=logits.device) < lengths[chosen, None]
        pair_tokens, pair_images = tokens[chosen, :width], image_index[pairs]
        matches = aligner.late.matches(pair_tokens, patches[pair_images]).detach()
        group_tokens = aligner.fusion(pair_tokens, mask, key_values[pair_images], matches)
        corrections = corrections.index_copy(0, pairs, group_tokens.float())
    true, by_caption, by_image = corrections.split([len(rows), len(rows) * count, len(rows) * count])
    target = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
    ways = (torch.cat([true[:, None], wrong.view(len(rows), count)], dim=1) for wrong in (by_caption, by_image))
    return sum((nn.functional.cross_entropy(way, target) for way in ways), torch.zeros((), device=logits.device)) / 2
