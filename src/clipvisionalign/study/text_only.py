"""The control beside the minimal pairs: does a language model tell the twins apart without the picture?

Where it does, a twin is merely an unlikely sentence, and a model that outscores it need not have looked. The language
model is a trigram of the training captions with Witten-Bell's smoothing, which is what a text tower could have learned
from the same captions at least.

Source: Hsieh et al., "SugarCrepe", arXiv:2306.14610, for the shortcut; Witten and Bell, IEEE Transactions on
Information Theory 37 (1991), for the smoothing.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from clipvisionalign.data.minimal_pairs import MinimalPair

ORDER = 3


class TrigramModel:
    """Log probabilities of captions, learned from `captions`."""

    def __init__(self, captions: Sequence[str]) -> None:
        from nltk.lm import WittenBellInterpolated
        from nltk.lm.preprocessing import padded_everygram_pipeline

        grams, vocabulary = padded_everygram_pipeline(ORDER, [words_of(caption) for caption in captions])
        self.model: Any = WittenBellInterpolated(ORDER)
        self.model.fit(grams, vocabulary)

    def knows(self, caption: str) -> list[bool]:
        """Of each word whether it stood in a caption that was learned from."""
        return [word in self.model.vocab for word in words_of(caption)]

    def log_probability(self, caption: str) -> float:
        """Of the whole caption, its end included."""
        words = ["<s>"] * (ORDER - 1) + words_of(caption) + ["</s>"]
        total = 0.0
        for place in range(ORDER - 1, len(words)):
            share = self.model.score(words[place], words[place - ORDER + 1 : place])
            total += math.log(max(share, 1e-12))
        return total


def words_of(caption: str) -> list[str]:
    """Lower-case words of any script, without punctuation; each sign of a script without spaces (Han, Kana) for itself.

    >>> words_of("The dog's HAT, a hat."), words_of("Собака кусает"), words_of("犬が走る")
    (['the', "dog's", 'hat', 'a', 'hat'], ['собака', 'кусает'], ['犬', 'が', '走', 'る'])
    """
    kept = "".join(
        f" {sign} " if unicodedata.east_asian_width(sign) in "WF" and unicodedata.category(sign)[0] == "L"
        # Marks are parts of words: of the vowels of Hindi, say.
        else sign if unicodedata.category(sign)[0] in "LMN" or sign == "'" else " "
        for sign in unicodedata.normalize("NFC", caption.lower())
    )  # fmt: skip
    return kept.split()


def twins_told_apart(captions: Sequence[str], pairs: Sequence[MinimalPair]) -> dict[str, list[float]]:
    """By kind, for each pair whether the true caption is the likelier sentence: 1, 0, or 0.5 for a tie.

    A kind of which the language model knows less than half of the words, as they are of another language, is left out:
    it would tell nothing apart, whatever there is to tell.
    """
    if not pairs:
        return {}
    model = TrigramModel(captions)
    found: dict[str, list[float]] = {}
    known: dict[str, list[bool]] = {}
    for pair in pairs:
        gap = model.log_probability(pair.true) - model.log_probability(pair.twin)
        found.setdefault(pair.kind, []).append(0.5 if abs(gap) < 1e-9 else float(gap > 0))
        known.setdefault(pair.kind, []).extend(model.knows(pair.true) + model.knows(pair.twin))
    return {kind: outcomes for kind, outcomes in found.items() if 2 * sum(known[kind]) >= len(known[kind]) > 0}
