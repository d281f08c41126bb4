"""Words of a query that a model's vocabulary lacks: unknown tokens, and scripts that it only spells.

A vocabulary of English subwords has single letters of other scripts, so that a Russian word becomes its letters instead
of an unknown token: nothing that the model has learned. Byte-level vocabularies have every character in that way.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

#: A word of another script with more tokens than this share of its letters is spelled.
SPELLED_SHARE = 0.6
#: Han characters in a vocabulary from which on each of them stands for what it means.
MIN_HAN_TOKENS = 1000
#: Words that are kept as known or not.
MAX_CHECKED_WORDS = 10_000


@dataclass(frozen=True)
class WordCheck:
    """The words of a text, as a tokenizer takes them.

    Attributes:
        known: Number of words that the vocabulary has.
        unknown: Those that it lacks, as they were written.
    """

    known: int
    unknown: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why the text has no meaning for the model; "" where it has a known word."""
        if self.known:
            return ""
        if not self.unknown:
            return "there is no word in it"
        return f"the model's vocabulary lacks {_enumerate(self.unknown)}"

    @property
    def note(self) -> str:
        """A note that names the unknown words of a text that has known ones too; "" where there are none."""
        if not self.known or not self.unknown:
            return ""
        return f"the model's vocabulary lacks {_enumerate(self.unknown)}; the other words are searched for"


def check_words(tokenizer: Any, text: str, checked: dict[str, bool] | None = None) -> WordCheck:
    """Which words of a text are in the vocabulary of a tokenizer.

    Args:
        tokenizer: One of transformers, or a `tokenizers.Tokenizer`. Of any other kind all words count as known.
        text: The words.
        checked: Whether words are known, of earlier texts for the same tokenizer; those of this one are added.

    Returns:
        The words, known and unknown.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    known, unknown = 0, list[str]()
    checked = {} if checked is None else checked
    if len(checked) > MAX_CHECKED_WORDS:
        checked.clear()
    for word in text.split():
        if not _is_word(word):
            continue
        is_known = checked.get(word)
        if is_known is None:
            is_known = checked[word] = _is_known(tokenizer, word)
        if is_known:
            known += 1
        else:
            unknown.append(word)
    return WordCheck(known, tuple(dict.fromkeys(unknown)))


def _is_word(word: str) -> bool:
    """Whether there is a letter, a digit or a symbol such as an emoji: no mere punctuation or control character."""
    return any(unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Mn") and not _is_punctuation(character)
               for character in word)  # fmt: skip


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PZ" or (character.isascii() and not character.isalnum())


def _is_known(tokenizer: Any, word: str) -> bool:
    tokens, unknown_token = _tokens(tokenizer, word)
    if tokens is None:
        return True
    # A marker of the beginning of a word is no token of it.
    pieces = [token for token in tokens if token.strip("▁Ġ#") and token != unknown_token]
    if not pieces or all(not any(_is_word(part) for part in piece) for piece in pieces):
        return False
    letters = [character for character in word if character.isalpha()]
    foreign = [character for character in letters if not _is_latin(character)]
    if len(foreign) * 2 < max(1, len(letters)) or len(pieces) < SPELLED_SHARE * len(letters):
        return True
    if any(_is_han_like(character) for character in foreign):
        return _knows_han(tokenizer)
    return len(letters) < 2


def _tokens(tokenizer: Any, word: str) -> tuple[list[str] | None, str | None]:
    """The tokens of a word, None where the tokenizer is of no known kind, and its unknown token."""
    if hasattr(tokenizer, "token_to_id") and hasattr(tokenizer, "encode"):
        encoding = tokenizer.encode(word, add_special_tokens=False)
        tokens = [token for token, used in zip(encoding.tokens, encoding.attention_mask, strict=True) if used]
        model = tokenizer.model
        unknown = getattr(model, "unk_token", None)
        if unknown is None and getattr(model, "unk_id", None) is not None:
            unknown = tokenizer.id_to_token(model.unk_id)
        return tokens, unknown
    if hasattr(tokenizer, "tokenize") and hasattr(tokenizer, "unk_token"):
        return list(tokenizer.tokenize(word)), tokenizer.unk_token
    return None, None


def _is_latin(character: str) -> bool:
    return character.isascii() or unicodedata.name(character, "").startswith(("LATIN", "FULLWIDTH LATIN"))


def _is_han_like(character: str) -> bool:
    """Whether one character of its script may be a word."""
    return unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))


def _knows_han(tokenizer: Any) -> bool:
    """Whether a vocabulary has Chinese characters as a text in Chinese needs them."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    count = 0
    for token in vocabulary:
        count += any("\u4e00" <= character <= "\u9fff" for character in token)
        if count >= MIN_HAN_TOKENS:
            return True
    return False


def _enumerate(words: tuple[str, ...], limit: int = 5) -> str:
    shown = ", ".join(f"'{word[:40]}'" for word in words[:limit])
    return shown + (f" and {len(words) - limit:,} more" if len(words) > limit else "")
