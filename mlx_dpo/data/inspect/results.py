"""Run all checks on training and held-out pairs, and collect the findings."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.inspect.duplicates import find_duplicates, find_leaks
from mlx_dpo.data.inspect.findings import (
    CHECKS,
    LENGTH_BIAS_SHARE,
    MODEL,
    OTHER_DETAILS,
    ROWS,
    VALID,
    Check,
    FindingLog,
)
from mlx_dpo.data.inspect.scan import ProgressCallback, ScanSettings, SplitScan, scan_sources
from mlx_dpo.data.sources import SplitSources


@dataclass(frozen=True)
class Finding:
    """Result of one check on one split: how many rows or pairs it reports, and their locations."""

    check: Check
    count: int
    total: int  # rows or pairs of the split, by the check's unit
    log: FindingLog

    @property
    def share(self) -> float:
        """Share of the split's rows or pairs that the check reports."""
        return self.count / self.total if self.total else 0.0

    @property
    def details(self) -> dict[str, int]:
        """Number of occurrences of each detail, such as an error message; most frequent first.

        Details that were counted together come last.
        """
        counts = self.log.details[self.check.name].most_common()
        return dict(sorted(counts, key=lambda item: item[0] == OTHER_DETAILS))

    def locations(self) -> Iterator[tuple[str, str | None]]:
        """Yield the location of each reported row, with a related location (or None).

        The related location of a duplicate, for instance, is that of the first such row.
        """
        return self.log.locations(self.check.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-compatible dictionary, with every location."""
        check = self.check
        return {
            "name": check.name,
            "kind": check.severity,
            "count": self.count,
            "of": self.total,
            "unit": check.unit,
            "share": self.share,
            "why": check.why,
            "advice": check.advice,
            "details": self.details,
            "places": [
                [location] if related is None else [location, related]
                for location, related in self.locations()
            ],
        }


@dataclass(frozen=True)
class CheckResults:
    """Results of all checks on the training and held-out splits, and the skipped checks."""

    train: SplitScan
    valid: SplitScan | None
    skipped: dict[str, list[str]]  # missing requirement -> names of the checks

    @property
    def splits(self) -> dict[str, SplitScan]:
        """Results by split name: `train` and, if there are held-out pairs, `valid`."""
        return {"train": self.train} | ({"valid": self.valid} if self.valid else {})

    @property
    def error_count(self) -> int:
        """Number of checks of severity `error` that report something, added over the splits."""
        return sum(
            finding.check.is_error
            for split in self.splits.values()
            for finding in list_findings(split)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all results as a JSON-compatible dictionary."""
        splits = {
            name: {
                "rows": split.rows,
                "pairs": split.pairs,
                "reports": [report.to_dict() for report in split.reports],
                "lengths": split.lengths.to_dict(),
                "findings": [finding.to_dict() for finding in list_findings(split)],
            }
            for name, split in self.splits.items()
        }
        return {"errors": self.error_count, **splits, "skipped": self.skipped}


def run_checks(
    sources: SplitSources,
    settings: ScanSettings,
    progress: ProgressCallback = lambda new_rows: None,
) -> CheckResults:
    """Run all checks while reading the data sources once.

    Raises:
        DataError: a source cannot be read to its end.
        ConfigError: a setting has no effect.
    """
    row_locations = RowLocations()
    train = SplitScan(settings, FindingLog(row_locations))
    valid = SplitScan(settings, FindingLog(row_locations)) if sources.valid else None
    for split, split_sources in ((train, sources.train), (valid, sources.valid)):
        if split is not None:
            scan_sources(split_sources, split, progress)
            find_duplicates(split.digests, split.log)
    if valid is not None:
        find_leaks(train.digests, valid.digests, train.log)
    is_met = {MODEL: settings.tokens is not None, VALID: valid is not None}
    skipped = {
        requirement: [check.name for check in CHECKS.values() if check.requires == requirement]
        for requirement, met in is_met.items()
        if not met
    }
    return CheckResults(train, valid, skipped)


def list_findings(split: SplitScan) -> list[Finding]:
    """Return the findings of a split: errors, then warnings, each in the order of `CHECKS`."""
    findings = [
        Finding(
            _advised(check, split.settings),
            count,
            split.rows if check.unit == ROWS else split.pairs,
            split.log,
        )
        for check in CHECKS.values()
        if (count := _count(check.name, split))
    ]
    return sorted(findings, key=lambda finding: not finding.check.is_error)


def _advised(check: Check, settings: ScanSettings) -> Check:
    """Return the check with the advice that the model's context length allows."""
    if not check.advice_at_limit or settings.tokens is None or settings.tokens.can_be_longer:
        return check
    return replace(check, advice=check.advice_at_limit)


def _count(name: str, split: SplitScan) -> int:
    if name != "length-bias":
        return split.log.count(name)
    bias = split.lengths.bias()
    if bias is None or bias.accuracy < LENGTH_BIAS_SHARE or not bias.is_significant:
        return 0
    return max(bias.chosen_longer, bias.rejected_longer)
