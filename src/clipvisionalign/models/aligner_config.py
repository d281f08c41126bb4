"""`AlignerConfig`: the settings of a model, and how they are recorded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from clipvisionalign.models.fusion import FusionConfig
from clipvisionalign.models.image_tower import ImageTowerConfig
from clipvisionalign.models.late_interaction import LateConfig
from clipvisionalign.models.positions import Positions
from clipvisionalign.models.text_families import DEFAULT_MAX_TOKENS
from clipvisionalign.models.text_tower import TextTowerConfig

#: Width of the common space of two towers by name, if the settings do not tell.
DEFAULT_WIDTH = 256


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
        width: width of the common space. Not given: 256, and for a pretrained model its own; a smaller one keeps the
            principal components of the vectors of the training split.
        temperature: where the learned temperature starts.
        dropout: dropout before the projections, while training.
        pretrained: a dual encoder to start from, with its own towers, heads, temperature, tokenizer and preprocessing,
            in the place of `image_tower` and `text_tower`: a folder in transformers' or open_clip's layout, or a hub
            name such as openai/clip-vit-base-patch32, also with @REVISION. "" for none.
        positions: positions of the text tower: its "own" (77 of CLIP, 512 of BERT's kin); "stretched" as by Long-CLIP
            (to 248 and 1,988), the first 20 kept; or "repeated" to 4,096, as they also are in a text tower by name
            with sliding windows. Captions are read as far as `text_tower.max_tokens`.
    """

    design: Literal["self", "sparse", "late", "cross"] = "self"
    image_tower: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text_tower: TextTowerConfig = field(default_factory=TextTowerConfig)
    late: LateConfig = field(default_factory=LateConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    width: int | None = None
    temperature: float = 0.05
    dropout: float = 0.2
    pretrained: str = ""
    positions: Positions = "own"

    def resolved(self) -> AlignerConfig:
        """The same with the width and the limit of tokens that two towers by name have where none is given.

        Those of a pretrained model are known when it is opened; its settings stay as they are.
        """
        if self.pretrained:
            return self
        text_tower = replace(self.text_tower, max_tokens=self.text_tower.max_tokens or DEFAULT_MAX_TOKENS)
        return replace(self, width=self.width or DEFAULT_WIDTH, text_tower=text_tower)


#: Settings that a pretrained model has its own of, in the order of `AlignerConfig`.
REPLACED_BY_PRETRAINED = ("image_tower", "temperature", "dropout")

#: And settings of the text tower that count beside a pretrained model.
TEXT_SETTINGS_BESIDE_PRETRAINED = ("window", "max_tokens")


def counts_beside_pretrained(setting: str) -> bool:
    """Whether a setting of a model counts beside a pretrained model.

    Args:
        setting: Its name with dots, such as "late.width".

    Returns:
        Whether it does.

    >>> counts_beside_pretrained("late.width"), counts_beside_pretrained("text_tower.name")
    (True, False)
    """
    section, _, name = setting.partition(".")
    if section == "text_tower":
        return name in TEXT_SETTINGS_BESIDE_PRETRAINED
    return section not in REPLACED_BY_PRETRAINED


#: What files of before recorded beside every pretrained model, since these were the defaults then.
_RECORDED_UNASKED = {"width": DEFAULT_WIDTH, "max_tokens": DEFAULT_MAX_TOKENS}


def recorded_settings(config: AlignerConfig) -> dict[str, Any]:
    """What config.yaml holds of a model's settings.

    Args:
        config: The settings.

    Returns:
        Of a pretrained model those that count beside it, and no others; a width or a limit of tokens that was not given
        is left out.

    >>> "image_tower" in recorded_settings(AlignerConfig(pretrained="openai/clip-vit-base-patch32"))
    False
    """
    settings = asdict(config.resolved())
    if not config.pretrained:
        return settings
    text = {name: settings["text_tower"][name] for name in TEXT_SETTINGS_BESIDE_PRETRAINED}
    settings["text_tower"] = {name: value for name, value in text.items() if value is not None}
    return {name: value for name, value in settings.items() if name not in REPLACED_BY_PRETRAINED and value is not None}


def read_recorded_settings(settings: Any) -> Any:
    """A model's settings as a file has them, without defaults that a pretrained model takes the place of.

    Files from before those were left out have them all, and among them a width and a limit of tokens that nobody asked
    for.

    Args:
        settings: what stands under `model` in a run's config.yaml.

    Returns:
        The settings that count; what has no settings is returned as it is.

    >>> recorded = {"pretrained": "clip", "image_tower": {}, "temperature": 0.05, "dropout": 0.2, "width": 256}
    >>> read_recorded_settings(recorded)
    {'pretrained': 'clip'}
    """
    if not isinstance(settings, dict) or not settings.get("pretrained"):
        return settings
    if not {*REPLACED_BY_PRETRAINED, "width"} <= settings.keys():
        return settings
    kept = {name: value for name, value in settings.items() if name not in REPLACED_BY_PRETRAINED}
    text = kept.get("text_tower")
    if isinstance(text, dict):
        kept["text_tower"] = _without_unasked(
            {name: text[name] for name in TEXT_SETTINGS_BESIDE_PRETRAINED if name in text}
        )
    return _without_unasked(kept)


def _without_unasked(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in settings.items()
        if name not in _RECORDED_UNASKED or value != _RECORDED_UNASKED[name]
    }  # fmt: skip
