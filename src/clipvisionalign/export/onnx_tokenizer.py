"""The tokenizer of an ONNX export: one file that the package tokenizers reads, without transformers or open_clip."""

from __future__ import annotations

import string
from importlib import import_module
from pathlib import Path
from typing import Any

from clipvisionalign.models.aligner import AnyTextTower
from clipvisionalign.models.pretrained.open_clip_towers import OpenClipTextTower


def write_tokenizer(tower: AnyTextTower, folder: Path) -> None:
    """Write the tokenizer of a text tower as tokenizer.json.

    Args:
        tower: The text tower.
        folder: Where it is written, with what transformers has beside it.

    Raises:
        ValueError: The tokenizer has no such form (SentencePiece's).
    """
    if isinstance(tower, OpenClipTextTower):
        _of_open_clip(tower).save_pretrained(folder)
        return
    tokenizer = tower.tokenizer
    if type(tokenizer).__name__ == "SiglipTokenizer":
        tokenizer = _of_siglip(tokenizer)
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


def _of_siglip(tokenizer: Any) -> Any:
    """SigLIP's tokenizer, a SentencePiece model behind a cleaning of captions, with the same steps in tokenizer.json.

    Two captions are read otherwise: one with a mark that is combined with a compatibility character ("\u2460" with an
    accent), which tokenizers normalises together, and one that holds a special token as words.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # A module that protobuf makes as it is imported: without types.
    protobuf: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    pieces = protobuf.ModelProto()
    pieces.ParseFromString(tokenizer.sp_model.serialized_model_proto())
    backend = Tokenizer(
        models.Unigram(
            [(piece.piece, piece.score) for piece in pieces.pieces],
            unk_id=pieces.trainer_spec.unk_id,
            byte_fallback=pieces.trainer_spec.byte_fallback,
        )
    )
    punctuation = "".join(f"\\{character}" for character in string.punctuation)
    # What Python's \s matches, which is more than that of the package's own expressions.
    spaces = "".join(character for character in map(chr, range(0x3001)) if character.isspace())
    steps: list[Any] = [normalizers.Replace("\u2581", " ")]
    if tokenizer.do_lower_case:
        # Of one letter, as Python has it at the end of a word.
        steps += [normalizers.Replace(Regex(r"(?<=\p{L})\u03a3(?!\p{L})"), "\u03c2"), normalizers.Lowercase()]
    steps += [normalizers.Replace(Regex(f"[{punctuation}]"), ""), normalizers.Replace(Regex(f"[{spaces}]+"), " ")]
    if pieces.normalizer_spec.precompiled_charsmap:
        steps += [normalizers.Precompiled(pieces.normalizer_spec.precompiled_charsmap)]
    steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=False)
    end, number = tokenizer.eos_token, tokenizer.eos_token_id
    backend.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, unk_token=tokenizer.unk_token, pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
    )  # fmt: skip


def _clip_tokenizer(open_clip_tokenizer: Any, max_tokens: int) -> Any:
    """CLIP's byte-pair encoding with open_clip's vocabulary."""
    from transformers import CLIPTokenizer

    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in open_clip_tokenizer.encoder.items()}
    merges = sorted(open_clip_tokenizer.bpe_ranks, key=open_clip_tokenizer.bpe_ranks.get)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)
