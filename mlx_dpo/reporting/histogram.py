"""Lengths as bars, and what they say, in lines for a person."""

from collections.abc import Mapping, Sequence

WIDTH = 16  # of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"


def histogram(
    parts: Sequence[str], bins: Sequence[tuple[int, int, Sequence[int]]], unit: str
) -> list[str]:
    """One line for each bin of (low, high, counts), one column of bars for each part."""
    most = max(max(counts) for _, _, counts in bins)
    labels = [f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high, _ in bins]
    left = max(len(unit), *map(len, labels))
    digits = len(f"{most:,}")
    column = WIDTH + 1 + digits
    lines = [f"{unit:>{left}}  " + "  ".join(f"{part:<{column}}" for part in parts)]
    for label, (_, _, counts) in zip(labels, bins, strict=True):
        cells = (f"{f'{bar(n / most)} {n:,}' if n else '':<{column}}" for n in counts)
        lines.append(f"{label:>{left}}  " + "  ".join(cells))
    return [line.rstrip() for line in lines]


def bar(share: float) -> str:
    """A bar, in eighths of a character; what is there is never invisible."""
    eighths = max(1, round(share * WIDTH * 8)) if share else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + EIGHTHS[rest].strip()


def spread_lines(spreads: Mapping[str, Sequence[int]]) -> list[str]:
    """Median, the length that 95 % keep within, and the longest of each part."""
    names = ("median", "95 %", "longest")
    left = max(map(len, spreads))
    rows = [f"{'':{left}}  " + "  ".join(f"{name:>9}" for name in names)]
    rows += [
        f"{part:<{left}}  " + "  ".join(f"{value:>9,}" for value in values)
        for part, values in spreads.items()
    ]
    return rows
