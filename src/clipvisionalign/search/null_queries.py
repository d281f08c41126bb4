"""Texts that mean nothing: what the best hit of a query that fits nothing looks like.

The pseudo-words of these texts are in no language. Their best cosines in an index are what chance gives there: a query
whose best hit is no better fits nothing in it. An index has them computed when it is written.

The more words, the higher their best cosines: a single word is compared with texts of one word, two with texts of two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

#: Numbers of words for which there are texts of their own.
SHORT_LENGTHS = (1, 2)
#: Number of texts, and the share of them whose best hit a query has to surpass.
NULL_TEXTS, NULL_SHARE = 64, 0.9
#: The share for single words, which say little: with 0.9 a plain "dog" fitted none of 30 photographs of which six were
#: of dogs, and these came first.
WORD_SHARE = 0.75

_ONSETS, _VOWELS, _CODAS = "b d f g k l m n p r s t v z br dr kl pr st tr", "a e i o u", "b d f g k l m n p r t x"


def null_texts(count: int = NULL_TEXTS, seed: int = 0) -> list[str]:
    """Texts of one to six pseudo-words.

    Args:
        count: Number of texts.
        seed: Of the drawing.

    Returns:
        The texts, always the same for one seed.

    >>> null_texts(2)
    ['dipdrok tugklek guk trekgatsop', 'zirmun']
    """
    rng = random.Random(seed)
    return [_pseudo_words(rng, rng.randint(1, 6)) for _ in range(count)]


def short_null_texts(words: int, count: int = NULL_TEXTS) -> list[str]:
    """Texts of a given number of pseudo-words.

    Args:
        words: Number of words of each.
        count: Number of texts.

    Returns:
        The texts, always the same.

    >>> short_null_texts(1, 2)
    ['stak', 'dron']
    """
    rng = random.Random(words)
    return [_pseudo_words(rng, words) for _ in range(count)]


def _pseudo_words(rng: random.Random, words: int) -> str:
    onsets, vowels, codas = _ONSETS.split(), _VOWELS.split(), _CODAS.split()

    def syllable() -> str:
        return rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas)

    return " ".join("".join(syllable() for _ in range(rng.randint(1, 3))) for _ in range(words))


def chance_level(best: Sequence[float], share: float = NULL_SHARE) -> float:
    """The cosine that the best hit of a query has to surpass to fit better than chance.

    Args:
        best: The best cosine of each of some texts that mean nothing.
        share: The share of them whose best hit has to be surpassed.

    Returns:
        The cosine that this share of them does not surpass.

    >>> chance_level([0.1, 0.3, 0.2])
    0.3
    """
    ordered = sorted(best)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
