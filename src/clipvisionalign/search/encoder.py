"""What encodes the queries of an index: its text tower by onnxruntime, the aligner where PyTorch is needed.

Words go through the text tower that lies beside the index (`text_tower.py`). The aligner is loaded when something else
is asked for the first time: an image as a query, an explanation, a re-ranking by a fusion or of images without stored
patches, or words where there is no text tower.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipvisionalign.search.fingerprint import aligner_fingerprint
from clipvisionalign.search.manifest import IndexManifest
from clipvisionalign.search.storage import InvalidIndexError, as_storage
from clipvisionalign.search.text_tower import open_text_tower, read_text_manifest
from clipvisionalign.starter import StarterNotInstalled, resolve_run

if TYPE_CHECKING:
    from clipvisionalign.export.onnx_text import CaptionTokens, OnnxTextTower
    from clipvisionalign.images import ImageSource
    from clipvisionalign.models.aligner import Aligner
    from clipvisionalign.models.pair_scorer import EncodedCaption


#: Tokens that a tokenizer adds to a text, at most.
_SPECIAL_TOKENS = 3


def as_array(value: Any) -> np.ndarray:
    """An array of NumPy.

    Args:
        value: One, or a tensor of PyTorch.

    Returns:
        The array.
    """
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)


class QueryEncoder:
    """Encodes queries for one index.

    Args:
        index: Path or URL of the index.
        manifest: Its manifest.
        run: The run folder of its aligner, where it was moved; "" for where the manifest has it.
        device: Of the aligner, once it is loaded.
        has_patches: Whether patches of its images are kept by now: only then words are encoded for pair scores without
            the aligner.

    Attributes:
        run: The run folder, or a pretrained dual encoder.
        loading_seconds: How long the aligner took to load, once it is.

    Raises:
        InvalidIndexError: The run has other weights; or it is not there, and was named or is needed.
    """

    def __init__(
        self, index: str | Path, manifest: IndexManifest, run: str | Path = "", device: str = "auto",
        has_patches: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.index, self.storage = index, as_storage(index)
        self.manifest, self.device = manifest, device
        self.run = Path(run or manifest.run)
        self._text_manifest = read_text_manifest(self.storage, manifest.aligner)
        self._not_installed, self._ask_for_patches, self.loading_seconds = "", has_patches, 0.0
        try:
            self.run = Path(resolve_run(run or manifest.run))
        except StarterNotInstalled as error:
            self._not_installed = f"{index}: made with {error}"
        self._text_tower: OnnxTextTower | None = None
        self._aligner: Aligner | None = None
        # Two, so that words are searched for while the aligner is loaded.
        self._text_lock, self._aligner_lock = threading.Lock(), threading.Lock()
        # Without a text tower the run is needed; with one it may be gone, and a name of the hub has its commit with it.
        if run or self._text_manifest is None or (self.run.is_dir() and not self._not_installed):
            self._check_run(is_needed=bool(run) or self._text_manifest is None)

    def _check_run(self, is_needed: bool) -> None:
        from clipvisionalign.models.hub import WeightsNotFound

        if self._not_installed:
            raise InvalidIndexError(self._not_installed)
        try:
            fingerprint = aligner_fingerprint(self.run)
        except FileNotFoundError as error:
            if not is_needed:
                return
            reason = f" ({error})" if isinstance(error, WeightsNotFound) else ""
            message = f"{self.index}: its aligner {self.run} is not there; give its path with --run{reason}"
            raise InvalidIndexError(message) from None
        if fingerprint != self.manifest.aligner:
            raise InvalidIndexError(f"{self.index}: it was made by another aligner than {self.run}")

    @property
    def aligner(self) -> Aligner:
        """The aligner, which is loaded when it is first asked for.

        Raises:
            InvalidIndexError: It is not there, or has other weights.
        """
        with self._aligner_lock:
            if self._aligner is None:
                start = time.perf_counter()
                from clipvisionalign.models.io import load_aligner

                self._check_run(is_needed=True)
                self._aligner = load_aligner(self.run, self.device)
                self.loading_seconds += time.perf_counter() - start
            return self._aligner

    @property
    def text_tower(self) -> OnnxTextTower | None:
        """The text tower beside the index, opened when it is first asked for; None where there is none to use."""
        with self._text_lock:
            if self._text_tower is None and self._text_manifest is not None:
                self._text_tower = open_text_tower(self.storage, self.manifest.aligner)
                if self._text_tower is None:
                    self._text_manifest = None
            return self._text_tower

    def load(self) -> None:
        """Load what words are encoded by: the text tower, or the aligner where there is none to use.

        Raises:
            InvalidIndexError: The aligner is needed, and not there.
        """
        if self.text_tower is None:
            _ = self.aligner

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the captions: a `tokenizers.Tokenizer`, or one of transformers; None for any other kind."""
        tower = self.text_tower
        return getattr(self.aligner.text_tower, "tokenizer", None) if tower is None else tower.tokenizer

    def token_limit(self, text: str) -> int:
        """Number of tokens that the model takes of a text, if it has more.

        Args:
            text: Words.

        Returns:
            The number, special tokens included; 0 for a text that is read to its end.
        """
        tower = self.text_tower
        if tower is None:
            # A token has one character of these at least.
            if text.isascii() and len(text) < self.aligner.text_tower.max_tokens - _SPECIAL_TOKENS:
                return 0
            tokens = self.aligner.text_tower.tokenize([text])
            return len(tokens[0]) if tokens.num_truncated[0] else 0
        if text.isascii() and len(text) < (tower.tokenizer.truncation or {}).get("max_length", 0) - _SPECIAL_TOKENS:
            return 0
        encoding = tower.tokenizer.encode(text)
        return sum(encoding.attention_mask) if encoding.overflowing else 0

    @property
    def design(self) -> str:
        """The design of the aligner."""
        return str(self._text_manifest["design"]) if self._text_manifest else self.aligner.config.design

    @property
    def reranks(self) -> bool:
        """Whether the aligner scores pairs."""
        return bool(self._text_manifest["reranks"]) if self._text_manifest else self.aligner.late is not None

    def encode_words(self, texts: Sequence[str]) -> np.ndarray:
        """Encode words.

        Args:
            texts: M texts.

        Returns:
            (M, D) float32, unit length.
        """
        tower = self.text_tower
        return self.aligner.encode_captions(texts).numpy() if tower is None else tower.encode_captions(texts)

    def encode_images(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Encode images, by PyTorch.

        Args:
            images: N images.

        Returns:
            (N, D) float32, unit length.

        Raises:
            ImageError: An image cannot be opened.
            InvalidIndexError: The aligner is not there.
        """
        return self.aligner.encode_images(images).numpy()

    @property
    def late_scales(self) -> tuple[float, float] | None:
        """Of the cosine and of the late interaction in pair scores, where words are encoded for these without PyTorch:
        the design is `late`, the text tower beside the index gives its tokens, and the index keeps patches; else None.
        """
        tower = self.text_tower
        if tower is None or tower.late is None or not self._ask_for_patches():
            return None
        return tower.late["scale"], tower.late["late_scale"]

    def encode_for_pairs(self, texts: Sequence[str]) -> list[CaptionTokens] | list[EncodedCaption]:
        """Encode words for pair scores, without PyTorch where that is possible.

        Args:
            texts: M texts.

        Returns:
            One a text, its vector included.

        Raises:
            InvalidIndexError: The aligner is needed, and not there.
        """
        if not texts:
            return []
        tower = self.text_tower
        if tower is None or self.late_scales is None:
            return self.encode_words_for_pairs(texts)
        return tower.encode_tokens(texts)

    def encode_words_for_pairs(self, texts: Sequence[str]) -> list[EncodedCaption]:
        """Encode words for re-ranking, by PyTorch.

        Args:
            texts: M texts.

        Returns:
            One a text, its vector included.

        Raises:
            InvalidIndexError: The aligner is not there.
        """
        return self.aligner.encode_captions_for_pairs(texts)
