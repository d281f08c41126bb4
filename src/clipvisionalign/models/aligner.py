"""`Aligner`: two towers, projection heads, temperature, optional late interaction and fusion; saves itself.

- One code path for the four designs: `self` and `sparse` differ in the text tower's attention only; `late` adds the
  late interaction on top of the same two towers, and `cross` the fusion on top of that.
- A caption's vector depends on that caption alone and an image's on that image alone; only a pair's score sees both.
- Encoding is in float32 whatever the training used.

Source of the alignment: Radford et al., "CLIP", arXiv:2103.00020; Zhai et al., "LiT", arXiv:2111.07991.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.argument_checks import check_lists, check_strings
from clipvisionalign.batch import TokenGroup, group_by_length
from clipvisionalign.files import atomic_write, atomic_write_files
from clipvisionalign.images import ImageSource
from clipvisionalign.models.aligner_config import AlignerConfig
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.fusion import Fusion
from clipvisionalign.models.heads import CaptionEmbeddings, ImageEmbeddings, ImageHead
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower
from clipvisionalign.models.late_interaction import MAX_LOG_SCALE, LateInteraction
from clipvisionalign.models.pair_scorer import EncodedCaption, EncodedImages, PairModel, PairScorer
from clipvisionalign.models.pretrained import extend_positions, open_pretrained, start_from_projections
from clipvisionalign.models.pretrained.parts import PretrainedImageHead, PretrainedImageTower, PretrainedTextTower
from clipvisionalign.models.run_files import CONFIG_FILE, IMAGE_FOLDER, PRETRAINED_FOLDER, TEXT_FOLDER, WEIGHTS_FILE
from clipvisionalign.models.text_tower import CaptionFeatures, TextTower, TextTowerConfig
from clipvisionalign.progress import progress

#: Towers by name, or of a pretrained dual encoder.
AnyImageTower: TypeAlias = ImageTower | PretrainedImageTower
AnyTextTower: TypeAlias = TextTower | PretrainedTextTower

#: Beginnings of the names of what scores pairs: used where a loss or a score is taken, not where the towers encode.
PAIR_SCORER_PREFIXES = ("late.", "fusion.")


#: Images and captions that are remembered at most: half a GiB of features each.
TOWER_CACHE_LIMITS = 4000, 20_000


@dataclass
class TowerOutputCache:
    """What frozen towers gave. images: by path; captions: by their tokens, pooled (W,) and tokens (T, W)."""

    images: dict[ImageSource, ImageFeatures] = field(default_factory=dict)
    captions: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)


class Aligner(PairModel):
    """Aligns images and captions in one space of `config.width` dimensions.

    run: a folder that `save` wrote, which has the towers' configs and the tokenizer; None to find them by name: then
    `config` gets the commits that the hub has. With `load_weights` False the towers stay empty until `load_state_dict`.
    Raises WeightsNotFound, and ValueError for an unknown backbone.
    """

    image_tower: AnyImageTower
    text_tower: AnyTextTower
    image_head: ImageHead | PretrainedImageHead
    text_head: nn.Module
    logit_bias: nn.Parameter | None
    max_log_scale: Tensor | None

    def __init__(self, config: AlignerConfig, run: Path | None = None, load_weights: bool = True) -> None:
        super().__init__()
        #: Whether encoding and scoring show a live line on standard error.
        self.show_progress = False
        #: What the towers gave before, where the same images and captions come again; None to run them each time.
        self.tower_cache: TowerOutputCache | None = None
        #: What is added to the scaled cosines by a model that was trained with a sigmoid loss, (1,); else None.
        self.register_parameter("logit_bias", None)
        self.register_buffer("max_log_scale", None)
        if config.pretrained:
            self._take_pretrained(config, run, load_weights)
        else:
            self._build_towers(config, run, load_weights)
        width = self.config.width
        self.late: LateInteraction | None = None
        self.fusion: Fusion | None = None
        if config.design in ("late", "cross"):
            self.late = LateInteraction(config.late, self.text_tower.width, width)
            if isinstance(self.text_tower, PretrainedTextTower):
                start_from_projections(self.late, self.text_tower, self.text_head)
        if config.design == "cross":
            self.fusion = Fusion(config.fusion, self.text_tower.width, width)

    def _build_towers(self, config: AlignerConfig, run: Path | None, load_weights: bool) -> None:
        """Two towers by name, and new heads."""
        text_config = config.text_tower
        if config.design == "sparse":
            text_config = replace(text_config, attention="sliding")
        self.image_tower = ImageTower(config.image_tower, load_weights, None if run is None else run / IMAGE_FOLDER)
        self.text_tower = TextTower(text_config, None if run is None else run / TEXT_FOLDER, load_weights)
        self.config = replace(
            config,
            image_tower=replace(config.image_tower, revision=self.image_tower.config.revision),
            text_tower=replace(config.text_tower, revision=self.text_tower.config.revision),
        )
        self.image_head = ImageHead(self.image_tower, config.width, config.dropout)
        text_head = nn.Linear(self.text_tower.width, config.width)
        nn.init.orthogonal_(text_head.weight)
        self.text_head = text_head
        # Of one element and one axis: FSDP2 shards no scalars.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / config.temperature)]))

    def _take_pretrained(self, config: AlignerConfig, run: Path | None, load_weights: bool) -> None:
        """The towers and heads of a pretrained dual encoder."""
        folder = None if run is None else run / PRETRAINED_FOLDER
        parts, pinned = open_pretrained(config.pretrained, folder, load_weights)
        if config.positions != "own":
            extend_positions(parts.text_tower, config.positions)
        if config.design == "sparse":
            parts.text_tower.use_window(config.text_tower.window)
        if config.text_tower.max_tokens != TextTowerConfig.max_tokens:
            parts.text_tower.limit_tokens(config.text_tower.max_tokens)
        self.image_tower, self.text_tower = parts.image_tower, parts.text_tower
        self.image_head, self.text_head = parts.image_head, parts.text_head
        tower = self.text_tower
        tower.config = replace(config.text_tower, name=pinned, max_tokens=tower.max_tokens)
        self.config = replace(
            config, pretrained=pinned, width=parts.width, image_tower=parts.image_tower.config, text_tower=tower.config
        )
        self.embed_patches(config.design in ("late", "cross"))
        self.log_scale = nn.Parameter(torch.tensor([parts.log_scale]))
        if parts.logit_bias is not None:
            # No loss trains it: it moves no rank.
            self.logit_bias = nn.Parameter(torch.tensor([parts.logit_bias]), requires_grad=False)
        # A buffer: a run that is opened again has its limit from its weights, not from the ones it started from.
        self.register_buffer("max_log_scale", torch.tensor([max(MAX_LOG_SCALE, parts.log_scale)]))

    def embed_patches(self, wanted: bool = True) -> None:
        """Whether image embeddings have patches; those of a pretrained model have them for designs that score pairs."""
        if isinstance(self.image_tower, PretrainedImageTower) and isinstance(self.image_head, PretrainedImageHead):
            self.image_tower.pools_patches = self.image_head.projects_patches = wanted

    # --- from tensors to the common space -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.log_scale.device

    @property
    def scores_all_pairs(self) -> bool:
        """Whether a whole gallery is ranked by `score`, which sees more than the vectors, and not by the vectors."""
        return self.config.design == "late"

    def scale(self) -> Tensor:
        """1 / temperature, at most 100 as in CLIP, or as much as a pretrained model has."""
        if self.max_log_scale is not None:
            # `minimum` would share the gradient out where both are equal, which is where CLIP starts.
            limited = torch.where(self.log_scale > self.max_log_scale, self.max_log_scale, self.log_scale)
            return limited.exp().squeeze(0)
        return self.log_scale.exp().clamp(max=100.0).squeeze(0)

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """After a step: the temperatures that are learned stay where they have a gradient, as CLIP's does."""
        limit = MAX_LOG_SCALE if self.max_log_scale is None else self.max_log_scale.item()
        self.log_scale.clamp_(-MAX_LOG_SCALE, limit)
        if self.late is not None:
            self.late.log_scale.clamp_(-MAX_LOG_SCALE, MAX_LOG_SCALE)

    def embed_image_features(self, features: ImageFeatures) -> ImageEmbeddings:
        """An image tower's features -> vectors (B, D) and patches (B, P, D)."""
        return self.image_head(features)

    def embed_caption_group(self, group: TokenGroup) -> CaptionEmbeddings:
        """One group of captions -> vectors (b, D), tokens (b, T, W) for a design that scores pairs, and mask (b, T)."""
        features: CaptionFeatures = self.text_tower(group.ids, group.mask, want_tokens=self.late is not None)
        return CaptionEmbeddings(
            F.normalize(self.text_head(features.pooled).float(), dim=-1), features.tokens, features.mask
        )

    def embed_caption_features(self, features: CaptionFeatures, group: TokenGroup) -> CaptionEmbeddings:
        """`embed_caption_group` with precomputed outputs of the tower: `features` is of the whole batch."""
        vectors = F.normalize(self.text_head(features.pooled[group.rows]).float(), dim=-1)
        mask = self.text_tower.word_mask(group.ids, group.mask)
        if features.tokens is None:
            return CaptionEmbeddings(vectors, None, mask)
        # The batch is padded to its longest caption, a group to its own.
        return CaptionEmbeddings(vectors, features.tokens[group.rows, : mask.shape[1]], mask)

    # --- from images and words to vectors -----------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Sequence[ImageSource], batch: int = 64) -> Tensor:
        """Images (paths, bytes or Pillow images) -> unit vectors (N, D), float32.

        Raises ImageError, and TypeError for one image where a list of them belongs."""
        chunks = [embeddings.vectors.cpu() for embeddings in self.image_chunks(images, batch)]
        return torch.cat(chunks) if chunks else torch.empty(0, self.config.width)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str], batch: int = 250) -> Tensor:
        """Captions -> unit vectors (M, D), float32. Raises TypeError for one string where a list of them belongs."""
        check_strings(captions)
        return self.encode_tokens(self.text_tower.tokenize(captions), batch)

    @torch.no_grad()
    def encode_tokens(self, tokens: list[list[int]], batch: int = 250) -> Tensor:
        """What the text tower's `tokenize` gave -> unit vectors (M, D), float32: to encode the same captions again."""
        vectors = torch.empty(len(tokens), self.config.width)
        for rows, embeddings in self._caption_chunks(tokens, batch):
            vectors[rows] = embeddings.vectors.cpu()
        return vectors

    @torch.no_grad()
    def encode_pooled(self, pooled: Tensor) -> Tensor:
        """Pooled vectors (M, W) that the text tower has given already -> unit vectors (M, D), float32."""
        return F.normalize(self.text_head(pooled.to(self.device)).float(), dim=-1).cpu()

    def score(self, images: Sequence[ImageSource], captions: Sequence[str]) -> Tensor:
        """The score of every image with every caption (N, M): cosines, or the scores of the late interaction or fusion.

        Raises ImageError, and TypeError for one image or one string where a list of them belongs."""
        check_lists(images, captions)
        if self.late is None or not len(images):
            return self.encode_images(images) @ self.encode_captions(captions).T
        pairs = self.pair_scorer(images, captions)
        if self.fusion is None:
            return pairs.score_matrix()
        grid = np.indices((len(images), len(captions))).reshape(2, -1)
        return torch.from_numpy(pairs(grid[0], grid[1])).reshape(len(images), len(captions))

    def score_pairs(
        self, images: Sequence[ImageSource], captions: Sequence[str], image_index: np.ndarray, caption_index: np.ndarray
    ) -> np.ndarray:
        """The scores of some pairs only (Q,): image `image_index[q]` with caption `caption_index[q]`."""
        check_lists(images, captions)
        if self.late is not None:
            return self.pair_scorer(images, captions)(image_index, caption_index)
        left, right = self.encode_images(images).numpy(), self.encode_captions(captions).numpy()
        return np.einsum("qd,qd->q", left[image_index], right[caption_index])

    @torch.no_grad()
    def pair_scorer(self, images: Sequence[ImageSource], captions: Sequence[str], batch: int = 512) -> PairScorer:
        """Encode images and captions once, to score any pairs of them later.

        Raises ValueError if the design cannot, and for no images.
        """
        if self.late is None:
            raise ValueError(f"the design '{self.config.design}' scores no pairs: it has vectors only")
        check_lists(images, captions)
        with eval_mode(self):
            return PairScorer(
                self,
                self.encode_images_for_pairs(self.image_chunks(images, 64)),
                self.encode_captions_for_pairs(captions),
                batch,
            )

    @torch.no_grad()
    def encode_images_for_pairs(self, chunks: Iterable[ImageEmbeddings]) -> EncodedImages:
        """What pairs need of images, each projected once. Raises ValueError for no images."""
        return EncodedImages.concat([self.project_images_for_pairs(embeddings) for embeddings in chunks])

    def project_images_for_pairs(self, embeddings: ImageEmbeddings) -> EncodedImages:
        """`encode_images_for_pairs` of some images, with gradients if enabled."""
        assert self.late is not None
        assert embeddings.patches is not None
        key_values = None if self.fusion is None else self.fusion.project_patches(embeddings.patches)
        return EncodedImages(embeddings.vectors, self.late.project_patches(embeddings.patches), key_values)

    @torch.no_grad()
    def encode_captions_for_pairs(self, captions: Sequence[str]) -> list[EncodedCaption]:
        """What pairs need of captions, each encoded once."""
        check_strings(captions)
        with eval_mode(self):
            encoded: list[EncodedCaption | None] = [None] * len(captions)
            for rows, embeddings in self._caption_chunks(self.text_tower.tokenize(captions), 250):
                for row, caption in zip(rows.tolist(), self.project_captions_for_pairs(embeddings), strict=True):
                    encoded[row] = caption
        return [caption for caption in encoded if caption is not None]

    def project_captions_for_pairs(self, embeddings: CaptionEmbeddings) -> list[EncodedCaption]:
        """`encode_captions_for_pairs` of one group of captions."""
        assert self.late is not None
        assert embeddings.tokens is not None
        late_tokens, encoded = self.late.project_tokens(embeddings.tokens, embeddings.mask), []
        for row in range(len(embeddings.vectors)):
            token_count, kept_count = int(embeddings.mask[row].sum()), int(late_tokens.mask[row].sum())
            encoded.append(
                EncodedCaption(
                    embeddings.vectors[row],
                    late_tokens.vectors[row, :kept_count],
                    late_tokens.weights[row, :kept_count],
                    embeddings.tokens[row, :token_count] if self.fusion is not None else None,
                    None if late_tokens.positions is None else late_tokens.positions[row, :kept_count],
                )
            )
        return encoded

    @torch.no_grad()
    def image_chunks(self, images: Sequence[ImageSource], batch: int = 64) -> Iterator[ImageEmbeddings]:
        """Images in the common space, `batch` at a time. Raises ImageError, and TypeError for one image alone."""
        check_lists(images)
        starts = range(0, len(images), batch)
        with eval_mode(self), ThreadPoolExecutor() as pool:
            for start in progress(starts, "encoding images", len(images), self.show_progress, batch):
                yield self.embed_image_features(self._image_features(images[start : start + batch], pool))

    def _image_features(self, images: Sequence[ImageSource], pool: ThreadPoolExecutor) -> ImageFeatures:
        """What the image tower gives for some images: looked at now, or remembered."""
        cache = None if self.tower_cache is None else self.tower_cache.images
        missing = [image for image in images if cache is None or image not in cache]
        if missing:
            pixels = torch.stack(list(pool.map(self.image_tower.image_transform.image_loader(), missing)))
            features = self.image_tower(pixels.to(self.device))
            if cache is None:
                return features
            for position, image in enumerate(missing):
                cache[image] = ImageFeatures(*(part[position].clone() for part in features))
        assert cache is not None
        pooled, patches = zip(*(cache[image] for image in images), strict=True)
        return ImageFeatures(torch.stack(pooled), torch.stack(patches))

    def _caption_chunks(self, tokens: list[list[int]], batch: int) -> Iterator[tuple[Tensor, CaptionEmbeddings]]:
        groups = group_by_length(tokens, self.text_tower.pad, batch)
        with eval_mode(self):
            show_progress = self.show_progress
            for group in progress(
                groups, "encoding captions", len(tokens), show_progress, lambda group: len(group.rows)
            ):
                moved = TokenGroup(group.ids.to(self.device), group.mask.to(self.device), group.rows)
                if self.tower_cache is None:
                    yield group.rows, self.embed_caption_group(moved)
                else:
                    features = self._cached_caption_features(moved, [tuple(tokens[row]) for row in group.rows.tolist()])
                    yield (
                        group.rows,
                        self.embed_caption_features(features, replace(moved, rows=torch.arange(len(moved.rows)))),
                    )

    def _cached_caption_features(self, group: TokenGroup, keys: list[tuple[int, ...]]) -> CaptionFeatures:
        """What the text tower gives for a group: read now, or remembered."""
        assert self.tower_cache is not None
        cache = self.tower_cache.captions
        missing = [position for position, key in enumerate(keys) if key not in cache]
        if missing:
            features = self.text_tower(group.ids[missing], group.mask[missing])
            for row, position in enumerate(missing):
                token_features = features.tokens[row, : len(keys[position])].clone()
                cache[keys[position]] = features.pooled[row].clone(), token_features
        pooled = torch.stack([cache[key][0] for key in keys])
        if self.late is None:
            return CaptionFeatures(pooled, None, group.mask)
        tokens = nn.utils.rnn.pad_sequence([cache[key][1] for key in keys], batch_first=True)
        return CaptionFeatures(pooled, tokens, group.mask)

    # --- saving and loading ---------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write weights, config, and the text tower's config and tokenizer: all that `load_aligner` needs.

        Raises OSError where there is no room; the weights that were there before stay.
        """
        import yaml
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        # A run that is resumed needs them too, while its last model is written.
        text_folder = PRETRAINED_FOLDER if self.config.pretrained else TEXT_FOLDER
        for tower, name in ((self.text_tower, text_folder), (self.image_tower, IMAGE_FOLDER)):
            with atomic_write_files(target / name) as aside:
                tower.save(aside)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        try:
            # In a folder: safetensors itself writes under a random name, which a process that is killed
            # leaves. On the disk at once: a checkpoint that is written later relies on this model.
            with atomic_write(target / WEIGHTS_FILE, in_own_folder=True) as aside:
                save_file(state, aside)
        except SafetensorError as error:
            raise OSError(f"{target / WEIGHTS_FILE}: not written: {error}; what was there before is kept") from None
        if not (target / CONFIG_FILE).exists():
            with atomic_write(target / CONFIG_FILE) as aside:
                aside.write_text(yaml.safe_dump({"model": asdict(self.config)}, sort_keys=False))

    def parameter_count(self) -> int:
        """Parameters of all parts."""
        return sum(parameter.numel() for parameter in self.parameters())
