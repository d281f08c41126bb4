"""Pretrained dual encoders, used as they are: CLIP, SigLIP and their kin, in transformers' and open_clip's layouts.

Kept of each: projection heads, tokenizer with its padding, pooling, causal attention, scale, bias and preprocessing.
"""

from clipvisionalign.models.positions import Positions, count_positions
from clipvisionalign.models.pretrained.designs import extend_positions, start_from_projections
from clipvisionalign.models.pretrained.families import (
    is_dual_encoder,
    is_model_folder,
    layout_of,
    load_dual_encoder,
    open_caption_tokenizer,
    save_dual_encoder,
    width_of,
)
from clipvisionalign.models.pretrained.names import as_given, hint_for_name
from clipvisionalign.models.pretrained.parts import (
    DualEncoderParts,
    PretrainedImageHead,
    PretrainedImageTower,
    PretrainedTextTower,
)
from clipvisionalign.models.pretrained.sources import (
    describe_missing,
    find_pretrained,
    open_pretrained,
)
from clipvisionalign.models.pretrained.width import check_width, principal_directions, reduce_width

__all__ = [
    "DualEncoderParts",
    "Positions",
    "PretrainedImageHead",
    "PretrainedImageTower",
    "PretrainedTextTower",
    "as_given",
    "check_width",
    "count_positions",
    "describe_missing",
    "extend_positions",
    "find_pretrained",
    "hint_for_name",
    "is_dual_encoder",
    "is_model_folder",
    "layout_of",
    "load_dual_encoder",
    "open_caption_tokenizer",
    "open_pretrained",
    "principal_directions",
    "reduce_width",
    "save_dual_encoder",
    "start_from_projections",
    "width_of",
]
