"""When rounds may run here: windows of the machine's local time, as a person writes them in the policy."""

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_WINDOW = re.compile(r"(?:([a-z,-]+) )?([0-2]\d):([0-5]\d)-([0-2]\d):([0-5]\d)")


class _Span(NamedTuple):
    """The weekdays a window begins on (0 is Monday), and its minutes from that midnight; the end may be tomorrow."""

    days: frozenset[int]
    begin: int
    end: int


def _a_window(text: str) -> str:
    _parse(text)
    return text


Window = Annotated[str, AfterValidator(_a_window)]  # "20:00-06:00", "mon-fri 20:00-06:00", "sat,sun 00:00-24:00"


def is_open(windows: Iterable[str], moment: datetime) -> bool:
    """Whether a moment lies in one of the windows.

    A window's first minute belongs to it and its last does not. One that ends before it begins ends on the next day,
    and its weekdays are those on which it begins.

    Args:
        windows: As ``Window`` accepts them.
        moment: Local time.
    """
    today = moment.hour * 60 + moment.minute
    return any(
        (moment.weekday() in days and begin <= today < end)
        or ((moment.weekday() - 1) % 7 in days and begin <= today + _DAY_MINUTES < end)
        for days, begin, end in map(_parse, windows)
    )


def _parse(text: str) -> _Span:
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(f'must be like "20:00-06:00" or "mon-fri 20:00-06:00", not {text!r}')
    begin, end = (60 * int(found[i]) + int(found[i + 1]) for i in (2, 4))
    if begin >= _DAY_MINUTES or end > _DAY_MINUTES or begin == end:
        raise ValueError(f"{text!r} is no time of day; a whole day is 00:00-24:00")
    return _Span(frozenset(_days(found[1], text)), begin, end if end > begin else end + _DAY_MINUTES)


def _days(listed: str | None, text: str) -> Iterator[int]:
    """Weekdays of a list like ``mon-wed,sat``; all of them where there is none."""
    for part in listed.split(",") if listed else ["mon-sun"]:
        ends = part.split("-")
        if len(ends) > 2 or not set(ends) <= set(DAYS):
            raise ValueError(f"{text!r}: weekdays are {', '.join(DAYS)}")
        begin, end = DAYS.index(ends[0]), DAYS.index(ends[-1])
        yield from (day % 7 for day in range(begin, end + 1 if end >= begin else end + 8))
