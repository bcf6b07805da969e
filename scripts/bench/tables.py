"""CSV rows, speed-ups and a text table from results."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mlx_dpo.errors import DataError
from scripts.bench.job import Result

Row = dict[str, str]
Rate = Callable[[Result], float | None]  # pairs per second, None if not applicable


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Result of one run of a trainer in one setting."""

    trainer: str
    setting: str
    round: int
    result: Result
    remark: str = ""  # why the setting is excluded from the comparison


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number with so many significant digits, without exponent; empty for None."""
    if value is None:
        return ""
    return f"{float(f'{value:.{digits}g}'):f}".rstrip("0").rstrip(".")


def format_gigabytes(count: int | None) -> str:
    """Format bytes in GB; empty for None."""
    return "" if count is None else format_number(count / 1e9)


def peer_row(measured: Measurement) -> Row:
    """Return the row of a trainer's result."""
    result = measured.result
    return {
        "trainer": measured.trainer,
        "setting": measured.setting,
        "round": str(measured.round),
        "pairs": str(result.pairs),
        "tokens": str(result.tokens),
        "first_epoch_pairs_per_s": format_number(result.first_epoch),
        "cached_epoch_pairs_per_s": format_number(result.cached_epoch),
        "user_s": format_number(result.cpu_s[0]),
        "system_s": format_number(result.cpu_s[1]),
        "peak_gb": format_gigabytes(result.peak_bytes),
        "resident_gb": format_gigabytes(result.resident_bytes),
        "versions": result.versions,
        "remark": measured.remark,
    }


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a CSV file; a new file gets a header.

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
    """Return pairs per second, including the reference."""
    return result.first_epoch


def cached_epoch(result: Result) -> float | None:
    """Return pairs per second with cached reference log-probs; None without a cache."""
    return result.cached_epoch


EPOCHS: dict[str, Rate] = {
    "over a first epoch": first_epoch,
    "with the reference cached": cached_epoch,
}


def fastest_settings(measured: Sequence[Measurement]) -> list[str]:
    """Return the settings that are fastest by one of the rates, except those with a remark."""
    best: dict[str, None] = {}
    for rate in EPOCHS.values():
        rated = [(value, run.setting) for run in measured if (value := _rate(run, rate))]
        if rated:
            best[max(rated)[1]] = None
    return list(best)


def _rate(measured: Measurement, rate: Rate) -> float | None:
    return None if measured.remark else rate(measured.result)


def speedups(measured: Sequence[Measurement], rate: Rate, *, of: str = "ours") -> dict[str, float]:
    """Return the speed-up of trainer `of` over each other trainer.

    Ratios compare the best settings within a round; the result is the median over rounds.
    Trainers without such a rate are left out.
    """
    best: dict[tuple[int, str], float] = {}
    for run in measured:
        key, value = (run.round, run.trainer), _rate(run, rate)
        if value:
            best[key] = max(value, best.get(key, 0.0))
    by_trainer: dict[str, list[float]] = {}
    for (turn, trainer), value in best.items():
        if trainer != of and (turn, of) in best:
            by_trainer.setdefault(trainer, []).append(best[turn, of] / value)
    return {trainer: median(values) for trainer, values in by_trainer.items()}


def progress_line(row: Row) -> str:
    """Return a row of `peer_row` as one line of progress output."""
    names = (
        "first_epoch_pairs_per_s",
        "cached_epoch_pairs_per_s",
        "user_s",
        "system_s",
        "peak_gb",
        "resident_gb",
    )
    figures = ", ".join(f"{name} {row[name]}" for name in names if row[name])
    return f"{row['stage']}: {row['trainer']}, {row['setting']}: {figures}"


def text_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return an aligned Markdown table of these columns."""
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
