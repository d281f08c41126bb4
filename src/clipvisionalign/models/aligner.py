"""`Aligner`: the two towers, the projection heads, the temperature, the optional fusion; saves and loads itself.

- One code path for the three designs: `self` and `sparse` differ in the text tower's attention only, `cross` adds the
  fusion on top of the same two towers.
- A caption's vector depends on that caption alone and an image's on that image alone; only a pair's score sees both.
- The image's vector is a linear map of the backbone's own pooled vector plus an attention pooling over its patches,
  whose positions are learned: where a thing stands in the picture is part of what a caption says.
- Encoding is in float32 whatever the training used.

Source of the alignment: Radford et al., "CLIP", arXiv:2103.00020; Zhai et al., "LiT", arXiv:2111.07991.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.batch import Batch, TokenGroup, group_by_length
from clipvisionalign.models.device import best_device
from clipvisionalign.models.fusion import Fusion, FusionConfig
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower, ImageTowerConfig
from clipvisionalign.models.text_tower import CaptionFeatures, TextTower, TextTowerConfig
from clipvisionalign.pictures import Picture, open_picture
from clipvisionalign.progress import progress

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"
TEXT_FOLDER = "text_tower"


@dataclass
class AlignerConfig:
    """The model: which towers, and which attention between caption and picture.

    Args:
        design: "self" (plain attention in the text tower), "sparse" (Longformer, or sliding windows over the same text
            tower), "cross" (the caption's tokens attend to the picture's patches, to re-rank the first candidates).
        image_tower: the picture tower.
        text_tower: the text tower.
        fusion: the fusion head of the design "cross".
        width: width of the common space.
        temperature: where the learned temperature starts.
        dropout: dropout before the projections, while training.
    """

    design: Literal["self", "sparse", "cross"] = "self"
    image_tower: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text_tower: TextTowerConfig = field(default_factory=TextTowerConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    width: int = 256
    temperature: float = 0.05
    dropout: float = 0.2


class ImageStates(NamedTuple):
    """An image in the common space. vectors: (B, D) unit length; patches: (B, P, D)."""

    vectors: Tensor
    patches: Tensor


class CaptionStates(NamedTuple):
    """Captions in the common space. vectors: (b, D) unit length; tokens: (b, T, W); mask: (b, T)."""

    vectors: Tensor
    tokens: Tensor
    mask: Tensor


class ImageHead(nn.Module):
    """From a picture tower's features to the common space: a map of the pooled vector plus a pooling of the patches."""

    def __init__(self, tower_width: int, patches: int, width: int, dropout: float, heads: int = 8) -> None:
        super().__init__()
        self.pooled = nn.Sequential(nn.LayerNorm(tower_width), nn.Dropout(dropout), nn.Linear(tower_width, width))
        self.patch = nn.Sequential(nn.LayerNorm(tower_width), nn.Dropout(dropout), nn.Linear(tower_width, width))
        self.position = nn.Parameter(torch.randn(patches, width) * 0.02)
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

    text_folder: where the text tower's config and tokenizer lie, None to find them by name. With `load_weights` False
    the towers stay empty until `load_state_dict`. Raises WeightsNotFound, and ValueError for an unknown backbone.
    """

    def __init__(self, config: AlignerConfig, text_folder: Path | None = None, load_weights: bool = True) -> None:
        super().__init__()
        self.config = config
        #: Whether encoding and scoring show a live line on standard error.
        self.show_progress = False
        text_config = config.text_tower
        if config.design == "sparse":
            text_config = replace(text_config, attention="sliding")
        self.image_tower = ImageTower(config.image_tower, load_weights)
        self.text_tower = TextTower(text_config, text_folder, load_weights)
        self.image_head = ImageHead(self.image_tower.width, self.image_tower.patches, config.width, config.dropout)
        self.text_head = nn.Linear(self.text_tower.width, config.width)
        nn.init.orthogonal_(self.text_head.weight)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.fusion: Fusion | None = None
        if config.design == "cross":
            self.fusion = Fusion(config.fusion, self.text_tower.width, config.width)

    # --- from tensors to the common space -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    def scale(self) -> Tensor:
        """1 / temperature, at most 100 as in CLIP."""
        return self.log_scale.exp().clamp(max=100.0)

    def image_states(self, features: ImageFeatures) -> ImageStates:
        """A picture tower's features -> vectors (B, D) and patches (B, P, D)."""
        return self.image_head(features)

    def caption_states(self, group: TokenGroup) -> CaptionStates:
        """One group of captions -> vectors (b, D), tokens (b, T, W) and mask (b, T)."""
        features: CaptionFeatures = self.text_tower(group.ids, group.mask)
        return CaptionStates(F.normalize(self.text_head(features.pooled).float(), dim=-1), features.tokens, group.mask)

    def forward(self, batch: Batch, features: ImageFeatures | None = None) -> tuple[ImageStates, list[CaptionStates]]:
        """The states of a batch's images and of its captions, group by group in the batch's order.

        features: the picture tower's, where they are known already; else its pixels go through the tower.
        """
        if features is None:
            if batch.pixels is None:
                raise ValueError("a batch without pixels needs the picture tower's features")
            features = self.image_tower(batch.pixels)
        return self.image_states(features), [self.caption_states(group) for group in batch.captions]

    # --- from pictures and words to vectors -----------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Sequence[Picture], batch: int = 64) -> Tensor:
        """Images (paths, bytes or Pillow pictures) -> unit vectors (N, D), float32. Raises PictureError."""
        chunks = [states.vectors.cpu() for states in self._image_chunks(images, batch)]
        return torch.cat(chunks) if chunks else torch.empty(0, self.config.width)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str], batch: int = 250) -> Tensor:
        """Captions -> unit vectors (M, D), float32."""
        vectors = torch.empty(len(captions), self.config.width)
        for rows, states in self._caption_chunks(captions, batch):
            vectors[rows] = states.vectors.cpu()
        return vectors

    def score(self, images: Sequence[Picture], captions: Sequence[str]) -> Tensor:
        """The score of every image with every caption (N, M): cosines, or with a fusion the fused scores."""
        if self.fusion is None:
            return self.encode_images(images) @ self.encode_captions(captions).T
        score_pairs = self.pair_scorer(images, captions)
        grid = np.indices((len(images), len(captions))).reshape(2, -1)
        return torch.from_numpy(score_pairs(grid[0], grid[1])).reshape(len(images), len(captions))

    @torch.no_grad()
    def pair_scorer(self, images: Sequence[Picture], captions: Sequence[str], batch: int = 512) -> PairScorer:
        """Encode images and captions once, to score any pairs of them later. Raises ValueError without a fusion."""
        if self.fusion is None:
            raise ValueError(f"the design '{self.config.design}' has no fusion that scores pairs")
        with evaluating(self):
            vectors, key_values = [], []
            for image_states in self._image_chunks(images, 64):
                vectors.append(image_states.vectors)
                key_values.append(self.fusion.project_patches(image_states.patches))
            tokens: list[Tensor] = [torch.empty(0)] * len(captions)
            caption_vectors = torch.empty(len(captions), self.config.width)
            for rows, states in self._caption_chunks(captions, 250):
                caption_vectors[rows] = states.vectors.cpu()
                for row, caption_tokens, mask in zip(rows.tolist(), states.tokens, states.mask, strict=True):
                    tokens[row] = caption_tokens[: int(mask.sum())]
        images_in = torch.cat(vectors).cpu() if vectors else torch.empty(0, self.config.width)
        return PairScorer(self, images_in, torch.cat(key_values), caption_vectors, tokens, batch)

    def _image_chunks(self, images: Sequence[Picture], batch: int) -> Iterator[ImageStates]:
        transform = self.image_tower.input.transform()

        def prepare(image: Picture) -> Tensor:
            return transform(open_picture(image))

        starts = range(0, len(images), batch)
        with evaluating(self), ThreadPoolExecutor() as pool:
            for start in progress(starts, "encoding images", len(starts), self.show_progress):
                pixels = torch.stack(list(pool.map(prepare, images[start : start + batch])))
                yield self.image_states(self.image_tower(pixels.to(self.device, memory_format=torch.channels_last)))

    def _caption_chunks(self, captions: Sequence[str], batch: int) -> Iterator[tuple[Tensor, CaptionStates]]:
        groups = group_by_length(self.text_tower.tokenize(captions), self.text_tower.pad, batch)
        with evaluating(self):
            for group in progress(groups, "encoding captions", len(groups), self.show_progress):
                moved = TokenGroup(group.ids.to(self.device), group.mask.to(self.device), group.rows)
                yield group.rows, self.caption_states(moved)

    # --- saving and loading ---------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write weights, config, and the text tower's config and tokenizer: all that `load_aligner` needs."""
        import yaml
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.text_tower.save(target / TEXT_FOLDER)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # Written aside and renamed, so that a run cut off in the middle keeps its last whole file.
        aside = target / f"{WEIGHTS_FILE}.part"
        save_file(state, aside)
        aside.replace(target / WEIGHTS_FILE)
        if not (target / CONFIG_FILE).exists():
            (target / CONFIG_FILE).write_text(yaml.safe_dump({"model": asdict(self.config)}, sort_keys=False))

    def parameter_count(self) -> int:
        """Parameters of all parts."""
        return sum(parameter.numel() for parameter in self.parameters())


