"""The tokenizer of an ONNX export: one file that the package tokenizers reads, without transformers or open_clip."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from clipvisionalign.models.aligner import AnyTextTower
from clipvisionalign.models.pretrained.open_clip_towers import OpenClipTextTower


def write_tokenizer(tower: AnyTextTower, folder: Path) -> None:
    """Write tokenizer.json into a folder, and what transformers has beside it.

    Raises ValueError for a tokenizer that has no such form.
    """
    if isinstance(tower, OpenClipTextTower):
        _of_open_clip(tower).save_pretrained(folder)
        return
    tokenizer = tower.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{tower.config.name}: its tokenizer ({type(tokenizer).__name__}) is SentencePiece's, for which there is "
            "no tokenizer.json, so that it is not exported to ONNX; --transformers writes the model with it"
        )
    tokenizer.save_pretrained(folder)


def _of_open_clip(tower: OpenClipTextTower) -> Any:
    """An open_clip tokenizer as one of transformers, its cleaning of captions included as far as tokenizers has it:
    HTML entities and broken encodings have to be mended before."""
    from tokenizers import Regex, normalizers

    open_clip_tokenizer = tower.open_clip_tokenizer
    if not hasattr(open_clip_tokenizer, "tokenizer"):
        return _clip_tokenizer(open_clip_tokenizer, tower.max_positions)
    tokenizer = open_clip_tokenizer.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{tower.config.name}: its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json")
    steps: list[Any] = [normalizers.NFC()]
    if getattr(open_clip_tokenizer.clean_fn, "__name__", "") == "_clean_canonicalize":
        punctuation = string.punctuation.replace("_", "")
        escaped = "".join(f"\\{character}" for character in punctuation)
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{escaped}]"), "")]
        steps += [normalizers.Lowercase()]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _clip_tokenizer(open_clip_tokenizer: Any, max_tokens: int) -> Any:
    """CLIP's byte-pair encoding with open_clip's vocabulary."""
    from transformers import CLIPTokenizer

    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in open_clip_tokenizer.encoder.items()}
    merges = sorted(open_clip_tokenizer.bpe_ranks, key=open_clip_tokenizer.bpe_ranks.get)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)
