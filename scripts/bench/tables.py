"""Results -> CSV rows, ratios and a table. Pure but for the file that rows are appended to."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mlx_dpo.errors import DataError
from scripts.bench.job import Result

Row = dict[str, str]
Rate = Callable[[Result], float | None]  # pairs per second, if the trainer has such a thing


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One trainer in one setting, once."""

    trainer: str
    setting: str
    round: int
    result: Result
    remark: str = ""  # why it cannot be the trainer's best


def figure(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, not in scientific notation; empty for None."""
    if value is None:
        return ""
    return f"{float(f'{value:.{digits}g}'):f}".rstrip("0").rstrip(".")


def gigabytes(count: int | None) -> str:
    """Bytes as GB; empty for None."""
    return "" if count is None else figure(count / 1e9)


def peer_row(measured: Measured) -> Row:
    """The columns of a trainer's result."""
    result = measured.result
    return {
        "trainer": measured.trainer,
        "setting": measured.setting,
        "round": str(measured.round),
        "pairs": str(result.pairs),
        "tokens": str(result.tokens),
        "first_epoch_pairs_per_s": figure(result.first_epoch),
        "cached_epoch_pairs_per_s": figure(result.cached_epoch),
        "peak_gb": gigabytes(result.peak_bytes),
        "resident_gb": gigabytes(result.resident_bytes),
        "versions": result.versions,
        "remark": measured.remark,
    }


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file that begins with the names of their columns.

    Raises:
        DataError: the file has other columns.
    """
    rows = list(rows)
    if not rows:
        return
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise DataError(
                f"{path}: has other columns ({', '.join(found)}); move it away, or give --csv"
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def first_epoch(result: Result) -> float | None:
    """Pairs per second, reference included."""
    return result.first_epoch


def cached_epoch(result: Result) -> float | None:
    """Pairs per second once the reference is known; None for trainers that keep none."""
    return result.cached_epoch


EPOCHS: dict[str, Rate] = {
    "over a first epoch": first_epoch,
    "with the reference cached": cached_epoch,
}


def fastest(measured: Sequence[Measured]) -> list[str]:
    """The settings that are best by one of the rates, without those that are no candidates."""
    best: dict[str, None] = {}
    for rate in EPOCHS.values():
        rated = [(value, one.setting) for one in measured if (value := _rate(one, rate))]
        if rated:
            best[max(rated)[1]] = None
    return list(best)


def _rate(measured: Measured, rate: Rate) -> float | None:
    return None if measured.remark else rate(measured.result)


def ratios(measured: Sequence[Measured], rate: Rate, *, of: str = "ours") -> dict[str, float]:
    """How many times the rate of each other trainer `of` has.

    Each takes its best setting; a ratio is formed within a round, the median taken over rounds.
    Trainers without such a rate are left out.
    """
    best: dict[tuple[int, str], float] = {}
    for one in measured:
        key, value = (one.round, one.trainer), _rate(one, rate)
        if value:
            best[key] = max(value, best.get(key, 0.0))
    found: dict[str, list[float]] = {}
    for (turn, trainer), value in best.items():
        if trainer != of and (turn, of) in best:
            found.setdefault(trainer, []).append(best[turn, of] / value)
    return {trainer: median(values) for trainer, values in found.items()}


def sentence(row: Row) -> str:
    """A row of `peer_row`, as it is said while the others run."""
    names = ("first_epoch_pairs_per_s", "cached_epoch_pairs_per_s", "peak_gb", "resident_gb")
    figures = ", ".join(f"{name} {row[name]}" for name in names if row[name])
    return f"{row['stage']}: {row['trainer']}, {row['setting']}: {figures}"


def text_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table of these columns, every cell as wide as its column."""
    cells = [list(columns), *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    rule = [["-" * width for width in widths]]
    lines = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in cells[:1] + rule + cells[1:]
    ]
    return "\n".join(lines)
