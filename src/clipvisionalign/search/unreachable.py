"""Tables and shards of an index that cannot be read now: how they are told from other errors, and named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from clipvisionalign.counts import count_noun
from clipvisionalign.search.storage import InvalidIndexError


class ShardUnavailable(OSError):
    """A shard that does not answer."""


class MissingShard(NamedTuple):
    """A shard whose images a result lacks.

    Attributes:
        shard: Its name.
        images: Number of images that it holds.
    """

    shard: str
    images: int

    def describe(self) -> str:
        """The shard in words, such as "shard-02 (1,234 images)"."""
        return f"{self.shard} ({count_noun(self.images, 'image')})"


def missing_note(missing: Sequence[MissingShard]) -> str:
    """What a result is told of shards that have not answered.

    Args:
        missing: One shard or more.

    Returns:
        A note.

    >>> missing_note([MissingShard("shard-02", 7)])
    'incomplete: shard-02 (7 images) does not answer now; what it holds is missing here'
    """
    shards = ", ".join(shard.describe() for shard in missing)
    verb, held = ("does", "it holds") if len(missing) == 1 else ("do", "they hold")
    return f"incomplete: {shards} {verb} not answer now; what {held} is missing here"


def is_unreadable(error: BaseException) -> bool:
    """Whether an error is that of an index whose files cannot be read, as of a drive that is gone.

    Args:
        error: The error of a query.

    Returns:
        Whether it is; any other one is the query's own.

    >>> is_unreadable(OSError("Not found: index/pictures.lance")), is_unreadable(OSError("no field named year"))
    (True, False)
    """
    # The engine raises errors of queries, too, as those of the system, which alone have a number.
    by_system = isinstance(error, OSError) and error.errno is not None
    gone = by_system or isinstance(error, (ShardUnavailable, InvalidIndexError))
    return gone or "LanceError(IO)" in str(error) or "Not found:" in str(error)
