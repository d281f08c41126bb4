"""`Aligner`: two towers, projection heads, temperature, optional late interaction and fusion; saves itself.

One code path for the four designs: `self` and `sparse` differ in the text tower's attention only; `late` adds the late
interaction on top of the same two towers, and `cross` the fusion on top of that. `encoding.py` has how images and
captions are encoded and scored.

Source of the alignment: Radford et al., "CLIP", arXiv:2103.00020; Zhai et al., "LiT", arXiv:2111.07991.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.batch import TokenGroup
from clipvisionalign.files import atomic_write, atomic_write_files
from clipvisionalign.models.aligner_config import AlignerConfig, recorded_settings
from clipvisionalign.models.encoding import AnyImageTower, AnyTextTower, EncodingModel
from clipvisionalign.models.fusion import Fusion
from clipvisionalign.models.heads import CaptionEmbeddings, ImageEmbeddings, ImageHead
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower
from clipvisionalign.models.late_interaction import MAX_LOG_SCALE, LateInteraction
from clipvisionalign.models.pretrained import extend_positions, open_pretrained, reduce_width, start_from_projections
from clipvisionalign.models.pretrained.parts import PretrainedImageHead, PretrainedImageTower, PretrainedTextTower
from clipvisionalign.models.run_files import CONFIG_FILE, IMAGE_FOLDER, PRETRAINED_FOLDER, TEXT_FOLDER, WEIGHTS_FILE
from clipvisionalign.models.text_tower import CaptionFeatures, TextTower
from clipvisionalign.models.tower_cache import TOWER_CACHE_LIMITS, TowerOutputCache

__all__ = [
    "PAIR_SCORER_PREFIXES",
    "TOWER_CACHE_LIMITS",
    "Aligner",
    "AlignerConfig",
    "AnyImageTower",
    "AnyTextTower",
    "TowerOutputCache",
]

#: Beginnings of the names of what scores pairs: used where a loss or a score is taken, not where the towers encode.
PAIR_SCORER_PREFIXES = ("late.", "fusion.")


class Aligner(EncodingModel):
    """Aligns images and captions in one space of D dimensions.

    `load_aligner` opens a trained one. One that is made here has pretrained towers, found by name, and untrained heads:
    its scores mean nothing before it is trained (`train`). With `config.pretrained` towers and heads are those of a
    pretrained dual encoder, such as a CLIP.

    `encode_images` and `encode_captions` return unit vectors, `score` a matrix (images, captions), higher where they
    fit. It is an `nn.Module`: `to`, `eval` and `state_dict` work as always; encoding and scoring switch to evaluation
    mode for their duration.

    >>> aligner = Aligner(AlignerConfig())  # the towers that pip installs with this package
    >>> vectors = aligner.encode_captions(["a dog on the grass", "two cats"])
    >>> vectors.shape, (vectors.norm(dim=1) - 1).abs().max().item() < 1e-5
    (torch.Size([2, 256]), True)

    Args:
        config: The settings of the model.
        run: A folder that `save` wrote, which has the towers' configs and the tokenizer; None to find them by name.
        load_weights: Whether pretrained weights of the towers are loaded; else they are random until
            `load_state_dict`.
        directions: (config.width, D) of a pretrained model of width D, see `reduce_width`; None for a model that keeps
            its width, or gets its weights later.

    Attributes:
        config: The settings, with the hub's commits that the towers come from.
        image_tower: Pixels to pooled vector and patches.
        text_tower: Tokens to pooled vector and token vectors; it tokenises too.
        image_head: Projects pooled vectors and patches of images to the common space.
        text_head: Projects pooled vectors of captions to the common space.
        log_scale: (1,) logarithm of 1 / temperature, a parameter.
        late: The late interaction of the designs `late` and `cross`; else None.
        fusion: The fusion of the design `cross`; else None.
        logit_bias: (1,) what a sigmoid loss adds to the scaled cosines; None for a model without.
        show_progress: Whether encoding and scoring show a live line on standard error.
        tower_cache: Outputs of frozen towers, reused where the same images and captions come again; None for none.

    Raises:
        WeightsNotFound: There are no weights of that name here or on the hub.
        ValueError: A backbone is unknown, or a setting does not fit the pretrained model.

    Source of the alignment: Radford et al., "CLIP", arXiv:2103.00020; Zhai et al., "LiT", arXiv:2111.07991.
    """

    image_tower: AnyImageTower
    text_tower: AnyTextTower
    image_head: ImageHead | PretrainedImageHead
    text_head: nn.Module
    logit_bias: nn.Parameter | None
    max_log_scale: Tensor | None

    def __init__(
        self,
        config: AlignerConfig,
        run: Path | None = None,
        load_weights: bool = True,
        directions: Tensor | None = None,
    ) -> None:
        super().__init__()
        #: Whether encoding and scoring show a live line on standard error.
        self.show_progress = False
        #: What the towers gave before, where the same images and captions come again; None to run them each time.
        self.tower_cache: TowerOutputCache | None = None
        #: What is added to the scaled cosines by a model that was trained with a sigmoid loss, (1,); else None.
        self.register_parameter("logit_bias", None)
        self.register_buffer("max_log_scale", None)
        if config.pretrained:
            self._take_pretrained(config, run, load_weights, directions)
        else:
            self._build_towers(config, run, load_weights)
        self.late: LateInteraction | None = None
        self.fusion: Fusion | None = None
        if config.design in ("late", "cross"):
            self.late = LateInteraction(config.late, self.text_tower.width, self.width)
            if isinstance(self.text_tower, PretrainedTextTower):
                start_from_projections(self.late, self.text_tower, self.text_head)
        if config.design == "cross":
            self.fusion = Fusion(config.fusion, self.text_tower.width, self.width)

    def _build_towers(self, config: AlignerConfig, run: Path | None, load_weights: bool) -> None:
        """Two towers by name, and new heads."""
        config = config.resolved()
        text_config = config.text_tower
        if config.design == "sparse":
            text_config = replace(text_config, attention="sliding")
        self.image_tower = ImageTower(config.image_tower, load_weights, None if run is None else run / IMAGE_FOLDER)
        text_folder = None if run is None else run / TEXT_FOLDER
        self.text_tower = TextTower(text_config, text_folder, load_weights, config.positions)
        self.config = replace(
            config,
            image_tower=replace(config.image_tower, revision=self.image_tower.config.revision),
            text_tower=replace(config.text_tower, revision=self.text_tower.config.revision),
        )
        self.image_head = ImageHead(self.image_tower, self.width, config.dropout)
        text_head = nn.Linear(self.text_tower.width, self.width)
        nn.init.orthogonal_(text_head.weight)
        self.text_head = text_head
        # Of one element and one axis: FSDP2 shards no scalars.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / config.temperature)]))

    def _take_pretrained(
        self, config: AlignerConfig, run: Path | None, load_weights: bool, directions: Tensor | None
    ) -> None:
        """The towers and heads of a pretrained dual encoder."""
        folder = None if run is None else run / PRETRAINED_FOLDER
        parts, pinned = open_pretrained(config.pretrained, folder, load_weights)
        if config.positions != "own":
            extend_positions(parts.text_tower, config.positions)
        if config.design == "sparse":
            parts.text_tower.use_window(config.text_tower.window)
        if config.text_tower.max_tokens is not None:
            parts.text_tower.limit_tokens(config.text_tower.max_tokens)
        if config.width is not None and config.width != parts.width:
            reduce_width(parts, config.width, directions)
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
            # The sigmoid loss alone trains it: it moves no rank.
            self.logit_bias = nn.Parameter(torch.tensor([parts.logit_bias]), requires_grad=False)
        # A buffer: a run that is opened again has its limit from its weights, not from the ones it started from.
        self.register_buffer("max_log_scale", torch.tensor([max(MAX_LOG_SCALE, parts.log_scale)]))

    def embed_patches(self, wanted: bool = True) -> None:
        """Set whether image embeddings of a pretrained model have patches, as designs that score pairs need them.

        Args:
            wanted: Whether they have. Towers by name always give patches.
        """
        if isinstance(self.image_tower, PretrainedImageTower) and isinstance(self.image_head, PretrainedImageHead):
            self.image_tower.pools_patches = self.image_head.projects_patches = wanted

    # --- from tensors to the common space -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.log_scale.device

    @property
    def scores_all_pairs(self) -> bool:
        """Whether a whole gallery is ranked by `score`, which uses more than the vectors, and not by the vectors."""
        return self.config.design == "late"

    def scale(self) -> Tensor:
        """1 / temperature, at most 100 as in CLIP, or as much as a pretrained model has.

        Returns:
            A scalar, with a gradient.
        """
        if self.max_log_scale is not None:
            # `minimum` would share the gradient out where both are equal, which is where CLIP starts.
            limited = torch.where(self.log_scale > self.max_log_scale, self.max_log_scale, self.log_scale)
            return limited.exp().squeeze(0)
        return self.log_scale.exp().clamp(max=100.0).squeeze(0)

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """Clamp the learned temperatures after a step to where they have a gradient, as CLIP does."""
        limit = MAX_LOG_SCALE if self.max_log_scale is None else self.max_log_scale.item()
        self.log_scale.clamp_(-MAX_LOG_SCALE, limit)
        if self.late is not None:
            self.late.log_scale.clamp_(-MAX_LOG_SCALE, MAX_LOG_SCALE)

    def embed_image_features(self, features: ImageFeatures) -> ImageEmbeddings:
        """Project the features of an image tower to the common space.

        Args:
            features: Pooled (B, C) and patches (B, P, C').

        Returns:
            Unit vectors (B, D), and patches (B, P, D); None of a pretrained model without `embed_patches`.
        """
        return self.image_head(features)

    def embed_caption_group(self, group: TokenGroup) -> CaptionEmbeddings:
        """Encode one group of captions.

        Args:
            group: Token ids and mask (b, T), on the model's device.

        Returns:
            Unit vectors (b, D), tokens (b, T, W) for designs that score pairs, else None, and mask (b, T).
        """
        return self._project_captions(self.text_tower(group.ids, group.mask, want_tokens=self.late is not None))

    def embed_caption_groups(self, groups: Sequence[TokenGroup]) -> list[CaptionEmbeddings]:
        """Encode the groups of a batch, together where the text tower is faster so.

        Args:
            groups: The groups, on the model's device.

        Returns:
            What `embed_caption_group` returns for each of them.
        """
        if not isinstance(self.text_tower, TextTower):
            return [self.embed_caption_group(group) for group in groups]
        pairs = [(group.ids, group.mask) for group in groups]
        return [self._project_captions(each) for each in self.text_tower.encode_groups(pairs, self.late is not None)]

    def _project_captions(self, features: CaptionFeatures) -> CaptionEmbeddings:
        """Outputs of the text tower for some captions, in the common space."""
        return CaptionEmbeddings(
            F.normalize(self.text_head(features.pooled).float(), dim=-1), features.tokens, features.mask
        )

    def embed_caption_features(self, features: CaptionFeatures, group: TokenGroup) -> CaptionEmbeddings:
        """`embed_caption_group` with precomputed outputs of the text tower.

        Args:
            features: Outputs for the whole batch, pooled (M, W) and tokens (M, T, W) or None.
            group: One group of its captions, whose `rows` are positions among the M.

        Returns:
            As `embed_caption_group`.
        """
        vectors = F.normalize(self.text_head(features.pooled[group.rows]).float(), dim=-1)
        mask = self.text_tower.word_mask(group.ids, group.mask)
        if features.tokens is None:
            return CaptionEmbeddings(vectors, None, mask)
        # The batch is padded to its longest caption, a group to its own.
        return CaptionEmbeddings(vectors, features.tokens[group.rows, : mask.shape[1]], mask)

    # --- saving and loading ---------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write weights, config, and the towers' configs and tokenizer: all that `load_aligner` needs.

        A config.yaml that is there already is left as it is: a run's has more in it.

        Args:
            folder: The folder; it is made if it is not there.

        Raises:
            OSError: There is no room; the weights that were there before stay.
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
                aside.write_text(yaml.safe_dump({"model": recorded_settings(self.config)}, sort_keys=False))

    @property
    def late_scales(self) -> tuple[float, float] | None:
        """What cosines and the late interaction count in pair scores; None where these are not of both alone, as the
        design `late` has them."""
        if self.late is None or self.fusion is not None:
            return None
        return self.scale().item(), self.late.scale().item() * self.late.weight.item()

    def parameter_count(self) -> int:
        """Number of parameters of all parts.

        Returns:
            The number, frozen ones included.
        """
        return sum(parameter.numel() for parameter in self.parameters())
