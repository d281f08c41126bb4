"""The loss of late interaction and fusion over several processes, with its gradients.

Tokens and patches of all processes are gathered, so that the late interaction compares as many pairs as the dual
encoder does; its loss is that of one process with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.heads import CaptionEmbeddings, ImageEmbeddings
from clipvisionalign.models.late_interaction import LateTokens, maxsim
from clipvisionalign.training.contrastive import softmax_terms
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.forward import TowerOutputs
from clipvisionalign.training.fusion_loss import dual_logits, fusion_loss, pair_loss, tokens_of_rows
from clipvisionalign.training.gathered_batch import GatheredBatch


def backward_pair_loss(
    aligner: Aligner, distributed: Distributed, gallery: GatheredBatch, outputs: Sequence[TowerOutputs],
    negatives: int, weight: float, text_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Compute this process's part of the loss of late interaction and fusion, and its gradients.

    The late interaction scores this process's rows against the columns of all processes. The fusion draws its negatives
    among this process's own pairs.

    Args:
        aligner: The model; one of the design "self" or "sparse" has no such loss.
        distributed: This process.
        gallery: The vectors of all processes.
        outputs: Outputs of this process's chunks, as leaves, which receive the gradients.
        negatives: Hard negatives per image and per caption, for the fusion.
        weight: Weight of the loss beside the dual encoder's.
        text_dtype: The dtype that the text tower computes in.

    Returns:
        The loss without its weight, a scalar; 0 for a model without late interaction.
    """
    if aligner.late is None:
        return torch.zeros((), device=outputs[0].scale.device)
    images = ImageEmbeddings(*(torch.cat(part) for part in zip(*(s.images for s in outputs if s.images), strict=True)))
    captions = [group for state in outputs for group in state.captions]
    positives = gallery.positive_mask(gallery.own_images, gallery.own_captions)
    with torch.autocast(images.vectors.device.type, text_dtype, enabled=text_dtype != torch.float32):
        if not distributed.is_distributed:
            loss = pair_loss(aligner, images, captions, positives, negatives)
            (weight * loss).backward()
            return loss.detach()
        patches, late_loss, late = _backward_late_loss(aligner, distributed, gallery, images, captions, weight)
        if aligner.fusion is None:
            return late_loss
        logits = late + dual_logits(aligner, images, captions)
        # Sums over processes become means: each has pairs of its own.
        fused = fusion_loss(aligner, images, patches, captions, logits, positives, negatives) / distributed.world_size
    (weight * fused).backward()
    return late_loss + fused.detach()


def _backward_late_loss(
    aligner: Aligner, distributed: Distributed, gallery: GatheredBatch, images: ImageEmbeddings,
    captions: list[CaptionEmbeddings], weight: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The late interaction among the images and captions of all processes.

    Returns this process's patches, its part of the loss, whose gradients are taken here, and the logits of its own
    pairs. Tokens and patches of all are gathered, not their scores: rows here, columns of all.
    """
    late = aligner.late
    assert late is not None
    assert images.patches is not None
    patches = late.project_patches(images.patches)
    parts = [late.project_tokens(*tokens_of_rows(group)) for group in captions]
    width = max(distributed.all_gather_object(max(part.weights.shape[1] for part in parts)))
    vectors = torch.cat([nn.functional.pad(p.vectors, (0, 0, 0, width - p.vectors.shape[1])) for p in parts])
    weights = torch.cat([nn.functional.pad(p.weights, (0, width - p.weights.shape[1])) for p in parts])
    local_tensors = (patches, vectors, weights)
    gathered = [distributed.gather_rows(tensor.detach())[0].requires_grad_() for tensor in local_tensors]
    tokens = LateTokens(gathered[1], gathered[2], gathered[2] > 0)
    rows, columns = gallery.own_images, gallery.own_captions
    logits = late.scale() * maxsim(gathered[0][rows], tokens)
    by_image = softmax_terms(logits, gallery.positive_mask(images=rows), 0.0).sum() / len(gallery.images)
    others = late.scale() * maxsim(gathered[0], tokens.select(columns)).T
    by_caption = softmax_terms(others, gallery.positive_mask(captions=columns).T, 0.0).sum() / len(gallery.captions)
    loss = (by_image + by_caption) / 2
    (weight * loss).backward()
    gradients = [distributed.all_reduce(tensor.grad) for tensor in gathered if tensor.grad is not None]
    torch.autograd.backward(local_tensors, [gradients[0][rows], gradients[1][columns], gradients[2][columns]])
    return patches.detach(), loss.detach(), logits.detach()[:, columns]
