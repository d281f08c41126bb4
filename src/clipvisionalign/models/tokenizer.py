"""A transformers tokenizer: read from a folder, and applied to captions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.batch import TokenizedCaptions

if TYPE_CHECKING:
    from torch import nn

#: Files that a tokenizer is read from.
TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.txt",
    "vocab.json", "merges.txt", "bpe.codes", "spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip

#: Sets of them of which one is enough.
TOKENIZER_FILE_SETS = (
    {"tokenizer.json"}, {"vocab.txt"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {"spm.model"},
    {"tokenizer.model"}, {"sentencepiece.bpe.model"}, {"bpe.codes"},
)  # fmt: skip

#: Vocabularies that only the package sentencepiece reads.
_SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "spm.model", "sentencepiece.bpe.model")


def without_weights(tower: nn.Module) -> Any:
    """A text tower as worker processes need it: a copy without modules, parameters and buffers.

    Where workers are not forked (macOS, Windows, Python 3.14), what they call is sent to each of them.

    Args:
        tower: A tower whose `tokenize` needs no weights.

    Returns:
        A shallow copy with its other attributes, its tokenizer among them.
    """
    light = copy.copy(tower)
    for name in ("_modules", "_parameters", "_buffers"):
        light.__dict__[name] = {}
    return light


def tokenize_captions(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> TokenizedCaptions:
    """Tokenise captions by a transformers tokenizer and cut them; each caption is read once, cut or not.

    Args:
        tokenizer: The tokenizer.
        captions: M captions.
        max_tokens: Tokens of a caption at most, its special tokens included.

    Returns:
        The tokens of each caption, without padding, and how many were cut off.
    """
    if not len(captions):
        return TokenizedCaptions([])
    encoding = tokenizer(list(captions), truncation=True, max_length=max_tokens, padding=False)
    ids, num_truncated = encoding["input_ids"], [0] * len(captions)
    for row in [row for row, row_ids in enumerate(ids) if len(row_ids) >= max_tokens]:
        if encoding.is_fast:
            # What was cut off comes along in pieces, each with special tokens of its own.
            rest = encoding.encodings[row].overflowing
            num_truncated[row] = sum(len(piece.ids) - sum(piece.special_tokens_mask) for piece in rest)
        else:
            num_truncated[row] = len(tokenizer(captions[row], truncation=False)["input_ids"]) - len(ids[row])
    return TokenizedCaptions(ids, num_truncated)


def load_tokenizer(source: Path) -> Any:
    """Load the tokenizer of a folder in transformers' layout; no code of the folder is run.

    Args:
        source: The folder.

    Returns:
        transformers' tokenizer.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    import transformers

    if not has_tokenizer(source):
        raise ValueError(
            f"{source}: no tokenizer: neither tokenizer.json nor a vocabulary is there; copy the publisher's there"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        if find_spec("sentencepiece") is None and any((source / file).is_file() for file in _SENTENCEPIECE_FILES):
            reason = 'it needs sentencepiece: pip install "clipvisionalign[pretrained]"'
        raise ValueError(
            f"{source}: a tokenizer that cannot be read: {reason.rstrip('.')}; or get the publisher's files again"
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files that a tokenizer is read from.

    Args:
        folder: The folder, which may be missing.

    Returns:
        Whether one of `TOKENIZER_FILE_SETS` is there.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return any(wanted <= names for wanted in TOKENIZER_FILE_SETS)
