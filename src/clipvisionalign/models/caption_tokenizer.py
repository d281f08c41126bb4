"""A model's tokenizer without the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipvisionalign.batch import TokenizedCaptions
from clipvisionalign.models.pretrained import PretrainedTextTower, is_dual_encoder, open_caption_tokenizer
from clipvisionalign.models.run_files import CONFIG_FILE, PRETRAINED_FOLDER, TEXT_FOLDER
from clipvisionalign.models.text_families import max_positions
from clipvisionalign.models.text_tower import TextTowerConfig, load_tokenizer, tokenize_captions
from clipvisionalign.models.weights import find_text_folder


class CaptionTokenizer:
    """Captions to token lists, as a text tower of the same name and `max_tokens` has them."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        """See `TextTower.tokenize`."""
        return tokenize_captions(self.tokenizer, captions, self.max_tokens)


def open_tokenizer(model: str | Path, max_tokens: int = 0) -> CaptionTokenizer | PretrainedTextTower:
    """The tokenizer of a run folder, of a pretrained dual encoder, or of a text tower by name or folder; no weights are
    loaded.

    max_tokens: where captions are cut; 0 for the model's own, or for the default of `train`. It is never above what the
    encoder has positions for. Raises WeightsNotFound, and ValueError for a limit below 3.
    """
    import transformers

    run, recorded = Path(model), 0
    if (run / CONFIG_FILE).is_file():
        recorded = _recorded_limit(run)
    if 0 < max_tokens < 3:
        raise ValueError(
            f"--max-tokens {max_tokens}: a caption has two tokens that mark its ends, and should have a third"
        )
    if (run / PRETRAINED_FOLDER).is_dir():
        tower = open_caption_tokenizer(run / PRETRAINED_FOLDER)
        # Of a run whose positions were extended.
        tower.max_positions = max(tower.max_positions, recorded)
        tower.limit_tokens(max_tokens or recorded or tower.max_positions)
        return tower
    if (run / TEXT_FOLDER / "config.json").is_file():
        folder = run / TEXT_FOLDER
    else:
        folder = run if is_dual_encoder(run) else find_text_folder(str(model), weights="random")
    if is_dual_encoder(folder):
        return open_caption_tokenizer(folder, max_tokens)
    limit = max_tokens or recorded or TextTowerConfig().max_tokens
    encoder_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return CaptionTokenizer(load_tokenizer(folder), min(limit, max_positions(encoder_config)))


def _recorded_limit(run: Path) -> int:
    """The limit that a run's settings have; 0 where they have none."""
    from clipvisionalign.plain_yaml import safe_load

    settings = safe_load((run / CONFIG_FILE).read_text())
    return int(settings["model"]["text_tower"].get("max_tokens", 0))
