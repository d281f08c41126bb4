"""`Aligner`: two towers, projection heads, temperature, optional late interaction and fusion; saves and loads itself.

- One code path for the four designs: `self` and `sparse` differ in the text tower's attention only; `late` adds the
  late interaction on top of the same two towers, and `cross` the fusion on top of that.
- A caption's vector depends on that caption alone and an image's on that image alone; only a pair's score sees both.
- The image's vector is a linear map of the backbone's own pooled vector plus an attention pooling over its patches,
  whose positions are learned: where a thing stands in the picture is part of what a caption says.
- Encoding is in float32 whatever the training used.

Source of the alignment: Radford et al., "CLIP", arXiv:2103.00020; Zhai et al., "LiT", arXiv:2111.07991.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.batch import TokenGroup, group_by_length
from clipvisionalign.files import files_written_aside, written_aside
from clipvisionalign.images import Picture
from clipvisionalign.lists import check_lists, check_strings
from clipvisionalign.models.device import best_device
from clipvisionalign.models.fusion import Fusion, FusionConfig
from clipvisionalign.models.hub import tell
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower, ImageTowerConfig
from clipvisionalign.models.late_interaction import (
    MOST_LOG_SCALE,
    LateConfig,
    LateInteraction,
    LateTokens,
    late_pair_scores,
    late_scores,
)
from clipvisionalign.models.packed_linear import pack_linears
from clipvisionalign.models.text_tower import CaptionFeatures, TextTower, TextTowerConfig
from clipvisionalign.models.weights import find_image_weights, find_text_weights
from clipvisionalign.progress import progress

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"
TEXT_FOLDER = "text_tower"
#: Only where a picture tower's name does not tell how it is built.
IMAGE_FOLDER = "image_tower"
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


class ImageStates(NamedTuple):
    """An image in the common space. vectors: (B, D) unit length; patches: (B, P, D), None where nobody asks."""

    vectors: Tensor
    patches: Tensor | None


class CaptionStates(NamedTuple):
    """Captions in the common space. vectors: (b, D) unit length; tokens: (b, T, W) or None; mask: (b, T)."""

    vectors: Tensor
    tokens: Tensor | None
    mask: Tensor


#: Pictures and captions that are remembered at most: half a GiB of features each.
REMEMBERED = 4000, 20_000


@dataclass
class Remembered:
    """What frozen towers gave. images: by path; captions: by their tokens, pooled (W,) and tokens (T, W)."""

    images: dict[Picture, ImageFeatures] = field(default_factory=dict)
    captions: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)


#: Heads of the pooling over an image's patches, which share out the width of the common space.
HEADS = 8


class ImageHead(nn.Module):
    """From a picture tower's features to the common space: a map of the pooled vector plus a pooling of the patches."""

    def __init__(self, tower: ImageTower, width: int, dropout: float, heads: int = HEADS) -> None:
        super().__init__()
        self.pooled, self.patch = (
            nn.Sequential(nn.LayerNorm(each), nn.Dropout(dropout), nn.Linear(each, width))
            for each in (tower.width, tower.patch_width)
        )
        self.position = nn.Parameter(torch.randn(tower.patches, width) * 0.02)
        self.weights = nn.Linear(width, heads)
        self.value = nn.Linear(width, width)
        # Every patch counts alike at the start.
        nn.init.zeros_(self.weights.weight)
        self.heads = heads

    def forward(self, features: ImageFeatures) -> ImageStates:
        patches = self.patch(features.patches) + self.position
        weights = self.weights(patches).softmax(dim=1)
        values = self.value(patches).unflatten(-1, (self.heads, -1))
        pooled = torch.einsum("bph,bphd->bhd", weights, values).flatten(1)
        return ImageStates(F.normalize((self.pooled(features.pooled) + pooled).float(), dim=-1), patches)


class Aligner(nn.Module):
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


