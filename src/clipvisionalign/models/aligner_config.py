"""`AlignerConfig`: the settings of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from clipvisionalign.models.fusion import FusionConfig
from clipvisionalign.models.image_tower import ImageTowerConfig
from clipvisionalign.models.late_interaction import LateConfig
from clipvisionalign.models.pretrained import Positions
from clipvisionalign.models.text_tower import TextTowerConfig


@dataclass
class AlignerConfig:
    """The model: which towers, and which attention between caption and image.

    Args:
        design: "self" (plain attention in the text tower), "sparse" (Longformer, or sliding windows over the same text
            tower), "late" (tokens against patches by the sum of best matches), "cross" (the caption's tokens attend to
            the image's patches, to re-rank the first candidates).
        image_tower: the image tower.
        text_tower: the text tower.
        late: the late interaction of the designs "late" and "cross".
        fusion: the fusion head of the design "cross".
        width: width of the common space.
        temperature: where the learned temperature starts.
        dropout: dropout before the projections, while training.
        pretrained: a dual encoder to start from, with its own towers, heads, width, temperature, tokenizer and
            preprocessing, in the place of `image_tower`, `text_tower` and `width`: a folder in transformers' or
            open_clip's layout, or a hub name such as openai/clip-vit-base-patch32, also with @REVISION. "" for none.
        positions: positions of a pretrained text tower: its "own" (77 of CLIP); "stretched" to 248 as by Long-CLIP, the
            first 20 kept; or "repeated" to 4,096.
    """

    design: Literal["self", "sparse", "late", "cross"] = "self"
    image_tower: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text_tower: TextTowerConfig = field(default_factory=TextTowerConfig)
    late: LateConfig = field(default_factory=LateConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    width: int = 256
    temperature: float = 0.05
    dropout: float = 0.2
    pretrained: str = ""
    positions: Positions = "own"