class PairScorer:
    """Scores pairs of the images and captions it was made from; each was encoded and projected once.

    Called with image numbers (Q,) and caption numbers (Q,) it gives the fused scores (Q,), float32: the dual score
    divided by the temperature, plus the fusion's weight times its correction.
    """

    def __init__(
        self,
        aligner: Aligner,
        image_vectors: Tensor,
        key_values: Tensor,
        caption_vectors: Tensor,
        tokens: list[Tensor],
        batch: int,
    ) -> None:
        self.aligner = aligner
        self.image_vectors = image_vectors
        self.caption_vectors = caption_vectors
        self.key_values = key_values
        self.tokens = tokens
        self.lengths = np.array([len(caption) for caption in tokens])
        self.batch = batch

    def __call__(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        assert self.aligner.fusion is not None
        weight = self.aligner.fusion.weight.item()
        return self.dual(image_index, caption_index) + weight * self.corrections(image_index, caption_index)

    @torch.no_grad()
    def dual(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """The dual encoder's scores of the pairs (Q,): cosine / temperature."""
        scores = np.empty(len(image_index), dtype=np.float32)
        for start in range(0, len(scores), 1 << 16):
            part = slice(start, start + (1 << 16))
            products = self.image_vectors[image_index[part]] * self.caption_vectors[caption_index[part]]
            scores[part] = (products.sum(-1) * self.aligner.scale().cpu()).numpy()
        return scores

    @torch.no_grad()
    def corrections(self, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
        """The fusion's corrections of the pairs (Q,)."""
        aligner = self.aligner
        assert aligner.fusion is not None
        found = np.empty(len(image_index), dtype=np.float32)
        # Pairs of captions of one length stand together, so that little is padded.
        order = np.argsort(self.lengths[caption_index], kind="stable")
        with evaluating(aligner):
            starts = range(0, len(order), self.batch)
            for start in progress(starts, "scoring pairs", len(starts), aligner.show_progress):
                pairs = order[start : start + self.batch]
                images, captions = image_index[pairs], caption_index[pairs]
                tokens = nn.utils.rnn.pad_sequence([self.tokens[c] for c in captions], batch_first=True)
                lengths = torch.from_numpy(self.lengths[captions])
                mask = torch.arange(tokens.shape[1]) < lengths[:, None]
                key_values = self.key_values[torch.from_numpy(images).to(self.key_values.device)]
                found[pairs] = aligner.fusion(tokens, mask.to(tokens.device), key_values).float().cpu().numpy()
        return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, and back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def config_from_dict(cls: Callable[..., Any], values: dict[str, Any]) -> Any:
    """A settings dataclass from what YAML or JSON holds; unknown names and wrong types raise ValueError."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "settings")
    try:
        return parser.instantiate_classes(parser.parse_object({"settings": values})).settings
    except ArgumentError as error:
        raise ValueError(str(error)) from None


def load_aligner(folder: str | Path, device: str = "auto") -> Aligner:
    """The aligner that a run folder holds, ready to encode and score; needs nothing else, and no network.

    Raises FileNotFoundError where the folder is not a run folder, ValueError where a file in it does not fit.
    """
    import yaml
    from safetensors.torch import load_file

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
    aligner = Aligner(config, text_folder=source / TEXT_FOLDER, load_weights=False)
    try:
        aligner.load_state_dict(load_file(source / WEIGHTS_FILE))
    except Exception as error:
        raise ValueError(f"{source / WEIGHTS_FILE}: not this aligner's weights: {error}") from None
    return aligner.to(best_device(device)).eval()
