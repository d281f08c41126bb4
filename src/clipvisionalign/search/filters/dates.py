"""Dates of a filter: a year, a month, a day, an hour, a minute or a second, each an interval of time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

_DATE = re.compile(
    r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2})(?:[T ]([0-9]{2})(?::([0-9]{2})(?::([0-9]{2}))?)?)?)?)?", re.IGNORECASE
)
#: What a date looks like, for messages.
DATE_FORMS = '2023, 2023-05, 2023-05-01 or "2023-05-01 12:30"'


@dataclass(frozen=True)
class DateInterval:
    """The time that a date names.

    Attributes:
        start: Its first moment.
        end: The first moment after it; None after the year 9999.
        parts: Number of parts that are given, from 1, the year, to 6, the second.
    """

    start: datetime
    end: datetime | None
    parts: int


def parse_date(text: str) -> DateInterval:
    """The interval of a date.

    Args:
        text: Such as 2023, 2023-05, 2023-05-01, 2023-05-01T12, "2023-05-01 12:30", "2023-05-01 12:30:05".

    Returns:
        The interval.

    Raises:
        ValueError: It is no date, or there is no such day or time.

    >>> parse_date("2023-05").end
    datetime.datetime(2023, 6, 1, 0, 0)
    """
    match = _DATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a date is written {DATE_FORMS}")
    numbers = [int(group) for group in match.groups() if group is not None]
    try:
        year, month, day, hour, minute, second = [*numbers, *(1, 1, 1, 0, 0, 0)[len(numbers) :]]
        start = datetime(year, month, day, hour, minute, second)
    except ValueError as error:
        raise ValueError(f"there is no such date: {error}") from None
    return DateInterval(start, _interval_end(start, len(numbers)), len(numbers))


def _interval_end(start: datetime, parts: int) -> datetime | None:
    """The first moment after an interval; None where that is beyond what is counted."""
    steps = {3: timedelta(days=1), 4: timedelta(hours=1), 5: timedelta(minutes=1), 6: timedelta(seconds=1)}
    try:
        if parts == 1:
            return start.replace(year=start.year + 1)
        if parts == 2:
            return start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
        return start + steps[parts]
    except (ValueError, OverflowError):
        return None
