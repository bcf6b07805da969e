"""The day that a chat template prints: today, or the day on which a run began.

Templates such as Llama 3.2's write the date into the prompt (`strftime_now`). A run continues with
the day on which it began, so its token ids and its reference log-probs stay valid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, datetime, time
from typing import Any

DATED = "strftime_now"  # function by which a template prints the date
ATTRIBUTE = "mlx_dpo_day"  # of a tokenizer: its templates print this day
_day: ContextVar[date | None] = ContextVar("day", default=None)  # of the rendering in progress


def now() -> datetime:
    """Return the local time; everything here reads the clock by this function."""
    return datetime.now()


def today() -> date:
    """Return the present day."""
    return now().date()


def is_dated(tokenizer: Any) -> bool:
    """Return whether the tokenizer's chat template prints the date."""
    return DATED in str(getattr(tokenizer, "chat_template", ""))


def set_day(tokenizer: Any, day: date | None) -> None:
    """Let the tokenizer's chat template print `day` from now on; None means the present time."""
    setattr(tokenizer, ATTRIBUTE, day)


def get_day(tokenizer: Any) -> date | None:
    """Return the day that `set_day` set, or None."""
    return getattr(tokenizer, ATTRIBUTE, None)


@contextmanager
def printing_day_of(tokenizer: Any) -> Iterator[None]:
    """Let templates print the tokenizer's day inside the block."""
    token = _day.set(get_day(tokenizer))
    try:
        yield
    finally:
        _day.reset(token)


def strftime_now(format_: str) -> str:
    """Return the formatted day, at midnight, or the present time if no day is set."""
    day = _day.get()
    moment = now() if day is None else datetime.combine(day, time())
    return moment.strftime(format_)
