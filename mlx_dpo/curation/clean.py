"""Write a data set without the rows that the checks report (`mlx-dpo data clean`)."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.setting import check_known
from mlx_dpo.curation.check import check_pairs
from mlx_dpo.data.inspect.findings import CHECKS, RENAMED_CHECKS, Check
from mlx_dpo.data.inspect.raw_rows import (
    JSON_LINES,
    check_new_path,
    check_rereadable,
    check_row_count,
    check_rows_independent,
    open_new_file,
    read_all_raw_rows,
    write_row,
)
from mlx_dpo.data.inspect.results import CheckResults
from mlx_dpo.data.inspect.scan import ProgressCallback
from mlx_dpo.data.sources import Source, find_sources
from mlx_dpo.errors import ConfigError, DataError


@dataclass(frozen=True)
class CleanResult:
    """Number of rows before and after cleaning, and of rows dropped because of each check."""

    rows: int
    remaining: int
    dropped: dict[str, int]  # a row with several findings counts for each of them
    report: Path
    skipped: list[str]  # checks that need a model or held-out pairs
    columns_of_bytes: Mapping[str, int]  # rows by column that was left out, as JSON has no bytes


def clean_pairs(
    config: DPOConfig,
    *,
    drop: Sequence[str],
    output: Path,
    progress: ProgressCallback = lambda new_rows: None,
) -> CleanResult:
    """Write the rows that no check in `drop` reports to `output`, and a report file next to it.

    An empty `drop` means every check of severity `error`.

    Raises:
        DataError: a source cannot be read to its end.
        ConfigError: a check is unknown or cannot be run, or the output file exists.
    """
    report = output.with_suffix(".report.json")
    _check_arguments(config, output, report)
    checks = _select_checks(drop)
    sources = find_sources(config.pairs, config.valid, config.split)
    check_rereadable([*sources.train, *sources.valid])
    _check_sources_distinct(sources.train)
    _, results = check_pairs(config, progress)
    _check_not_skipped(drop, results)
    dropped = _find_dropped_rows(results, checks)
    # Leaving the block publishes the report first and the rows last.
    with open_new_file(output) as rows_file, open_new_file(report) as report_file:
        remaining, left_out = 0, Counter[str]()
        for raw in read_all_raw_rows(sources.train):
            if raw.location not in dropped:
                left_out.update(write_row(rows_file, raw))
                remaining += 1
        check_row_count(remaining + len(dropped), results.train.rows, sources.train[0])
        if not remaining:
            raise DataError(f"{sources.train[0].name}: no row would be left; drop fewer")
        content = _make_report(sources.train, results, checks, dropped) | {"output": str(output)}
        report_file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    skipped = [check.name for check in checks if check.name in _skipped_checks(results)]
    return CleanResult(results.train.rows, remaining, content["dropped"], report, skipped, left_out)


def _make_report(
    sources: Sequence[Source],
    results: CheckResults,
    checks: Sequence[Check],
    dropped: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Return the content of the report file as a JSON-compatible dictionary."""
    skipped = _skipped_checks(results)
    return {
        "sources": [source.name for source in sources],
        "checks": [check.name for check in checks if check.name not in skipped],
        "rows": results.train.rows,
        "kept": results.train.rows - len(dropped),
        "dropped": dict(Counter(name for names in dropped.values() for name in names)),
        "dropped_rows": [
            {"where": location, "findings": names} for location, names in dropped.items()
        ],
    }


def _select_checks(drop: Sequence[str]) -> list[Check]:
    for name in drop:
        if name in RENAMED_CHECKS:
            raise ConfigError(f"`drop` {name} is now called `{RENAMED_CHECKS[name]}`")
        check_known(name, CHECKS, "finding", hint="docs/data.md lists them")
        if not CHECKS[name].can_drop:
            raise ConfigError(
                f"`drop` {name} has no effect; it describes all pairs together, not single rows"
            )
    return [check for check in CHECKS.values() if (check.name in drop if drop else check.is_error)]


def _find_dropped_rows(results: CheckResults, checks: Sequence[Check]) -> dict[str, list[str]]:
    """Return a dictionary from each dropped row's location to the checks that report the row."""
    dropped: dict[str, list[str]] = {}
    for check in checks:
        for location, _ in results.train.log.locations(check.name):
            names = dropped.setdefault(location, [])
            if check.name not in names:
                names.append(check.name)
    return dropped


def _skipped_checks(results: CheckResults) -> list[str]:
    """Return the names of the checks that were skipped for lack of a model or held-out pairs."""
    return [name for names in results.skipped.values() for name in names]


def _check_arguments(config: DPOConfig, output: Path, report: Path) -> None:
    if output.suffix != JSON_LINES:
        raise ConfigError(f"{output}: rows are written as JSON lines; give a `{JSON_LINES}` file")
    for path in (output, report):
        check_new_path(path)
    check_rows_independent(config)


def _check_not_skipped(drop: Sequence[str], results: CheckResults) -> None:
    for requirement, names in results.skipped.items():
        for name in drop:
            if name in names:
                raise ConfigError(f"`drop` {name} has no effect without {requirement}")


def _check_sources_distinct(sources: Sequence[Source]) -> None:
    """Raise `ConfigError` if a file is named twice; its rows' locations would be ambiguous."""
    names = [source.name for source in sources]
    names += [str(path) for source in sources for path in source.files if str(path) != source.name]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]}: is named twice; name it once")
