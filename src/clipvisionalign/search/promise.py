"""The verdict on the result of a search: up to where it holds what is meant, and that nothing fits.

- With a calibration (`calibration.py`), the hits down to a cut-off hold what is meant with a given probability.
- A query of words that the vocabulary of the model lacks has no result.
- A query whose best hit is no better than that of texts which mean nothing (`null_queries.py`), or than that of hardly
  any caption that the index is calibrated on, fits nothing better than chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipvisionalign.search.calibration import DEFAULT_LEVEL, Calibration, UncalibratedError
from clipvisionalign.search.hits import Hit
from clipvisionalign.search.null_queries import NULL_SHARE, WORD_SHARE, chance_level
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.rerank_margin import RerankMargin
from clipvisionalign.search.time_limit import TimeSpent
from clipvisionalign.search.unknown_words import check_words
from clipvisionalign.search.unreachable import MissingShard, missing_note

#: Factor by which more hits are read, where all that were read are promised.
DEPTH_FACTOR = 4


@dataclass(frozen=True)
class Promise:
    """Up to where a result holds what is meant.

    Attributes:
        level: The probability.
        threshold: The cosine that is reached.
        promised: Number of images that reach it; of a query without a level of its own, among its hits.
        more: Whether images beyond the hits of a query without a level of its own may reach it as well.
        calibrated_on: In words; the promise holds for collections like that.
    """

    level: float
    threshold: float
    promised: int
    more: bool
    calibrated_on: str

    def to_dict(self) -> dict[str, Any]:
        """The promise as JSON.

        Returns:
            Its fields.
        """
        return asdict(self)


class SearchResult(list[Any]):
    """The hits of a query, best first, with the verdict on them.

    Args:
        hits: `Hit` or `CaptionHit`, each as without a promise.
        promise: Up to where they hold what is meant; None without a calibration.
        reason: Why nothing fits the query; "" where something does.
        notes: For the user.
        missing: Shards that have not answered: what they hold is not among the hits.
        spent: What was done within the time of the query; None without one.

    Attributes:
        nothing: Whether nothing fits. There may be hits all the same: the nearest of what does not fit.
    """

    def __init__(
        self, hits: Sequence[Any] = (), promise: Promise | None = None, reason: str = "", notes: Sequence[str] = (),
        missing: Sequence[MissingShard] = (), spent: TimeSpent | None = None,
    ) -> None:  # fmt: skip
        super().__init__(hits)
        self.promise, self.reason, self.notes, self.missing = promise, reason, tuple(notes), tuple(missing)
        self.spent = spent

    @property
    def nothing(self) -> bool:
        """Whether nothing fits the query."""
        return bool(self.reason)

    def with_hits(self, hits: Sequence[Any]) -> SearchResult:
        """The same verdict with other hits, such as the first of these.

        Args:
            hits: The hits.

        Returns:
            A result of its own.
        """
        return SearchResult(hits, self.promise, self.reason, self.notes, self.missing, self.spent)

    def ranked_otherwise(self, hits: Sequence[Any], note: str) -> SearchResult:
        """The same verdict with hits of another ranking, to which no promise by cosines applies.

        Args:
            hits: The hits.
            note: For the user, "" for none.

        Returns:
            A result of its own.
        """
        notes = [*self.notes, note] if note else self.notes
        return SearchResult(hits, None, self.reason, notes, self.missing, self.spent)

    def with_time(self, spent: TimeSpent, note: str = "") -> SearchResult:
        """The same result with what was done within its time.

        Args:
            spent: What was done.
            note: For the user, "" for none.

        Returns:
            A result of its own.
        """
        notes = [*self.notes, note] if note else self.notes
        return SearchResult(self, self.promise, self.reason, notes, self.missing, spent)

    def without_shards(self, missing: Sequence[MissingShard]) -> SearchResult:
        """The same hits, marked as incomplete: nothing is promised, and nothing is known not to be there.

        Args:
            missing: Shards that have not answered; the result itself where there are none.

        Returns:
            A result of its own.
        """
        if not missing:
            return self
        return SearchResult(self, notes=[*self.notes, missing_note(missing)], missing=missing, spent=self.spent)

    def verdict(self) -> dict[str, Any]:
        """The verdict as JSON.

        Returns:
            "promise" (None without one), "nothing" and "reason"; "incomplete", where shards have not answered, with
            the "shard" and the number of "images" of each; "within", of a query with a time, what was done in it.
        """
        promise = None if self.promise is None else self.promise.to_dict()
        incomplete = {"incomplete": [shard._asdict() for shard in self.missing]} if self.missing else {}
        within = {} if self.spent is None else {"within": self.spent.to_dict()}
        return {"promise": promise, "nothing": self.nothing, "reason": self.reason, **incomplete, **within}


class ResultAssessor:
    """Adds the verdict to results of an index.

    Args:
        index: Its path or URL, for messages.
        calibration: That of the index; None without one, or the error that it cannot be read by.
        tokenizer: Gives the model's tokenizer.
        null_cosines: The best cosines of texts that mean nothing; none if unknown.
        count: Gives the number of images of the index.
        short_null_cosines: Of such texts of one word, and of other numbers of words, by that number.
        token_limit: Gives the number of tokens that the model takes of a text that has more, 0 for any other.
    """

    def __init__(
        self, index: str, calibration: Calibration | UncalibratedError | None, tokenizer: Callable[[], Any],
        null_cosines: Sequence[float], count: Callable[[], int],
        short_null_cosines: Mapping[int, Sequence[float]] = {}, token_limit: Callable[[str], int] = lambda text: 0,
    ) -> None:  # fmt: skip
        self.short_null_cosines, self.token_limit = short_null_cosines, token_limit
        self.index, self.calibration = index, calibration
        self.tokenizer, self.null_cosines, self.count = tokenizer, null_cosines, count
        self._checked_words: dict[str, bool] = {}

    @property
    def calibrated_on(self) -> str:
        """What the index is calibrated on, in words; "" where there is no calibration that can be read."""
        return self.calibration.describe() if isinstance(self.calibration, Calibration) else ""

    @property
    def rerank_margin(self) -> RerankMargin | None:
        """Which first hits are worth re-ranking; None where that is not calibrated."""
        return self.calibration.rerank if isinstance(self.calibration, Calibration) else None

    def assess(self, query: SearchQuery, hits: Sequence[Any], deeper: Callable[[int], Sequence[Any]]) -> SearchResult:
        """The hits of a query, with the verdict; with a promise, all hits that it needs and no others.

        Args:
            query: The query.
            hits: Its nearest images or captions, before re-ranking.
            deeper: Gives so many of the nearest, where `hits` may not be all that are promised.

        Returns:
            The result, before re-ranking.

        Raises:
            UncalibratedError: A promise is asked for that cannot be given.
        """
        level = query.promise
        calibration = require_calibration(self.index, self.calibration, level) if level else self.calibration
        if query.captions or not query.terms or any(term.is_image for term in query.terms):
            return SearchResult(hits)
        checks = [
            check_words(self.tokenizer(), str(term.content), self._checked_words)
            for term in query.terms
            if term.weight > 0
        ]
        if not any(check.known for check in checks):
            return SearchResult([], reason=next(check.reason for check in checks))
        notes = [note for check in checks if (note := check.note or check.reason)]
        limits = [limit for term in query.terms if (limit := self.token_limit(str(term.content)))]
        if limits:
            notes.append(
                f"the query is longer than the {limits[0]} tokens that the model reads of it: the rest is ignored"
            )
        if not isinstance(calibration, Calibration):
            return SearchResult(hits, reason=self._chance(query, hits), notes=notes)
        if not level:
            return SearchResult(hits, self._marked(calibration, hits), self._chance(query, hits), notes)
        cut = calibration.threshold(level)
        promised = _reaching(hits, cut, query.depth, deeper)
        if len(query.terms) > 1:
            notes.append("a promise is calibrated on single captions: of several terms it may be kept less often")
        promise = Promise(level, cut, len(promised), False, calibration.describe())
        reason = "" if promised else f"no image fits it so well as what is meant does in {100 * level:g} % of all cases"
        if not hits and query.where.strip():
            reason = "the filter leaves no image"
        return SearchResult(promised, promise, reason, notes)

    def _marked(self, calibration: Calibration, hits: Sequence[Any]) -> Promise | None:
        """Where the line of `DEFAULT_LEVEL` is among some hits; None where it is not calibrated."""
        try:
            cut = calibration.threshold(DEFAULT_LEVEL)
        except UncalibratedError:
            return None
        promised = sum(hit.score >= cut for hit in hits)
        more = bool(hits) and promised == len(hits)
        return Promise(DEFAULT_LEVEL, cut, promised, more, calibration.describe())

    def _chance(self, query: SearchQuery, hits: Sequence[Any]) -> str:
        """Why the best hit is no better than chance would have it; "" where it is, or where that is not known."""
        # Of the images that a filter leaves the best may be worse.
        if not hits or query.where.strip() or len(query.terms) > 1:
            return ""
        best, count = max(hit.score for hit in hits), self.count()
        text = str(query.terms[0].content)
        # Of scripts without spaces the number of words is not known.
        words = len(text.split()) if text.isascii() else 0
        null_cosines = self.short_null_cosines.get(words) or self.null_cosines
        if null_cosines and best <= chance_level(null_cosines, WORD_SHARE if words == 1 else NULL_SHARE):
            return f"it fits none of the {count:,} images better than words that mean nothing do"
        if isinstance(self.calibration, Calibration) and best < self.calibration.chance_level(count):
            return f"99 % of the captions that the index is calibrated on fit one of {count:,} images better"
        return ""


def require_calibration(index: str, calibration: Calibration | UncalibratedError | None, level: float) -> Calibration:
    """A calibration that a promise can be given by.

    Args:
        index: Path or URL of the index, for messages.
        calibration: What `read_calibration` gives.
        level: The probability that is promised.

    Returns:
        The calibration.

    Raises:
        UncalibratedError: There is none, it cannot be read, or it has too few images for this level.
    """
    if isinstance(calibration, UncalibratedError):
        raise calibration
    if calibration is None:
        raise UncalibratedError(
            f"{index}: a promise of {level:g} needs a calibration: 'clipvisionalign calibrate {index} DATA' makes it "
            "from captioned images that the model was not trained on"
        )
    calibration.threshold(level)
    return calibration


def _reaching(hits: Sequence[Hit], cut: float, depth: int, deeper: Callable[[int], Sequence[Hit]]) -> Sequence[Hit]:
    """All hits that reach a cosine; more are read while all that were read do."""
    while len(hits) >= depth and hits[-1].score >= cut:
        depth *= DEPTH_FACTOR
        hits = deeper(depth)
    return [hit for hit in hits if hit.score >= cut]
