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
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.batch import TokenGroup, group_by_length
from clipvisionalign.files import files_written_aside, written_aside
from clipvisionalign.images import Picture
from clipvisionalign.lists import check_lists, check_strings
from clipvisionalign.models.eval_mode import evaluating
from clipvisionalign.models.fusion import Fusion, FusionConfig
from clipvisionalign.models.heads import CaptionStates, ImageHead, ImageStates
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower, ImageTowerConfig
from clipvisionalign.models.late_interaction import MOST_LOG_SCALE, LateConfig, LateInteraction
from clipvisionalign.models.pair_scorer import EncodedCaption, EncodedImages, PairModel, PairScorer
from clipvisionalign.models.run_files import CONFIG_FILE, IMAGE_FOLDER, TEXT_FOLDER, WEIGHTS_FILE
from clipvisionalign.models.text_tower import CaptionFeatures, TextTower, TextTowerConfig
from clipvisionalign.progress import progress

#: Beginnings of the names of what scores pairs: used where a loss or a score is taken, not where the towers encode.
PAIR_PARTS = ("late.", "fusion.")


@dataclass
class AlignerConfig:
    """The model: which towers, and which attention between caption and picture.

    Args:
        design: "self" (plain attention in the text tower), "sparse" (Longformer, or sliding windows over the same text
            tower), "late" (tokens against patches by the sum of best matches), "cross" (the caption's tokens attend to
            the picture's patches, to re-rank the first candidates).
        image_tower: the picture tower.
        text_tower: the text tower.
        late: the late interaction of the designs "late" and "cross".
        fusion: the fusion head of the design "cross".
        width: width of the common space.
        temperature: where the learned temperature starts.
        dropout: dropout before the projections, while training.
    """

    design: Literal["self", "sparse", "late", "cross"] = "self"
    image_tower: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text_tower: TextTowerConfig = field(default_factory=TextTowerConfig)
    late: LateConfig = field(default_factory=LateConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    width: int = 256
    temperature: float = 0.05
    dropout: float = 0.2


#: Pictures and captions that are remembered at most: half a GiB of features each.
REMEMBERED = 4000, 20_000


@dataclass
class Remembered:
    """What frozen towers gave. images: by path; captions: by their tokens, pooled (W,) and tokens (T, W)."""

    images: dict[Picture, ImageFeatures] = field(default_factory=dict)
    captions: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)


