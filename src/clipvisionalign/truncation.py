"""Tokens of captions, and how many a text tower's limit cuts off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


class TokenizedCaptions(list[list[int]]):
    """The tokens of captions, a list each, cut where a caption has too many.

    Args:
        ids: (M,) token ids of each caption.
        num_truncated: (M,) how many tokens of each were cut off; empty if none was.
    """

    def __init__(self, ids: Sequence[list[int]], num_truncated: Sequence[int] = ()) -> None:
        super().__init__(ids)
        self.num_truncated = list(num_truncated) or [0] * len(self)


@dataclass(frozen=True)
class TruncationStats:
    """How many captions were cut, and what that cost.

    Attributes:
        captions: Number of captions.
        cut: Number of those that were cut.
        tokens_lost: Number of tokens that were cut off, of all captions together.
        longest: Tokens of the longest caption before it was cut.
    """

    captions: int = 0
    cut: int = 0
    tokens_lost: int = 0
    longest: int = 0

    @classmethod
    def from_tokens(cls, tokens: Sequence[list[int]]) -> TruncationStats:
        """Count the captions that were cut.

        Args:
            tokens: (M,) tokens of each caption; a list that is no `TokenizedCaptions` counts as not cut.

        Returns:
            The counts.

        >>> TruncationStats.from_tokens(TokenizedCaptions([[1, 2], [1, 2]], [0, 3])).longest
        5
        """
        num_truncated = tokens.num_truncated if isinstance(tokens, TokenizedCaptions) else [0] * len(tokens)
        longest = max((len(ids) + extra for ids, extra in zip(tokens, num_truncated, strict=True)), default=0)
        return cls(len(tokens), sum(map(bool, num_truncated)), sum(num_truncated), longest)

    def __add__(self, other: TruncationStats) -> TruncationStats:
        return TruncationStats(
            self.captions + other.captions, self.cut + other.cut, self.tokens_lost + other.tokens_lost,
            max(self.longest, other.longest),
        )  # fmt: skip

    def to_dict(self) -> dict[str, float]:
        """The counts, and "share", the share of captions that were cut (0 to 1).

        Returns:
            Numbers by name.
        """
        return {**asdict(self), "share": self.cut / max(1, self.captions)}

    def summary(self, split: str, max_tokens: int) -> str:
        """The counts in one line.

        Args:
            split: Name of the split.
            max_tokens: The limit.

        Returns:
            A sentence.
        """
        return (
            f"{split}: {self.cut:,} of {self.captions:,} captions ({100 * self.cut / max(1, self.captions):.1f} %) are "
            f"longer than {max_tokens} tokens and cut; the longest has {self.longest:,}, {self.tokens_lost:,} tokens "
            "are lost"
        )
