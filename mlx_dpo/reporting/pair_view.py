"""Pairs as the model sees them, on a terminal: told apart by marks, and by colours where there are.

A mark stands before every line, so that nothing hangs on colours.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

PROMPT, SCORED, CUT = "prompt", "scored", "cut"
MARKS = {PROMPT: "│", SCORED: "█", CUT: "╳"}
STYLES = {PROMPT: "", SCORED: "green", CUT: "red dim"}
SPECIAL = "bold cyan"
OPEN, CLOSE, NEWLINE = "⟦", "⟧", "⏎"
LEGEND = (
    f"{MARKS[PROMPT]} read   {MARKS[SCORED]} scored   {MARKS[CUT]} cut   "
    f"{OPEN}control token{CLOSE}   {NEWLINE} end of a line"
)
HEAD, TAIL = 300, 100  # characters that are shown of what was cut
# What would move the cursor, colour the screen or turn the writing round is shown by its number.
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)


class Piece(Protocol):
    """Text of tokens; see `preferences.showing`."""

    @property
    def text(self) -> str:
        """As the tokenizer decodes it."""

    @property
    def special(self) -> bool:
        """Whether it is a control token."""


class Part(Protocol):
    """Tokens that are treated alike."""

    @property
    def name(self) -> str:
        """Whose they are."""

    @property
    def kind(self) -> str:
        """What is done to them."""

    @property
    def tokens(self) -> int:
        """How many they are."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """Their text."""


def print_legend(console: Console) -> None:
    """What the marks mean."""
    console.print(LEGEND, style="dim", markup=False)


def print_page(console: Console, where: str, notes: Iterable[str], parts: Iterable[Part]) -> None:
    """One pair."""
    console.print()
    console.print(Rule(Text(where), align="left", characters="─", style="bold"))
    for note in notes:
        console.print(note, markup=False)
    for part in parts:
        tokens = f"{part.tokens:,} token{'s' * (part.tokens != 1)}"
        console.print(f"{part.name}, {tokens}, {_done(part)}", style="bold")
        for line in _lines(console, part):
            console.print(Text(f"{MARKS[part.kind]} ", style=STYLES[part.kind]) + line)


def _done(part: Part) -> str:
    return {PROMPT: "read", SCORED: "scored", CUT: "cut: never seen"}[part.kind]


def _lines(console: Console, part: Part) -> Iterator[Text]:
    text = Text()
    for piece in part.pieces:
        shown = UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", piece.text)
        if piece.special:
            text.append(f"{OPEN}{shown}{CLOSE}", SPECIAL)
        else:
            text.append(shown.replace("\n", f"{NEWLINE}\n"), STYLES[part.kind])
    if part.kind == CUT and len(text) > HEAD + TAIL:
        text = text[:HEAD] + Text(" […] ", STYLES[CUT]) + text[-TAIL:]
    for line in text.split("\n"):
        if console.is_terminal and len(line):
            yield from line.wrap(console, max(10, console.width - 2), no_wrap=False)
        else:
            yield line


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
