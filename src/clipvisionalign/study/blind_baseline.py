"""The baseline of the minimal pairs: a language model that is given no image.

Where it does, a foil is merely an unlikely sentence, and a model that outscores it need not use the image. The language
model is a trigram of the training captions with Witten-Bell's smoothing, which is what a text tower could have learned
from the same captions at least.

Source: Hsieh et al., "SugarCrepe", arXiv:2306.14610, for the shortcut; Witten and Bell, IEEE Transactions on
Information Theory 37 (1991), for the smoothing.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from clipvisionalign.data.foils import MinimalPair

NGRAM_ORDER = 3


class TrigramModel:
    """A language model of captions, by trigrams.

    Args:
        captions: What it is learned from.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        from nltk.lm import WittenBellInterpolated
        from nltk.lm.preprocessing import padded_everygram_pipeline

        grams, vocabulary = padded_everygram_pipeline(NGRAM_ORDER, [tokenize_words(caption) for caption in captions])
        self.model: Any = WittenBellInterpolated(NGRAM_ORDER)
        self.model.fit(grams, vocabulary)

    def knows(self, caption: str) -> list[bool]:
        """Of each word whether it stood in a caption that was learned from.

        Args:
            caption: A caption.

        Returns:
            A value for each word.
        """
        return [word in self.model.vocab for word in tokenize_words(caption)]

    def log_probability(self, caption: str) -> float:
        """The log probability of a whole caption, its end included.

        Args:
            caption: A caption.

        Returns:
            At most 0.
        """
        words = ["<s>"] * (NGRAM_ORDER - 1) + tokenize_words(caption) + ["</s>"]
        total = 0.0
        for position in range(NGRAM_ORDER - 1, len(words)):
            probability = self.model.score(words[position], words[position - NGRAM_ORDER + 1 : position])
            total += math.log(max(probability, 1e-12))
        return total


def tokenize_words(caption: str) -> list[str]:
    """Lower-case words of any script, without punctuation; each sign of a script without spaces (Han, Kana) for itself.

    Args:
        caption: A caption.

    Returns:
        Its words.

    >>> tokenize_words("The dog's HAT, a hat."), tokenize_words("Собака кусает"), tokenize_words("犬が走る")
    (['the', "dog's", 'hat', 'a', 'hat'], ['собака', 'кусает'], ['犬', 'が', '走', 'る'])
    """
    kept = "".join(
        f" {sign} " if unicodedata.east_asian_width(sign) in "WF" and unicodedata.category(sign)[0] == "L"
        # Marks are parts of words: such as the vowels of Hindi.
        else sign if unicodedata.category(sign)[0] in "LMN" or sign == "'" else " "
        for sign in unicodedata.normalize("NFC", caption.lower())
    )  # fmt: skip
    return kept.split()


@lru_cache(maxsize=1)
def _trigrams_of(captions: tuple[str, ...]) -> TrigramModel:
    """The model of a study's training captions, which several sets of pairs and reports are compared with."""
    return TrigramModel(captions)


def blind_accuracy(captions: Sequence[str], pairs: Sequence[MinimalPair]) -> dict[str, list[float]]:
    """Whether the true caption of each pair is the likelier sentence.

    Args:
        captions: What the language model is learned from.
        pairs: Minimal pairs.

    Returns:
        By kind, for each pair 1, 0, or 0.5 for a tie. A kind of which less than half of the words are in the language
        model's vocabulary, as in another language, is left out: it would distinguish nothing.
    """
    if not pairs:
        return {}
    model = _trigrams_of(tuple(captions))
    shares: dict[str, list[float]] = {}
    known: dict[str, list[bool]] = {}
    for pair in pairs:
        margin = model.log_probability(pair.caption) - model.log_probability(pair.foil)
        shares.setdefault(pair.kind, []).append(0.5 if abs(margin) < 1e-9 else float(margin > 0))
        known.setdefault(pair.kind, []).extend(model.knows(pair.caption) + model.knows(pair.foil))
    return {kind: outcomes for kind, outcomes in shares.items() if 2 * sum(known[kind]) >= len(known[kind]) > 0}
