"""Towers of open_clip's models: its own vision transformers and ResNets, timm's backbones, its own text transformers,
and Hugging Face's text models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.batch import TokenizedCaptions
from clipvisionalign.images import ImageTransform
from clipvisionalign.models.image_tower import timm_patches
from clipvisionalign.models.pretrained.parts import PretrainedImageTower, PretrainedTextTower, first_match, pool_alone

#: Settings of a Hugging Face text model, beside open_clip's own in a run folder.
HF_CONFIG_FOLDER = "hf_text_config"


class OpenClipViT(PretrainedImageTower):
    """open_clip's `VisionTransformer`, its projection taken off."""

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> tokens (B, 1 + P, C)."""
        visual = self.backbone
        return visual.transformer(visual._embeds(self.image_transform.normalize(pixels)))

    @property
    def last_block(self) -> nn.Module | None:
        """The last block, where the class token alone is pooled."""
        visual = self.backbone
        return visual.transformer.resblocks[-1] if visual.attn_pool is None and visual.pool_type == "tok" else None

    def pool(self, features: Tensor) -> Tensor:
        """Tokens (B, 1 + P, C) -> pooled (B, C)."""
        return self.backbone._pool(features)[0]

    def pool_each(self, patches: Tensor) -> Tensor:
        """Patches (B, P, C) -> (B, P, C), each pooled alone."""
        if self.backbone.attn_pool is None:
            return self.backbone.ln_post(patches)
        return pool_alone(lambda single: self.backbone._pool(single)[0], patches)


class OpenClipResNet(PretrainedImageTower):
    """open_clip's `ModifiedResNet` with its pooling by attention, which projects as well."""

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> (B, C, h, w)."""
        visual = self.backbone
        x = visual.stem(self.image_transform.normalize(pixels))
        return visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))

    def patches_in(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, P, C)."""
        return features.flatten(2).transpose(1, 2)

    def pool(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, D)."""
        return self.backbone.attnpool(features)

    def pool_each(self, patches: Tensor) -> Tensor:
        """Patches (B, P, C) -> (B, P, D): the value and output projections of the pooling, as in MaskCLIP
        (Zhou et al., arXiv:2112.01071)."""
        pooling = self.backbone.attnpool
        return pooling.c_proj(pooling.v_proj(patches))


class OpenClipTimm(PretrainedImageTower):
    """open_clip's `TimmModel`: a timm backbone, its head taken off."""

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> (B, prefix + P, C) or (B, C, h, w)."""
        return self.backbone.trunk.forward_features(self.image_transform.normalize(pixels))

    def patches_in(self, features: Tensor) -> Tensor:
        """What `feature_map` gives -> its patches (B, P, C)."""
        return timm_patches(self.backbone.trunk, features)

    @property
    def last_block(self) -> nn.Module | None:
        """The last block, where a class token alone is pooled."""
        trunk = self.backbone.trunk
        blocks = getattr(trunk, "blocks", None)
        return (
            blocks[-1] if isinstance(blocks, nn.Sequential) and getattr(trunk, "global_pool", "") == "token" else None
        )

    def pool(self, features: Tensor) -> Tensor:
        """What `feature_map` gives -> pooled (B, C)."""
        return self.backbone.head(self.backbone.trunk.forward_head(features))

    def pool_each(self, patches: Tensor) -> Tensor:
        """Patches (B, P, C) -> (B, P, C), each pooled alone."""
        single, trunk = patches.flatten(0, 1), self.backbone.trunk
        if isinstance(getattr(trunk, "blocks", None), nn.Sequential) and hasattr(trunk, "patch_embed"):
            # A class token is pooled alone, or left out of a mean: the patch stands in for either.
            single = single[:, None].expand(-1, self.prefix_tokens + 1, -1)
        else:
            last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
            single = single[:, None, None] if last else single[:, :, None, None]
        return self.pool(single).unflatten(0, patches.shape[:2])


class OpenClipTextTower(PretrainedTextTower):
    """open_clip's `TextTransformer`, its projection taken off.

    Args:
        encoder: the text model.
        tokenizer: open_clip's tokenizer.
        source: the model's folder.
        width: W.
        context_length: tokens that the model was trained to take.
    """

    def __init__(self, encoder: Any, tokenizer: Any, source: Path, width: int, context_length: int) -> None:
        is_trimmable = encoder.attn_mask is not None and encoder.cls_emb is None and encoder.pool_type in _TRIMMED
        super().__init__(
            encoder, getattr(tokenizer, "tokenizer", tokenizer), source, width, context_length,
            fixed_length=not is_trimmable, pooling=encoder.pool_type,
        )  # fmt: skip
        self.max_positions = self.max_tokens = context_length
        self.open_clip_tokenizer = tokenizer
        self.pad = getattr(self.tokenizer, "pad_token_id", None) or 0

    def input_embeddings(self) -> nn.Module:
        """The table of the tokens' embeddings."""
        return self.encoder.token_embedding

    def vocabulary(self) -> dict[str, int]:
        """Each token's number; open_clip's own tokenizer has it under another name than transformers'."""
        return self.tokenizer.get_vocab() if hasattr(self.tokenizer, "get_vocab") else dict(self.tokenizer.encoder)

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        """Token ids by open_clip's own tokenizer, without the padding that no vector depends on."""
        if not len(captions):
            return TokenizedCaptions([])
        ids = self.open_clip_tokenizer(list(captions), context_length=self.max_tokens)
        lengths = self.lengths(ids)
        num_truncated = [
            self._token_count(caption) - length if length == self.max_tokens else 0
            for caption, length in zip(captions, lengths, strict=True)
        ]
        if self.fixed_length:
            padded = F.pad(ids, (0, self.max_positions - ids.shape[1]), value=self.pad)
            return TokenizedCaptions(padded.tolist(), num_truncated)
        return TokenizedCaptions(
            [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)], num_truncated
        )

    def lengths(self, ids: Tensor) -> list[int]:
        """(M, T), padded -> tokens of each caption up to its end-of-text token."""
        if self.fixed_length:
            return self.word_mask(ids, torch.ones_like(ids)).sum(dim=1).tolist()
        return (self._end(ids) + 1).tolist()

    def _end(self, ids: Tensor) -> Tensor:
        """(b, T) -> (b,), the place of the end-of-text token."""
        if self.encoder.pool_type == "eos":
            return first_match(ids, self.encoder.eos_id)
        # onnxruntime has no argmax of 64-bit numbers.
        return ids.to(torch.int32).argmax(dim=-1)

    def _token_count(self, caption: str) -> int:
        tokenizer = self.open_clip_tokenizer
        if hasattr(tokenizer, "tokenizer"):
            return len(tokenizer.tokenizer(tokenizer.clean_fn(caption), truncation=False).input_ids)
        return len(tokenizer.encode(caption)) + 2

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids (b, T) -> pooled (b, W), tokens (b, T, W)."""
        text = self.encoder
        if self.fixed_length:
            tokens: list[Tensor] = []
            handle = text.transformer.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
            try:
                pooled = text(ids)
            finally:
                handle.remove()
            return pooled[0] if isinstance(pooled, tuple) else pooled, text.ln_final(tokens[0][:, : ids.shape[1]])
        x, attention_mask = text._embeds(ids)
        length = ids.shape[1]
        x = text.ln_final(text.transformer(x, attn_mask=attention_mask[..., :length, :length]))
        # `shape[0]` and not `len`, which an export to ONNX would take for a constant.
        return x[torch.arange(ids.shape[0], device=ids.device), self._end(ids)], x


#: Ways of pooling in which a causal caption's padding has no part.
_TRIMMED = ("argmax", "eos")


class OpenClipHuggingFaceTower(OpenClipTextTower):
    """open_clip's `HFTextEncoder`: a transformers encoder with open_clip's pooler, its projection taken off."""

    def __init__(self, encoder: Any, tokenizer: Any, source: Path, width: int, context_length: int) -> None:
        PretrainedTextTower.__init__(
            self, encoder, tokenizer.tokenizer, source, width, context_length, pooling=type(encoder.pooler).__name__
        )
        self.max_positions = self.max_tokens = context_length
        self.open_clip_tokenizer = tokenizer
        # open_clip takes what is no padding for the caption.
        self.pad = encoder.config.pad_token_id

    def input_embeddings(self) -> nn.Module:
        """The table of the tokens' embeddings."""
        return self.encoder.transformer.get_input_embeddings()

    def lengths(self, ids: Tensor) -> list[int]:
        """(M, T), padded -> tokens of each caption."""
        return (ids != self.pad).sum(dim=1).tolist()

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids, mask (b, T) -> pooled (b, W), tokens (b, T, W)."""
        output = self.encoder.transformer(input_ids=ids, attention_mask=mask)
        return self.encoder.pooler(output, mask), output.last_hidden_state

    def save(self, folder: Path) -> None:
        """open_clip's files, and the text model's settings, which open_clip itself asks the hub for."""
        super().save(folder)
        self.encoder.config.save_pretrained(folder / HF_CONFIG_FOLDER)


def image_tower(visual: Any, transform: ImageTransform) -> tuple[PretrainedImageTower, nn.Module]:
    """The image tower and projection of an open_clip model's `visual`.

    Raises ValueError for one whose parts are not known.
    """
    kind = type(visual).__name__
    if kind == "VisionTransformer":
        projection: nn.Module = nn.Identity()
        if visual.proj is not None:
            projection = linear_of(visual.proj)
            visual.proj = None
        grid = visual.grid_size[0] * visual.grid_size[1]
        return OpenClipViT(visual, transform, visual.ln_post.normalized_shape[0], grid, prefix_tokens=1), projection
    if kind == "ModifiedResNet":
        patches = len(visual.attnpool.positional_embedding) - 1
        tower = OpenClipResNet(visual, transform, visual.output_dim, patches)
        tower.raw_patch_width = visual.attnpool.positional_embedding.shape[1]
        return tower, nn.Identity()
    if kind != "TimmModel":
        raise ValueError(f"an image tower of the kind '{kind}' of open_clip is not known")
    projection = nn.Identity()
    if "pool" not in dict(visual.head.named_children()):
        projection, visual.head = visual.head, nn.Identity()
    timm_tower = OpenClipTimm(visual, transform, 0, 0, prefix_tokens=getattr(visual.trunk, "num_prefix_tokens", 0))
    visual.eval()
    with torch.no_grad():
        features = timm_tower(torch.zeros(1, 3, transform.size, transform.size))
    timm_tower.width = features.pooled.shape[1]
    timm_tower.num_patches, timm_tower.raw_patch_width = features.patches.shape[1], features.patches.shape[2]
    return timm_tower, projection


def text_tower(text: Any, tokenizer: Any, source: Path, context_length: int) -> tuple[OpenClipTextTower, nn.Module]:
    """The text tower and projection of an open_clip model's `text`.

    Raises ValueError for one whose parts are not known.
    """
    kind = type(text).__name__
    if kind == "HFTextEncoder":
        projection, text.proj = text.proj, nn.Identity()
        width = text.transformer.config.hidden_size
        return OpenClipHuggingFaceTower(text, tokenizer, source, width, context_length), projection
    if kind != "TextTransformer":
        raise ValueError(f"a text tower of the kind '{kind}' of open_clip is not known")
    projection = nn.Identity()
    if text.text_projection is not None:
        projection = (
            text.text_projection if isinstance(text.text_projection, nn.Linear) else linear_of(text.text_projection)
        )
        text.text_projection = None
    return OpenClipTextTower(text, tokenizer, source, text.width, context_length), projection


def linear_of(matrix: Tensor) -> nn.Linear:
    """x @ matrix (C, D) as a layer."""
    layer = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False, device=matrix.device)
    with torch.no_grad():
        layer.weight.copy_(matrix.T)
    return layer
