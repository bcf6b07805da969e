"""Format quantities with units for display."""

import re

COUNTED = re.compile(r"\b(pair|row|answer|step|warning|prompt)s\b")


def format_items(count: int, items: str) -> str:
    """Return a count with its items, such as `3 held-out pairs` or `1 held-out pair`."""
    if count == 1:
        items = COUNTED.sub(r"\1", items, count=1)
    return f"{count:,} {items}"


def format_duration(seconds: float) -> str:
    """Return a time as `minutes:seconds`, such as `0:42`, or `hours:minutes:seconds`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(size: float, *, is_estimate: bool = False) -> str:
    """Return a number of bytes as text in decimal units, such as `1.5 GB`, `350 MB` or `0.4 MB`.

    An estimate is rounded to whole megabytes below 100 MB, and to three significant digits of
    gigabytes above.
    """
    if is_estimate:
        if size < 1e8:
            return f"{size / 1e6:.0f} MB"
        return f"{size / 1e9:.{0 if size >= 1e11 else 1 if size >= 1e10 else 2}f} GB"
    if size < 1e3:
        return f"{size:.0f} bytes"
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    if size < 1e9:
        return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.1f} GB"
