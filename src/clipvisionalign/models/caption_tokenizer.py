"""A model's tokenizer without the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipvisionalign.batch import TokenizedCaptions
from clipvisionalign.models.aligner_config import AlignerConfig, read_recorded_settings
from clipvisionalign.models.hub import HubUnreachable, NoSuchRepository, WeightsNotFound
from clipvisionalign.models.positions import positions_by_name
from clipvisionalign.models.pretrained import (
    PretrainedTextTower,
    count_positions,
    find_pretrained,
    hint_for_name,
    is_dual_encoder,
    open_caption_tokenizer,
)
from clipvisionalign.models.run_files import ADAPTERS_FILE, CONFIG_FILE, PRETRAINED_FOLDER, TEXT_FOLDER
from clipvisionalign.models.run_names import resolve_run
from clipvisionalign.models.text_families import DEFAULT_MAX_TOKENS, max_positions, supports_custom_attention
from clipvisionalign.models.text_tower import silence_transformers
from clipvisionalign.models.text_weights import find_text_folder
from clipvisionalign.models.tokenizer import load_tokenizer, tokenize_captions
from clipvisionalign.models.weights import IsDualEncoder
from clipvisionalign.settings import config_from_dict


class CaptionTokenizer:
    """Tokenises captions as a text tower of the same name and `max_tokens` does.

    Args:
        tokenizer: A tokenizer of transformers.
        max_tokens: Where captions are cut.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        """Token ids of each caption with its special tokens, long ones cut.

        Args:
            captions: M captions.

        Returns:
            A list of ids for each; its attribute `num_truncated` has how many were cut off.
        """
        return tokenize_captions(self.tokenizer, captions, self.max_tokens)


def open_tokenizer(model: str | Path, max_tokens: int = 0) -> CaptionTokenizer | PretrainedTextTower:
    """The tokenizer of a run folder, of a pretrained dual encoder, or of a text tower by name or folder.

    No weights are loaded; tokenizers that are not on this machine are fetched.

    Args:
        model: The run folder, `starter`, or a folder or name of a model.
        max_tokens: Where captions are cut; 0 for the model's own limit, or for the default of `train`. It is never
            above what the encoder has positions for.

    Returns:
        An object with `tokenize`.

    Raises:
        WeightsNotFound: There is no such model here or on the hub.
        ValueError: `max_tokens` is 1 or 2.
    """
    import transformers

    run, recorded = Path(resolve_run(model)), AlignerConfig()
    if (run / CONFIG_FILE).is_file():
        recorded = _recorded_settings(run)
    if 0 < max_tokens < 3:
        raise ValueError(
            f"--max-tokens {max_tokens}: a caption has two tokens that mark its ends, and should have a third"
        )
    own_limit = recorded.text_tower.max_tokens
    if (run / PRETRAINED_FOLDER).is_dir():
        tower = open_caption_tokenizer(run / PRETRAINED_FOLDER)
        tower.max_positions = count_positions(tower.max_positions, recorded.positions)
        tower.limit_tokens(max_tokens or own_limit or tower.max_positions)
        return tower
    if (run / TEXT_FOLDER / "config.json").is_file():
        folder = run / TEXT_FOLDER
    elif (run / ADAPTERS_FILE).is_file():
        folder = _find_folder(recorded.text_tower.name)
    else:
        folder = run if is_dual_encoder(run) else _find_folder(str(model))
    if is_dual_encoder(folder):
        return open_caption_tokenizer(folder, max_tokens)
    limit = max_tokens or own_limit or DEFAULT_MAX_TOKENS
    silence_transformers()
    encoder_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    positions = max_positions(encoder_config)
    if folder != run / TEXT_FOLDER:
        # By name: a run's own folder has the positions that it was given.
        has_windows = recorded.design == "sparse" or recorded.text_tower.attention == "sliding"
        how = positions_by_name(recorded.positions, has_windows)
        positions = count_positions(positions, how) if supports_custom_attention(encoder_config) else positions
    return CaptionTokenizer(load_tokenizer(folder), min(limit, positions))


def _find_folder(name: str) -> Path:
    """The folder with the tokenizer of a text tower or a dual encoder by name. Raises WeightsNotFound."""
    if hint := hint_for_name(name):
        raise WeightsNotFound(f"{name}: no tokenizer: {hint}")
    try:
        return find_text_folder(name, weights="random")
    except IsDualEncoder:
        return find_pretrained(name, weights=False)[0]
    except NoSuchRepository:
        raise
    except HubUnreachable as error:
        raise HubUnreachable(f"{name}: no tokenizer: {error}; or {_WAYS_OUT}") from None
    except WeightsNotFound:
        if Path(name).exists():
            kind = "a folder without config.json" if Path(name).is_dir() else "a file, and no folder"
        else:
            kind = "no such folder is here"
        raise WeightsNotFound(f"{name}: no tokenizer: {kind}; {_WAYS_OUT}") from None


_WAYS_OUT = "give a run folder, a model's folder, or a name of the hub, such as distilbert-base-uncased"


def _recorded_settings(run: Path) -> AlignerConfig:
    """The settings of a run's model."""
    from clipvisionalign.plain_yaml import safe_load

    settings = read_recorded_settings(safe_load((run / CONFIG_FILE).read_text())["model"])
    config: AlignerConfig = config_from_dict(AlignerConfig, settings)
    return config
