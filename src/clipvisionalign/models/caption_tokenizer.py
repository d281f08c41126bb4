"""A model's tokenizer without the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipvisionalign.batch import TokenizedCaptions
from clipvisionalign.models.run_files import CONFIG_FILE, TEXT_FOLDER
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


def open_tokenizer(model: str | Path, max_tokens: int = 0) -> CaptionTokenizer:
    """The tokenizer of a run folder, or of a text tower by name or folder; no weights are loaded.

    max_tokens: where captions are cut; 0 for the run's own, or for the default of `train`. It is never above what the
    encoder has positions for. Raises WeightsNotFound, and ValueError for a limit below 3.
    """
    import transformers

    from clipvisionalign.plain_yaml import safe_load

    run, limit = Path(model), TextTowerConfig().max_tokens
    if (run / TEXT_FOLDER / "config.json").is_file():
        folder = run / TEXT_FOLDER
        settings = safe_load((run / CONFIG_FILE).read_text())
        limit = settings["model"]["text_tower"].get("max_tokens", limit)
    else:
        folder = find_text_folder(str(model), weights="random")
    limit = max_tokens or limit
    if limit < 3:
        raise ValueError(f"--max-tokens {limit}: a caption has two tokens that mark its ends, and should have a third")
    encoder_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return CaptionTokenizer(load_tokenizer(folder), min(limit, max_positions(encoder_config)))
