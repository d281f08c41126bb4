"""A text tower as ONNX, run by onnxruntime and tokenizers alone: neither PyTorch nor transformers is imported.

A folder of such a tower (`text_tower.py` writes it) holds the graph, tokenizer.json, and text.json with what a caption
has to look like.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipvisionalign.argument_checks import check_strings

#: Files of an exported text tower. The manifest is written last: with it the folder is complete.
TEXT_MANIFEST, TEXT_GRAPH, TEXT_TOKENIZER = "text.json", "text_tower.onnx", "tokenizer.json"
#: Outputs beside "vectors" of a model that scores pairs by late interaction alone.
LATE_OUTPUTS = ("token_vectors", "token_weights")
#: Version of text.json.
TEXT_FORMAT = 1


class CaptionTokens(NamedTuple):
    """A caption as late interaction scores images with it; without padding, and without tokens that have no weight.

    Attributes:
        vector: (D,) unit length.
        token_vectors: (T, E) unit length.
        token_weights: (T,) sum to 1.
    """

    vector: np.ndarray
    token_vectors: np.ndarray
    token_weights: np.ndarray


def open_session(path: Path) -> Any:
    """Open a graph with onnxruntime, on the CPU.

    Args:
        path: The .onnx file.

    Returns:
        An onnxruntime InferenceSession.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Threads that wait for work by turning would take the cores that the rest of a service needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_tokenizer(path: Path, manifest: dict[str, Any]) -> Any:
    """Open a tokenizer that cuts and pads captions as a model does.

    Args:
        path: The tokenizer.json.
        manifest: "max_tokens" and "pad", and where they differ from the default "truncation_side", "padding_side" and
            "padded_to", the fixed number of tokens.

    Returns:
        A `tokenizers.Tokenizer`.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(manifest["max_tokens"], direction=manifest.get("truncation_side", "right"))
    tokenizer.enable_padding(
        direction=manifest.get("padding_side", "right"), pad_id=manifest["pad"], length=manifest.get("padded_to")
    )
    return tokenizer


def tokenize_padded(tokenizer: Any, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise captions into one array.

    Args:
        tokenizer: As `open_tokenizer` returns it.
        captions: M captions.

    Returns:
        Token ids and mask, each (M, T), int64; the mask is 1 on tokens, 0 on padding.
    """
    encodings = tokenizer.encode_batch(list(captions))
    ids = np.array([each.ids for each in encodings], dtype=np.int64)
    return ids, np.array([each.attention_mask for each in encodings], dtype=np.int64)


def tokenized_batches(
    tokenizer: Any, captions: Sequence[str], batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokenise captions in batches of about equal length, so that little is padded.

    Args:
        tokenizer: As `open_tokenizer` returns it.
        captions: M captions.
        batch: Captions of a batch at most.

    Yields:
        The positions of a batch in `captions`, its token ids and its mask, see `tokenize_padded`.
    """
    order = np.argsort([len(caption) for caption in captions], kind="stable")
    for start in range(0, len(captions), batch):
        rows = order[start : start + batch]
        yield rows, *tokenize_padded(tokenizer, [captions[row] for row in rows])


class OnnxTextTower:
    """An exported text tower: captions to vectors.

    Args:
        folder: A folder that `write_text_tower` wrote.

    Attributes:
        manifest: The content of text.json.
        tokenizer: A `tokenizers.Tokenizer`, which cuts captions and pads batches.

    Raises:
        ModuleNotFoundError: onnxruntime or tokenizers is not installed.
        FileNotFoundError: The folder has no manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        source = Path(folder)
        self.manifest: dict[str, Any] = json.loads((source / TEXT_MANIFEST).read_text(encoding="utf-8"))
        self.tokenizer = open_tokenizer(source / TEXT_TOKENIZER, self.manifest)
        self.session = open_session(source / TEXT_GRAPH)

    @property
    def late(self) -> dict[str, float] | None:
        """How pair scores weigh their parts: "scale" of the cosine, "late_scale" of the late interaction; None of a
        model whose pair scores are not of its late interaction alone."""
        return self.manifest.get("late")

    def clean(self, caption: str) -> str:
        """A caption as the tokenizer takes it: with what the model's own tokenizer mends before.

        Args:
            caption: The words.

        Returns:
            The words, without HTML entities and broken encodings where the model's tokenizer mends them.
        """
        if self.manifest.get("cleaning") != "open_clip":
            return caption
        if not caption.isascii():
            try:
                import ftfy
            except ModuleNotFoundError:
                pass
            else:
                caption = ftfy.fix_text(caption)
        return html.unescape(html.unescape(caption)) if "&" in caption else caption

    def encode_captions(self, captions: Sequence[str], batch: int = 64) -> np.ndarray:
        """Encode captions; those of about equal length go together.

        Args:
            captions: M captions.
            batch: Captions that go through the tower together.

        Returns:
            (M, D) float32, unit length, in the order of `captions`.

        Raises:
            TypeError: One string is given where a list is required.
        """
        check_strings(captions)
        vectors = np.empty((len(captions), self.manifest["width"]), dtype=np.float32)
        for rows, ids, mask in tokenized_batches(self.tokenizer, [self.clean(each) for each in captions], batch):
            vectors[rows] = self.session.run(["vectors"], {"ids": ids, "mask": mask})[0]
        return vectors

    def encode_tokens(self, captions: Sequence[str], batch: int = 64) -> list[CaptionTokens]:
        """Encode captions for pair scores by late interaction.

        Args:
            captions: M captions.
            batch: Captions that go through the tower together.

        Returns:
            One a caption.

        Raises:
            TypeError: One string is given where a list is required.
            ValueError: The model has no such scores (`late`).
        """
        check_strings(captions)
        if self.late is None:
            raise ValueError("this text tower gives no vectors of tokens")
        names = ["vectors", *LATE_OUTPUTS]
        encoded: dict[int, CaptionTokens] = {}
        for rows, ids, mask in tokenized_batches(self.tokenizer, [self.clean(each) for each in captions], batch):
            for row, vector, tokens, weights in zip(
                rows.tolist(), *self.session.run(names, {"ids": ids, "mask": mask}), strict=True
            ):
                encoded[row] = CaptionTokens(vector, tokens[weights > 0], weights[weights > 0])
        return [encoded[number] for number in range(len(captions))]