class EncodedImages(NamedTuple):
    """N images as pairs need them. vectors: (N, D); patches: (N, P, E); key_values: (N, L, P, 2 D) for a fusion."""

    vectors: Tensor
    patches: Tensor
    key_values: Tensor | None

    @classmethod
    def join(cls, chunks: Sequence[EncodedImages]) -> EncodedImages:
        """Chunks one after the other. Raises ValueError for none."""
        if not chunks:
            raise ValueError("no images to score")
        key_values = [chunk.key_values for chunk in chunks if chunk.key_values is not None]
        vectors, patches = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("vectors", "patches"))
        return cls(vectors, patches, torch.cat(key_values) if key_values else None)


class EncodedCaption(NamedTuple):
    """A caption as pairs need it. vector: (D,); parts: (T, E) with weights (T,); tokens: (T, W) for a fusion.

    positions: (T,), where in the caption the tokens of the parts stand, where not all count (`keep_tokens`).
    """

    vector: Tensor
    parts: Tensor
    weights: Tensor
    tokens: Tensor | None
    positions: Tensor | None = None


class PairScorer:
    """Scores pairs of the images and captions it was made from; each was encoded and projected once.

    A pair's score is the dual encoder's cosine / temperature, plus the late interaction's score / its temperature times
    its weight, plus the fusion's correction times its weight. Called with image numbers (Q,) and caption numbers (Q,)
    it gives their scores (Q,), float32.
    """

    def __init__(
        self, aligner: Aligner, images: EncodedImages, captions: list[EncodedCaption], batch: int = 512
    ) -> None:
        assert aligner.late is not None
        self.aligner, self.late, self.fusion = aligner, aligner.late, aligner.fusion
        self.images, self.captions, self.batch = images, captions, batch
        self.image_vectors = images.vectors.cpu()
        width = aligner.config.width
        self.caption_vectors = torch.stack([c.vector for c in captions]).cpu() if captions else torch.empty(0, width)
        #: How often a picture's patches went through the fusion's projections: once each, whatever is scored.
        self.projections = 0 if images.key_values is None else len(images.key_values)
        self.lengths = np.array([len(caption.parts) for caption in captions])

    def weights(self) -> np.ndarray:
        """What the three parts of a score count: (3,), the dual score 1."""
        fusion = 0.0 if self.fusion is None else self.fusion.weight.item()
        return np.array([1.0, self.late.weight.item(), fusion], dtype=np.float32)

    def __call__(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        return self.parts(image_index, caption_index) @ self.weights()

    @torch.no_grad()
    def parts(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """The parts of the pairs' scores (Q, 3): dual encoder, late interaction, fusion's correction."""
        found = np.zeros((len(image_index), 3), dtype=np.float32)
        # Pairs of captions of one length stand together, so that little is padded.
        order = np.argsort(self.lengths[caption_index], kind="stable")
        with evaluating(self.aligner):
            starts = range(0, len(order), self.batch)
            for start in progress(starts, "scoring pairs", len(order), self.aligner.show_progress, self.batch):
                pairs = order[start : start + self.batch]
                found[pairs] = self.some(image_index[pairs], caption_index[pairs]).float().cpu().numpy()
        return found

    def some(self, image_index: np.ndarray, caption_index: np.ndarray) -> Tensor:
        """`parts` of as many pairs as go through the fusion together, with gradients where they are asked for."""
        device = self.images.vectors.device
        images = torch.from_numpy(image_index).to(device)
        captions = [self.captions[caption] for caption in caption_index]
        vectors = torch.stack([caption.vector for caption in captions])
        dual = (self.images.vectors[images] * vectors).sum(-1) * self.aligner.scale()
        patches = self.images.patches[images]
        late = late_pair_scores(patches, _padded_parts(captions)) * self.late.scale()
        if self.fusion is None:
            return torch.stack([dual, late, torch.zeros_like(dual)], dim=1)
        assert self.images.key_values is not None
        states = nn.utils.rnn.pad_sequence([c.tokens for c in captions if c.tokens is not None], batch_first=True)
        lengths = torch.tensor([len(c.tokens) for c in captions if c.tokens is not None], device=device)
        mask = torch.arange(states.shape[1], device=device) < lengths[:, None]
        correction = self.fusion(states, mask, self.images.key_values[images], self.late.matches(states, patches))
        return torch.stack([dual, late, correction.float()], dim=1)

    @torch.no_grad()
    def table(self) -> Tensor:
        """The scores of all pairs (N, M) without a fusion, in blocks: memory beyond the table does not grow with it."""
        if self.fusion is not None:
            raise ValueError("a fusion scores the pairs it is asked for, not a whole table")
        scores = (self.image_vectors @ self.caption_vectors.T) * self.aligner.scale().cpu()
        order = np.argsort(self.lengths, kind="stable")
        starts, shown = range(0, len(order), self.batch), self.aligner.show_progress
        for start in progress(starts, "scoring captions with all images", len(order), shown, self.batch):
            rows = order[start : start + self.batch]
            parts = _padded_parts([self.captions[row] for row in rows])
            late = late_scores(self.images.patches, parts) * self.late.scale() * self.late.weight
            scores[:, rows] += late.cpu()
        return scores


def _padded_parts(captions: Sequence[EncodedCaption]) -> LateTokens:
    vectors = nn.utils.rnn.pad_sequence([caption.parts for caption in captions], batch_first=True)
    weights = nn.utils.rnn.pad_sequence([caption.weights for caption in captions], batch_first=True)
    lengths = torch.tensor([len(caption.parts) for caption in captions], device=vectors.device)
    return LateTokens(vectors, weights, torch.arange(vectors.shape[1], device=vectors.device) < lengths[:, None])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, and back into the mode it was in."""
    if not any(module.training for module in model.modules()):
        # To set the mode of each module takes as long as a small model's caption.
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def config_from_dict(cls: Callable[..., Any], values: dict[str, Any]) -> Any:
    """A settings dataclass from what YAML or JSON holds; unknown names and wrong types raise ValueError."""
    from jsonargparse import ArgumentError

    parser = _parser_of(cls)
    try:
        return parser.instantiate_classes(parser.parse_object({"settings": values})).settings
    except ArgumentError as error:
        raise ValueError(str(error)) from None


@cache
def _parser_of(cls: Callable[..., Any]) -> Any:
    """Made once: that takes as long as building a small model."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "settings")
    return parser


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a run's model.safetensors, under the names and in the shapes that an aligner has them."""
    from safetensors.torch import load_file

    state = load_file(path)
    # Runs from before the temperature had an axis.
    return state | {"log_scale": state["log_scale"].reshape(1)} if "log_scale" in state else state


def pin_towers(config: AlignerConfig, say: Callable[[str], None] = tell) -> AlignerConfig:
    """Fetch what the towers need and is not on this machine; returns the config with the hub's commits that have it.

    Raises WeightsNotFound, and ValueError for an unknown backbone.
    """
    image, text = config.image_tower, config.text_tower
    found = find_image_weights(image.name, image.weights, image.revision, say)
    if found is not None:
        image = replace(image, revision=found.origin.revision or image.revision)
    revision = find_text_weights(text.name, text.weights, text.revision, say).origin.revision
    return replace(config, image_tower=image, text_tower=replace(text, revision=revision or text.revision))


def load_aligner(folder: str | Path, device: str = "auto", packed: bool = True) -> Aligner:
    """The aligner that a run folder holds, ready to encode and score; needs nothing else, and no network.

    packed: lay the weights out for the CPU's kernels, which an export to another format cannot read.

    Raises FileNotFoundError where the folder is not a run folder, ValueError where a file in it does not fit.
    """
    import yaml

    source = Path(folder)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, TEXT_FOLDER) if not (source / name).exists()]
    if missing:
        told = "no such folder" if not source.is_dir() else f"it lacks {', '.join(missing)}"
        raise FileNotFoundError(f"{source}: not a run folder: {told}; 'clipvisionalign train' writes one")
    try:
        settings = yaml.safe_load((source / CONFIG_FILE).read_text())["model"]
        config = config_from_dict(AlignerConfig, settings)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source / CONFIG_FILE}: no settings of an aligner: {error}") from None
    aligner = Aligner(config, run=source, load_weights=False)
    try:
        aligner.load_state_dict(read_weights(source / WEIGHTS_FILE))
    except Exception as error:
        raise ValueError(f"{source / WEIGHTS_FILE}: not this aligner's weights: {error}") from None
    if packed:
        pack_linears(aligner)
    return aligner.to(best_device(device)).eval()
