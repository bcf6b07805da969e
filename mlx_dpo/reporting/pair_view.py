"""Show preference pairs at a terminal: their text, and histograms of text lengths.

Every line of text begins with a mark (prompt, scored or cut), so that the meaning does not
depend on colours.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from mlx_dpo.terminal_text import escape_invisible, escape_line

PROMPT, SCORED, CUT = "prompt", "scored", "cut"
MARKS = {PROMPT: "│", SCORED: "█", CUT: "╳"}
STYLES = {PROMPT: "", SCORED: "green", CUT: "red dim"}
SPECIAL_TOKEN_STYLE = "bold cyan"
OPEN, CLOSE, NEWLINE = "⟦", "⟧", "⏎"
LEGEND = (
    f"{MARKS[PROMPT]} prompt   {MARKS[SCORED]} scored   {MARKS[CUT]} cut   "
    f"{OPEN}special token{CLOSE}   {NEWLINE} end of a line"
)
HEAD, TAIL = 300, 100  # characters of a cut text that are shown


class Piece(Protocol):
    """Decoded text of one or more consecutive tokens, as made by `data.inspect.show`."""

    @property
    def text(self) -> str:
        """Text that the tokenizer decodes from the tokens."""

    @property
    def special(self) -> bool:
        """Whether the piece is a special token."""


class Part(Protocol):
    """Consecutive tokens of a pair of one kind: prompt, scored or cut (truncated)."""

    @property
    def name(self) -> str:
        """Name of the text in the pair that the tokens belong to, such as `chosen`."""

    @property
    def kind(self) -> str:
        """Kind of the tokens: `PROMPT`, `SCORED` or `CUT` (truncated)."""

    @property
    def tokens(self) -> int:
        """Number of tokens in this part."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """Decoded texts of the tokens, in order."""


def print_legend(console: Console) -> None:
    """Print what the marks at the beginning of lines mean."""
    console.print(LEGEND, style="dim")


def print_pair(
    console: Console, location: str, notes: Iterable[str], parts: Iterable[Part]
) -> None:
    """Print a pair: its location, notes about it, and the text of its parts."""
    console.print()
    console.print(Rule(Text(escape_line(location)), align="left", characters="─", style="bold"))
    for note in notes:
        console.print(note)
    for part in parts:
        tokens = f"{part.tokens:,} token{'s' * (part.tokens != 1)}"
        console.print(f"{part.name}, {tokens}, {_treatment(part)}", style="bold")
        for line in _wrap_lines(console, part):
            console.print(Text(f"{MARKS[part.kind]} ", style=STYLES[part.kind]) + line)


def _treatment(part: Part) -> str:
    return {PROMPT: "not scored", SCORED: "scored", CUT: "cut: not in the model's input"}[part.kind]


def _wrap_lines(console: Console, part: Part) -> Iterator[Text]:
    text = Text()
    for piece in part.pieces:
        printable = escape_invisible(piece.text)
        if piece.special:
            text.append(f"{OPEN}{printable}{CLOSE}", SPECIAL_TOKEN_STYLE)
        else:
            text.append(printable.replace("\n", f"{NEWLINE}\n"), STYLES[part.kind])
    if part.kind == CUT and len(text) > HEAD + TAIL:
        text = text[:HEAD] + Text(" […] ", STYLES[CUT]) + text[-TAIL:]
    for line in text.split("\n"):
        if console.is_terminal and len(line):
            yield from line.wrap(console, max(10, console.width - 2), no_wrap=False)
        else:
            yield line


MAX_BAR_WIDTH = 16  # characters
EIGHTHS = " ▏▎▍▌▋▊▉"


def format_histogram(
    columns: Sequence[str], bins: Sequence[tuple[int, int, Sequence[int]]], unit: str
) -> list[str]:
    """Return a histogram as lines of text: one line per bin, one bar per column.

    Args:
        columns: headings of the columns.
        bins: (low, high, counts) per bin, with one count per column.
        unit: heading of the first text column, which shows the bounds of the bins.
    """
    max_count = max(max(counts) for _, _, counts in bins)
    labels = [f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high, _ in bins]
    label_width = max(len(unit), *map(len, labels))
    column_width = MAX_BAR_WIDTH + 1 + len(f"{max_count:,}")
    lines = [f"{unit:>{label_width}}  " + "  ".join(f"{name:<{column_width}}" for name in columns)]
    for label, (_, _, counts) in zip(labels, bins, strict=True):
        bars = (f"{format_bar(n / max_count)} {n:,}" if n else "" for n in counts)
        cells = "  ".join(f"{bar:<{column_width}}" for bar in bars)
        lines.append(f"{label:>{label_width}}  {cells}")
    return [line.rstrip() for line in lines]


def format_bar(share: float) -> str:
    """Return a bar of block characters; a share of 1 gives `MAX_BAR_WIDTH` characters.

    The bar's length is rounded to an eighth of a character; a share above 0 has at least an eighth.
    """
    eighths = max(1, round(share * MAX_BAR_WIDTH * 8)) if share else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + EIGHTHS[rest].strip()


def format_length_summary(lengths: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a table of lengths as lines of text.

    Args:
        lengths: a row per name: median, 95th percentile and maximum of the lengths.
    """
    headings = ("median", "95 %", "longest")
    width = max(map(len, lengths))
    rows = [f"{'':{width}}  " + "  ".join(f"{heading:>9}" for heading in headings)]
    rows += [
        f"{name:<{width}}  " + "  ".join(f"{value:>9,}" for value in values)
        for name, values in lengths.items()
    ]
    return rows
