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
    """The loss of pair scores: late interaction over all pairs, and the fusion over hard negatives where there is one.

    Args:
        aligner: A model of the design `late` or `cross`.
        images: Vectors and patches of B images.
        captions: Groups of M captions.
        positives: (B, M) bool; columns in the order of the groups.
        negatives: Hard negatives per image and per caption.

    Returns:
        A scalar.
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
    """The dual encoder's logits of all pairs, without gradients.

    Args:
        aligner: The model, whose temperature is used.
        images: Vectors of B images.
        captions: Groups of M captions.

    Returns:
        (B, M) cosine / temperature; columns in the order of the groups.
    """
    return aligner.scale() * images.vectors @ torch.cat([group.vectors for group in captions]).T


def tokens_of_rows(group: CaptionEmbeddings) -> tuple[Tensor, Tensor]:
    """Tokens and mask of a group of captions.

    Args:
        group: The group; its design has to score pairs.

    Returns:
        Tokens (b, T, W) and mask (b, T).
    """
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
    """Each true pair against hard negatives, in both directions.

    One caption of each image is drawn. It is scored with its image and with hard negative images; its image is scored
    with it and with hard negative captions. A softmax over drawn candidates takes the log of their probability off each
    score, which leaves the fusion's correction alone: it learns what the dual encoder lacks.

    Args:
        aligner: A model of the design `cross`.
        images: Vectors and patches of B images.
        patches: (B, P, E) of the late interaction.
        captions: Groups of M captions.
        logits: (B, M) scores without the fusion, by whose softmax negatives are drawn; columns in the order of the
            groups.
        positives: (B, M) bool.
        count: Hard negatives per image and per caption; fewer where a row or column has fewer.

    Returns:
        A scalar.

    Source: Li et al., "ALBEF", arXiv:2107.07651; Bengio and Senecal, IEEE Transactions on Neural Networks 19 (2008),
    713, for the correction of drawn candidates.
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