class Aligner(PairModel):
    """Aligns images and captions in one space of `config.width` dimensions.

    run: a folder that `save` wrote, which has the towers' configs and the tokenizer; None to find them by name: then
    `config` gets the commits that the hub has. With `load_weights` False the towers stay empty until `load_state_dict`.
    Raises WeightsNotFound, and ValueError for an unknown backbone.
    """

    def __init__(self, config: AlignerConfig, run: Path | None = None, load_weights: bool = True) -> None:
        super().__init__()
        #: Whether encoding and scoring show a live line on standard error.
        self.show_progress = False
        #: What the towers gave before, where the same pictures and captions come again; None to run them each time.
        self.remembered: Remembered | None = None
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
        self.text_head = nn.Linear(self.text_tower.width, config.width)
        nn.init.orthogonal_(self.text_head.weight)
        # Of one element and one axis: FSDP2 shards no scalars.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / config.temperature)]))
        self.late: LateInteraction | None = None
        self.fusion: Fusion | None = None
        if config.design in ("late", "cross"):
            self.late = LateInteraction(config.late, self.text_tower.width, config.width)
        if config.design == "cross":
            self.fusion = Fusion(config.fusion, self.text_tower.width, config.width)

    # --- from tensors to the common space -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    @property
    def scores_all_pairs(self) -> bool:
        """Whether a whole gallery is ranked by `score`, which sees more than the vectors, and not by the vectors."""
        return self.config.design == "late"

    def scale(self) -> Tensor:
        """1 / temperature, at most 100 as in CLIP."""
        return self.log_scale.exp().clamp(max=100.0).squeeze(0)

    @torch.no_grad()
    def limit_temperatures(self) -> None:
        """After a step: the temperatures that are learned stay where they have a gradient, as CLIP's does."""
        for part in (self, self.late):
            if part is not None:
                part.log_scale.clamp_(-MOST_LOG_SCALE, MOST_LOG_SCALE)

    def image_states(self, features: ImageFeatures) -> ImageStates:
        """A picture tower's features -> vectors (B, D) and patches (B, P, D)."""
        return self.image_head(features)

    def caption_states(self, group: TokenGroup) -> CaptionStates:
        """One group of captions -> vectors (b, D), tokens (b, T, W) for a design that scores pairs, and mask (b, T)."""
        features: CaptionFeatures = self.text_tower(group.ids, group.mask, want_tokens=self.late is not None)
        return CaptionStates(F.normalize(self.text_head(features.pooled).float(), dim=-1), features.tokens, group.mask)

    def states_of(self, known: CaptionFeatures, group: TokenGroup) -> CaptionStates:
        """`caption_states` of a group whose tower's outputs are known already: `known` is of the whole batch."""
        vectors = F.normalize(self.text_head(known.pooled[group.rows]).float(), dim=-1)
        if known.tokens is None:
            return CaptionStates(vectors, None, group.mask)
        # The batch is padded to its longest caption, a group to its own.
        return CaptionStates(vectors, known.tokens[group.rows, : group.mask.shape[1]], group.mask)

    # --- from pictures and words to vectors -----------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Sequence[Picture], batch: int = 64) -> Tensor:
        """Images (paths, bytes or Pillow pictures) -> unit vectors (N, D), float32.

        Raises PictureError, and TypeError for one image where a list of them belongs."""
        chunks = [states.vectors.cpu() for states in self.image_chunks(images, batch)]
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
        for rows, states in self._caption_chunks(tokens, batch):
            vectors[rows] = states.vectors.cpu()
        return vectors

    @torch.no_grad()
    def encode_pooled(self, pooled: Tensor) -> Tensor:
        """Pooled vectors (M, W) that the text tower has given already -> unit vectors (M, D), float32."""
        return F.normalize(self.text_head(pooled.to(self.device)).float(), dim=-1).cpu()

    def score(self, images: Sequence[Picture], captions: Sequence[str]) -> Tensor:
        """The score of every image with every caption (N, M): cosines, or what the late interaction or fusion says.

        Raises PictureError, and TypeError for one image or one string where a list of them belongs."""
        check_lists(images, captions)
        if self.late is None or not len(images):
            return self.encode_images(images) @ self.encode_captions(captions).T
        pairs = self.pair_scorer(images, captions)
        if self.fusion is None:
            return pairs.table()
        grid = np.indices((len(images), len(captions))).reshape(2, -1)
        return torch.from_numpy(pairs(grid[0], grid[1])).reshape(len(images), len(captions))

    def score_pairs(
        self, images: Sequence[Picture], captions: Sequence[str], image_index: np.ndarray, caption_index: np.ndarray
    ) -> np.ndarray:
        """The scores of some pairs only (Q,): image `image_index[q]` with caption `caption_index[q]`."""
        check_lists(images, captions)
        if self.late is not None:
            return self.pair_scorer(images, captions)(image_index, caption_index)
        left, right = self.encode_images(images).numpy(), self.encode_captions(captions).numpy()
        return np.einsum("qd,qd->q", left[image_index], right[caption_index])

    @torch.no_grad()
    def pair_scorer(self, images: Sequence[Picture], captions: Sequence[str], batch: int = 512) -> PairScorer:
        """Encode images and captions once, to score any pairs of them later. Raises ValueError if the design cannot,
        and for no images."""
        if self.late is None:
            raise ValueError(f"the design '{self.config.design}' scores no pairs: it has vectors only")
        check_lists(images, captions)
        with evaluating(self):
            return PairScorer(
                self,
                self.encode_image_parts(self.image_chunks(images, 64)),
                self.encode_caption_parts(captions),
                batch,
            )

    @torch.no_grad()
    def encode_image_parts(self, chunks: Iterable[ImageStates]) -> EncodedImages:
        """What pairs need of images, each projected once. Raises ValueError for no images."""
        return EncodedImages.join([self.image_parts(states) for states in chunks])

    def image_parts(self, states: ImageStates) -> EncodedImages:
        """`encode_image_parts` of some images, with gradients where they are asked for."""
        assert self.late is not None
        assert states.patches is not None
        key_values = None if self.fusion is None else self.fusion.project_patches(states.patches)
        return EncodedImages(states.vectors, self.late.patches(states.patches), key_values)

    @torch.no_grad()
    def encode_caption_parts(self, captions: Sequence[str]) -> list[EncodedCaption]:
        """What pairs need of captions, each encoded once."""
        check_strings(captions)
        with evaluating(self):
            captions_in: list[EncodedCaption | None] = [None] * len(captions)
            for rows, states in self._caption_chunks(self.text_tower.tokenize(captions), 250):
                for row, caption in zip(rows.tolist(), self.caption_parts(states), strict=True):
                    captions_in[row] = caption
        return [caption for caption in captions_in if caption is not None]

    def caption_parts(self, states: CaptionStates) -> list[EncodedCaption]:
        """`encode_caption_parts` of one group of captions."""
        assert self.late is not None
        assert states.tokens is not None
        parts, found = self.late.tokens(states.tokens, states.mask), []
        for row in range(len(states.vectors)):
            real, kept = int(states.mask[row].sum()), int(parts.mask[row].sum())
            found.append(
                EncodedCaption(
                    states.vectors[row],
                    parts.vectors[row, :kept],
                    parts.weights[row, :kept],
                    states.tokens[row, :real] if self.fusion is not None else None,
                    None if parts.positions is None else parts.positions[row, :kept],
                )
            )
        return found

    @torch.no_grad()
    def image_chunks(self, images: Sequence[Picture], batch: int = 64) -> Iterator[ImageStates]:
        """Images in the common space, `batch` at a time. Raises PictureError, and TypeError for one image alone."""
        check_lists(images)
        starts = range(0, len(images), batch)
        with evaluating(self), ThreadPoolExecutor() as pool:
            for start in progress(starts, "encoding images", len(images), self.show_progress, batch):
                yield self.image_states(self._image_features(images[start : start + batch], pool))

    def _image_features(self, images: Sequence[Picture], pool: ThreadPoolExecutor) -> ImageFeatures:
        """What the picture tower gives for some images: looked at now, or remembered."""
        known = None if self.remembered is None else self.remembered.images
        new = [image for image in images if known is None or image not in known]
        if new:
            pixels = torch.stack(list(pool.map(self.image_tower.input.look(), new)))
            features = self.image_tower(pixels.to(self.device))
            if known is None:
                return features
            for place, image in enumerate(new):
                known[image] = ImageFeatures(*(part[place].clone() for part in features))
        assert known is not None
        pooled, patches = zip(*(known[image] for image in images), strict=True)
        return ImageFeatures(torch.stack(pooled), torch.stack(patches))

    def _caption_chunks(self, tokens: list[list[int]], batch: int) -> Iterator[tuple[Tensor, CaptionStates]]:
        groups = group_by_length(tokens, self.text_tower.pad, batch)
        with evaluating(self):
            shown = self.show_progress
            for group in progress(groups, "encoding captions", len(tokens), shown, lambda group: len(group.rows)):
                moved = TokenGroup(group.ids.to(self.device), group.mask.to(self.device), group.rows)
                if self.remembered is None:
                    yield group.rows, self.caption_states(moved)
                else:
                    known = self._remembered_captions(moved, [tuple(tokens[row]) for row in group.rows.tolist()])
                    yield group.rows, self.states_of(known, replace(moved, rows=torch.arange(len(moved.rows))))

    def _remembered_captions(self, group: TokenGroup, keys: list[tuple[int, ...]]) -> CaptionFeatures:
        """What the text tower gives for a group: read now, or remembered."""
        assert self.remembered is not None
        known = self.remembered.captions
        new = [place for place, key in enumerate(keys) if key not in known]
        if new:
            features = self.text_tower(group.ids[new], group.mask[new])
            for row, place in enumerate(new):
                own = features.tokens[row, : len(keys[place])].clone()
                known[keys[place]] = features.pooled[row].clone(), own
        pooled = torch.stack([known[key][0] for key in keys])
        if self.late is None:
            return CaptionFeatures(pooled, None, group.mask)
        tokens = nn.utils.rnn.pad_sequence([known[key][1] for key in keys], batch_first=True)
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
        for tower, name in ((self.text_tower, TEXT_FOLDER), (self.image_tower, IMAGE_FOLDER)):
            with files_written_aside(target / name) as aside:
                tower.save(aside)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        try:
            # In a folder: safetensors itself writes under a name that nobody else knows, which a process that is killed
            # leaves. On the disk at once: a checkpoint that is written later relies on this model.
            with written_aside(target / WEIGHTS_FILE, in_folder=True) as aside:
                save_file(state, aside)
        except SafetensorError as error:
            raise OSError(f"{target / WEIGHTS_FILE}: not written: {error}; what was there before is kept") from None
        if not (target / CONFIG_FILE).exists():
            with written_aside(target / CONFIG_FILE) as aside:
                aside.write_text(yaml.safe_dump({"model": asdict(self.config)}, sort_keys=False))

    def parameter_count(self) -> int:
        """Parameters of all parts."""
        return sum(parameter.numel() for parameter in self.parameters())
